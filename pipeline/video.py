"""A generated video in memory."""

import base64
import io
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from model.vae import WanVAE
from pipeline.decoding import decode_frames
from pipeline.output import VideoFiles, VideoOutput


class Video:
    """A generated video: latents, pixel frames and metadata.

    Attributes:
        latents: [F, C, h, w], float32, on the CPU.
        metadata: all settings that determine the video; `save` writes them.
        fps: pixel frames per second.
    """

    def __init__(self, latents: Tensor, vae: WanVAE, fps: int, metadata: dict[str, Any], seconds: float = 0.0):
        """
        Args:
            vae: decodes the latents.
            seconds: time that generation took, for the metadata.
        """
        self.latents, self.fps, self.metadata = latents, fps, metadata
        self._vae, self._seconds = vae, seconds

    @cached_property
    def frames(self) -> np.ndarray:
        """Pixel frames [T, H, W, 3], uint8, decoded at the first access."""
        [frames] = decode_frames(self._vae.stream(), self.latents[None].to(self._vae.net.device), "the video")
        return frames

    def _repr_html_(self) -> str:
        """Show the video in motion in a notebook."""
        images = [Image.fromarray(frame) for frame in self.frames]
        buffer = io.BytesIO()
        images[0].save(
            buffer, format="webp", save_all=True, append_images=images[1:], duration=round(1000 / self.fps), loop=0
        )
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<img src="data:image/webp;base64,{data}" style="min-width: 256px">'

    def save(self, path: str | os.PathLike[str], save_latents: bool = False) -> Path:
        """Write the video as mp4, and its metadata as a JSON file beside it.

        `inference.py --config_path X.json` makes the same video again.

        Args:
            path: file name that ends in .mp4; existing files are replaced.
            save_latents: also write X.safetensors.

        Raises:
            UserError: for another suffix, or a folder that is not writable.
        """
        files = VideoFiles.at(path)
        with VideoOutput(
            self._vae,
            [files],
            self.fps,
            len(self.latents),
            metadata=[self.metadata],
            save_latents=save_latents,
            seconds=self._seconds,
            crf=self.metadata["config"]["video"]["crf"],
        ) as output:
            for latents in self.latents[None].to(self._vae.net.device).split(1, dim=1):
                output.emit(latents)
        return files.video

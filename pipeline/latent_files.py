"""Files of latents: safetensors with `latents` [F, C, h, w], float32."""

import json
import os
import struct
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from model.weight_checks import is_finite
from utils.errors import UserError
from utils.files import partial_path, refuse_device


class LatentsWriter:
    """Writes `latents` [F, C, h, w] in float32 to a safetensors file, frame by frame.

    The file appears under its name when it is complete. Its header states the shape, so F must be known at the start.
    """

    def __init__(self, path: str | os.PathLike[str], num_frames: int):
        self.path = Path(path)
        self.num_frames = num_frames
        self._partial = partial_path(self.path)
        self._frames = 0

    def __enter__(self) -> "LatentsWriter":
        refuse_device(self.path)
        self._file = self._partial.open("xb")
        return self

    def write(self, latents: Tensor) -> None:
        """Append frames [f, C, h, w]."""
        if not self._frames:
            self._write_header((self.num_frames, *latents.shape[1:]))
        self._file.write(latents.to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
        self._frames += len(latents)

    def _write_header(self, shape: tuple[int, ...]) -> None:
        entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * int(np.prod(shape))]}
        header = json.dumps({"latents": entry}).encode()
        header += b" " * (-len(header) % 8)
        self._file.write(struct.pack("<Q", len(header)) + header)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                assert self._frames == self.num_frames, f"{self._frames} frames written of {self.num_frames}"
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def read_latents(path: str | os.PathLike[str]) -> Tensor:
    """Read the latents [F, C, h, w] of a video.

    Raises:
        UserError: if the file is missing or has no such latents.
    """
    try:
        latents = load_file(path)["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"cannot read latents from {path} ({error}); --save_latents writes such files") from None
    if not is_finite(latents):
        raise UserError(f"latents in {path} hold NaN or infinity; generate that video again")
    if latents.ndim != 4:
        raise UserError(f"latents in {path} must be [F, C, h, w], not {list(latents.shape)}")
    return latents

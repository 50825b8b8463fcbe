"""Latents in a safetensors file that grows block by block: nothing is held in memory."""

import json
import os
import struct
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from utils.errors import UserError
from utils.files import partial_path


class LatentsWriter:
    """Writes `latents` [F, C, h, w], float32, frame by frame; the file appears under its name when it is complete.

    Safetensors begin with a header that gives the shape, so F has to be known beforehand.
    """

    def __init__(self, path: str | os.PathLike[str], shape: tuple[int, int, int, int]):
        self.path = Path(path)
        self.shape = shape
        self._partial = partial_path(self.path)
        self._frames = 0

    def __enter__(self) -> "LatentsWriter":
        frames, channels, height, width = self.shape
        entry = {"dtype": "F32", "shape": self.shape, "data_offsets": [0, 4 * frames * channels * height * width]}
        header = json.dumps({"latents": entry}).encode()
        header += b" " * (-len(header) % 8)
        self._file = self._partial.open("wb")
        self._file.write(struct.pack("<Q", len(header)) + header)
        return self

    def write(self, latents: Tensor) -> None:
        """Append frames [f, C, h, w]."""
        assert latents.shape[1:] == self.shape[1:], latents.shape
        self._file.write(latents.to("cpu", torch.float32).contiguous().numpy().astype("<f4").tobytes())
        self._frames += len(latents)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
            if kind is None:
                assert self._frames == self.shape[0], f"{self._frames} frames written of {self.shape[0]}"
                os.replace(self._partial, self.path)
        finally:
            self._partial.unlink(missing_ok=True)


def read_latents(path: str | os.PathLike[str]) -> Tensor:
    """The latents [F, C, h, w] that `LatentsWriter` wrote.

    Raises:
        UserError: if the file is missing or holds something else.
    """
    try:
        latents = load_file(path)["latents"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} is no file of saved latents ({error}); make one with --save_latents") from None
    if latents.ndim != 4:
        raise UserError(f"latents in {path} must be [F, C, h, w], not {list(latents.shape)}")
    return latents

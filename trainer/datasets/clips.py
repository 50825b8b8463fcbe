"""Encoded training clips on disk: shards of latents with their captions; or LMDBs, as trainer/datasets/ode_pairs.py
describes
them."""

import bisect
import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from trainer.datasets.ode_pairs import Trajectories, open_latents
from utils.errors import UserError
from utils.files import atomic_path


def write_shard(path: Path, latents: Tensor, captions: Sequence[str], vae: str = "") -> None:
    """Write clips [N, F, C, h, w], as float16, with their N captions and what tells their VAE from others; atomic."""
    with atomic_path(path) as temporary:
        # One entry: safetensors writes several in an order of chance, and the same clips should be the same bytes.
        named = {"clips": json.dumps({"captions": list(captions), "vae": vae})}
        save_file({"latents": latents.half().contiguous()}, temporary, named)


def holds_clips(path: Path, num_frames: int, captions: Sequence[str], vae: str) -> bool:
    """Whether a shard holds clips of `num_frames` latent frames by this VAE with exactly these captions."""
    try:
        with safe_open(path, framework="pt") as shard:
            frames, named = shard.get_slice("latents").get_shape()[1], json.loads(shard.metadata()["clips"])
            return frames == num_frames and named == {"captions": list(captions), "vae": vae}
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False


class Clips(Protocol):
    """Where clips are kept: their captions, the shape of one, and single ones read when they are needed."""

    captions: list[str]
    shape: tuple[int, ...]  # of a clip: [F, C, h, w]

    def read(self, indices: Iterable[int]) -> Tensor:
        """Clips by index, [B, F, C, h, w] in float16."""
        ...


def open_clips(folder: str) -> Clips:
    """Open a folder of shards, or an LMDB of clips or a folder of LMDBs.

    LMDBs of ODE pairs are refused. The end of their trajectories is a sample of the teacher's, not data, and need not
    even be clean: by default only the points that the forward KL reads are saved.

    Raises:
        UserError: if there is none, one is broken, they are not of one size and one VAE, or they are ODE pairs.
    """
    if not folder:
        raise UserError("no encoded clips: set data.path to some; scripts/encode_clips.py makes them")
    path = Path(folder)
    packed = None if shard_files(path) else open_latents(path)
    if packed is None:
        return Shards(path)
    if packed.shape[0] > 1:
        raise UserError(
            f"{folder} holds ODE pairs (trajectories of {packed.shape[0]} points), not clips; give those of "
            "scripts/encode_clips.py, or an LMDB of clips"
        )
    return Packed(packed)


class Packed:
    """The clips of LMDBs: trajectories of one point."""

    def __init__(self, trajectories: Trajectories):
        self.captions = trajectories.prompts
        self.shape = trajectories.shape[1:]
        self._trajectories = trajectories

    def read(self, indices: Iterable[int]) -> Tensor:
        """Clips by index, [B, F, C, h, w]."""
        return torch.stack([self._trajectories.read(index)[0] for index in indices])


class Shards:
    """The shards of a folder behind each other; clips are read when they are needed.

    Raises:
        UserError: if there is none, one is broken, they are not of one size, or not of one VAE.
    """

    def __init__(self, folder: Path):
        self.files = shard_files(folder)
        if not self.files:
            raise UserError(f"no encoded clips in {folder}; make them with scripts/encode_clips.py")
        self.captions: list[str] = []
        self.shape: tuple[int, ...] = ()  # of a clip: [F, C, h, w]
        self._starts: list[int] = []  # of the files, in the order of all clips
        encoded_by = None
        for file in self.files:
            self._starts.append(len(self.captions))
            with _reading(file) as shard:
                count, *shape = shard.get_slice("latents").get_shape()
                named = json.loads(shard.metadata()["clips"])
                captions, vae = named["captions"], named["vae"]
                if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                    raise TypeError("its captions are no list of texts")
            self.shape = self.shape or tuple(shape)
            if tuple(shape) != self.shape or len(captions) != count or len(shape) != 4:
                raise UserError(f"{file} has clips of another size, or lacks captions; delete it and encode again")
            encoded_by = vae if encoded_by is None else encoded_by
            if vae != encoded_by:
                raise UserError(f"{file} was encoded by another VAE than {self.files[0]}; encode all clips again")
            self.captions += captions

    def read(self, indices: Iterable[int]) -> Tensor:
        """Clips by index, [B, F, C, h, w]."""
        return torch.stack([self._clip(index) for index in indices])

    def _clip(self, index: int) -> Tensor:
        number = bisect.bisect_right(self._starts, index) - 1
        with _reading(self.files[number]) as shard:
            return shard.get_slice("latents")[index - self._starts[number]]


def shard_files(folder: Path) -> list[Path]:
    """The shards of a folder, in their order; those that are still being written left out."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


@contextlib.contextmanager
def _reading(file: Path) -> Iterator[Any]:
    """A shard, opened; what goes wrong with it is the file's fault."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is no shard of clips ({error}); delete it and encode again") from None

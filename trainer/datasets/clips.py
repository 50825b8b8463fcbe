"""Reads and writes encoded training clips: latents with their captions.

A data set is a folder of shards (.safetensors, ours), of LMDBs (trainer/datasets/lmdb.py), or of CausVid's .pt files
{prompt: latents [1, F, C, h, w]}. A shard holds `latents` [N, F, C, h, w] in float16. Its metadata entry `clips` is
JSON with N captions, a fingerprint of the VAE, and, for video files, their names and the names of those left out.
"""

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

from trainer.datasets.lmdb import open_latent_lmdb
from trainer.datasets.ode_pairs import PairFolder, TrajectoryStore
from utils.errors import UserError
from utils.files import atomic_path


class Clips(Protocol):
    """Encoded clips on disk: captions and shape in memory, latents read on request."""

    captions: list[str]
    shape: tuple[int, ...]  # of one clip: [F, C, h, w]

    def read(self, indices: Iterable[int]) -> Tensor:
        """Return clips by index, float16 [B, F, C, h, w]."""
        ...


def open_clips(folder: str) -> Clips:
    """Open a folder of shards, an LMDB of clips, a folder of such LMDBs, or a folder of CausVid's .pt files.

    LMDBs of ODE pairs are refused: a trajectory's end is a teacher sample, not data, and may not even be clean.

    Raises:
        UserError: if there are no clips, a file is corrupt, their sizes or VAEs differ, or they are ODE pairs.
    """
    if not folder:
        raise UserError("no encoded clips: set data.path to a folder that scripts/encode_clips.py wrote")
    path = Path(folder)
    if shard_files(path):
        return ClipShards(path)
    stored: TrajectoryStore | None = open_latent_lmdb(path)
    if stored is None:
        if not any(path.glob("*.pt")):
            return ClipShards(path)
        stored = PairFolder(path)
    if stored.shape[0] > 1:
        raise UserError(
            f"{folder} holds ODE pairs (trajectories of {stored.shape[0]} points), not clips; set data.path to output "
            "of scripts/encode_clips.py or an LMDB of clips"
        )
    return SinglePointClips(stored)


class SinglePointClips:
    """The clips of LMDBs or .pt files, which are read as trajectories of one point."""

    def __init__(self, trajectories: TrajectoryStore):
        self.captions = trajectories.prompts
        self.shape = trajectories.shape[1:]
        self._trajectories = trajectories

    def read(self, indices: Iterable[int]) -> Tensor:
        """Return clips by index, float16 [B, F, C, h, w]."""
        return torch.stack([self._trajectories.read(index)[0] for index in indices])


class ClipShards:
    """The shards of a folder, read as one sequence of clips.

    Raises:
        UserError: if there is no shard, one is corrupt, or they differ in clip size or VAE.
    """

    def __init__(self, folder: Path):
        self.files = shard_files(folder)
        if not self.files:
            raise UserError(f"no encoded clips in {folder}; make them with scripts/encode_clips.py")
        self.captions: list[str] = []
        self.shape: tuple[int, ...] = ()  # of one clip: [F, C, h, w]
        self._starts: list[int] = []  # index of each shard's first clip
        first_vae = None
        for file in self.files:
            self._starts.append(len(self.captions))
            with _open_shard(file) as shard:
                count, *shape = shard.get_slice("latents").get_shape()
                metadata = json.loads(shard.metadata()["clips"])
                captions, vae = metadata["captions"], metadata["vae"]
                if not isinstance(captions, list) or not all(isinstance(caption, str) for caption in captions):
                    raise TypeError("its captions are not a list of strings")
            self.shape = self.shape or tuple(shape)
            if tuple(shape) != self.shape or len(captions) != count or len(shape) != 4:
                raise UserError(f"{file} has clips of another size or too few captions; delete it and encode it again")
            first_vae = vae if first_vae is None else first_vae
            if vae != first_vae:
                raise UserError(f"{file} was encoded by another VAE than {self.files[0]}; encode all clips again")
            self.captions += captions

    def read(self, indices: Iterable[int]) -> Tensor:
        """Return clips by index, float16 [B, F, C, h, w]."""
        return torch.stack([self._clip(index) for index in indices])

    def _clip(self, index: int) -> Tensor:
        number = bisect.bisect_right(self._starts, index) - 1
        with _open_shard(self.files[number]) as shard:
            return shard.get_slice("latents")[index - self._starts[number]]


def shard_files(folder: Path) -> list[Path]:
    """Return the finished shards of a folder in the order of their names."""
    return sorted(file for file in folder.glob("*.safetensors") if not file.name.startswith("."))


def write_shard(path: Path, latents: Tensor, captions: Sequence[str], vae: str = "", **metadata: Any) -> None:
    """Write clips [N, F, C, h, w] with N captions and the VAE's fingerprint to one shard, atomically.

    Args:
        metadata: further entries, which training does not read.
    """
    with atomic_path(path) as temporary:
        # safetensors writes several metadata entries in random order; one entry keeps the file's bytes reproducible.
        clips = json.dumps({"captions": list(captions), "vae": vae, **metadata})
        save_file({"latents": latents.half().contiguous()}, temporary, {"clips": clips})


def shard_metadata(path: Path, num_frames: int) -> dict[str, Any] | None:
    """Return the metadata of a shard, or None if `path` is no shard of clips of `num_frames` latent frames."""
    try:
        with safe_open(path, framework="pt") as shard:
            frames, metadata = shard.get_slice("latents").get_shape()[1], json.loads(shard.metadata()["clips"])
            return metadata if frames == num_frames and isinstance(metadata, dict) else None
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None


@contextlib.contextmanager
def _open_shard(file: Path) -> Iterator[Any]:
    """Open a shard. Errors while reading it inside the `with` block become a UserError that names the file."""
    try:
        with safe_open(file, framework="pt") as shard:
            yield shard
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not a valid shard of clips ({error}); delete it and encode it again") from None

"""Encoded training clips on disk: shards of latents with their captions."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from utils.errors import UserError
from utils.files import atomic_path


def write_shard(path: Path, latents: Tensor, captions: Sequence[str]) -> None:
    """Write clips [N, F, C, h, w], as float16, with their N captions; atomic."""
    with atomic_path(path) as temporary:
        save_file({"latents": latents.half().contiguous()}, temporary, {"captions": json.dumps(list(captions))})


def holds_clips(path: Path, num_frames: int, captions: Sequence[str]) -> bool:
    """Whether a shard is there and holds clips of `num_frames` latent frames with exactly these captions."""
    try:
        with safe_open(path, framework="pt") as shard:
            frames = shard.get_slice("latents").get_shape()[1]
            return frames == num_frames and json.loads(shard.metadata()["captions"]) == list(captions)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return False


def read_clips(folder: str) -> tuple[Tensor, list[str]]:
    """All clips of a folder: latents [N, F, C, h, w] in float16, and N captions.

    Raises:
        UserError: if there is none, one is broken, or they are not of one size.
    """
    files = sorted(file for file in Path(folder).glob("*.safetensors") if not file.name.startswith("."))
    if not folder or not files:
        raise UserError(f"no encoded clips in {folder or 'data.path'}; make them with scripts/encode_clips.py")
    latents, captions = [], []
    for file in files:
        try:
            with safe_open(file, framework="pt") as shard:
                latents.append(shard.get_tensor("latents"))
                captions += json.loads(shard.metadata()["captions"])
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{file} is no shard of clips ({error}); delete it and encode again") from None
        if latents[-1].shape[1:] != latents[0].shape[1:] or sum(map(len, latents)) != len(captions):
            raise UserError(f"{file} has clips of another size, or lacks captions; delete it and encode again")
    return torch.cat(latents), captions

"""Encodes clips of any source to latents, so that training a DiT needs no VAE encoder."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from model.vae import encode_clip, normalise, use_channels_last_
from model.weights import VAE_FILES, ModelDirectory
from trainer.datasets.clips import is_shard_of, shard_files, write_shard
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import fingerprint

CLIPS_PER_SHARD = 64
_CLIPS_PER_PASS = 8  # encoded at once


def encode_clips(
    captions: Sequence[str],
    read_pixels: Callable[[int], Tensor],
    num_frames: int,
    folder: Path,
    directory: ModelDirectory,
    device: torch.device,
) -> None:
    """Encode one clip per caption and write shards for `open_clips` to `folder`; ranks share the shards.

    Shards that already hold these clips, encoded by this VAE, are kept.

    Args:
        read_pixels: maps an index to the pixels of its clip, [3, 4 (num_frames - 1) + 1, H, W] in [-1, 1].
        num_frames: latent frames of a clip.
        directory: the model whose VAE encodes.

    Raises:
        UserError: if `folder` holds shards that this call would not write.
    """
    files = {start: folder / f"{start:06d}.safetensors" for start in range(0, len(captions), CLIPS_PER_SHARD)}
    if others := [file.name for file in shard_files(folder) if file not in files.values()]:
        raise UserError(
            f"{folder} holds more than {len(captions)} clips, and training would read them too: delete "
            f"{', '.join(others[:3])}{' ...' if len(others) > 3 else ''}, or choose another --output"
        )
    vae = directory.load_vae(torch.float32).to(device)
    use_channels_last_(vae)
    vae_fingerprint = fingerprint(directory.path, VAE_FILES)
    for start in tqdm(list(files)[rank() :: world_size()], unit="shard", disable=rank() > 0):
        indices = range(start, min(start + CLIPS_PER_SHARD, len(captions)))
        chosen = [captions[index] for index in indices]
        if is_shard_of(files[start], num_frames, chosen, vae_fingerprint):
            continue
        latents = []
        for first in range(0, len(indices), _CLIPS_PER_PASS):
            pixels = torch.stack([read_pixels(index) for index in indices[first : first + _CLIPS_PER_PASS]])
            pixels = pixels.to(device, memory_format=torch.channels_last_3d)
            with torch.no_grad():
                latents.append(normalise(vae, encode_clip(vae, pixels)[0]).transpose(1, 2).cpu())
        write_shard(files[start], torch.cat(latents), chosen, vae_fingerprint)

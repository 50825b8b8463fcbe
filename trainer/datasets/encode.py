"""Encodes clips of any source to latents, so that training a DiT needs no VAE encoder."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from tqdm import tqdm

from model.vae import WanVAE, encode_clip, normalise, use_channels_last_
from model.weights import VAE_FILES, ModelDirectory
from trainer.datasets.clips import shard_files, shard_metadata, write_shard
from utils.distributed import rank, world_size
from utils.errors import UserError
from utils.files import fingerprint

CLIPS_PER_SHARD = 64
_CLIPS_PER_PASS = 8  # encoded at once
_VALUES_PER_PASS = 2**24  # of pixels; larger clips are encoded one by one, a few frames at a time, in less memory


def encode_clips(
    captions: Sequence[str],
    read_pixels: Callable[[int], Tensor],
    num_frames: int,
    folder: Path,
    directory: ModelDirectory,
    device: torch.device,
    sources: Sequence[str] | None = None,
) -> dict[str, str]:
    """Encode one clip per caption and write shards for `open_clips` to `folder`; ranks share the shards.

    Shards that already hold these clips, encoded by this VAE, are kept.

    Args:
        read_pixels: maps an index to the pixels of its clip, [3, 4 (num_frames - 1) + 1, H, W] in [-1, 1].
        num_frames: latent frames of a clip.
        directory: the model whose VAE encodes.
        sources: names of the clips, which change if their files change. A clip is left out if `read_pixels` raises
            `UserError`. Without names, the error is raised.

    Returns:
        The names of the clips that this rank has left out, with the reasons.

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
    all_left_out: dict[str, str] = {}
    for start in tqdm(list(files)[rank() :: world_size()], unit="shard", disable=rank() > 0):
        indices = range(start, min(start + CLIPS_PER_SHARD, len(captions)))
        content = _ShardContent(
            [captions[index] for index in indices],
            vae_fingerprint,
            None if sources is None else [sources[index] for index in indices],
        )
        left_out = content.left_out_of(files[start], num_frames)
        if left_out is None:
            latents, left_out = _encode_shard(vae, indices, read_pixels, content.sources, device)
            content.write(files[start], latents, left_out)
        all_left_out |= left_out
    return all_left_out


@dataclass(frozen=True)
class _ShardContent:
    """The clips of one shard: captions, the VAE's fingerprint, and the names of the clips if they are files."""

    captions: list[str]
    vae: str
    sources: list[str] | None

    def left_out_of(self, file: Path, num_frames: int) -> dict[str, str] | None:
        """Return the clips that a finished shard leaves out, with the reasons; None if `file` holds other clips."""
        metadata = shard_metadata(file, num_frames)
        left_out: dict[str, str] = {} if metadata is None else metadata.get("left_out", {})
        return left_out if metadata == self._metadata(left_out) else None

    def write(self, file: Path, latents: Tensor | None, left_out: dict[str, str]) -> None:
        """Write the shard; without latents, because all clips are left out, delete an older one."""
        if latents is None:
            file.unlink(missing_ok=True)
        else:
            write_shard(file, latents, **self._metadata(left_out))

    def _metadata(self, left_out: dict[str, str]) -> dict[str, Any]:
        if self.sources is None:
            return {"captions": self.captions, "vae": self.vae}
        pairs = zip(self.sources, self.captions, strict=True)
        kept = [caption for source, caption in pairs if source not in left_out]
        return {"captions": kept, "vae": self.vae, "sources": self.sources, "left_out": left_out}


def _encode_shard(
    vae: AutoencoderKLWan,
    indices: Sequence[int],
    read_pixels: Callable[[int], Tensor],
    sources: Sequence[str] | None,
    device: torch.device,
) -> tuple[Tensor | None, dict[str, str]]:
    """Return the latents [N, F, C, h, w] of clips, and the names of clips that cannot be read, with the reasons."""
    latents: list[Tensor] = []
    left_out: dict[str, str] = {}
    waiting: list[Tensor] = []
    for number, index in enumerate(indices):
        try:
            waiting.append(read_pixels(index))
        except UserError as error:
            if sources is None:
                raise
            left_out[sources[number]] = str(error)
        if waiting and len(waiting) >= min(_CLIPS_PER_PASS, _VALUES_PER_PASS // waiting[0].numel()):
            latents.append(_encode(vae, torch.stack(waiting), device))
            waiting = []
    if waiting:
        latents.append(_encode(vae, torch.stack(waiting), device))
    return (torch.cat(latents) if latents else None), left_out


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, pixels: Tensor, device: torch.device) -> Tensor:
    """Return the latents [B, F, C, h, w] of pixels [B, 3, T, H, W] on the CPU."""
    if pixels.numel() > _VALUES_PER_PASS:
        return WanVAE(vae).encode(pixels.transpose(1, 2)).cpu()
    pixels = pixels.to(device, memory_format=torch.channels_last_3d)
    return normalise(vae, encode_clip(vae, pixels)[0]).transpose(1, 2).cpu()

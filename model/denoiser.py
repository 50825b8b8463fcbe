"""Denoiser of a rollout: predicts x0 from noisy latents [B, F, C, h, w] and a sigma with the causal DiT."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from model.attention import FrameMask
from model.batched_pass import batch_flows
from model.block_pass import BlockPass
from model.causal_wan import CausalWanModel
from model.conditioning import Conditioning, TextContext
from model.flow import flow_to_x0, guide
from model.kv_cache import KVCache


class Denoiser:
    """A network and the text that it is conditioned on."""

    def __init__(self, net: CausalWanModel, text: TextContext, reuse_conditioning: bool = True):
        """
        Args:
            reuse_conditioning: passes without autograd compute the modulation of each sigma once. False: every pass
                computes it, as sharded weights require.
        """
        self.net = net
        self.text = text
        self.reuse_conditioning = reuse_conditioning
        self._conditionings: dict[tuple[float, ...], Conditioning] = {}

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: KVCache | None, write: bool = False) -> Tensor:
        """Predict the block's x0, float32 [B, F, C, h, w], from x at noise level sigma and the cache's context.

        Args:
            first_frame: absolute index of the block's first frame.
            cache: None: the block is the whole clip, and the pass is bidirectional with one timestep per clip.
            write: also append the block, at this noise level, to the cache.
        """
        if cache is None:
            return flow_to_x0(x, clip_flow(self.net, x, sigma, self.text), sigma)
        timestep = self._timestep(x, sigma)
        flow = self.net.denoise_block(x.transpose(1, 2), timestep, self.text, cache, first_frame, append=write)
        return flow_to_x0(x, flow.transpose(1, 2), sigma)

    def write_context(
        self, x: Tensor, sigma: float, first_frame: int, cache: KVCache, read_frames: int | None = None
    ) -> None:
        """Append the block x, at noise level sigma, to the cache. `read_frames`: see `CausalWanModel.write_block`."""
        timestep = self._timestep(x, sigma)
        self.net.write_block(x.transpose(1, 2), timestep, self.text, cache, first_frame, read_frames)

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: KVCache,
        read_frames: int | None = None,
    ) -> Tensor:
        """Run `write_context` on one block and `denoise` on the next block in one pass; return the x0 of x.

        Args:
            first_frame: absolute index of the context block's first frame.
            read_frames: see `CausalWanModel.write_block`.
        """
        both, written = torch.cat([context, x], dim=1), context.shape[1]
        if self.reuse_conditioning and context.shape == x.shape:
            timestep: Tensor | Conditioning = self._conditioning(x, context_sigma, sigma)
        else:
            timestep = torch.cat([timesteps(context, context_sigma), timesteps(x, sigma)], dim=1)
        flow = self.net.write_then_denoise(
            both.transpose(1, 2), timestep, self.text, cache, written, first_frame, read_frames
        )
        return flow_to_x0(x, flow.transpose(1, 2), sigma)

    def run_batch(self, passes: Sequence[BlockPass]) -> list[Tensor]:
        """Run several blocks in one pass, without autograd; return the x0 of the denoised blocks, in their order."""
        passes = sorted(passes, key=lambda item: item.denoise)  # the blocks that are only written come first
        equal = len({item.num_frames for item in passes}) == 1
        if self.reuse_conditioning:
            sigmas = [item.sigma for item in passes for _ in range(1 if equal else item.num_frames)]
            timestep: Tensor | Conditioning = self._conditioning(passes[0].x, *sigmas)
        else:
            timestep = torch.cat([timesteps(item.x, item.sigma) for item in passes], dim=1)
        flows = batch_flows(self.net, passes, self.text, timestep)
        denoised = [item for item in passes if item.denoise]
        return [flow_to_x0(item.x, flow, item.sigma) for item, flow in zip(denoised, flows, strict=True)]

    def _timestep(self, x: Tensor, sigma: float) -> Tensor | Conditioning:
        """Return the argument `timestep` of a pass over the block x."""
        reuse = self.reuse_conditioning and not torch.is_grad_enabled()
        return self._conditioning(x, sigma) if reuse else timesteps(x, sigma)

    def _conditioning(self, x: Tensor, *sigmas: float) -> Conditioning:
        """Return the conditioning of one block, or of blocks with one sigma each that share a pass."""
        if sigmas not in self._conditionings:
            timestep = torch.cat([timesteps(x[:1, :1], sigma) for sigma in sigmas], dim=1)
            self._conditionings[sigmas] = self.net.condition(timestep)
        return self._conditionings[sigmas]


@dataclass(frozen=True)
class GuidedCache:
    """Contexts of the two branches of a `GuidedDenoiser`; None for whole clips."""

    conditional: KVCache | None
    unconditional: KVCache | None

    def reset(self) -> None:
        """Empty both caches; see `KVCache.reset`."""
        for cache in self._caches:
            cache.reset()

    def forget(self, keep_frames: int) -> None:
        """Drop old frames of both caches; see `KVCache.forget`."""
        for cache in self._caches:
            cache.forget(keep_frames)

    def rewind(self, frame: int) -> None:
        """Rewind both caches; see `KVCache.rewind`."""
        for cache in self._caches:
            cache.rewind(frame)

    @property
    def _caches(self) -> list[KVCache]:
        return [cache for cache in (self.conditional, self.unconditional) if cache is not None]


class GuidedDenoiser:
    """A denoiser with classifier-free guidance (arXiv 2207.12598). Each branch has its own text and its own context."""

    def __init__(self, conditional: Denoiser, unconditional: Denoiser, scale: float):
        """
        Args:
            scale: s of unconditional + s (conditional - unconditional).
        """
        self.conditional, self.unconditional, self.scale = conditional, unconditional, scale

    @property
    def net(self) -> CausalWanModel:
        """The network, which both branches share."""
        return self.conditional.net

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: GuidedCache, write: bool = False) -> Tensor:
        """Run `Denoiser.denoise` for both branches; return the guided x0."""
        conditional = self.conditional.denoise(x, sigma, first_frame, cache.conditional, write)
        return self._guide(conditional, self.unconditional.denoise(x, sigma, first_frame, cache.unconditional, write))

    def write_context(
        self, x: Tensor, sigma: float, first_frame: int, cache: GuidedCache, read_frames: int | None = None
    ) -> None:
        """Run `Denoiser.write_context` for both branches."""
        assert cache.conditional is not None and cache.unconditional is not None
        self.conditional.write_context(x, sigma, first_frame, cache.conditional, read_frames)
        self.unconditional.write_context(x, sigma, first_frame, cache.unconditional, read_frames)

    def write_then_denoise(
        self,
        context: Tensor,
        context_sigma: float,
        x: Tensor,
        sigma: float,
        first_frame: int,
        cache: GuidedCache,
        read_frames: int | None = None,
    ) -> Tensor:
        """Run `Denoiser.write_then_denoise` for both branches; return the guided x0."""
        assert cache.conditional is not None and cache.unconditional is not None
        blocks = context, context_sigma, x, sigma, first_frame
        conditional = self.conditional.write_then_denoise(*blocks, cache.conditional, read_frames)
        return self._guide(
            conditional, self.unconditional.write_then_denoise(*blocks, cache.unconditional, read_frames)
        )

    def run_batch(self, passes: Sequence[BlockPass]) -> list[Tensor]:
        """Run `Denoiser.run_batch` for both branches; return the guided x0 of the denoised blocks."""
        conditional = self.conditional.run_batch([replace(item, cache=item.cache.conditional) for item in passes])
        unconditional = self.unconditional.run_batch([replace(item, cache=item.cache.unconditional) for item in passes])
        return [self._guide(*pair) for pair in zip(conditional, unconditional, strict=True)]

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        return guide(conditional, unconditional, self.scale)


def timesteps(x: Tensor, sigma: float) -> Tensor:
    """Return the timestep 1000 sigma for every frame of x [B, F, C, h, w], as [B, F]."""
    # Filled on the device: a copy from the host would make the host wait.
    return torch.full(x.shape[:2], 1000 * sigma, dtype=torch.float32, device=x.device)


def clip_flow(
    net: CausalWanModel,
    x: Tensor,
    sigma: float | Tensor,
    text: Tensor | TextContext,
    causal: FrameMask | None = None,
) -> Tensor:
    """Return the flow of whole clips, [B, F, C, h, w], from one pass without a cache.

    Args:
        x: clips at level sigma, [B, F, C, h, w].
        sigma: one level for all, or one per clip [B]. With `causal` also one per frame [B, F].
        text: embeddings [B, L, text_dim], or the result of the network's `encode_text`.
        causal: mask for block-causal attention. None: bidirectional attention.
    """
    if isinstance(sigma, Tensor):
        timestep = 1000 * sigma
    else:
        timestep = torch.full(x.shape[:1] if causal is None else x.shape[:2], 1000 * sigma, device=x.device)
    return net(x.transpose(1, 2), timestep, text, causal=causal).transpose(1, 2)

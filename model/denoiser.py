"""The causal DiT as the rollout sees it: x at a noise level in, x0 out, on latents [B, F, C, h, w]."""

import torch
from torch import Tensor

from model.causal_wan import BlockCausal, CausalWanModel, TextContext
from model.flow import flow_to_x0
from model.kv_cache import KVCache


class Denoiser:
    """One prompt's denoiser: a network with the text it is conditioned on."""

    def __init__(self, net: CausalWanModel, text: TextContext):
        self.net = net
        self.text = text

    def denoise(self, x: Tensor, sigma: float, first_frame: int, cache: KVCache, write: bool = False) -> Tensor:
        """Predict the block x0, float32 [B, F, C, h, w], from x at level sigma beside the cache's context.

        Args:
            first_frame: absolute index of the block's first frame.
            write: also append the block, at this level, to the cache.
        """
        flow = self.net(
            x.transpose(1, 2), self._timestep(x, sigma), self.text, first_frame=first_frame, cache=cache, write=write
        )
        return flow_to_x0(x, flow.transpose(1, 2), sigma)

    def write_context(self, x: Tensor, sigma: float, first_frame: int, cache: KVCache) -> None:
        """Append the block x, at level sigma, to the cache."""
        self.net(
            x.transpose(1, 2),
            self._timestep(x, sigma),
            self.text,
            first_frame=first_frame,
            cache=cache,
            write=True,
            head=False,
        )

    def write_then_denoise(
        self, context: Tensor, context_sigma: float, x: Tensor, sigma: float, first_frame: int, cache: KVCache
    ) -> Tensor:
        """`write_context` of a block and `denoise` of the one after it, by one pass.

        Args:
            first_frame: absolute index of the context block's first frame.
        """
        timestep = torch.cat([self._timestep(context, context_sigma), self._timestep(x, sigma)], dim=1)
        flow = self.net(
            torch.cat([context, x], dim=1).transpose(1, 2),
            timestep,
            self.text,
            first_frame=first_frame,
            cache=cache,
            written=context.shape[1],
        )
        return flow_to_x0(x, flow.transpose(1, 2), sigma)

    def _timestep(self, x: Tensor, sigma: float) -> Tensor:
        # Filled on the device: nothing is copied to it, nothing waits for it.
        return torch.full(x.shape[:2], 1000 * sigma, dtype=torch.float32, device=x.device)


def clip_flow(
    net: CausalWanModel,
    x: Tensor,
    sigma: float | Tensor,
    text: Tensor | TextContext,
    causal: BlockCausal | None = None,
) -> Tensor:
    """Return the flow of whole clips, [B, F, C, h, w], from one pass without a cache.

    Args:
        x: clips at level sigma, [B, F, C, h, w].
        sigma: one level for all, or [B]; with `causal` also [B, F].
        text: embeddings [B, L, text_dim], or the result of the network's `encode_text`.
        causal: the block-causal attention mask; None means bidirectional attention.
    """
    if isinstance(sigma, Tensor):
        timestep = 1000 * sigma
    else:
        timestep = torch.full(x.shape[:1] if causal is None else x.shape[:2], 1000 * sigma, device=x.device)
    return net(x.transpose(1, 2), timestep, text, causal=causal).transpose(1, 2)

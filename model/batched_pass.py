"""Forward passes over several blocks with different caches: fewer and larger kernels than one pass each.

The blocks lie one after another along the tokens, so they may have different lengths. Everything but the self-attention
runs on all tokens; each block attends to its own context.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from model.attention import attend
from model.block_pass import BlockPass
from model.causal_wan import CausalWanModel
from model.conditioning import Conditioning, TextContext


class BatchAttention:
    """Self-attention of several blocks, each over its cache's context and itself. Written blocks are appended."""

    def __init__(self, backend: Any, passes: Sequence[BlockPass]):
        """
        Args:
            passes: blocks in the order of their tokens. The caller commits the written ones after the last layer.
        """
        self.backend, self.passes = backend, passes
        written = {id(item.cache): item.num_frames for item in passes if not item.denoise}
        # Frames of the block that the pass writes before it denoises the next one on the same cache.
        self.uncommitted = [written.get(id(item.cache), 0) if item.denoise else 0 for item in passes]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outputs, start = [], 0
        for item, uncommitted in zip(self.passes, self.uncommitted, strict=True):
            cache, end = item.cache, start + item.num_frames * item.cache.tokens_per_frame
            block_k, block_v = k[:, start:end], v[:, start:end]
            before = None if uncommitted else min(item.first_frame, cache.num_frames)
            keys, values = cache.read_with_block(layer, block_k, block_v, before, uncommitted, item.read_frames)
            outputs.append(attend(q[:, start:end], keys, values, self.backend))
            if item.write:
                cache.append(layer, block_k, block_v)
            start = end
        return torch.cat(outputs, dim=1)

    def denoised(self) -> "BatchAttention":
        """Return the attention of the blocks that are denoised, in a layer where the others have been appended."""
        attention = BatchAttention(self.backend, [item for item in self.passes if item.denoise])
        attention.uncommitted = [n for item, n in zip(self.passes, self.uncommitted, strict=True) if item.denoise]
        return attention


@torch.no_grad()
def batch_flows(
    net: CausalWanModel, passes: Sequence[BlockPass], text: TextContext, conditioning: Tensor | Conditioning
) -> list[Tensor]:
    """Run the passes of several blocks in one pass, without autograd.

    Args:
        passes: first the blocks that are only written, then those that are denoised.
        conditioning: as the argument `timestep` of the network's passes, for all blocks along F.

    Returns:
        The flow [B, F, C, h, w] of each block that is denoised, in order.
    """
    only_written = [item for item in passes if not item.denoise]
    frames, written_frames = sum(item.num_frames for item in passes), sum(item.num_frames for item in only_written)
    positions = [(item.first_frame, item.num_frames) for item in passes]
    x = torch.cat([item.x for item in passes], dim=1).transpose(1, 2)
    tokens = net._embed(x, conditioning, 0, positions)
    attention = BatchAttention(net._attention_backend, passes)
    last = len(net.layers) - 1
    tokens = net._run_layers(tokens, text, attention, end=last)
    start = 0
    for item in only_written:
        net._append_last_layer(tokens.frames(start, start + item.num_frames), item.cache)
        start += item.num_frames
    flows: list[Tensor] = []
    if frames > written_frames:
        tokens = net._run_layers(tokens.frames(written_frames, frames), text, attention.denoised(), start=last)
        sizes = [item.num_frames for item in passes if item.denoise]
        flows = list(net._head(tokens).transpose(1, 2).split(sizes, dim=1))
    for item in passes:
        if item.write:
            item.cache.commit(item.num_frames)
    return flows

"""Floating-point operations of the DiT's passes, counted by torch on the meta device, where nothing is computed.

Only matrix products and convolutions count: each multiplication with its addition is two operations. Counts are for
one clip.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from benchmark.measure import counted_flops
from model.causal_wan import CausalWanModel
from model.conditioning import Conditioning, TextContext
from model.kv_cache import KVCache

_META = torch.device("meta")


class PassFlops:
    """Counts the operations of one network's passes over blocks of one size.

    Attributes:
        denoise, write: functions from the number of context frames to the count of this pass over one block.
        bidirectional: function from the number of frames to the count of one pass of diffusers' own network.
    """

    def __init__(
        self, config: Mapping[str, Any], size: tuple[int, int], block_frames: int, context_frames: int, text_length: int
    ):
        """
        Args:
            config: arguments of the network.
            size: height and width of the latents.
            block_frames: frames of a block.
            context_frames: frames of a full context.
            text_length: number of text tokens.
        """
        with _META:
            self.net = CausalWanModel.from_config(config)
        self.config, self.size = self.net.config, size
        self.block_frames, self.context_frames = block_frames, context_frames
        self.text = torch.empty(1, text_length, self.config["text_dim"], device=_META)
        self.denoise = cache(self._denoise)
        self.write = cache(self._write)
        self.bidirectional = cache(self._bidirectional)

    def write_then_denoise(self, context: int) -> int:
        """Return the count of a pass with `context` frames that writes one block and denoises the next."""
        return self.write(context) + self.denoise(min(context + self.block_frames, self.context_frames))

    def _denoise(self, context: int) -> int:
        x, level = self._block()
        return self._count(lambda cache, text: self.net.denoise_block(x, level, text, cache, context), context)

    def _write(self, context: int) -> int:
        x, level = self._block()
        return self._count(lambda cache, text: self.net.write_block(x, level, text, cache, context), context)

    def _bidirectional(self, frames: int) -> int:
        """Return the count of one pass of diffusers' own network, which projects the text in every pass."""
        with _META:
            net = WanTransformer3DModel.from_config(self.config)
            x = torch.empty(1, self.config["in_channels"], frames, *self.size)
            timestep = torch.empty(1)
        return counted_flops(torch.no_grad()(lambda: net(x, timestep, self.text)))

    @torch.no_grad()
    def _block(self) -> tuple[torch.Tensor, Conditioning]:
        """Return latents and the conditioning, which a video computes once per noise level: it does not count."""
        shape = (1, self.config["in_channels"], self.block_frames, *self.size)
        return torch.empty(shape, device=_META), self.net.condition(torch.empty(1, device=_META))

    @torch.no_grad()
    def _count(self, work: Callable[[KVCache, TextContext], object], context: int) -> int:
        cache = self.net.new_cache(1, *self.size, context, self.block_frames)
        cache.commit(context)
        text = self.net.encode_text(self.text)
        return counted_flops(lambda: work(cache, text))

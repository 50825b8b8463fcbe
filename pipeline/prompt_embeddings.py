"""Embeddings of prompts, with the text encoder's weights on its device only while it runs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from model.embeddings import EmbeddingCache
from model.offload import free_bytes
from utils.config import Offload

_WORKING_BYTES = 5e8  # activations while a prompt is encoded


class PromptEmbeddings:
    """Embeddings of prompts, from an encoder whose weights are on its device only while it encodes."""

    def __init__(self, cache: EmbeddingCache, device: torch.device, offload: Offload):
        """
        Args:
            device: where the text encoder runs.
            offload: none leaves the encoder where it is. text moves its weights to the device for missing prompts and
                back to the CPU afterwards. If they do not fit beside what is there, or with all, they stay on the CPU,
                and each layer's are copied while it runs.
        """
        self.cache, self.device, self.offload = cache, device, offload

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode the missing prompts. Pass all prompts of a run at once, so that the weights move only once."""
        moves = self.offload != "none" and bool(self.cache.missing(prompts))
        if moves and self._streams():
            self.cache.encoder.stream(self.device)
            moves = False
        if moves:
            self.cache.to(self.device)
        self.cache.prepare(prompts)
        if moves:
            self.cache.to("cpu")

    def _streams(self) -> bool:
        """Return whether the encoder's weights stay on the CPU."""
        encoder, free = self.cache.encoder, free_bytes(self.device)
        fits = free == math.inf or encoder.num_bytes + _WORKING_BYTES < free
        return self.offload == "all" or encoder.streamed or not fits

    def of(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [B, text length, text_dim] on the CPU, in the text encoder's dtype."""
        self.encode(prompts)
        return self.cache.get(prompts)

    def limited(self, capacity: int) -> "PromptEmbeddings":
        """Return embeddings from the same encoder, with the latest `capacity` of them in memory and no new files."""
        cache = self.cache
        limited = EmbeddingCache(cache.encoder, str(cache.folder or ""), cache.name, capacity, read_only=True)
        return PromptEmbeddings(limited, self.device, self.offload)

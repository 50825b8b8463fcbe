"""Embeddings of prompts, with the text encoder on its device only while it runs."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.embeddings import EmbeddingCache


class PromptEmbeddings:
    """Embeddings of prompts, from an encoder that is on its device only while it encodes."""

    def __init__(self, cache: EmbeddingCache, device: torch.device, offload: bool):
        """
        Args:
            device: where the text encoder runs.
            offload: move the encoder to the device for missing prompts and back to the CPU afterwards. Set to false if
                no other network needs the memory.
        """
        self.cache, self.device, self.offload = cache, device, offload

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode the missing prompts. Pass all prompts of a run at once, so that the weights move only once."""
        moves = self.offload and bool(self.cache.missing(prompts))
        if moves:
            self.cache.to(self.device)
        self.cache.prepare(prompts)
        if moves:
            self.cache.to("cpu")

    def of(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [B, text length, text_dim] on the CPU, in the text encoder's dtype."""
        self.encode(prompts)
        return self.cache.get(prompts)

    def limited(self, capacity: int) -> "PromptEmbeddings":
        """Return embeddings from the same encoder, with the latest `capacity` of them in memory and no new files."""
        cache = self.cache
        limited = EmbeddingCache(cache.encoder, str(cache.folder or ""), cache.name, capacity, read_only=True)
        return PromptEmbeddings(limited, self.device, self.offload)

"""Text embeddings of training captions, from the text encoder or from disk."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.embeddings import EmbeddingCache
from model.text_encoder import TextEncoder
from model.weights import ModelDirectory
from trainer.sharding import shard_text_encoder
from utils.config import Config
from utils.device import DTYPES
from utils.process_group import max_over_ranks

_CAPACITY = 10_000  # embeddings in memory: 160 MB for the miniature; 8 GB for Wan2.1 at 100 tokens per caption


class CaptionEmbeddings:
    """Embeddings of a training set's captions, encoded when first needed.

    With `model.text_cache`, embeddings are stored on disk. If scripts/encode_prompts.py has encoded all captions, the
    text encoder is never loaded.
    """

    def __init__(self, config: Config, captions: Sequence[str], device: torch.device):
        self.captions = captions
        self.device = device
        self.cache = load_caption_cache(config, device)
        self.sharded = shards_text_encoder(config)

    def of(self, clips: Sequence[int] | Tensor, dropped: Tensor | None = None) -> Tensor:
        """Return embeddings [B, L, text_dim], float32, of clips by index, or of the empty prompt where `dropped`."""
        texts = [self.captions[int(clip)] for clip in clips]
        if dropped is not None:
            texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        return self.encode(texts)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return embeddings [B, L, text_dim], float32. All ranks must call this equally often."""
        if self.sharded:  # a pass needs all ranks, so ranks with fewer missing texts encode the empty one
            missing = len(self.cache.missing(texts))
            for _ in range(max_over_ranks(missing, self.device) - missing):
                self.cache.encoder.encode([""])
        return self.cache.get(texts).to(self.device, torch.float32, non_blocking=True)


def shards_text_encoder(config: Config) -> bool:
    """Return whether the ranks share the text encoder's weights; with a disk cache, each rank has its own encoder."""
    return config.train.sharding != "replicate" and not config.model.text_cache


def load_caption_cache(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> EmbeddingCache:
    """Return the cache of caption embeddings, with the text encoder on `device` for missing ones.

    Args:
        dtype: type of the encoder; default: float32 on CPUs, `model.dtype` on GPUs. Embeddings on disk depend on it.
    """
    model = config.model
    dtype = dtype or (torch.float32 if device.type == "cpu" else DTYPES[model.dtype])
    directory = ModelDirectory.open(model.base)
    if not shards_text_encoder(config):
        return EmbeddingCache.load(directory, dtype, model.text_length, model.text_cache, _CAPACITY).to(device)
    encoder, tokenizer = directory.load_text_encoder(dtype)
    shard_text_encoder(encoder, config.train, device)
    return EmbeddingCache(TextEncoder(encoder, tokenizer, model.text_length), capacity=_CAPACITY)

"""Prompts to embeddings: UMT5, encoded once per prompt, optionally kept on disk."""

import contextlib
import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.weights import ModelDirectory
from utils.files import atomic_path, writable_folder
from utils.prompts import clean_prompt


class TextEncoder:
    """Wan's use of UMT5: cleaned prompts, a fixed number of tokens, zero embeddings behind the prompt's end.

    All positions are attended later, the zero ones too: public weights were trained so.
    """

    def __init__(self, encoder: nn.Module | None, tokenizer: Any, length: int = 512, cache: str = "", name: str = ""):
        """
        Args:
            encoder: transformers' `UMT5EncoderModel`; None where `load` opens it later.
            length: tokens; longer prompts are cut.
            cache: folder of embeddings that were computed before; empty for none.
            name: what tells this encoder's embeddings from another's in the cache.
        """
        self._open: Callable[[], Any] = lambda: (encoder, tokenizer)
        self._opened: tuple[nn.Module, Any] | None = None
        self._device: torch.device | None = None
        self.length = length
        self.cache = writable_folder(cache) if cache else None
        self.name = name

    @classmethod
    def load(cls, directory: ModelDirectory, dtype: torch.dtype, length: int = 512, cache: str = "") -> "TextEncoder":
        """The text encoder of a model directory; its files and type tell its embeddings from another's in the cache.

        With a cache, the weights are loaded when the first embedding is missing.
        """
        files = [*directory.path.glob("text_encoder/*"), *directory.path.glob("models_t5*")]
        stamps = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        text_encoder = cls(None, None, length, cache, name=f"{directory.path.resolve()} {stamps} {dtype}")
        text_encoder._open = lambda: directory.load_text_encoder(dtype)
        if not cache:  # what is wrong with it should be said at once
            text_encoder._networks()
        return text_encoder

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, length, text_dim] of the prompts, one by one, so that a prompt's never depend on its batch."""
        return torch.cat([self._encode(clean_prompt(prompt)) for prompt in prompts])

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the weights, for example off the device after use."""
        self._device = torch.device(device)
        if self._opened is not None:
            self._opened[0].to(device)
        return self

    def _networks(self) -> tuple[nn.Module, Any]:
        """Encoder and tokenizer, loaded now if they are not yet."""
        if self._opened is None:
            encoder, tokenizer = self._open()
            encoder.eval().requires_grad_(False)
            if self._device is not None:
                encoder.to(self._device)
            self._opened = encoder, tokenizer
        return self._opened

    def _encode(self, prompt: str) -> Tensor:
        file = self._cache_file(prompt)
        if file is not None and file.exists():
            with contextlib.suppress(SafetensorError, KeyError):  # a broken file is made again
                return load_file(file, device=str(self._device or "cpu"))["embedding"]
        encoder, tokenizer = self._networks()
        tokens = tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(next(encoder.parameters()).device)
        if len(tokenizer(prompt).input_ids) > self.length:
            print(f"note: a prompt is cut to its first {self.length} tokens: {prompt[:60]}...", file=sys.stderr)
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        embedding = hidden * tokens.attention_mask[..., None].to(hidden.dtype)
        if file is not None:
            with atomic_path(file) as path:
                save_file({"embedding": embedding.contiguous()}, path)
        return embedding

    def _cache_file(self, prompt: str) -> Path | None:
        if self.cache is None:
            return None
        key = hashlib.sha256("\0".join([self.name, str(self.length), prompt]).encode()).hexdigest()
        return self.cache / f"{key[:32]}.safetensors"

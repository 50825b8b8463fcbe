"""Prompts to embeddings: UMT5, encoded once per prompt, optionally kept on disk."""

import hashlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from model.weights import TEXT_ENCODER_FILES, ModelDirectory
from utils.files import atomic_path, fingerprint, writable_folder
from utils.prompts import clean_prompt


def without_padding(embedding: Tensor) -> Tensor:
    """A prompt's embedding [length, text_dim] without the zeros behind its end, to be kept."""
    used = embedding.any(dim=1).nonzero()
    return embedding[: int(used[-1]) + 1 if len(used) else 0].clone()


def padded(kept: Sequence[Tensor], length: int) -> Tensor:
    """Embeddings [B, length, text_dim] of what `without_padding` has left of each."""
    return torch.stack([F.pad(x, (0, 0, 0, length - len(x))) for x in kept])


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
        self.filling = False  # whether the cache is being filled, so that loading the weights is nothing to remark on
        self.cache = writable_folder(cache) if cache else None
        self.name = name

    @classmethod
    def load(cls, directory: ModelDirectory, dtype: torch.dtype, length: int = 512, cache: str = "") -> "TextEncoder":
        """The text encoder of a model directory; what is in its files, and its type, tell its embeddings from another's
        in the cache, so that a copy of either on another machine serves as well.

        With a cache, the weights are loaded when the first embedding is missing.
        """
        name = f"{fingerprint(directory.path, TEXT_ENCODER_FILES)} {dtype}" if cache else ""
        text_encoder = cls(None, None, length, cache, name)
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
            if self.cache is not None and not self.filling:
                print(
                    f"note: embeddings are missing in {self.cache}, so the text encoder is loaded; "
                    "scripts/encode_prompts.py puts them there ahead",
                    file=sys.stderr,
                )
            encoder, tokenizer = self._open()
            encoder.eval().requires_grad_(False)
            if self._device is not None:
                encoder.to(self._device)
            self._opened = encoder, tokenizer
        return self._opened

    def _encode(self, prompt: str) -> Tensor:
        """An embedding [1, length, text_dim], from the cache or into it."""
        file = self._cache_file(prompt)
        kept = None if file is None else self._read(file)
        if kept is None:
            kept = without_padding(self._compute(prompt)).contiguous()
            if file is not None:
                with atomic_path(file) as path:
                    save_file({"embedding": kept}, path)
        return padded([kept], self.length)

    def _compute(self, prompt: str) -> Tensor:
        """A prompt's embedding [length, text_dim]."""
        encoder, tokenizer = self._networks()
        tokens = tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(next(encoder.parameters()).device)
        if len(tokenizer(prompt).input_ids) > self.length:
            print(f"note: a prompt is cut to its first {self.length} tokens: {prompt[:60]}...", file=sys.stderr)
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return (hidden * tokens.attention_mask[..., None].to(hidden.dtype))[0]

    def _read(self, file: Path) -> Tensor | None:
        """An embedding as the cache keeps it, without its padding; None if there is none, or a broken one: it is made
        again."""
        if not file.exists():
            return None
        try:
            kept = load_file(file, device=str(self._device or "cpu"))["embedding"]
        except (SafetensorError, KeyError):
            return None
        whole = kept.ndim == 2 and len(kept) <= self.length and kept.is_floating_point()
        return kept if whole else None

    def _cache_file(self, prompt: str) -> Path | None:
        if self.cache is None:
            return None
        key = hashlib.sha256("\0".join([self.name, str(self.length), prompt]).encode()).hexdigest()
        return self.cache / f"{key[:32]}.safetensors"

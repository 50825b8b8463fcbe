"""The text encoder: computes UMT5 embeddings of prompts as Wan2.1 does."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from model.offload import num_bytes, stream_weights_
from model.weights import ModelDirectory
from utils.prompts import clean_prompt


class TextEncoder:
    """Encodes cleaned prompts with UMT5 and pads the embeddings with zeros to a fixed number of tokens.

    Cross-attention attends to the padding too, as in the training of the public weights.
    """

    def __init__(self, encoder: nn.Module | None, tokenizer: Any, length: int = 512):
        """
        Args:
            encoder: transformers' `UMT5EncoderModel`; None for subclasses that compute embeddings in another way.
            tokenizer: transformers' tokenizer of the encoder.
            length: number of tokens; longer prompts are cut.
        """
        self.length = length
        self._load: Callable[[], tuple[Any, Any]] = lambda: (encoder, tokenizer)
        self._networks: tuple[nn.Module, Any] | None = None
        self._device: torch.device | None = None
        self.streamed = False  # whether the weights stay on the CPU

    @classmethod
    def load(
        cls, directory: ModelDirectory, dtype: torch.dtype, length: int = 512, lazy: bool = False
    ) -> "TextEncoder":
        """Load the text encoder of a model directory.

        Args:
            lazy: load the weights with the first prompt.

        Raises:
            UserError: if the weights or the tokenizer cannot be loaded.
        """
        text_encoder = cls(None, None, length)
        text_encoder._load = lambda: directory.load_text_encoder(dtype)
        if not lazy:
            text_encoder.networks()
        return text_encoder

    @property
    def loaded(self) -> bool:
        """Whether the weights are in memory."""
        return self._networks is not None

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [B, length, text_dim] on the encoder's device, in its dtype.

        Prompts are encoded one by one, so that an embedding never depends on the other prompts of the batch.
        """
        return torch.stack([self._encode(clean_prompt(prompt)) for prompt in prompts])

    def to(self, device: torch.device | str) -> "TextEncoder":
        """Move the weights, now or when they are loaded."""
        self._device = torch.device(device)
        self._place()
        return self

    def stream(self, device: torch.device) -> None:
        """Encode on a device from now on, with the weights on the CPU; see `stream_weights_`."""
        self._device, self.streamed = device, True
        self._place()

    @property
    def num_bytes(self) -> int:
        """Bytes of the weights; loads them if necessary."""
        return num_bytes(self.networks()[0])

    def _place(self) -> None:
        """Move the weights, if they are loaded, to where they belong."""
        if self._networks is None or self._device is None:
            return
        encoder: Any = self._networks[0]
        if self.streamed:
            stream_weights_(encoder, encoder.encoder.block, self._device)  # type: ignore[union-attr, arg-type]
        else:
            encoder.to(self._device)

    def networks(self) -> tuple[nn.Module, Any]:
        """Return the encoder and its tokenizer; load them if necessary."""
        if self._networks is None:
            encoder, tokenizer = self._load()
            encoder.eval().requires_grad_(False)
            self._networks = encoder, tokenizer
            self._place()
        return self._networks

    def _encode(self, prompt: str) -> Tensor:
        """Return the embedding [length, text_dim] of a cleaned prompt."""
        encoder, tokenizer = self.networks()
        tokens = tokenizer(
            [prompt], padding="max_length", truncation=True, max_length=self.length, return_tensors="pt"
        ).to(self._device or next(encoder.parameters()).device)
        if len(tokenizer(prompt).input_ids) > self.length:
            print(f"note: a prompt is cut to its first {self.length} tokens: {prompt[:60]}...", file=sys.stderr)
        hidden = encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden.masked_fill(tokens.attention_mask[..., None] == 0, 0)[0]

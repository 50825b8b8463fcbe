"""Cache of prompt embeddings: the most recently used in memory and, if a folder is given, all on disk."""

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.text_encoder import TextEncoder
from model.weight_checks import is_finite
from model.weights import TEXT_ENCODER_FILES, ModelDirectory
from utils.errors import UserError
from utils.files import atomic_path, fingerprint, writable_folder
from utils.prompts import clean_prompt


class EmbeddingCache:
    """Returns embeddings of prompts and encodes only those that are neither in memory nor on disk.

    Embeddings are kept on the CPU, without the padding behind the prompt's end.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        folder: str = "",
        name: str = "",
        capacity: int | None = 1000,
        read_only: bool = False,
    ):
        """
        Args:
            folder: where embeddings are kept on disk; empty to keep them in memory only.
            name: identifies the encoder's weights and dtype among the files in `folder`.
            capacity: number of embeddings to keep in memory; the least recently used are dropped. None keeps all.
            read_only: write no files.
        """
        self.encoder = encoder
        self.folder = None if not folder else Path(folder) if read_only else writable_folder(folder)
        self.read_only = read_only
        self.name = name
        self.capacity = capacity
        self._memory: OrderedDict[str, Tensor] = OrderedDict()  # by cleaned prompt: [length, text_dim], unpadded

    @classmethod
    def load(
        cls,
        directory: ModelDirectory,
        dtype: torch.dtype,
        length: int = 512,
        folder: str = "",
        capacity: int | None = 1000,
    ) -> "EmbeddingCache":
        """Return a cache for the text encoder of a model directory.

        If a folder is given, the encoder's weights are loaded only when an embedding is missing. File names depend on
        the content of the encoder's files, so a copy of the model on another machine finds the same embeddings.

        Raises:
            UserError: if the text encoder cannot be loaded, or the folder is not writable.
        """
        encoder = TextEncoder.load(directory, dtype, length, lazy=bool(folder))
        name = f"{fingerprint(directory.path, TEXT_ENCODER_FILES)} {dtype}" if folder else ""
        return cls(encoder, folder, name, capacity)

    def get(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [B, length, text_dim] on the CPU, in the encoder's dtype."""
        embeddings = {key: self._get(key, prompt) for key, prompt in _by_key(prompts).items()}
        rows = [embeddings[clean_prompt(prompt)] for prompt in prompts]
        return torch.stack([F.pad(row, (0, 0, 0, self.encoder.length - len(row))) for row in rows])

    def prepare(self, prompts: Sequence[str]) -> None:
        """Read or encode the embeddings of these prompts, so that later calls of `get` find them in memory."""
        for key, prompt in _by_key(prompts).items():
            self._get(key, prompt)

    def missing(self, prompts: Sequence[str]) -> list[str]:
        """Return the prompts, each once, that `get` would have to encode."""
        keyed = _by_key(prompts).items()
        return [prompt for key, prompt in keyed if key not in self._memory and self._read(key) is None]

    def store(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that the folder lacks and write them there; keep nothing in memory."""
        for key, prompt in _by_key(prompts).items():
            if self._read(key) is None:
                self._encode(key, prompt)

    def to(self, device: torch.device | str) -> "EmbeddingCache":
        """Move the encoder's weights."""
        self.encoder.to(device)
        return self

    def _get(self, key: str, prompt: str) -> Tensor:
        embedding = self._memory.pop(key, None)
        if embedding is None:
            embedding = self._read(key)
        if embedding is None:
            if self.folder is not None and not self.encoder.loaded:
                print(
                    f"note: {self.folder} lacks embeddings, so the text encoder is loaded; "
                    "to encode prompts in advance, run scripts/encode_prompts.py",
                    file=sys.stderr,
                )
            embedding = self._encode(key, prompt)
        self._memory[key] = embedding
        if self.capacity is not None and len(self._memory) > self.capacity:
            self._memory.popitem(last=False)
        return embedding

    def _encode(self, key: str, prompt: str) -> Tensor:
        """Encode a prompt and write its embedding to the folder, unless that is read-only."""
        padded = self.encoder.encode([prompt])[0].cpu()
        if not is_finite(padded):
            raise UserError(f"the text encoder returns NaN or infinity for {prompt!r:.60}; try model.dtype=float32")
        used = padded.any(dim=1).nonzero()
        embedding = padded[: int(used[-1]) + 1 if len(used) else 0].clone()
        if self.folder is not None and not self.read_only:
            with atomic_path(self._file(self.folder, key)) as path:
                save_file({"embedding": embedding}, path)
        return embedding

    def _read(self, key: str) -> Tensor | None:
        """Return an embedding from disk; None if its file is missing or broken, so that it is encoded again.

        Raises:
            UserError: if it holds NaN: then the encoder that wrote it may be at fault, and so may other files.
        """
        if self.folder is None or not (file := self._file(self.folder, key)).exists():
            return None
        try:
            embedding = load_file(file)["embedding"]
        except (SafetensorError, KeyError):
            return None
        valid = embedding.ndim == 2 and len(embedding) <= self.encoder.length and embedding.is_floating_point()
        if valid and not is_finite(embedding):
            raise UserError(f"the embedding of {key!r:.60} in {file} holds NaN or infinity; delete {self.folder}")
        return embedding if valid else None

    def _file(self, folder: Path, key: str) -> Path:
        digest = hashlib.sha256("\0".join([self.name, str(self.encoder.length), key]).encode()).hexdigest()
        return folder / f"{digest[:32]}.safetensors"


def _by_key(prompts: Sequence[str]) -> dict[str, str]:
    """Map each cleaned prompt to an original. The encoder cleans the original: cleaning twice could change it again."""
    return {clean_prompt(prompt): prompt for prompt in prompts}

"""Text embeddings of training captions, from the text encoder or from the disk."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from model.text_encoder import TextEncoder, padded, without_padding
from model.weights import ModelDirectory
from trainer.sharding import shard_text_encoder
from utils.config import Config
from utils.device import DTYPES
from utils.process_group import largest_of_processes


class CaptionEmbeddings:
    """Embeddings of a training set's captions, encoded when first needed; the latest are kept.

    With `model.text_cache` they come from the disk, and if scripts/encode_prompts.py has been there, the text encoder
    is never loaded.
    """

    def __init__(self, config: Config, captions: Sequence[str], device: torch.device):
        self.captions = captions
        self.device = device
        self.length = config.model.text_length
        self.encoder = load_caption_encoder(config, device)
        self.together = shards_caption_encoder(config)  # a pass is a common work of all processes
        self._latest: OrderedDict[str, Tensor] = OrderedDict()

    def of(self, clips: Sequence[int] | Tensor, dropped: Tensor | None = None) -> Tensor:
        """Embeddings [B, L, text_dim], float32, of clips by index; the empty prompt's where `dropped` [B] is true."""
        texts = [self.captions[int(clip)] for clip in clips]
        if dropped is not None:
            texts = ["" if drop else text for text, drop in zip(texts, dropped.tolist(), strict=True)]
        return self.encode(texts)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings [B, L, text_dim], float32, of any texts. All processes ask as often, if not for the same."""
        missing = [text for text in dict.fromkeys(texts) if text not in self._latest]
        passes = largest_of_processes(len(missing), self.device) if self.together else len(missing)
        for number in range(passes):
            text = missing[number] if number < len(missing) else ""
            self._latest[text] = without_padding(self.encoder.encode([text])[0].cpu())
        for text in texts:
            self._latest.move_to_end(text)
        embeddings = padded([self._latest[text] for text in texts], self.length).to(self.device, torch.float32)
        while len(self._latest) > _KEPT_EMBEDDINGS:
            self._latest.popitem(last=False)
        return embeddings


def shards_caption_encoder(config: Config) -> bool:
    """Whether processes share out the text encoder's weights; nobody needs it where embeddings come from the disk."""
    return config.train.sharding != "replicate" and not config.model.text_cache


def load_caption_encoder(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> TextEncoder:
    """The text encoder that training reads captions with, on `device`.

    Its type, by default float32 on CPUs and `model.dtype` on GPUs, keeps embeddings on the disk apart.
    """
    model = config.model
    dtype = dtype or (torch.float32 if device.type == "cpu" else DTYPES[model.dtype])
    directory = ModelDirectory.open(model.base)
    if not shards_caption_encoder(config):
        return TextEncoder.load(directory, dtype, model.text_length, model.text_cache).to(device)
    encoder, tokenizer = directory.load_text_encoder(dtype)
    shard_text_encoder(encoder, config.train, device)
    return TextEncoder(encoder, tokenizer, model.text_length)


_KEPT_EMBEDDINGS = 10_000  # of the miniature some 160 MB; of Wan's own, a prompt of 100 tokens is 0.8 MB

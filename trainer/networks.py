"""What objectives are made of: networks to train, loaded or new; embeddings of captions; the order of the data."""

import contextlib
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model import presets
from model.causal_wan import CausalWanModel
from model.text_encoder import TextEncoder, padded, without_padding
from model.weights import ModelDirectory, save_transformer
from pipeline.build import choose_attention_backend
from trainer.sharding import shard, shard_text_encoder
from utils.config import Config, TrainConfig, num_micro_batches
from utils.device import DTYPES
from utils.distributed import world_size
from utils.errors import UserError
from utils.process_group import largest_of_processes
from utils.rng import keyed_generator


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


class Sampler:
    """The order in which a run goes through its data: every epoch a new permutation, a pure function of (seed, epoch).

    Where a run is in its data follows from its iteration, so there is nothing to save.
    """

    def __init__(self, size: int, *key: int | str):
        """
        Args:
            size: items of the data.
            key: what tells this order from others, the seed included.
        """
        self.size = size
        self.key = key
        self._epoch = -1
        self._order = torch.empty(0)

    def at(self, positions: Iterable[int]) -> Tensor:
        """The items at positions 0, 1, 2, ... of the endless order; [B] indices."""
        return torch.tensor([int(self._permutation(p // self.size)[p % self.size]) for p in positions])

    def _permutation(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.randperm(self.size, generator=keyed_generator("epoch", *self.key, epoch))
        return self._order


def batch_positions(train: TrainConfig, number: int, micro_batch: int) -> range:
    """Where in the endless order of the data a part of the `number`th batch stands."""
    start = (number * num_micro_batches(train, world_size()) + micro_batch) * train.batch_size
    return range(start, start + train.batch_size)


class Draws:
    """The randomness of a part of a batch, clip by clip: how a batch is split into parts changes none of it."""

    def __init__(self, config: Config, purpose: str, iteration: int, micro_batch: int, count: int = 0):
        """
        Args:
            count: clips in the part; default: `train.batch_size`.
        """
        count = count or config.train.batch_size
        self._clips = range(micro_batch * count, (micro_batch + 1) * count)  # of those of the batch
        self._batch = num_micro_batches(config.train, world_size()) * count
        self._key = (purpose, config.runtime.seed, iteration)
        self._generators = [keyed_generator(*self._key, clip) for clip in self._clips]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape]."""
        return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in self._generators])

    def integers(self, below: int, count: int) -> Tensor:
        """[B, count] integers from 0 to `below`, exclusive."""
        return torch.stack([torch.randint(below, (count,), generator=generator) for generator in self._generators])

    def uniform(self) -> Tensor:
        """Numbers in [0, 1), [B]."""
        return torch.stack([torch.rand((), generator=generator) for generator in self._generators])

    def even(self, count: int = 1) -> Tensor:
        """Numbers in [0, 1), [B, count], one from each of as many equal pieces as there are numbers in the whole batch:
        all of the range is covered, whatever the chance. Which piece a number is from is chance again."""
        pieces = torch.randperm(self._batch * count, generator=keyed_generator("pieces", *self._key))
        mine = pieces.view(self._batch, count)[self._clips.start : self._clips.stop]
        inside = torch.stack([torch.rand(count, generator=generator) for generator in self._generators])
        return (mine + inside) / (self._batch * count)


def build_transformer(config: Config, device: torch.device) -> CausalWanModel:
    """The DiT to train: `train.init`'s weights, or a preset's random ones; prepared as `prepare` does."""
    torch.manual_seed(config.runtime.seed)
    if config.train.init:
        directory = ModelDirectory.open(config.model.base)
        net = directory.load_transformer(CausalWanModel, torch.float32, weights=config.train.init)
    else:
        net = CausalWanModel(**preset(presets.TRANSFORMERS, config))
        net.init_weights()
    return prepare(net, config, device)


def prepare(net: CausalWanModel, config: Config, device: torch.device) -> CausalWanModel:
    """Put a DiT on its device, compiled, checkpointed and sharded as `config.train` says."""
    train = config.train
    if train.sharding == "replicate":
        net.to(device)
    net.train()
    net.gradient_checkpointing = train.activation_checkpointing
    choose_attention_backend(net, config.model.attention_backend)
    if train.compile:
        net.compile_layers()
    shard(net, train, device)
    return net


def compute_in(config: Config, device: torch.device) -> AbstractContextManager:
    """The context in which networks compute in `train.dtype`; sharded ones are cast as they are gathered instead."""
    train = config.train
    if train.sharding != "replicate" or train.dtype == "float32":
        return contextlib.nullcontext()
    # Without its cache: a weight that was cast without autograd would be taken where autograd needs it.
    return torch.autocast(device.type, DTYPES[train.dtype], cache_enabled=False)


def preset(table: dict[str, dict[str, Any]], config: Config) -> dict[str, Any]:
    """The sizes that `config.train.network` names.

    Raises:
        UserError: if there are none of this name.
    """
    name = config.train.network
    if name not in table:
        raise UserError(
            f"train.network={name!r} is no preset of {config.train.objective}; choose from {', '.join(table)}"
        )
    return table[name]


def export_transformer(net: CausalWanModel, folder: Path, weights: dict[str, Tensor]) -> None:
    """Write weights in the layout of diffusers' `WanTransformer3DModel`, in bfloat16."""
    state = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights.items()}
    save_transformer(folder, state, {k: v for k, v in net.config.items() if not k.startswith("_")})

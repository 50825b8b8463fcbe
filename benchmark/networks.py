"""Networks to measure: networks of a configuration, or networks of published sizes with random weights."""

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model import presets
from model.attention_backends import describe_attention
from model.causal_wan import CausalWanModel
from model.embeddings import EmbeddingCache
from model.presets import random_network
from model.text_encoder import TextEncoder
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import (
    build_schedule,
    check_size,
    choose_attention_backend,
    load_embeddings,
    load_network,
    load_vae,
    prepare_network,
)
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError

PROMPT = "a red circle moving up fast on a blue background"


class BenchmarkNetworks:
    """Builds each network of a configuration on request."""

    def __init__(self, config: Config, device: torch.device, random: str = ""):
        """
        Args:
            random: key of presets.TRANSFORMERS: use networks of this size with random weights. Empty: load the weights
                of the configuration.
        """
        self.config, self.device, self.random = config, device, random
        self.dtype = DTYPES[config.model.dtype]

    def sizes(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the arguments of the transformer and of the VAE."""
        if self.random:
            return presets.TRANSFORMERS[self.random], presets.VAES["wan"]
        directory = ModelDirectory.open(self.config.model.base)
        configs = directory.transformer_config(), directory.load_vae().config
        transformer, vae = ({k: v for k, v in config.items() if not k.startswith("_")} for config in configs)
        return transformer, vae

    def transformer(self) -> CausalWanModel:
        """Return the generator.

        Raises:
            TorchDynamoException: at the first pass, if `model.compile` is set and the network cannot be compiled.
        """
        if not self.random:
            return load_network(self.config, self.device, fall_back=False)
        net = random_network(CausalWanModel, presets.TRANSFORMERS[self.random], self.dtype, self.device)
        return prepare_network(net, self.config, self.device, fall_back=False)

    def vae(self) -> WanVAE:
        """Return the VAE."""
        if not self.random:
            return load_vae(self.config, self.device)
        return WanVAE(random_network(AutoencoderKLWan, presets.VAES["wan"], self.dtype, self.device))

    def text_encoder(self) -> TextEncoder:
        """Return the text encoder. With random weights, it tokenizes bytes."""
        if not self.random:
            return load_embeddings(self.config, self.device).encoder
        sizes = presets.TEXT_ENCODERS["wan"]
        encoder = random_network(lambda **s: UMT5EncoderModel(UMT5Config(**s)), sizes, self.dtype, self.device)
        return TextEncoder(encoder, ByT5Tokenizer(), self.config.model.text_length)

    def pipeline(self) -> TextToVideo:
        """Return a pipeline. With random weights, prompts have random embeddings."""
        net = self.transformer()
        embeddings = self.random_embeddings(net) if self.random else load_embeddings(self.config, self.device)
        return TextToVideo(self.config, net, embeddings, self.vae())

    def random_embeddings(self, net: CausalWanModel) -> EmbeddingCache:
        """Return a cache that gives every prompt a random embedding, without a text encoder."""
        return EmbeddingCache(RandomTextEncoder(self.config.model.text_length, net.config.text_dim))

    def check(self, backend: bool = True) -> str:
        """Check before any measurement that the configuration can run; return the line of `describe_attention`.

        Args:
            backend: also check that the attention backend runs on the device. Otherwise, the line is empty.

        Raises:
            UserError: for an impossible size or length, an attention backend that does not run on the device, or keys
                that the benchmark cannot honour.
        """
        self._check_keys()
        if self.random:
            sizes = presets.TRANSFORMERS[self.random]
            check_size(self.config, sizes)
            build_schedule(self.config.rollout, self.config.video.num_output_frames)
        else:
            TextToVideo.check(self.config)
            sizes = ModelDirectory.open(self.config.model.base).transformer_config()
        if not backend:
            return ""
        small = dict(num_layers=1, num_attention_heads=1, ffn_dim=8, text_dim=8)
        net = random_network(CausalWanModel, sizes | small, self.dtype, self.device)
        name = self.config.model.attention_backend
        choose_attention_backend(net, name)
        _, *patch = net.config.patch_size
        x = torch.zeros(1, net.config.in_channels, 1, *patch, device=self.device)
        text = torch.zeros(1, 8, 8, device=self.device)
        try:
            with torch.no_grad():
                net(x, torch.zeros(1, device=self.device), text)
            return describe_attention(net, self.config.model.attention_backend)
        except (RuntimeError, ValueError, ImportError, AssertionError) as error:
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            place = f"{self.config.model.dtype} on {self.device}"
            raise UserError(f"attention backend {name} does not run in {place}: {reason}") from None

    def _check_keys(self) -> None:
        """Check that videos are one causal rollout from noise without guidance: all figures assume it."""
        rollout = self.config.rollout
        if rollout.schedule == "bidirectional":
            raise UserError("the benchmark measures blocks: set rollout.schedule=timestep_first or block_first")
        for key, value, only in (
            ("rollout.num_rollouts", rollout.num_rollouts, 1),
            ("rollout.guidance_scale", rollout.guidance_scale, 1),
            ("video.source", self.config.video.source, ""),
        ):
            if value != only:
                raise UserError(f"the benchmark cannot measure {key}={value}: leave it out")


class RandomTextEncoder(TextEncoder):
    """Text encoder without weights that returns random embeddings."""

    def __init__(self, length: int, dim: int):
        super().__init__(None, None, length)
        self.dim = dim

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Return random embeddings [B, L, text_dim]."""
        return torch.randn(len(prompts), self.length, self.dim)

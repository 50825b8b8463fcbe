"""Sampling the bidirectional teacher: many steps over a whole clip, with classifier-free guidance."""

import itertools
from collections.abc import Callable, Sequence

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from model.causal_wan import CausalWanModel, TextContext
from model.embeddings import EmbeddingCache
from model.flow import guide
from model.weights import ModelDirectory
from pipeline.build import check_size, choose_attention_backend, latent_size
from utils.config import Config
from utils.device import DTYPES
from utils.rng import keyed_noise


class Teacher:
    """The teacher of one configuration on one device, ready to be sampled."""

    def __init__(self, config: Config, net: CausalWanModel, embeddings: EmbeddingCache):
        self.config = config
        self.net = net.eval().requires_grad_(False)
        self.embeddings = embeddings

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Teacher":
        """Load the DiT that `config.teacher.path` names, or the base's own, and the text encoder.

        Raises:
            UserError: for missing or broken files, and for a size that VAE and patches do not divide.
        """
        model, dtype = config.model, DTYPES[config.model.dtype]
        directory = ModelDirectory.open(model.base)
        check_size(config, directory.transformer_config())
        net = directory.load_transformer(CausalWanModel, dtype, weights=config.teacher.path or None).to(device)
        choose_attention_backend(net, model.attention_backend)
        if model.compile:
            net.compile_layers()
        return cls(config, net, EmbeddingCache.load(directory, dtype, model.text_length, model.text_cache).to(device))

    def noise(self, seed: int, samples: Sequence[int]) -> Tensor:
        """Noise [B, F, C, h, w] of numbered samples: a clip of `data.num_frames` latent frames is one block."""
        size = latent_size(self.config.video)
        shape = (self.config.data.num_frames, self.net.config.in_channels, *size)
        return torch.stack([keyed_noise(seed, sample, 0, 0, shape) for sample in samples]).to(self.net.device)

    def flow(self, prompts: Sequence[str]) -> Callable[[Tensor, float], Tensor]:
        """The guided flow of a batch of prompts, as a function of x [B, F, C, h, w] and sigma."""
        with torch.no_grad():  # keys and values of the text are the same at every step
            text = self.net.encode_text(self.embeddings.get(prompts).to(self.net.device))
            negative = self.embeddings.get([self.config.teacher.negative_prompt]).to(self.net.device)
            negative = self.net.encode_text(negative.expand(len(prompts), -1, -1))
        scale = self.config.teacher.guidance_scale
        return lambda x, sigma: guided_flow(self.net, x, sigma, text, negative, scale)


@torch.no_grad()
def guided_flow(
    net: CausalWanModel,
    x: Tensor,
    sigma: float | Tensor,
    text: Tensor | TextContext,
    negative: Tensor | TextContext,
    scale: float,
) -> Tensor:
    """The teacher's flow with guidance, float32 [B, F, C, h, w].

    Args:
        x: [B, F, C, h, w] at level sigma; one level for all, or [B].
        text, negative: prompt and negative-prompt embeddings [B, L, text_dim], or what the net's `encode_text` made of
            them.
        scale: 1 leaves guidance out, and its second forward.
    """
    timestep = 1000 * sigma if isinstance(sigma, Tensor) else torch.full((len(x),), 1000 * sigma, device=x.device)

    def flow(condition: Tensor | TextContext) -> Tensor:
        return net(x.transpose(1, 2), timestep, condition).transpose(1, 2).float()

    conditional = flow(text)
    return conditional if scale == 1 else guide(conditional, flow(negative), scale)


def sample_euler(
    flow: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Follow the probability-flow ODE by Euler steps through `sigmas`; returns x at each of them, first to last."""
    points = [noise]
    for index, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        x = points[-1]
        points.append(x + (next_sigma - sigma) * flow(x, sigma))
        if on_step is not None:
            on_step(index)
    return points


def sample_unipc(flow: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Sample with UniPC (arXiv 2302.04867), diffusers' implementation, as Wan's own pipeline does; returns x0."""
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    solver.set_timesteps(num_steps, device=noise.device)
    x = noise
    for index, timestep in enumerate(solver.timesteps):
        sigma = float(solver.sigmas[index])
        x = solver.step(flow(x, sigma), timestep, x, return_dict=False)[0]
    return x

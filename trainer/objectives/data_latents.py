"""Clips from noised training data: the generator denoises them in one step (CausVid, arXiv 2412.07772, section 4.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import BlockCausalMask
from model.causal_wan import CausalWanModel
from model.denoiser import clip_flow
from model.flow import add_noise, flow_to_x0
from pipeline.build import block_layout, context_frames, latent_size, rollout_sigmas
from trainer.datasets.clips import Clips, open_clips
from trainer.networks import mixed_precision
from trainer.objectives.clip_source import ClipBatch, ClipSource
from trainer.sharding import sync_gradients
from utils.config import Config
from utils.errors import UserError
from utils.rng import keyed_generator


def open_data_latents(config: Config) -> Clips:
    """Open the encoded clips of `data.path` and check that their size is that of the configuration.

    Raises:
        UserError: if there are no clips, or their size differs.
    """
    path = config.data.path
    clips = open_clips(path)
    found = (clips.shape[0], *clips.shape[2:])
    expected = (config.data.num_frames, *latent_size(config.video))
    if found != expected:
        raise UserError(
            f"the clips in {path} have {found[0]} latent frames of {found[1]}x{found[2]}, but the configuration has "
            f"{expected[0]} of {expected[1]}x{expected[2]} (data.num_frames; video.height, video.width / 8); change "
            "these keys or encode the clips again"
        )
    return clips


@dataclass
class DenoisedClip:
    """A clip after one step of the generator."""

    x0: Tensor  # [B, F, C, h, w]; has a graph if it was generated under autograd
    noise: Tensor  # [B, F, C, h, w]
    sigma: Tensor  # noise level of each frame of the generator's input, [B, F]


class DataLatents(ClipSource[DenoisedClip]):
    """Noises training clips to the levels of the rollout's steps; the generator predicts their x0 in one pass.

    A causal generator has block-causal attention and a level for each block. A bidirectional generator has one level
    for each clip. Levels are drawn uniformly from the steps. If `rollout.denoising_step_list` ends in 0, the draw
    includes clean blocks: at inference, finished blocks are context at level 0.
    """

    def __init__(self, config: Config, generator: CausalWanModel, clips: Clips, device: torch.device):
        self.config, self.generator, self.clips, self.device = config, generator, clips, device
        rollout, num_frames = config.rollout, config.data.num_frames
        if clips.shape[1] != generator.config.in_channels:
            raise UserError(
                f"the clips in {config.data.path} have {clips.shape[1]} channels, but the network has "
                f"{generator.config.in_channels}; encode the clips with the model's own VAE"
            )
        sigmas = rollout_sigmas(rollout)
        end = len(sigmas) if rollout.denoising_step_list[-1] == 0 else -1
        self.sigmas = torch.tensor(sigmas[config.distill.min_exit_step : end])
        self.blocks = block_layout(rollout, num_frames).sizes
        self.mask: BlockCausalMask | None = None
        if rollout.schedule != "bidirectional":
            self.mask = BlockCausalMask(self.blocks, *context_frames(rollout, num_frames))

    def run(self, batch: ClipBatch, trained: bool = True) -> DenoisedClip:
        x0 = self.clips.read(batch.items.tolist()).to(self.device, torch.float32)
        noise, sigma = self._draw(batch, x0.shape)
        levels = sigma[:, :, None, None, None]
        x = add_noise(x0, noise, levels)
        with torch.set_grad_enabled(trained), mixed_precision(self.config, self.device):
            level = sigma[:, 0] if self.mask is None else sigma
            flow = clip_flow(self.generator, x, level, batch.embeddings, self.mask)
            return DenoisedClip(flow_to_x0(x, flow, levels), noise, sigma)

    def _draw(self, batch: ClipBatch, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the noise [B, F, C, h, w] and the levels [B, F] of a micro-batch, keyed by position."""
        noises, sigmas = [], []
        for position in batch.positions:
            random = keyed_generator("data latents", self.config.runtime.seed, batch.role, position)
            drawn = torch.randint(len(self.sigmas), (len(self.blocks),), generator=random)
            sigmas.append(self.sigmas[drawn].repeat_interleave(torch.tensor(self.blocks)))
            noises.append(torch.randn(shape[1:], generator=random))
        return torch.stack(noises).to(self.device), torch.stack(sigmas).to(self.device)

    def training_window(self, clip: DenoisedClip) -> tuple[Tensor, None]:
        return clip.x0.detach(), None

    def backward(self, clip: DenoisedClip, gradient: Tensor, embeddings: Tensor, last: bool) -> None:
        sync_gradients(self.generator, last)
        clip.x0.backward(gradient)

    def noise(self, clip: DenoisedClip) -> Tensor:
        return clip.noise

    def metrics(self, clip: DenoisedClip) -> dict[str, float]:
        return {"input_sigma": clip.sigma.mean().item()}

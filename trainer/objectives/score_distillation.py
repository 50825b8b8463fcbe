"""Score distillation: DMD on the generator's clips, plus a forward KL onto teacher trajectories.

HiAR (arXiv 2603.08703), Self-Forcing (arXiv 2506.08009) and CausVid (arXiv 2412.07772) are this one objective. HiAR and
Self-Forcing roll the generator out; they differ in the schedule and in the weight of the forward KL. CausVid noises
training clips and denoises them in one step.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from model.causal_wan import CausalWanModel
from model.denoiser import clip_flow
from model.flow import add_noise, flow_to_x0, shift_sigma
from model.weights import ModelDirectory
from pipeline.build import build_schedule, check_size, rollout_sigmas
from pipeline.teacher import guided_flow
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.ode_pairs import ODEPairs
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions
from trainer.networks import build_transformer, mixed_precision, prepare_transformer
from trainer.objectives.base import Objective
from trainer.objectives.clip_source import ROLES, ClipBatch, ClipSource
from trainer.objectives.data_latents import DataLatents, open_data_latents
from trainer.objectives.forward_kl import ForwardKL, open_forward_kl_pairs
from trainer.objectives.losses import dmd_gradient, dmd_loss, flow_matching_loss, motion
from trainer.objectives.self_rollout import SelfRollout
from trainer.sampling import VideoSampler
from trainer.sharding import sync_gradients
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError
from utils.prompts import read_prompts


class ScoreDistillation(Objective):
    """Trains a generator on the difference of two scores, and a critic on the generator's clips (DMD2, 2405.14867)."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        build_schedule(config.rollout, config.data.num_frames)  # raises an error if blocks do not divide the frames
        build_schedule(config.rollout, config.distill.max_rollout_frames)
        pairs = open_forward_kl_pairs(config) if config.distill.forward_kl_weight > 0 else None
        clips = None if config.distill.backward_simulation else open_data_latents(config)
        captions = _read_rollout_prompts(config, pairs) if clips is None else clips.captions
        self.text = CaptionEmbeddings(config, captions, device)
        self.negative = self.text.encode([config.teacher.negative_prompt])
        self.orders = {role: DataOrder(len(captions), "prompts", role, config.runtime.seed) for role in ROLES}

        directory = ModelDirectory.open(config.model.base)
        check_size(config, directory.transformer_config())
        self.generator = build_transformer(config, device)
        self.critic = prepare_transformer(directory.load_transformer(CausalWanModel, torch.float32), config, device)
        self.teacher = self._load_teacher()
        self.forward_kl: ForwardKL | None = None
        self.clip_source: ClipSource
        if clips is None:
            self.clip_source = self_rollout = SelfRollout(config, self.generator, device)
            if pairs is not None:
                self.forward_kl = ForwardKL(config, pairs, self_rollout, self.text)
        else:
            self.clip_source = DataLatents(config, self.generator, clips, device)
        self.sampler = VideoSampler(config, self.generator, self.text, captions)

    def _load_teacher(self) -> CausalWanModel:
        config = self.config
        directory = ModelDirectory.open(config.teacher.base or config.model.base)
        dtype = DTYPES[config.train.dtype]
        net = directory.load_transformer(CausalWanModel, dtype, weights=config.teacher.path or None)
        return prepare_transformer(net.requires_grad_(False), config, self.device).eval()

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        return {"generator": self.generator, "critic": self.critic}

    @property
    def frozen_nets(self) -> Mapping[str, nn.Module]:
        return {"teacher": self.teacher}

    def data_summary(self) -> str:
        if not self.config.distill.backward_simulation:
            return f"{len(self.text.captions):,} encoded clips in {self.config.data.path}"
        prompts = f"{len(self.text.captions):,} prompts"
        if self.forward_kl is None:
            return prompts
        return f"{prompts}, {len(self.forward_kl.pairs):,} ODE pairs in {self.config.data.path}"

    def learning_rate(self, name: str) -> float:
        return self.config.train.learning_rate if name == "generator" else self.config.distill.critic_learning_rate

    def networks_to_update(self, iteration: int) -> list[str]:
        """Return the critic in every iteration, and after its warm-up the generator in every `generator_every`-th."""
        distill = self.config.distill
        updates_generator = iteration >= distill.critic_warmup and iteration % distill.generator_every == 0
        return ["generator", "critic"] if updates_generator else ["critic"]

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        step = self._generator_step if name == "generator" else self._critic_step
        return step(iteration, micro_batch, scale, last)

    # ---- Generator ----

    def _generator_step(self, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        batch = self.batch("generator", iteration, micro_batch)
        generated = self.clip_source.run(batch)
        clip, mask = self.clip_source.training_window(generated)
        gradient = self.score_difference(clip, batch.embeddings, iteration, micro_batch)
        leaf = clip.requires_grad_()
        [output_gradient] = torch.autograd.grad(scale * dmd_loss(leaf, gradient, mask), leaf)
        self.clip_source.backward(generated, output_gradient, batch.embeddings, last and self.forward_kl is None)
        metrics = {
            "dmd_gradient": gradient.abs().mean().item(),
            "dmd_output_gradient": (output_gradient / scale).norm().item(),
            "motion": motion(clip.detach()).item(),
            **self.clip_source.metrics(generated),
        }
        if self.forward_kl is not None:
            metrics |= self.forward_kl.backward(iteration, batch.positions, scale, last)
        if "motion_bidirectional" not in metrics:
            noise = self.clip_source.noise(generated)
            metrics["motion_bidirectional"] = self._bidirectional_motion(noise, batch.embeddings)
        return metrics

    @torch.no_grad()
    def score_difference(self, clip: Tensor, embeddings: Tensor, iteration: int, micro_batch: int) -> Tensor:
        """Return the DMD gradient at a clip, [B, F, C, h, w], at one random noise level per clip."""
        random = ClipRandom(self.config, "score difference", iteration, micro_batch)
        sigma, x, _ = self._add_random_noise(clip, random)
        negative = self.negative.expand(len(clip), -1, -1)
        with mixed_precision(self.config, self.device):
            critic_flow = clip_flow(self.critic, x, sigma, embeddings)
            guidance = self.config.distill.guidance_scale
            teacher_flow = guided_flow(self.teacher, x, sigma, embeddings, negative, guidance)
        sigma = sigma.view(-1, 1, 1, 1, 1)
        return dmd_gradient(clip, flow_to_x0(x, critic_flow, sigma), flow_to_x0(x, teacher_flow, sigma))

    @torch.no_grad()
    def _bidirectional_motion(self, noise: Tensor, embeddings: Tensor) -> float:
        """Return the motion of the generator's x0 from noise [B, F, C, h, w], predicted with bidirectional attention.

        Causal rollouts can become static while this prediction still moves (HiAR, arXiv 2603.08703, section 3.3).
        """
        sigma = rollout_sigmas(self.config.rollout)[0]
        with mixed_precision(self.config, self.device):
            flow = clip_flow(self.generator, noise, sigma, embeddings)
        return motion(flow_to_x0(noise, flow, sigma)).item()

    # ---- Critic ----

    def _critic_step(self, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Flow matching on the generator's clips (DMD2, arXiv 2405.14867, section 3)."""
        batch = self.batch("critic", iteration, micro_batch)
        with torch.no_grad():
            clip, _ = self.clip_source.training_window(self.clip_source.run(batch, trained=False))
        sigma, x, noise = self._add_random_noise(clip, ClipRandom(self.config, "critic", iteration, micro_batch))
        with mixed_precision(self.config, self.device):
            flow = clip_flow(self.critic, x, sigma, batch.embeddings)
        loss = flow_matching_loss(flow, clip, noise)
        sync_gradients(self.critic, last)
        (loss * scale).backward()
        return {"critic": loss.item()}

    # ---- Shared ----

    def batch(self, role: str, iteration: int, micro_batch: int) -> ClipBatch:
        """Return a micro-batch for the network `role`. The batches of a role leave no gaps in the order of captions."""
        number = iteration // self.config.distill.generator_every if role == "generator" else iteration
        positions = batch_positions(self.config.train, number, micro_batch)
        items = self.orders[role].at(positions)
        return ClipBatch(role, iteration, positions, items, self.text.of(items))

    def _add_random_noise(self, clip: Tensor, random: ClipRandom) -> tuple[Tensor, Tensor, Tensor]:
        """Return one noise level per clip [B] (stratified, shifted, clamped), the clips at it, and their noise."""
        distill = self.config.distill
        noise = random.normal(clip.shape[1:]).to(clip, non_blocking=True)
        sigma = shift_sigma(random.stratified()[:, 0], distill.timestep_shift)
        sigma = sigma.clamp(distill.min_timestep / 1000, distill.max_timestep / 1000)
        sigma = sigma.to(self.device, non_blocking=True)
        return sigma, add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1)), noise


def _read_rollout_prompts(config: Config, pairs: ODEPairs | None) -> list[str]:
    """Return the prompts of the rollouts: those of `data.prompts`, or else of the ODE pairs."""
    if config.data.prompts:
        return [prompt.text for prompt in read_prompts(config.data.prompts)]
    if pairs is None:
        raise UserError("score distillation without forward KL needs prompts for its rollouts: set data.prompts")
    return list(dict.fromkeys(pairs.prompts))

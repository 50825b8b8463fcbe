"""Score distillation by self-rollout: DMD with a bidirectional teacher, and forward KL onto the teacher's trajectories.

HiAR (arXiv 2603.08703), Self-Forcing (arXiv 2506.08009) and what lies between them are one objective: they differ in
the schedule by which the generator is rolled out, and in the weight of the forward KL.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.causal_wan import BlockCausal, CausalWanModel
from model.denoiser import Denoiser
from model.flow import add_noise, flow_to_x0, shift_sigma
from model.kv_cache import KVCache
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import build_schedule, check_size, context_frames, latent_size, rollout_sigmas
from pipeline.rollout import BlockLayout, Rollout
from pipeline.teacher import guided_flow
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.ode_pairs import ODEPairs, open_ode_pairs
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions
from trainer.networks import build_transformer, export_transformer, mixed_precision, prepare_transformer
from trainer.objectives.losses import dmd_gradient, dmd_loss, flow_matching_loss, forward_kl_loss, motion
from trainer.sampling import VideoSampler
from trainer.sharding import sync_gradients
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError
from utils.prompts import read_prompts
from utils.rng import keyed_generator, keyed_noise

ROLES = ("generator", "critic")


@dataclass
class Generated:
    """A rollout that has stopped at its exit step."""

    rollout: Rollout
    blocks: dict[int, Tensor]  # x0 of every block, [B, block frames, C, h, w]; with its graph where it was asked for
    trained: range  # the blocks that the loss reaches
    exit_step: int

    @property
    def frames(self) -> Tensor:
        """The whole rollout, detached [B, F, C, h, w]."""
        return torch.cat([self.blocks[block].detach() for block in sorted(self.blocks)], dim=1)


class ScoreDistillation:
    """The generator learns from the difference of two scores, the critic from what the generator makes."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        distill, num_frames = config.distill, config.data.num_frames
        build_schedule(config.rollout, num_frames)  # says so if blocks do not divide the frames
        build_schedule(config.rollout, distill.max_rollout_frames)
        self.pairs: ODEPairs | None = None
        if distill.forward_kl_weight > 0:
            self.pairs = open_ode_pairs(config.data.path, config.data.sigmas, distill.forward_kl_steps + 1)
            self.pairs.check_blocks(config.rollout.block_frames, config.data.path)
            if distill.forward_kl_mode == "rollout" and len(self.pairs.sigmas) > len(rollout_sigmas(config.rollout)):
                raise UserError(
                    f"the ODE pairs in {config.data.path} have {len(self.pairs.sigmas) - 1} steps, which a rollout of "
                    "fewer cannot follow; choose another distill.forward_kl_mode, or make pairs of fewer points"
                )
        if config.data.prompts:
            captions = [prompt.text for prompt in read_prompts(config.data.prompts)]
        elif self.pairs is not None:
            captions = list(dict.fromkeys(self.pairs.prompts))
        else:
            raise UserError("score distillation without forward KL needs prompts to roll out: set data.prompts")
        self.text = CaptionEmbeddings(config, captions, device)
        self.negative = self.text.encode([config.teacher.negative_prompt])
        seed = config.runtime.seed
        self.orders = {turn: DataOrder(len(captions), "prompts", turn, seed) for turn in ROLES}
        self.pair_order = DataOrder(len(self.pairs) if self.pairs else 1, "pairs", seed)

        check_size(config, ModelDirectory.open(config.model.base).transformer_config())
        self.generator = build_transformer(config, device)
        directory = ModelDirectory.open(config.model.base)
        self.critic = prepare_transformer(directory.load_transformer(CausalWanModel, torch.float32), config, device)
        self.teacher = self._load_teacher()
        longer = distill.max_rollout_frames > num_frames
        self.vae = WanVAE(directory.load_vae(DTYPES[config.train.dtype]).to(device)) if longer else None
        self.sigmas = rollout_sigmas(config.rollout)
        self.sampler = VideoSampler(config, self.generator, self.text, captions)

    def _load_teacher(self) -> CausalWanModel:
        config = self.config
        directory = ModelDirectory.open(config.teacher.base or config.model.base)
        dtype = DTYPES[config.train.dtype]
        net = directory.load_transformer(CausalWanModel, dtype, weights=config.teacher.path or None)
        return prepare_transformer(net.requires_grad_(False), config, self.device).eval()

    # ---- What the loop asks for ----

    @property
    def nets(self) -> Mapping[str, nn.Module]:
        """The generator, whose EMA is the result, and the critic."""
        return {"generator": self.generator, "critic": self.critic}

    @property
    def frozen_nets(self) -> Mapping[str, nn.Module]:
        """The teacher."""
        return {"teacher": self.teacher}

    def data_summary(self) -> str:
        """Return the number of prompts and ODE pairs."""
        pairs = f", {len(self.pairs):,} ODE pairs in {self.config.data.path}" if self.pairs else ""
        return f"{len(self.text.captions):,} prompts{pairs}"

    def learning_rate(self, name: str) -> float:
        """Generator and critic have rates of their own."""
        return self.config.train.learning_rate if name == "generator" else self.config.distill.critic_learning_rate

    def networks_to_update(self, iteration: int) -> list[str]:
        """The critic in every iteration, the generator in every few."""
        return ["generator", "critic"] if iteration % self.config.distill.generator_every == 0 else ["critic"]

    def backward(self, name: str, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """One part of a net's batch."""
        step = self._generator_step if name == "generator" else self._critic_step
        return step(iteration, micro_batch, scale, last)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the generator to `folder`."""
        export_transformer(self.generator, folder, weights)

    def sample(self, folder: Path) -> None:
        """Write videos of the first prompts."""
        self.sampler.write(folder)

    # ---- The generator's turn ----

    def _generator_step(self, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        distill = self.config.distill
        embeddings = self._embeddings("generator", iteration, micro_batch)
        generated = self.roll_out("generator", iteration, micro_batch, embeddings, graph=not distill.block_backward)
        clip, mask = self.training_window(generated)
        gradient = self.score_difference(clip, embeddings, iteration, micro_batch)
        leaf = clip.requires_grad_()
        [at_output] = torch.autograd.grad(scale * dmd_loss(leaf, gradient, mask), leaf)
        self._backward(generated, at_output, embeddings, last and self.pairs is None)
        metrics = {
            "dmd_gradient": gradient.abs().mean().item(),
            "dmd_output_gradient": (at_output / scale).norm().item(),
            "motion": motion(clip.detach()).item(),
            "exit_step": float(generated.exit_step),
        }
        if self.pairs is not None:
            metrics |= self._forward_kl(iteration, micro_batch, scale, last)
        if "motion_bidirectional" not in metrics:
            metrics["motion_bidirectional"] = self._bidirectional_motion(generated, embeddings)
        return metrics

    def roll_out(
        self, turn: str, iteration: int, micro_batch: int, embeddings: Tensor, graph: bool = False, trained: bool = True
    ) -> Generated:
        """Roll the generator out up to an exit step, by the one executor and the configured schedule.

        Exit step and length are drawn from (seed, turn, iteration) alone: they are the same for all parts, and so on
        all processes.

        Args:
            graph: keep the graph of the trained blocks; otherwise they can be denoised again.
            trained: whether a loss will reach the blocks at all.
        """
        config, size = self.config, len(embeddings)
        rollout_config, distill = config.rollout, config.distill
        block_frames, window = rollout_config.block_frames, config.data.num_frames
        shared = keyed_generator("rollout", config.runtime.seed, turn, iteration)
        exit_step = int(torch.randint(distill.min_exit_step, len(self.sigmas) - 1, (), generator=shared))
        longer = torch.randint((distill.max_rollout_frames - window) // block_frames + 1, (), generator=shared)
        num_frames = window + int(longer) * block_frames
        schedule = build_schedule(rollout_config, num_frames)
        layout = BlockLayout(block_frames)
        num_blocks = num_frames // block_frames
        # Of a rollout that is cut, the first block is only there for the others to see, and is no part of the loss.
        first = (num_frames - window) // block_frames + (1 if longer else 0)
        blocks = range(first, num_blocks) if trained else range(0)
        context, sink = context_frames(rollout_config, num_frames)
        # What blocks before the last saw has to be there when they are denoised again.
        written = num_frames - block_frames
        again = bool(blocks) and not graph
        history = written - first * block_frames if again and written > context else 0
        height, width = self._latent_size()

        def new_cache() -> KVCache:
            dtype = DTYPES[config.train.dtype]
            return self.generator.new_cache(size, height, width, context, block_frames, sink, history, dtype)

        samples = [2 * position + ROLES.index(turn) for position in self._positions(turn, iteration, micro_batch)]
        shape = (block_frames, self.generator.config.in_channels, height, width)

        def noise(block: int, step: int) -> Tensor:
            drawn = [keyed_noise(config.runtime.seed, sample, block, step, shape) for sample in samples]
            return torch.stack(drawn).to(self.device)

        rollout = Rollout(
            self._denoiser(embeddings, graph),
            self.sigmas,
            noise,
            new_cache,
            layout,
            deterministic=rollout_config.use_ode_trajectory,
            exit_step=exit_step,
            with_grad=lambda block: graph and block in blocks,
        )
        with mixed_precision(config, self.device):
            finished = dict(rollout.run(list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)))
        return Generated(rollout, finished, blocks, exit_step)

    def training_window(self, generated: Generated) -> tuple[Tensor, Tensor | None]:
        """The last `data.num_frames` frames [B, F, C, h, w], and which of them count [B, F] (None: all).

        Of a longer rollout the window's first frame is made anew by decoding and encoding it alone: as the first frame
        of a clip, which teacher and critic take it for, it holds one pixel frame and not four.
        """
        frames, window = generated.frames, self.config.data.num_frames
        if frames.shape[1] == window:
            return frames, None
        assert self.vae is not None
        before, clip = frames[:, : -(window - 1)], frames[:, -window:].clone()
        image = self.vae.decode(before)[:, -1:]
        clip[:, :1] = self.vae.encode(image).to(clip)
        mask = torch.ones(clip.shape[:2], device=clip.device)
        mask[:, : self.config.rollout.block_frames] = 0
        return clip, mask

    @torch.no_grad()
    def score_difference(self, clip: Tensor, embeddings: Tensor, iteration: int, micro_batch: int) -> Tensor:
        """The DMD gradient at a clip, at one noise level per clip."""
        sigma, x, _ = self._noised(clip, ClipRandom(self.config, "score difference", iteration, micro_batch))
        negative = self.negative.expand(len(clip), -1, -1)
        with mixed_precision(self.config, self.device):
            critic = self.critic(x.transpose(1, 2), 1000 * sigma, embeddings).transpose(1, 2)
            teacher = guided_flow(self.teacher, x, sigma, embeddings, negative, self.config.distill.guidance_scale)
        levels = sigma.view(-1, 1, 1, 1, 1)
        return dmd_gradient(clip, flow_to_x0(x, critic, levels), flow_to_x0(x, teacher, levels))

    def _backward(self, generated: Generated, at_output: Tensor, embeddings: Tensor, last: bool) -> None:
        """Lead a gradient at the training window [B, F, C, h, w] back into the generator."""
        block_frames = self.config.rollout.block_frames
        before = len(generated.blocks) - at_output.shape[1] // block_frames  # blocks before the window
        parts = {
            block: at_output[:, (block - before) * block_frames :][:, :block_frames] for block in generated.trained
        }
        if not self.config.distill.block_backward:
            sync_gradients(self.generator, last)
            torch.autograd.backward([generated.blocks[b] for b in parts], list(parts.values()))
            return
        for block, gradient in parts.items():
            sync_gradients(self.generator, last and block == generated.trained[-1])
            with mixed_precision(self.config, self.device):
                generated.rollout.denoiser = self._denoiser(embeddings, graph=True)
                x0 = generated.rollout.denoise_again(block)
            x0.backward(gradient)

    # ---- The critic's turn ----

    def _critic_step(self, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Flow matching on what the generator makes (DMD2, arXiv 2405.14867, section 3)."""
        embeddings = self._embeddings("critic", iteration, micro_batch)
        with torch.no_grad():
            clip, _ = self.training_window(self.roll_out("critic", iteration, micro_batch, embeddings, trained=False))
        sigma, x, noise = self._noised(clip, ClipRandom(self.config, "critic", iteration, micro_batch))
        with mixed_precision(self.config, self.device):
            flow = self.critic(x.transpose(1, 2), 1000 * sigma, embeddings).transpose(1, 2)
        loss = flow_matching_loss(flow, clip, noise)
        sync_gradients(self.critic, last)
        (loss * scale).backward()
        return {"critic": loss.item()}

    # ---- Forward KL ----

    def _forward_kl(self, iteration: int, micro_batch: int, scale: float, last: bool) -> dict[str, float]:
        """Regression onto the teacher's trajectories, with the teacher's noise levels."""
        assert self.pairs is not None
        config, distill = self.config, self.config.distill
        position = self._positions("generator", iteration, micro_batch)
        chosen = self.pair_order.at(position).tolist()
        shared = keyed_generator("forward KL", config.runtime.seed, iteration)
        step = int(torch.randint(distill.forward_kl_steps, (), generator=shared))
        points = self.pairs.read(
            chosen, [0, step, step + 1] if distill.forward_kl_mode == "rollout" else [step, step + 1]
        )
        points = points.to(self.device, torch.float32)  # [B, 2 or 3, F, C, h, w]
        point, next_point = points[:, -2], points[:, -1]
        sigma, next_sigma = self.pairs.sigmas[step : step + 2]
        embeddings = self.text.encode([self.pairs.prompts[i] for i in chosen])
        sync_gradients(self.generator, last)
        with mixed_precision(config, self.device):
            if distill.forward_kl_mode == "rollout":
                seen, flow = self._roll_out_from(points[:, 0], step, embeddings)
            else:
                seen = point
                flow = self._flow_of_clip(point, sigma, embeddings, distill.forward_kl_mode == "bidirectional")
        leaf = flow.detach().requires_grad_()
        loss = forward_kl_loss(leaf, point, next_point, sigma, next_sigma, distill.forward_kl_form, seen)
        weight = distill.forward_kl_weight
        [at_flow] = torch.autograd.grad(weight * loss, leaf)
        flow.backward(scale * at_flow)
        return {
            "forward_kl": loss.item(),
            # By x0, as DMD's: a change of x0 is -sigma times one of the flow.
            "forward_kl_output_gradient": (at_flow / sigma).norm().item(),
            f"motion_{distill.forward_kl_mode}": motion(flow_to_x0(seen, flow.detach(), sigma)).item(),
        }

    @torch.no_grad()
    def _bidirectional_motion(self, generated: Generated, embeddings: Tensor) -> float:
        """Motion of what the generator, attending bidirectionally, takes a rollout's noise to be. Causal rollouts can
        come to stand still while this still moves (HiAR, arXiv 2603.08703, section 3.3)."""
        length = self.config.data.num_frames // self.config.rollout.block_frames
        noise = torch.cat([generated.rollout.noise(block, 0) for block in sorted(generated.blocks)[-length:]], dim=1)
        with mixed_precision(self.config, self.device):
            flow = self._flow_of_clip(noise, self.sigmas[0], embeddings, bidirectional=True)
        return motion(flow_to_x0(noise, flow, self.sigmas[0])).item()

    def _flow_of_clip(self, point: Tensor, sigma: float, embeddings: Tensor, bidirectional: bool) -> Tensor:
        """The generator's flow of whole clips at once: bidirectionally, or block-causally as rollouts see them."""
        x, rollout = point.transpose(1, 2), self.config.rollout
        if bidirectional:
            timestep = torch.full((len(point),), 1000 * sigma, device=self.device)
            return self.generator(x, timestep, embeddings).transpose(1, 2)
        frames = point.shape[1]
        context, sink = context_frames(rollout, frames)
        causal = BlockCausal((rollout.block_frames,) * (frames // rollout.block_frames), context, sink)
        timestep = torch.full((len(point), frames), 1000 * sigma, device=self.device)
        return self.generator(x, timestep, embeddings, causal=causal).transpose(1, 2)

    def _roll_out_from(self, start: Tensor, exit_step: int, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """The point that a deterministic rollout along the teacher's levels comes to, and the flow there.

        start: the trajectories' noise [B, F, C, h, w].
        """
        assert self.pairs is not None
        rollout_config = self.config.rollout
        size, frames = start.shape[:2]
        block_frames = rollout_config.block_frames
        schedule = build_schedule(rollout_config, frames)
        context, sink = context_frames(rollout_config, frames)
        height, width = start.shape[-2:]
        dtype = DTYPES[self.config.train.dtype]
        # Pairs need not have the levels behind those that the loss reads, but a clean context is written at the last.
        sigmas = self.pairs.sigmas + [0.0] * (len(self.sigmas) - len(self.pairs.sigmas))
        rollout = Rollout(
            self._denoiser(embeddings, graph=True),
            sigmas,
            lambda block, step: start[:, block * block_frames : (block + 1) * block_frames],
            lambda: self.generator.new_cache(size, height, width, context, block_frames, sink, 0, dtype),
            BlockLayout(block_frames),
            deterministic=True,
            exit_step=exit_step,
            with_grad=lambda block: True,
        )
        blocks = dict(rollout.run(list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)))
        x0 = torch.cat([blocks[block] for block in sorted(blocks)], dim=1)
        point = torch.cat([rollout.exits[block].x for block in sorted(blocks)], dim=1)
        return point, (point - x0) / self.pairs.sigmas[exit_step]

    # ---- Shared ----

    def _positions(self, turn: str, iteration: int, micro_batch: int) -> range:
        """Where in the endless order of prompts this part of the batch stands."""
        number = iteration // self.config.distill.generator_every if turn == "generator" else iteration
        return batch_positions(self.config.train, number, micro_batch)

    def _embeddings(self, turn: str, iteration: int, micro_batch: int) -> Tensor:
        """Prompt embeddings [B, L, text_dim] of a part of the batch."""
        return self.text.of(self.orders[turn].at(self._positions(turn, iteration, micro_batch)))

    def _denoiser(self, embeddings: Tensor, graph: bool) -> Denoiser:
        with torch.set_grad_enabled(graph), mixed_precision(self.config, self.device):
            return Denoiser(self.generator, self.generator.encode_text(embeddings))

    def _noised(self, clip: Tensor, draws: ClipRandom) -> tuple[Tensor, Tensor, Tensor]:
        """A noise level for every clip [B], evenly drawn, shifted, clamped; the clips at it; their noise."""
        distill = self.config.distill
        noise = draws.normal(clip.shape[1:]).to(clip)
        sigma = shift_sigma(draws.stratified()[:, 0], distill.timestep_shift)
        sigma = sigma.clamp(distill.min_timestep / 1000, distill.max_timestep / 1000).to(self.device)
        return sigma, add_noise(clip, noise, sigma.view(-1, 1, 1, 1, 1)), noise

    def _latent_size(self) -> tuple[int, int]:
        return latent_size(self.config.video)

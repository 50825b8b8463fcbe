"""Self-rollouts: training runs the generator as inference does, up to a random exit step (arXiv 2506.08009)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import block_layout, build_rollout, build_schedule, context_frames, frames_per_block, rollout_sigmas
from pipeline.history_replay import ReplayPlan, plan_replay, replay_exit_step
from pipeline.training_rollout import TrainingRollout
from trainer.networks import mixed_precision
from trainer.objectives.clip_source import ROLES, ClipBatch, ClipSource
from trainer.sharding import sync_gradients
from utils.config import Config
from utils.device import DTYPES
from utils.rng import keyed_generator


@dataclass
class GeneratedClip:
    """A rollout that stopped at its exit step."""

    rollout: TrainingRollout
    blocks: dict[int, Tensor]  # x0 of every block, [B, block frames, C, h, w]; trained blocks may have a graph
    trained_blocks: range  # the blocks that the loss reaches
    exit_step: int

    @property
    def frames(self) -> Tensor:
        """All frames without a graph, [B, F, C, h, w]."""
        return torch.cat([self.blocks[block].detach() for block in sorted(self.blocks)], dim=1)


def trained_blocks(config: Config, num_frames: int) -> range:
    """Return the blocks of a rollout of `num_frames` frames that the loss reaches.

    A rollout longer than the window trains all blocks of the window but the first, which is masked.
    """
    num_blocks, window = block_layout(config.rollout, num_frames).num_blocks, config.data.num_frames
    masked = num_frames > window
    return range(num_blocks - block_layout(config.rollout, window).num_blocks + masked, num_blocks)


def backward_by_blocks(config: Config) -> bool:
    """Return whether a rollout's backward pass runs block by block."""
    return config.distill.block_backward and config.distill.history_gradient == "none"


def replay_history(config: Config, num_frames: int) -> int:
    """Return the evicted frames that a cache must keep, so that every trained block can be denoised again."""
    layout, first = block_layout(config.rollout, num_frames), trained_blocks(config, num_frames).start
    written, (context, _) = layout.start(layout.num_blocks - 1), context_frames(config.rollout, num_frames)
    return written - layout.start(first) if written > context else 0


def history_plan(config: Config, num_frames: int, exit_step: int) -> ReplayPlan:
    """Return the input of the pass that gives the gradient of `distill.history_gradient`.

    Args:
        num_frames: latent frames of the rollout.
    """
    trained, released = trained_blocks(config, num_frames), config.distill.history_gradient == "released"
    return plan_replay(
        build_schedule(config.rollout, num_frames).ops_until(exit_step),
        block_layout(config.rollout, num_frames),
        exit_step,
        # The released code also keeps the graph of the masked block before the trained ones.
        range(max(0, trained.start - released), trained.stop),
        *context_frames(config.rollout, num_frames),
        released=released,
    )


class SelfRollout(ClipSource[GeneratedClip]):
    """Rolls the generator out, and propagates gradients at the generated clips back into it."""

    def __init__(self, config: Config, generator: CausalWanModel, device: torch.device):
        self.config, self.generator, self.device = config, generator, device
        self.sigmas = rollout_sigmas(config.rollout)
        self.vae: WanVAE | None = None  # re-encodes a frame of rollouts that are longer than the training window
        if config.distill.max_rollout_frames > config.data.num_frames:
            vae = ModelDirectory.open(config.model.base).load_vae(DTYPES[config.train.dtype])
            self.vae = WanVAE(vae.to(device))

    def run(self, batch: ClipBatch, trained: bool = True) -> GeneratedClip:
        """Roll the generator out by the configured schedule, up to an exit step.

        The exit step and the length depend only on (seed, role, iteration), so all micro-batches and ranks agree.
        With `distill.block_backward` or a `history_gradient`, no graph is kept: `backward` denoises the trained blocks
        again.
        """
        config = self.config
        through_history = trained and config.distill.history_gradient != "none"
        keep_graph = trained and not config.distill.block_backward and not through_history
        exit_step, num_frames = self._draw_exit(batch.role, batch.iteration)
        blocks_in_loss = trained_blocks(config, num_frames) if trained else range(0)
        rollout = build_rollout(
            config,
            self._denoiser(batch.embeddings, keep_graph),
            [len(ROLES) * position + ROLES.index(batch.role) for position in batch.positions],
            num_frames=num_frames,
            dtype=DTYPES[config.train.dtype],
            history_frames=replay_history(config, num_frames) if blocks_in_loss and backward_by_blocks(config) else 0,
            rollout_class=TrainingRollout,
            exit_step=exit_step,
            with_grad=lambda block: keep_graph and block in blocks_in_loss,
            keep_contexts=through_history,
        )
        with mixed_precision(config, self.device):
            blocks = self._finished_blocks(rollout, num_frames)
        return GeneratedClip(rollout, blocks, blocks_in_loss, exit_step)

    def from_noise(
        self, noise: Tensor, sigmas: Sequence[float], exit_step: int, embeddings: Tensor, positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Roll out deterministically (Euler steps) from given noise along given noise levels.

        Args:
            noise: [B, F, C, h, w].
            sigmas: noise levels of the steps, S + 1 values; values missing after the exit step count as 0.
            positions: the clips' positions in the order of pairs; they key the noise of contexts.

        Returns:
            x at the exit step and the flow there, both [B, F, C, h, w]. The flow has a graph.
        """
        config = self.config
        num_frames = noise.shape[1]
        rollout = build_rollout(
            config,
            self._denoiser(embeddings, graph=True),
            [-1 - position for position in positions],  # `run` uses the other sample numbers
            num_frames=num_frames,
            size=(noise.shape[-2], noise.shape[-1]),
            dtype=DTYPES[config.train.dtype],
            rollout_class=TrainingRollout,
            sigmas=[*sigmas, *[0.0] * (len(self.sigmas) - len(sigmas))],
            deterministic=True,
            exit_step=exit_step,
            with_grad=lambda block: True,
        )
        layout, fresh_noise = rollout.layout, rollout.noise
        rollout.noise = lambda block, step: (
            fresh_noise(block, step) if step else noise[:, layout.start(block) : layout.start(block + 1)]
        )
        blocks = self._finished_blocks(rollout, num_frames)
        x0 = torch.cat([blocks[block] for block in sorted(blocks)], dim=1)
        x = torch.cat([rollout.exit_inputs[block].x for block in sorted(blocks)], dim=1)
        return x, (x - x0) / sigmas[exit_step]

    def training_window(self, clip: GeneratedClip) -> tuple[Tensor, Tensor | None]:
        """Return the last `data.num_frames` frames [B, F, C, h, w] and their loss mask [B, F], None for all ones.

        The first frame of a clip holds one pixel frame, later frames hold four. So in a longer rollout, the window's
        first frame is decoded and encoded again on its own. Its block is masked.
        """
        frames, window = clip.frames, self.config.data.num_frames
        if frames.shape[1] == window:
            return frames, None
        assert self.vae is not None
        before, latents = frames[:, : -(window - 1)], frames[:, -window:].clone()
        image = self.vae.decode(before)[:, -1:]
        latents[:, :1] = self.vae.encode(image).to(latents)
        mask = torch.ones(latents.shape[:2], device=latents.device)
        mask[:, : block_layout(self.config.rollout, window).frames(0)] = 0
        return latents, mask

    def backward(self, clip: GeneratedClip, gradient: Tensor, embeddings: Tensor, last: bool) -> None:
        """Propagate the gradient at the training window, [B, F, C, h, w], back into the generator.

        Without a graph the trained blocks are denoised again: one by one, as no gradient crosses blocks, or with a
        `history_gradient` in one pass (law 6, docs/method.md).

        Args:
            last: whether the generator's gradients are complete afterwards, see `Objective.backward`.
        """
        layout = clip.rollout.layout
        window_start = layout.start(len(clip.blocks)) - gradient.shape[1]  # in frames
        gradients = {
            block: gradient[:, layout.start(block) - window_start :][:, : layout.frames(block)]
            for block in clip.trained_blocks
        }
        if self.config.distill.history_gradient != "none" and gradients:
            sync_gradients(self.generator, last)
            with mixed_precision(self.config, self.device):
                plan = history_plan(self.config, layout.start(len(clip.blocks)), clip.exit_step)
                replayed = replay_exit_step(clip.rollout, plan, self._denoiser(embeddings, graph=True))
            torch.autograd.backward([replayed[block] for block in gradients], list(gradients.values()))
            return
        if not self.config.distill.block_backward:
            sync_gradients(self.generator, last)
            torch.autograd.backward([clip.blocks[block] for block in gradients], list(gradients.values()))
            return
        for block, block_gradient in gradients.items():
            sync_gradients(self.generator, last and block == clip.trained_blocks[-1])
            with mixed_precision(self.config, self.device):
                clip.rollout.denoiser = self._denoiser(embeddings, graph=True)
                x0 = clip.rollout.replay(block)
            x0.backward(block_gradient)

    def noise(self, clip: GeneratedClip) -> Tensor:
        """Return the noise at the first step of the training window's blocks, [B, F, C, h, w]."""
        window = self.config.data.num_frames
        blocks = sorted(clip.blocks)[-block_layout(self.config.rollout, window).num_blocks :]
        return torch.cat([clip.rollout.noise(block, 0) for block in blocks], dim=1)[:, -window:]

    def metrics(self, clip: GeneratedClip) -> dict[str, float]:
        return {"exit_step": float(clip.exit_step)}

    def _draw_exit(self, role: str, iteration: int) -> tuple[int, int]:
        """Return the exit step and the number of frames of an iteration's rollouts, both uniform."""
        distill, window = self.config.distill, self.config.data.num_frames
        block_frames = frames_per_block(self.config.rollout, window)
        shared = keyed_generator("rollout", self.config.runtime.seed, role, iteration)
        exit_step = int(torch.randint(distill.min_exit_step, len(self.sigmas) - 1, (), generator=shared))
        max_extra_blocks = (distill.max_rollout_frames - window) // block_frames
        extra_blocks = int(torch.randint(max_extra_blocks + 1, (), generator=shared))
        return exit_step, window + extra_blocks * block_frames

    def _finished_blocks(self, rollout: TrainingRollout, num_frames: int) -> dict[int, Tensor]:
        """Run a rollout up to its exit step; return the x0 of every block."""
        schedule, exit_step = build_schedule(self.config.rollout, num_frames), rollout.final_step
        return dict(rollout.run(list(schedule.ops_until(exit_step)), schedule.caches_until(exit_step)))

    def _denoiser(self, embeddings: Tensor, graph: bool) -> Denoiser:
        with torch.set_grad_enabled(graph), mixed_precision(self.config, self.device):
            text = self.generator.encode_text(embeddings)
            return Denoiser(self.generator, text, reuse_conditioning=False)

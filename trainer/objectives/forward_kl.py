"""Forward KL: regression of the generator onto teacher trajectories (HiAR, arXiv 2603.08703, section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.attention import BlockCausalMask
from model.denoiser import clip_flow
from model.flow import flow_to_x0
from pipeline.build import block_layout, context_frames, latent_size, rollout_sigmas
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.ode_pairs import ODEPairs, open_ode_pairs
from trainer.datasets.order import DataOrder
from trainer.networks import mixed_precision
from trainer.objectives.losses import forward_kl_loss, motion
from trainer.objectives.self_rollout import SelfRollout
from trainer.sharding import sync_gradients
from utils.config import Config
from utils.errors import UserError
from utils.rng import keyed_generator


def open_forward_kl_pairs(config: Config) -> ODEPairs:
    """Open the ODE pairs of `config.data` and check that the configured forward KL can use them.

    Raises:
        UserError: if there are no pairs, or their frames or noise levels do not fit the rollout.
    """
    path, distill = config.data.path, config.distill
    pairs = open_ode_pairs(path, config.data.sigmas, distill.forward_kl_steps + 1)
    pairs.check_size(config.data.num_frames, latent_size(config.video), path)
    pairs.check_blocks(config.rollout, path)
    if distill.forward_kl_mode == "rollout" and len(pairs.sigmas) > len(rollout_sigmas(config.rollout)):
        raise UserError(
            f"the ODE pairs in {path} have {len(pairs.sigmas) - 1} steps, more than the rollout; "
            "choose another distill.forward_kl_mode, or generate pairs with fewer points"
        )
    return pairs


class ForwardKL:
    """The forward-KL term of score distillation.

    The loss draws one of the first `forward_kl_steps` steps. It compares the generator's flow with the chord from the
    teacher's point at this step to the next point. The generator is conditioned on the teacher's noise level.
    `forward_kl_mode` selects how it predicts the flow:
    - bidirectional: bidirectional attention over the teacher's point (the paper);
    - block_causal: one block-causal pass over the teacher's point (the released code);
    - rollout: a deterministic rollout from the trajectory's noise, at the rollout's own point.
    """

    def __init__(self, config: Config, pairs: ODEPairs, self_rollout: SelfRollout, text: CaptionEmbeddings):
        self.config, self.pairs, self.self_rollout, self.text = config, pairs, self_rollout, text
        self.generator, self.device = self_rollout.generator, self_rollout.device
        pairs.check_channels(self.generator.config.in_channels, config.data.path)
        self.order = DataOrder(len(pairs), "pairs", config.runtime.seed)

    def backward(self, iteration: int, positions: Sequence[int], scale: float, last: bool) -> dict[str, float]:
        """Add `scale` times the gradient of the weighted loss to the generator's gradients; return values to log.

        Args:
            positions: the micro-batch's positions in the order of pairs.
            last: whether the generator's gradients are complete afterwards, see `Objective.backward`.
        """
        config, distill = self.config, self.config.distill
        chosen = self.order.at(positions).tolist()
        shared = keyed_generator("forward KL", config.runtime.seed, iteration)
        step = int(torch.randint(distill.forward_kl_steps, (), generator=shared))
        indices = [0, step, step + 1] if distill.forward_kl_mode == "rollout" else [step, step + 1]
        points = self.pairs.read(chosen, indices)  # [B, 2 or 3, F, C, h, w]
        points = points.to(self.device, torch.float32, non_blocking=True)
        point, next_point = points[:, -2], points[:, -1]
        sigma, next_sigma = self.pairs.sigmas[step : step + 2]
        embeddings = self.text.encode([self.pairs.prompts[i] for i in chosen])
        sync_gradients(self.generator, last)
        with mixed_precision(config, self.device):
            x, flow = self.predict(points[:, 0], point, step, embeddings, positions)
        leaf = flow.detach().requires_grad_()
        loss = forward_kl_loss(leaf, point, next_point, sigma, next_sigma, distill.forward_kl_form, x)
        [flow_gradient] = torch.autograd.grad(distill.forward_kl_weight * loss, leaf)
        flow.backward(scale * flow_gradient)
        return {
            "forward_kl": loss.item(),
            # With respect to x0, for comparison with DMD's: dx0 = -sigma dflow.
            "forward_kl_output_gradient": (flow_gradient / sigma).norm().item(),
            f"motion_{distill.forward_kl_mode}": motion(flow_to_x0(x, flow.detach(), sigma)).item(),
        }

    def predict(
        self, noise: Tensor, point: Tensor, step: int, embeddings: Tensor, positions: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Return the generator's x at a step and its flow there, both [B, F, C, h, w], in the configured mode.

        Args:
            noise: the trajectories' first point; only mode `rollout` reads it.
            point: the trajectories' point at `step`.
            positions: see `backward`.
        """
        sigma, mode = self.pairs.sigmas[step], self.config.distill.forward_kl_mode
        if mode == "rollout":
            return self.self_rollout.from_noise(noise, self.pairs.sigmas, step, embeddings, positions)
        if mode == "bidirectional":
            return point, clip_flow(self.generator, point, sigma, embeddings)
        rollout, num_frames = self.config.rollout, point.shape[1]
        causal = BlockCausalMask(block_layout(rollout, num_frames).sizes, *context_frames(rollout, num_frames))
        return point, clip_flow(self.generator, point, sigma, embeddings, causal)

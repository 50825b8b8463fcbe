"""ODE regression: the causal initialisation."""

from pathlib import Path

import torch
from torch import Tensor

from model.causal_wan import BlockCausal
from model.flow import flow_to_x0
from pipeline.build import rollout_sigmas
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.ode_pairs import open_ode_pairs
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions
from trainer.networks import build_transformer, export_transformer, mixed_precision
from trainer.objectives.base import SingleNet
from trainer.objectives.losses import masked_mse
from trainer.sampling import VideoSampler
from utils.config import Config
from utils.errors import UserError


class ODERegression(SingleNet):
    """Causal initialisation: from every level of a teacher trajectory to its end, block-causally, each block at a level
    of its own (CausVid, arXiv 2412.07772, section 4.2)."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.net = build_transformer(config, device)
        rollout = config.rollout
        num_levels = len(rollout_sigmas(rollout))
        self.pairs = open_ode_pairs(config.data.path, config.data.sigmas, num_levels)
        if len(self.pairs.sigmas) != num_levels:
            raise UserError(
                f"the pairs in {config.data.path} have points at {len(self.pairs.sigmas)} noise levels, but the "
                f"rollout has {num_levels}; make them with as many --save_indices"
            )
        if self.pairs.sigmas[-1] != 0:
            raise UserError(
                f"the trajectories in {config.data.path} end at the noise level {self.pairs.sigmas[-1]:.4g}, but their "
                "ends are what is learned and must be clean; make them with the last of --save_indices -1"
            )
        self.sigmas = torch.tensor(self.pairs.sigmas)  # the teacher's, which the student has to be told
        self.pairs.check_blocks(rollout.block_frames, config.data.path)
        self.text = CaptionEmbeddings(config, self.pairs.prompts, device)
        self.order = DataOrder(len(self.pairs), "pairs", config.runtime.seed)
        self.sampler = VideoSampler(config, self.net, self.text, self.pairs.prompts)

    def data_summary(self) -> str:
        """Return the number of ODE pairs."""
        return f"{len(self.pairs):,} ODE pairs in {self.config.data.path}"

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of x0 over the frames that are not clean already."""
        train, rollout = self.config.train, self.config.rollout
        chosen = self.order.at(batch_positions(train, iteration, micro_batch))
        points = self.pairs.read(chosen.tolist()).to(self.device, torch.float32)  # [B, S + 1, F, C, h, w]
        num_frames = points.shape[2]
        num_blocks = num_frames // rollout.block_frames
        levels = ClipRandom(self.config, "ode regression", iteration, micro_batch).integers(
            len(self.sigmas), num_blocks
        )
        levels = levels.repeat_interleave(rollout.block_frames, dim=1).to(self.device)  # [B, F]
        x = points.gather(1, levels[:, None, :, None, None, None].expand(-1, 1, -1, *points.shape[3:]))[:, 0]
        sigma = self.sigmas.to(self.device)[levels]
        causal = BlockCausal((rollout.block_frames,) * num_blocks)
        with mixed_precision(self.config, self.device):
            flow = self.net(x.transpose(1, 2), 1000 * sigma, self.text.of(chosen), causal=causal).transpose(1, 2)
        x0 = flow_to_x0(x, flow, sigma[:, :, None, None, None])
        noisy = (levels < len(self.sigmas) - 1).float()
        return masked_mse(x0, points[:, -1], noisy), {}

    def sample(self, folder: Path) -> None:
        """Write videos of the first prompts."""
        self.sampler.write(folder)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the transformer to `folder`."""
        export_transformer(self.net, folder, weights)

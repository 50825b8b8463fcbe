"""ODE regression: initialises the causal generator from teacher trajectories."""

import torch
from torch import Tensor

from model.attention import BlockCausalMask
from model.denoiser import clip_flow
from model.flow import flow_to_x0
from pipeline.build import block_layout, latent_size, rollout_sigmas
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.ode_pairs import open_ode_pairs
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions
from trainer.networks import build_transformer, mixed_precision
from trainer.objectives.base import SingleNetObjective
from trainer.objectives.losses import masked_mse
from trainer.sampling import VideoSampler
from utils.config import Config
from utils.errors import UserError


class ODERegression(SingleNetObjective):
    """Regression from every point of a teacher trajectory to its clean end (CausVid, arXiv 2412.07772, section 4.2).

    Each block has its own random point, and attention is block-causal. A bidirectional generator has one per clip.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.net = build_transformer(config, device)
        num_points = len(rollout_sigmas(config.rollout))
        path = config.data.path
        self.pairs = open_ode_pairs(path, config.data.sigmas, num_points)
        if len(self.pairs.sigmas) != num_points:
            raise UserError(
                f"the pairs in {path} have points at {len(self.pairs.sigmas)} noise levels, but the rollout has "
                f"{num_points}; regenerate them with that many --save_indices"
            )
        if self.pairs.sigmas[-1] != 0:
            raise UserError(
                f"the trajectories in {path} end at the noise level {self.pairs.sigmas[-1]:.4g}, but ODE regression "
                "needs clean ends; regenerate them with --save_indices ... -1"
            )
        self.pairs.check_size(config.data.num_frames, latent_size(config.video), path)
        self.pairs.check_channels(self.net.config.in_channels, path)
        self.pairs.check_blocks(config.rollout, path)
        self.sigmas = torch.tensor(self.pairs.sigmas)  # the teacher's levels: the network must be conditioned on these
        self.text = CaptionEmbeddings(config, self.pairs.prompts, device)
        self.order = DataOrder(len(self.pairs), "pairs", config.runtime.seed)
        self.sampler = VideoSampler(config, self.net, self.text, self.pairs.prompts)

    def data_summary(self) -> str:
        return f"{len(self.pairs):,} ODE pairs in {self.config.data.path}"

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        chosen = self.order.at(batch_positions(self.config.train, iteration, micro_batch))
        points = self.pairs.read(chosen.tolist()).to(self.device, torch.float32)  # [B, S + 1, F, C, h, w]
        blocks = block_layout(self.config.rollout, points.shape[2]).sizes
        random = ClipRandom(self.config, "ode regression", iteration, micro_batch)
        index = random.integers(len(self.sigmas), len(blocks))  # of the point of each block
        index = index.repeat_interleave(torch.tensor(blocks), dim=1).to(self.device)  # [B, F]
        x = points.gather(1, index[:, None, :, None, None, None].expand(-1, 1, -1, *points.shape[3:]))[:, 0]
        sigma = self.sigmas.to(self.device)[index]
        bidirectional = self.config.rollout.schedule == "bidirectional"
        mask = None if bidirectional else BlockCausalMask(blocks)
        with mixed_precision(self.config, self.device):
            flow = clip_flow(self.net, x, sigma[:, 0] if bidirectional else sigma, self.text.of(chosen), mask)
        x0 = flow_to_x0(x, flow, sigma[:, :, None, None, None])
        noisy = (index < len(self.sigmas) - 1).float()  # clean blocks have nothing to predict
        return masked_mse(x0, points[:, -1], noisy), {}

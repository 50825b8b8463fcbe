"""Flow matching on encoded clips, for bidirectional and causal networks."""

from pathlib import Path

import torch
from torch import Tensor

from model.causal_wan import BlockCausal
from model.flow import add_noise, shift_sigma
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.clips import open_clips
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions
from trainer.networks import build_transformer, export_transformer, mixed_precision
from trainer.objectives.base import SingleNet, draw_length
from trainer.objectives.losses import flow_matching_loss
from trainer.sampling import VideoSampler
from utils.config import Config
from utils.errors import UserError


class FlowMatching(SingleNet):
    """Flow matching on encoded clips, text dropped at times.

    It trains a bidirectional net, at one noise level per clip, or by `train.forcing` a causal one, at one per block:
    beside the noisy past (diffusion forcing, arXiv 2407.01392) or the clean one (teacher forcing).
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.net = build_transformer(config, device)
        self.clips = open_clips(config.data.path)
        captions, longest = self.clips.captions, 4 * (self.clips.shape[0] - 1) + 1
        if max(config.train.clip_frames, default=0) > longest:
            raise UserError(
                f"train.clip_frames={config.train.clip_frames} asks for more than the {longest} pixel frames of the "
                f"clips in {config.data.path}"
            )
        self.block_frames = config.rollout.block_frames if config.train.forcing != "none" else 0
        lengths = [(n - 1) // 4 + 1 for n in config.train.clip_frames] or [self.clips.shape[0]]
        if self.block_frames and any(frames % self.block_frames for frames in lengths):
            raise UserError(
                f"blocks of {self.block_frames} latent frames do not divide clips of {' or '.join(map(str, lengths))}; "
                "change train.clip_frames or rollout.block_frames"
            )
        self.text = CaptionEmbeddings(config, captions, device)
        self.sampler = VideoSampler(config, self.net, self.text, captions, bidirectional=not self.block_frames)
        self.order = DataOrder(len(captions), "clips", config.runtime.seed)

    def data_summary(self) -> str:
        """Return the number and the length of the clips."""
        return f"{len(self.clips.captions):,} clips of {self.clips.shape[0]} latent frames in {self.config.data.path}"

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the flow (Wan2.1, section 4.2)."""
        train = self.config.train
        num_clips, num_frames = train.batch_size, self.clips.shape[0]
        if train.clip_frames:
            num_clips, num_pixel_frames = draw_length(self.config, iteration)
            num_frames = (num_pixel_frames - 1) // 4 + 1
        chosen = self.order.at(batch_positions(train, iteration, micro_batch)[:num_clips])
        x0 = self.clips.read(chosen.tolist())[:, :num_frames].to(self.device, torch.float32)
        num_blocks = num_frames // self.block_frames if self.block_frames else 1
        draws = ClipRandom(self.config, "flow matching", iteration, micro_batch, num_clips)
        u = draws.stratified(num_blocks).repeat_interleave(num_frames // num_blocks, dim=1)
        sigma = shift_sigma(u, train.timestep_shift).to(self.device)
        noise = draws.normal(x0.shape[1:]).to(self.device)
        dropped = draws.uniform() < train.text_dropout
        x = add_noise(x0, noise, sigma.view(*sigma.shape, 1, 1, 1))
        with mixed_precision(self.config, self.device):
            flow = self._flow(x0, x, sigma, self.text.of(chosen, dropped))
        weight = torch.ones(x0.shape[:2], device=self.device)
        weight[:, 0] = train.first_frame_weight
        return flow_matching_loss(flow, x0, noise, weight), {}

    def _flow(self, x0: Tensor, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """The net's flow of x [B, F, C, h, w] at levels [B, F], beside what `train.forcing` has it see."""
        frames = x.shape[1]
        if not self.block_frames:
            return self.net(x.transpose(1, 2), 1000 * sigma[:, 0], text).transpose(1, 2)
        beside_clean = self.config.train.forcing == "teacher"
        causal = BlockCausal((self.block_frames,) * (frames // self.block_frames), beside_clean=beside_clean)
        if beside_clean:
            x, sigma = torch.cat([x0, x], dim=1), torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        return self.net(x.transpose(1, 2), 1000 * sigma, text, causal=causal).transpose(1, 2)[:, -frames:]

    def sample(self, folder: Path) -> None:
        """Write videos of the first prompts."""
        self.sampler.write(folder)

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write the transformer to `folder`."""
        export_transformer(self.net, folder, weights)

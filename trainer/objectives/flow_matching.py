"""Flow matching on encoded clips, for bidirectional and causal networks."""

import torch
from torch import Tensor

from model.attention import BlockCausalMask
from model.denoiser import clip_flow
from model.flow import add_noise, shift_sigma
from pipeline.build import block_layout, describe_blocks
from trainer.datasets.captions import CaptionEmbeddings
from trainer.datasets.clips import open_clips
from trainer.datasets.order import ClipRandom, DataOrder, batch_positions, draw_clip_length
from trainer.networks import build_transformer, mixed_precision
from trainer.objectives.base import SingleNetObjective
from trainer.objectives.losses import flow_matching_loss
from trainer.sampling import VideoSampler
from utils.config import Config
from utils.errors import UserError


class FlowMatching(SingleNetObjective):
    """Flow matching on encoded clips with text dropout (Wan2.1, arXiv 2503.20314, section 4.2).

    `train.forcing` selects the network and the noise:
    - none: bidirectional attention, one noise level per clip;
    - diffusion: causal attention, one noise level per block, noisy earlier blocks (arXiv 2407.01392);
    - teacher: causal attention, one noise level per block, clean earlier blocks (teacher forcing).
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        self.net = build_transformer(config, device)
        self.clips = open_clips(config.data.path)
        captions = self.clips.captions
        self.causal = config.train.forcing != "none"
        self._check_lengths()
        self.text = CaptionEmbeddings(config, captions, device)
        self.sampler = VideoSampler(config, self.net, self.text, captions, bidirectional=not self.causal)
        self.order = DataOrder(len(captions), "clips", config.runtime.seed)

    def _check_lengths(self) -> None:
        """Check that the clips are long enough for `train.clip_frames` and divide into blocks."""
        config, clip_frames = self.config, self.config.train.clip_frames
        num_pixel_frames = 4 * (self.clips.shape[0] - 1) + 1
        if max(clip_frames, default=0) > num_pixel_frames:
            raise UserError(
                f"train.clip_frames={clip_frames} exceeds the {num_pixel_frames} pixel frames of the clips in "
                f"{config.data.path}; encode longer clips or change train.clip_frames"
            )
        lengths = [(n - 1) // 4 + 1 for n in clip_frames] or [self.clips.shape[0]]
        if self.causal and not all(block_layout(config.rollout, frames).is_whole for frames in lengths):
            frames = " or ".join(map(str, lengths))
            raise UserError(
                f"{describe_blocks(config.rollout)} do not divide clips of {frames} latent frames; "
                "change train.clip_frames or rollout.block_frames"
            )

    def data_summary(self) -> str:
        return f"{len(self.clips.captions):,} clips of {self.clips.shape[0]} latent frames in {self.config.data.path}"

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        train = self.config.train
        num_clips, num_frames = train.batch_size, self.clips.shape[0]
        if train.clip_frames:
            num_clips, num_pixel_frames = draw_clip_length(self.config, iteration)
            num_frames = (num_pixel_frames - 1) // 4 + 1
        chosen = self.order.at(batch_positions(train, iteration, micro_batch)[:num_clips])
        x0 = self.clips.read(chosen.tolist())[:, :num_frames].to(self.device, torch.float32)
        random = ClipRandom(self.config, "flow matching", iteration, micro_batch, num_clips)
        blocks = block_layout(self.config.rollout, num_frames).sizes if self.causal else (num_frames,)
        u = random.stratified(len(blocks)).repeat_interleave(torch.tensor(blocks), dim=1)
        sigma = shift_sigma(u, train.timestep_shift).to(self.device)  # [B, F]
        noise = random.normal(x0.shape[1:]).to(self.device)
        dropped = random.uniform() < train.text_dropout
        x = add_noise(x0, noise, sigma.view(*sigma.shape, 1, 1, 1))
        with mixed_precision(self.config, self.device):
            flow = self._flow(x0, x, sigma, self.text.of(chosen, dropped))
        weight = torch.ones(x0.shape[:2], device=self.device)
        weight[:, 0] = train.first_frame_weight
        return flow_matching_loss(flow, x0, noise, weight), {}

    def _flow(self, x0: Tensor, x: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        """Return the network's flow at x, both [B, F, C, h, w], for noise levels sigma [B, F]."""
        if not self.causal:
            return clip_flow(self.net, x, sigma[:, 0], text)
        num_frames = x.shape[1]
        teacher_forcing = self.config.train.forcing == "teacher"
        blocks = block_layout(self.config.rollout, num_frames).sizes
        causal = BlockCausalMask(blocks, teacher_forcing=teacher_forcing)
        if teacher_forcing:  # the clean clip comes first, as the past of the noisy one
            x, sigma = torch.cat([x0, x], dim=1), torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        return clip_flow(self.net, x, sigma, text, causal)[:, -num_frames:]

"""What can be learned: each objective owns its networks and computes one iteration's loss."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model import presets
from model.causal_wan import BlockCausal
from model.flow import add_noise, flow_to_x0, shift_sigma
from model.vae import channels_last_, decode_clip, encode_clip
from model.weights import ModelDirectory
from pipeline.text_to_video import rollout_sigmas
from trainer.distillation import ScoreDistillation
from trainer.losses import flow_matching_loss, kl_to_standard_normal, masked_mse
from trainer.networks import (
    CaptionEmbeddings,
    Draws,
    Sampler,
    batch_positions,
    build_transformer,
    compute_in,
    export_transformer,
    preset,
)
from trainer.sampling import VideoSampler
from trainer.sharding import sync_gradients
from trainer.trainer import Objective
from utils import shapes
from utils.clips import open_clips
from utils.config import Config
from utils.errors import UserError
from utils.ode_pairs import open_ode_pairs


class SingleNet:
    """An objective of one network with one loss."""

    net: Any
    config: Config

    @property
    def nets(self) -> dict[str, nn.Module]:
        """The one network."""
        return {"net": self.net}

    def learning_rate(self, name: str) -> float:
        """The configuration's."""
        return self.config.train.learning_rate

    def turns(self, iteration: int) -> list[str]:
        """Always the one."""
        return ["net"]

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """The loss of a part of the batch, and what to log beside it."""
        raise NotImplementedError

    def sample(self, folder: Path) -> None:
        """It makes no videos by itself."""

    def backward(self, name: str, iteration: int, part: int, scale: float, last: bool) -> dict[str, float]:
        """Backward through `loss`."""
        loss, metrics = self.loss(iteration, part)
        sync_gradients(self.net, last)
        (loss * scale).backward()
        return {"loss": loss.item()} | metrics


class TextAttributes(SingleNet):
    """The miniature's text encoder, pre-trained to tell a caption's attributes; the heads are thrown away.

    Trained together with the DiT, a text encoder this small lags far behind it. It reads the captions of held-out
    scenes too, as a real one has read all language: what is held out is how they look. Without them it took a green
    circle on blue for a blue one on green.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        encoder = UMT5EncoderModel(UMT5Config(**preset(presets.TEXT_ENCODERS, config)))
        width = encoder.config.d_model
        heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in shapes.NUM_CLASSES.items()})
        self.encoder, self.heads = encoder, heads
        self.net = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)
        self.tokenizer = ByT5Tokenizer()

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of every attribute from the mean embedding."""
        seed = self.config.runtime.seed
        # A seventh of the scenes are held out.
        numbers = batch_positions(self.config.train, iteration, part)
        scenes = [shapes.sample_clip(seed, i, held_out=i % 7 == 0).scene for i in numbers]
        tokens = self.tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt").to(self.device)
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        losses, correct = [], []
        for name, head in self.heads.items():
            target = torch.tensor([scene.labels[name] for scene in scenes], device=self.device)
            logits = head(pooled)
            losses.append(F.cross_entropy(logits, target))
            correct.append((logits.argmax(-1) == target).float().mean().item())
        return torch.stack(losses).sum(), {"accuracy": sum(correct) / len(correct)}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `text_encoder/` and `tokenizer/`."""
        encoder = {k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")}
        self.encoder.load_state_dict(encoder)
        self.encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


class VAEReconstruction(SingleNet):
    """The miniature's VAE: pixel error and a small KL term on clips of mixed lengths."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        if config.train.init:
            self.net = ModelDirectory.open(config.train.init).load_vae(torch.float32).to(device).train()
        else:
            self.net = AutoencoderKLWan(**preset(presets.VAES, config)).to(device)
        channels_last_(self.net)
        if config.train.decoder_only:
            self.net.encoder.requires_grad_(False)
            self.net.quant_conv.requires_grad_(False)

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """Absolute and squared error of the reconstruction, and the KL term."""
        train = self.config.train
        num_clips, num_frames = draw_length(self.config, iteration)
        numbers = batch_positions(train, iteration, part)[:num_clips]
        pixels = torch.stack([self.clip(i, num_frames) for i in numbers])
        pixels = pixels.to(self.device, memory_format=torch.channels_last_3d)
        mean, log_variance = encode_clip(self.net, pixels)
        noise = Draws(self.config, "posterior", iteration, part, num_clips).normal(mean.shape[1:]).to(mean)
        latents = mean + noise * (0.5 * log_variance).exp()
        error = decode_clip(self.net, latents) - pixels
        kl = kl_to_standard_normal(mean, log_variance)
        squared = error.square().mean()
        loss = error.abs().mean() + 4 * squared + train.kl_weight * kl
        return loss, {"psnr_db": -10 * np.log10(squared.item() / 4 + 1e-12), "kl": kl.item()}

    def clip(self, index: int, num_frames: int) -> Tensor:
        """Training clip number `index`: pixels [3, T, H, W] in [-1, 1]."""
        return shapes.to_pixels(shapes.render(shapes.sample_clip(self.config.runtime.seed, index), num_frames))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `vae/`, with the latents' mean and deviation per channel, measured unless the encoder is as it was."""
        self.net.load_state_dict(weights)
        if not self.config.train.decoder_only:
            with torch.no_grad():
                clips = (self.clip(i, 33)[None].to(self.device) for i in range(64))
                latents = torch.cat([encode_clip(self.net, clip)[0] for clip in clips])
            std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
            self.net.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        for parameter in self.net.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
        self.net.save_pretrained(folder / "vae")


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
        self.sampler = VideoSampler(config, self.net, self.text.encoder, captions, bidirectional=not self.block_frames)
        self.order = Sampler(len(captions), "clips", config.runtime.seed)

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the flow (Wan2.1, section 4.2)."""
        train = self.config.train
        num_clips, num_frames = train.batch_size, self.clips.shape[0]
        if train.clip_frames:
            num_clips, num_pixel_frames = draw_length(self.config, iteration)
            num_frames = (num_pixel_frames - 1) // 4 + 1
        chosen = self.order.at(batch_positions(train, iteration, part)[:num_clips])
        x0 = self.clips.read(chosen.tolist())[:, :num_frames].to(self.device, torch.float32)
        num_blocks = num_frames // self.block_frames if self.block_frames else 1
        draws = Draws(self.config, "flow matching", iteration, part, num_clips)
        u = draws.even(num_blocks).repeat_interleave(num_frames // num_blocks, dim=1)
        sigma = shift_sigma(u, train.timestep_shift).to(self.device)
        noise = draws.normal(x0.shape[1:]).to(self.device)
        dropped = draws.uniform() < train.text_dropout
        x = add_noise(x0, noise, sigma.view(*sigma.shape, 1, 1, 1))
        with compute_in(self.config, self.device):
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
        if self.pairs.shape[1] % rollout.block_frames:
            raise UserError(
                f"the ODE pairs in {config.data.path} have {self.pairs.shape[1]} frames, which blocks of "
                f"{rollout.block_frames} do not divide; set rollout.block_frames, or make pairs of another --num_frames"
            )
        self.text = CaptionEmbeddings(config, self.pairs.prompts, device)
        self.order = Sampler(len(self.pairs), "pairs", config.runtime.seed)
        self.sampler = VideoSampler(config, self.net, self.text.encoder, self.pairs.prompts)

    def loss(self, iteration: int, part: int) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of x0 over the frames that are not clean already."""
        train, rollout = self.config.train, self.config.rollout
        chosen = self.order.at(batch_positions(train, iteration, part))
        points = self.pairs.read(chosen.tolist()).to(self.device, torch.float32)  # [B, S + 1, F, C, h, w]
        num_frames = points.shape[2]
        num_blocks = num_frames // rollout.block_frames
        levels = Draws(self.config, "ode regression", iteration, part).integers(len(self.sigmas), num_blocks)
        levels = levels.repeat_interleave(rollout.block_frames, dim=1).to(self.device)  # [B, F]
        x = points.gather(1, levels[:, None, :, None, None, None].expand(-1, 1, -1, *points.shape[3:]))[:, 0]
        sigma = self.sigmas.to(self.device)[levels]
        causal = BlockCausal((rollout.block_frames,) * num_blocks)
        with compute_in(self.config, self.device):
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


def draw_length(config: Config, iteration: int) -> tuple[int, int]:
    """How many clips of how many pixel frames a part of iteration `iteration`'s batch holds: about as many pixels
    whatever the length, which is the same for all parts, so that no process waits for another."""
    train = config.train
    rng = np.random.default_rng([config.runtime.seed, iteration])
    num_frames = int(rng.choice(train.clip_frames))
    return max(1, train.batch_size * min(train.clip_frames) // num_frames), num_frames


def build_objective(config: Config, device: torch.device) -> Objective:
    """The objective that `config.train.objective` names."""
    return OBJECTIVES[config.train.objective](config, device)


OBJECTIVES: dict[str, Callable[[Config, torch.device], Objective]] = {
    "score_distillation": ScoreDistillation,
    "text_attributes": TextAttributes,
    "vae_reconstruction": VAEReconstruction,
    "flow_matching": FlowMatching,
    "ode_regression": ODERegression,
}

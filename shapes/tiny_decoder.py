"""Training objective of the miniature's tiny decoder. Importing this module registers it."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from model import presets
from model.tiny_decoder import TinyNetwork
from model.vae import WanVAE
from model.weight_files import save_weights
from model.weights import ModelDirectory
from shapes import world
from trainer.datasets.order import batch_positions, draw_clip_length
from trainer.networks import preset
from trainer.objectives import OBJECTIVES
from trainer.objectives.base import SingleNetObjective
from utils.config import Config

TINY_DECODER_FILE = "tiny_decoder/tiny_decoder.safetensors"


class TinyDecoderDistillation(SingleNetObjective):
    """Distil the frozen decoder of `model.base` into a tiny decoder, on latents of clips of mixed lengths."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        self.vae = WanVAE(ModelDirectory.open(config.model.base).load_vae(torch.float32)).to(device)
        self.net = TinyNetwork(self.vae.channels, **preset(presets.TINY_DECODERS, config)).to(device)

    @property
    def frozen_nets(self) -> Mapping[str, nn.Module]:
        return {"vae": self.vae.net}

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Return mean absolute error + 4 mean squared error between both decoders' pixels in [-1, 1]."""
        num_clips, num_frames = draw_clip_length(self.config, iteration)
        numbers = batch_positions(self.config.train, iteration, micro_batch)[:num_clips]
        size, seed = self.config.data.frame_size, self.config.runtime.seed
        clips = (world.sample_clip(seed, i, size=size) for i in numbers)
        pixels = torch.stack([world.to_pixels(world.render(clip, num_frames)).transpose(0, 1) for clip in clips])
        latents = self.vae.encode(pixels.to(self.device))
        target = self.vae.decode(latents)
        decoded, _ = self.net(latents)
        error = 2 * decoded[:, self.vae.temporal_stride - 1 :] - 1 - target
        squared = error.square().mean()
        return error.abs().mean() + 4 * squared, {"psnr_db": -10 * np.log10(squared.item() / 4 + 1e-12)}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write tiny_decoder/tiny_decoder.safetensors, with TAEHV's names, in bfloat16."""
        state = {name: weight.to("cpu", torch.bfloat16) for name, weight in weights.items()}
        save_weights(folder / TINY_DECODER_FILE, state)


OBJECTIVES["tiny_decoder"] = TinyDecoderDistillation

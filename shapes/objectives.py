"""Training objectives of the miniature's text encoder and VAE. Importing this module registers them."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model import presets
from model.vae import decode_clip, encode_clip, use_channels_last_
from model.weights import ModelDirectory
from shapes import world
from trainer.datasets.order import ClipRandom, batch_positions, draw_clip_length
from trainer.networks import mixed_precision, preset
from trainer.objectives import OBJECTIVES
from trainer.objectives.base import SingleNetObjective
from trainer.objectives.losses import kl_to_standard_normal
from utils.config import Config


class TextAttributes(SingleNetObjective):
    """Pre-train the miniature's text encoder to classify a caption's attributes; the heads are discarded.

    Trained together with the DiT, an encoder of this size learns far more slowly than the DiT. Captions of held-out
    scenes are included, because a real text encoder also has seen all words; only their videos are held out. Without
    these captions, the encoder confused a green circle on blue with a blue circle on green.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        encoder = UMT5EncoderModel(UMT5Config(**preset(presets.TEXT_ENCODERS, config)))
        width = encoder.config.d_model
        # One class more than the world has: the caption does not name the attribute.
        heads = nn.ModuleDict({name: nn.Linear(width, size + 1) for name, size in world.NUM_CLASSES.items()})
        self.encoder, self.heads = encoder, heads
        self.net = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)
        self.tokenizer = ByT5Tokenizer()

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Return the sum of every attribute's cross-entropy, predicted from the mean embedding."""
        seed = self.config.runtime.seed
        numbers = batch_positions(self.config.train, iteration, micro_batch)
        size = self.config.data.frame_size
        clips = [world.sample_clip(seed, i, held_out=i % 7 == 0, size=size) for i in numbers]  # a seventh is held out
        scenes = [clip.scene.without(clip.omitted) for clip in clips]
        tokens = self.tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt").to(self.device)
        hidden = self.encoder(**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        losses, correct = [], []
        for name, head in self.heads.items():
            labels = torch.tensor([scene.labels[name] for scene in scenes], device=self.device)
            target = labels % (world.NUM_CLASSES[name] + 1)  # -1, not named, becomes the last class
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


class VAEReconstruction(SingleNetObjective):
    """Train the miniature's VAE with pixel errors and a small KL term, on clips of mixed lengths."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        if config.train.init:
            self.net = ModelDirectory.open(config.train.init).load_vae(torch.float32).to(device).train()
        else:
            self.net = AutoencoderKLWan(**preset(presets.VAES, config)).to(device)
        use_channels_last_(self.net)
        if config.train.decoder_only:
            self.net.encoder.requires_grad_(False)
            self.net.quant_conv.requires_grad_(False)

    def loss(self, iteration: int, micro_batch: int) -> tuple[Tensor, dict[str, float]]:
        """Return mean absolute error + 4 mean squared error + `kl_weight` KL(posterior || N(0, 1))."""
        train = self.config.train
        num_clips, num_frames = draw_clip_length(self.config, iteration)
        numbers = batch_positions(train, iteration, micro_batch)[:num_clips]
        pixels = torch.stack([self.clip(i, num_frames) for i in numbers])
        pixels = pixels.to(self.device, memory_format=torch.channels_last_3d)
        with mixed_precision(self.config, self.device):
            mean, log_variance = (moment.float() for moment in encode_clip(self.net, pixels))
            random = ClipRandom(self.config, "posterior", iteration, micro_batch, num_clips)
            latents = mean + random.normal(mean.shape[1:]).to(mean) * (0.5 * log_variance).exp()
            error = decode_clip(self.net, latents).float() - pixels
        kl = kl_to_standard_normal(mean, log_variance)
        squared = error.square().mean()
        loss = error.abs().mean() + 4 * squared + train.kl_weight * kl
        return loss, {"psnr_db": -10 * np.log10(squared.item() / 4 + 1e-12), "kl": kl.item()}

    def clip(self, index: int, num_frames: int) -> Tensor:
        """Return training clip number `index`, pixels [3, T, H, W] in [-1, 1]."""
        clip = world.sample_clip(self.config.runtime.seed, index, size=self.config.data.frame_size)
        return world.to_pixels(world.render(clip, num_frames))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `vae/`. If the encoder was trained, measure the latents' mean and standard deviation per channel."""
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


OBJECTIVES["text_attributes"] = TextAttributes
OBJECTIVES["vae_reconstruction"] = VAEReconstruction

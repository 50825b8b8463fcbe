"""What can be learned: each objective owns its networks and computes one iteration's loss."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model import presets
from model.vae import decode_clip, encode_clip
from trainer.losses import kl_to_standard_normal
from trainer.trainer import Objective
from utils import shapes
from utils.config import Config


class TextAttributes:
    """The miniature's text encoder, pre-trained to tell a caption's attributes; the heads are thrown away.

    Trained together with the DiT, a text encoder this small lags far behind it.
    """

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        encoder = UMT5EncoderModel(UMT5Config(**presets.TEXT_ENCODERS[config.train.network]))
        width = encoder.config.d_model
        heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in shapes.NUM_CLASSES.items()})
        self.net = nn.ModuleDict({"encoder": encoder, "heads": heads}).to(device)
        self.tokenizer = ByT5Tokenizer()

    def loss(self, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of every attribute from the mean embedding."""
        train = self.config.train
        scenes = [
            shapes.sample_clip(self.config.runtime.seed, iteration * train.batch_size + i).scene
            for i in range(train.batch_size)
        ]
        tokens = self.tokenizer([scene.caption for scene in scenes], padding=True, return_tensors="pt").to(self.device)
        hidden = self.net["encoder"](**tokens).last_hidden_state
        mask = tokens.attention_mask[..., None]
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        losses, correct = [], []
        for name, head in self.net["heads"].items():
            target = torch.tensor([scene.labels[name] for scene in scenes], device=self.device)
            logits = head(pooled)
            losses.append(F.cross_entropy(logits, target))
            correct.append((logits.argmax(-1) == target).float().mean().item())
        return torch.stack(losses).sum(), {"accuracy": sum(correct) / len(correct)}

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Write `text_encoder/` and `tokenizer/`."""
        encoder = self.net["encoder"]
        encoder.load_state_dict({k.removeprefix("encoder."): v for k, v in weights.items() if k.startswith("encoder.")})
        encoder.to(torch.bfloat16).save_pretrained(folder / "text_encoder")
        self.tokenizer.save_pretrained(folder / "tokenizer")


class VAEReconstruction:
    """The miniature's VAE: pixel error and a small KL term on clips of mixed lengths."""

    def __init__(self, config: Config, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.runtime.seed)
        self.net = AutoencoderKLWan(**presets.VAES[config.train.network]).to(device)
        channels_last_(self.net)

    def loss(self, iteration: int) -> tuple[Tensor, dict[str, float]]:
        """Absolute and squared error of the reconstruction, and the KL term."""
        train = self.config.train
        rng = np.random.default_rng([self.config.runtime.seed, iteration])
        num_frames = int(rng.choice(train.clip_frames))
        # A batch holds about as many pixels whatever its clips' length.
        num_clips = max(1, train.batch_size * min(train.clip_frames) // num_frames)
        pixels = torch.stack(
            [self.clip(iteration * train.batch_size + i, num_frames) for i in range(num_clips)]
        ).to(self.device, memory_format=torch.channels_last_3d)
        mean, log_variance = encode_clip(self.net, pixels)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(iteration)).to(mean)
        latents = mean + noise * (0.5 * log_variance).exp()
        error = decode_clip(self.net, latents) - pixels
        kl = kl_to_standard_normal(mean, log_variance)
        squared = error.square().mean()
        loss = error.abs().mean() + squared + train.kl_weight * kl
        return loss, {"psnr_db": -10 * np.log10(squared.item() / 4 + 1e-12), "kl": kl.item()}

    def clip(self, index: int, num_frames: int) -> Tensor:
        """Training clip number `index`: pixels [3, T, H, W] in [-1, 1]."""
        return to_pixels(shapes.render(shapes.sample_clip(self.config.runtime.seed, index), num_frames))

    def export(self, folder: Path, weights: dict[str, Tensor]) -> None:
        """Measure the latents' mean and deviation per channel, write them into the config, and write `vae/`."""
        self.net.load_state_dict(weights)
        with torch.no_grad():
            latents = torch.cat([encode_clip(self.net, self.clip(i, 33)[None])[0] for i in range(64)])
        std, mean = torch.std_mean(latents, dim=(0, 2, 3, 4))
        self.net.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
        self.net.to(torch.bfloat16).save_pretrained(folder / "vae")


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [T, H, W, 3] to float [3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 127.5 - 1


def channels_last_(net: nn.Module) -> None:
    """Lay convolution weights out channels last, which convolutions on CPUs and tensor cores run faster in."""
    for parameter in net.parameters():
        if parameter.ndim == 5:
            parameter.data = parameter.data.to(memory_format=torch.channels_last_3d)
        elif parameter.ndim == 4:
            parameter.data = parameter.data.to(memory_format=torch.channels_last)


def build_objective(config: Config, device: torch.device) -> Objective:
    """The objective that `config.train.objective` names."""
    return OBJECTIVES[config.train.objective](config, device)


OBJECTIVES = {
    "text_attributes": TextAttributes,
    "vae_reconstruction": VAEReconstruction,
}

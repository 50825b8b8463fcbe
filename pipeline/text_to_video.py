"""From a prompt to finished blocks of latents: loads the networks and sets up a rollout. No loop over steps in here."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.text_encoder import TextEncoder, padded, without_padding
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import build_rollout, build_schedule, check_size, load_network, load_text_encoder, load_vae
from pipeline.rollout import Rollout
from pipeline.schedule import Op, Schedule
from utils.config import Config


class TextToVideo:
    """The networks of one configuration on one device, ready to generate."""

    def __init__(self, config: Config, net: CausalWanModel, text_encoder: TextEncoder, vae: WanVAE):
        self.config = config
        self.net = net
        self.text_encoder = text_encoder
        self.vae = vae
        self.embeddings = PromptEmbeddings(text_encoder, config.model.text_length, net.device, config.model.offload)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "TextToVideo":
        """Load everything that `config.model` names.

        Raises:
            UserError: for missing or broken files, and for a size that VAE and patches do not divide.
        """
        net = load_network(config, device)
        return cls(config, net, load_text_encoder(config, device), load_vae(config, device))

    @staticmethod
    def check(config: Config, prefix_frames: int | None = 0) -> None:
        """Find out before any weights are loaded whether the video's size and length can be made.

        Args:
            prefix_frames: latent frames that the video continues; None if that is not known yet.

        Raises:
            UserError: naming what would work.
        """
        check_size(config, ModelDirectory.open(config.model.base).transformer_config())
        if prefix_frames is not None:
            build_schedule(config.rollout, config.video.num_output_frames, prefix_frames)

    def num_ops(self, prefix_frames: int = 0) -> int:
        """Ops of one video, for progress."""
        return sum(1 for _ in self.ops(self.schedule(prefix_frames)))

    def ops(self, schedule: Schedule) -> Iterator[Op]:
        """A schedule's ops as the configuration orders and joins them."""
        return schedule.ops(self.config.rollout.order, self.config.rollout.fuse_context)

    def schedule(self, prefix_frames: int = 0) -> Schedule:
        """The schedule of a video that continues `prefix_frames` latent frames.

        Raises:
            UserError: if blocks do not divide the frames to generate.
        """
        return build_schedule(self.config.rollout, self.config.video.num_output_frames, prefix_frames)

    def generate(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        observe: Callable[[Op], None] | None = None,
    ) -> Iterator[Tensor]:
        """Generate videos as one batch; yields latents [B, F, C, h, w] as blocks are finished.

        Args:
            prompts: one per video.
            samples: the number of each video. With the seed, it decides about the noise; nothing else does.
            given: clean latents [1 or B, F, C, h, w] that the videos start with; they are not yielded.
            observe: called after every op.
        """
        schedule = self.schedule(0 if prefix is None else prefix.shape[1])
        rollout = self.rollout(prompts, samples, prefix, observe)
        for _, latents in rollout.run(list(self.ops(schedule)), schedule.caches):
            yield latents

    def rollout(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        observe: Callable[[Op], None] | None = None,
    ) -> Rollout:
        """What `generate`, with the same arguments, runs the ops by."""
        assert len(prompts) == len(samples)
        with torch.no_grad():
            text = self.net.encode_text(self.embeddings.of(prompts).to(self.net.device))
        return build_rollout(self.config, self.net, text, samples, prefix, observe=observe)


class PromptEmbeddings:
    """Embeddings of prompts, encoded ahead of their videos."""

    def __init__(self, text_encoder: TextEncoder, length: int, device: torch.device, offload: bool):
        """
        Args:
            length: tokens of an embedding.
            device: where the text encoder works.
            offload: move it off the device when it has encoded what was asked for, and back when there is more. One
                that nobody else needs the room of should not be.
        """
        self.text_encoder, self.length, self.device, self.offload = text_encoder, length, device, offload
        self._kept: dict[str, Tensor] = {}  # without the zeros behind their ends

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode those of the prompts that have not been yet: all of a run's at once move the weights but once."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._kept]
        if missing and self.offload:
            self.text_encoder.to(self.device)
        for prompt in missing:
            self._kept[prompt] = without_padding(self.text_encoder.encode([prompt])[0].cpu())
        if missing and self.offload:
            self.text_encoder.to("cpu")

    def of(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings [B, text length, text_dim] on the CPU, in the text encoder's type."""
        self.encode(prompts)
        return padded([self._kept[prompt] for prompt in prompts], self.length)

"""From a prompt to finished blocks of latents: loads the networks and sets up a rollout. No loop over steps in here."""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from model.embeddings import EmbeddingCache
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.build import build_rollout, build_schedule, check_size, load_embeddings, load_network, load_vae
from pipeline.rollout import Rollout
from pipeline.schedule import Op, Schedule
from utils.config import Config


class TextToVideo:
    """The networks of one configuration on one device, ready to generate."""

    def __init__(self, config: Config, net: CausalWanModel, embeddings: EmbeddingCache, vae: WanVAE):
        self.config = config
        self.net = net
        self.vae = vae
        self.embeddings = PromptEmbeddings(embeddings, net.device, config.model.offload)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "TextToVideo":
        """Load everything that `config.model` names.

        Raises:
            UserError: for missing or broken files, and for a size that VAE and patches do not divide.
        """
        net = load_network(config, device)
        return cls(config, net, load_embeddings(config, device), load_vae(config, device))

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

    def generate_blocks(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        on_op: Callable[[Op], None] | None = None,
    ) -> Iterator[Tensor]:
        """Generate videos as one batch; yields latents [B, F, C, h, w] as blocks are finished.

        Args:
            prompts: one per video.
            samples: the number of each video. With the seed, it decides about the noise; nothing else does.
            given: clean latents [1 or B, F, C, h, w] that the videos start with; they are not yielded.
            on_op: called after every op.
        """
        schedule = self.schedule(0 if prefix is None else prefix.shape[1])
        rollout = self.rollout(prompts, samples, prefix, on_op)
        for _, latents in rollout.run(list(self.ops(schedule)), schedule.caches):
            yield latents

    def rollout(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        on_op: Callable[[Op], None] | None = None,
    ) -> Rollout:
        """What `generate`, with the same arguments, runs the ops by."""
        assert len(prompts) == len(samples)
        with torch.no_grad():
            text = self.net.encode_text(self.embeddings.of(prompts).to(self.net.device))
        return build_rollout(self.config, Denoiser(self.net, text), samples, prefix=prefix, on_op=on_op)


class PromptEmbeddings:
    """Embeddings of prompts, from an encoder that is on its device only while it encodes."""

    def __init__(self, cache: EmbeddingCache, device: torch.device, offload: bool):
        """
        Args:
            device: where the text encoder runs.
            offload: move the encoder to the device for missing prompts and back to the CPU afterwards. Set to false if
                no other network needs the memory.
        """
        self.cache, self.device, self.offload = cache, device, offload

    def encode(self, prompts: Sequence[str]) -> None:
        """Encode the prompts that are missing; all prompts of a run at once move the weights only once."""
        moves = self.offload and bool(self.cache.missing(prompts))
        if moves:
            self.cache.to(self.device)
        self.cache.prepare(prompts)
        if moves:
            self.cache.to("cpu")

    def of(self, prompts: Sequence[str]) -> Tensor:
        """Return embeddings [B, text length, text_dim] on the CPU, in the text encoder's dtype."""
        self.encode(prompts)
        return self.cache.get(prompts)

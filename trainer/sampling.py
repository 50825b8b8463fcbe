"""Writes sample videos during training: by rollouts for causal networks, by an ODE solver for bidirectional ones."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.output import VideoFiles, VideoOutput
from pipeline.teacher import guided_flow, sample_unipc
from pipeline.text_to_video import TextToVideo
from trainer.datasets.captions import CaptionEmbeddings
from trainer.networks import mixed_precision
from trainer.sharding import unsharded_copy
from utils.config import Config
from utils.device import DTYPES
from utils.distributed import rank, world_size
from utils.files import writable_folder
from utils.prompts import Prompt, read_prompts, unique_stems
from utils.rng import keyed_noise

_NUM_PROMPTS = 4  # if `train.sample_prompts` is empty


class VideoSampler:
    """Writes videos of a few prompts with the network in training. The ranks divide the prompts among themselves."""

    def __init__(
        self,
        config: Config,
        net: CausalWanModel,
        embeddings: CaptionEmbeddings,
        captions: Sequence[str],
        bidirectional: bool = False,
    ):
        """
        Args:
            captions: training captions; the first ones are used if `train.sample_prompts` is empty.
            bidirectional: solve the ODE of whole clips with the settings of `config.teacher`; otherwise run rollouts.
        """
        self.net, self.embeddings, self.captions, self.bidirectional = net, embeddings, captions, bidirectional
        self.config = deepcopy(config)
        # Videos have the length of training clips, and keys and values the dtype of training.
        self.config.video.num_output_frames = config.data.num_frames
        self.config.rollout.num_rollouts = 1
        self.config.model.dtype = config.train.dtype
        self.config.model.offload = "none"

    @cached_property
    def vae(self) -> WanVAE:
        """The VAE, loaded on first use."""
        directory = ModelDirectory.open(self.config.model.base)
        return WanVAE(directory.load_vae(DTYPES[self.config.train.dtype]).to(self.net.device))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """The prompts of the sample videos, read once."""
        captions = (
            read_sample_prompts(self.config.train.sample_prompts) or list(dict.fromkeys(self.captions))[:_NUM_PROMPTS]
        )
        return [Prompt(index, text, text) for index, text in enumerate(captions)]

    def write(self, folder: Path) -> None:
        """Write one video per prompt to `folder`. All ranks must call this.

        The collective work comes first: copying a sharded network and encoding the prompts. After that, no rank waits
        for another. So if a video fails, a note is printed and training continues.
        """
        sharded, dtype = self.config.train.sharding != "replicate", DTYPES[self.config.train.dtype]
        net = unsharded_copy(self.net, dtype) if sharded else self.net
        pipeline = TextToVideo(self.config, net, self.embeddings.cache, self.vae)
        prompts, video = self.prompts, self.config.video
        guided = self.bidirectional or self.config.rollout.guidance_scale != 1
        negative = [self.config.teacher.negative_prompt] if guided else []
        self.embeddings.encode([*(prompt.text for prompt in prompts), *negative])
        stems = unique_stems(prompts, 1)
        for prompt in prompts[rank() :: world_size()]:
            path = folder / f"{stems[prompt.index][0]}.mp4"
            try:
                with mixed_precision(self.config, net.device):
                    latents = self.latents(pipeline, prompt.text)
                files = VideoFiles(writable_folder(folder), path.stem)
                with VideoOutput(self.vae, [files], video.fps, latents.shape[1], crf=video.crf) as output:
                    output.emit(latents)
            except (OSError, RuntimeError, ValueError, MemoryError) as error:  # training does not need the video
                print(f"note: {path} was not written: {type(error).__name__}: {error}", flush=True)

    @torch.no_grad()
    def latents(self, pipeline: TextToVideo, prompt: str) -> Tensor:
        """Return the latents [1, F, C, h, w] of one video."""
        if not self.bidirectional:
            return torch.cat(list(pipeline.generate_blocks([prompt], [0])), dim=1)
        net, video, teacher = pipeline.net, self.config.video, self.config.teacher
        embeddings = pipeline.embeddings.of([prompt, teacher.negative_prompt]).to(net.device)
        text, negative = map(net.encode_text, embeddings.split(1))
        size = pipeline.vae.latent_shape(video.height, video.width)
        noise = keyed_noise(self.config.runtime.seed, 0, 0, 0, (video.num_output_frames, *size))[None].to(net.device)
        return sample_unipc(
            lambda x, sigma: guided_flow(net, x, sigma, text, negative, teacher.guidance_scale),
            noise,
            teacher.num_inference_steps,
            teacher.timestep_shift,
        )


def read_sample_prompts(path: str) -> list[str]:
    """Return the prompts of a file; an empty list for an empty path."""
    return [prompt.text for prompt in read_prompts(path)] if path else []

"""Sample videos during training: by inference's own pipeline, with the net that is being trained. One that is
bidirectional is sampled as a teacher is."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.vae import WanVAE
from model.weights import ModelDirectory
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
from utils.video import VideoWriter

_SAMPLES = 4  # prompts, where none are configured


class VideoSampler:
    """Rolls the generator out over a few prompts, which the processes share out, and writes videos."""

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
            captions: prompts to choose from where `train.sample_prompts` names none.
            bidirectional: solve the ODE of whole clips, by `config.teacher`, instead of a rollout.
        """
        self.net, self.embeddings, self.captions, self.bidirectional = net, embeddings, captions, bidirectional
        self.config = deepcopy(config)
        # Latents of the training's length; keys and values in the type that the net computes in.
        self.config.video.num_output_frames = config.data.num_frames
        self.config.model.dtype = config.train.dtype
        self.config.model.offload = False

    @cached_property
    def vae(self) -> WanVAE:
        """The VAE, loaded when the first videos are wanted."""
        directory = ModelDirectory.open(self.config.model.base)
        return WanVAE(directory.load_vae(DTYPES[self.config.train.dtype]).to(self.net.device))

    @cached_property
    def prompts(self) -> list[Prompt]:
        """What to make videos of, read once for all samplings."""
        captions = read_captions(self.config.train.sample_prompts) or list(dict.fromkeys(self.captions))[:_SAMPLES]
        return [Prompt(index, text, text) for index, text in enumerate(captions)]

    def write(self, folder: Path) -> None:
        """Write a video of every prompt to `folder`.

        What processes do together, to copy a sharded net and to encode the prompts, comes first. After that none waits
        for another: what goes wrong with a video is printed, and training goes on without it.
        """
        sharded, dtype = self.config.train.sharding != "replicate", DTYPES[self.config.train.dtype]
        net = unsharded_copy(self.net, dtype) if sharded else self.net
        pipeline = TextToVideo(self.config, net, self.embeddings.cache, self.vae)
        prompts = self.prompts
        guides = [self.config.teacher.negative_prompt] if self.bidirectional else []
        self.embeddings.encode([*(prompt.text for prompt in prompts), *guides])
        stems = unique_stems(prompts, 1)
        for prompt in prompts[rank() :: world_size()]:
            path = folder / f"{stems[prompt.index][0]}.mp4"
            try:
                with mixed_precision(self.config, net.device):
                    latents = self.latents(pipeline, prompt.text)
                writable_folder(path.parent)
                with VideoWriter(path, fps=self.config.video.fps) as video:
                    video.write(self.vae.decode(latents)[0])
            except Exception as error:  # whatever it is, training can do without; memory included
                print(f"note: {path} was not written: {type(error).__name__}: {error}", flush=True)

    @torch.no_grad()
    def latents(self, pipeline: TextToVideo, prompt: str) -> Tensor:
        """A video's latents [1, F, C, h, w]."""
        if not self.bidirectional:
            return torch.cat(list(pipeline.generate_blocks([prompt], [0])), dim=1)
        net, video, teacher = pipeline.net, self.config.video, self.config.teacher
        embeddings = pipeline.embeddings.of([prompt, teacher.negative_prompt]).to(net.device)
        text, negative = map(net.encode_text, embeddings.split(1))  # once for all steps
        size = pipeline.vae.latent_shape(video.height, video.width)
        noise = keyed_noise(self.config.runtime.seed, 0, 0, 0, (video.num_output_frames, *size))[None].to(net.device)
        return sample_unipc(
            lambda x, sigma: guided_flow(net, x, sigma, text, negative, teacher.guidance_scale),
            noise,
            teacher.num_inference_steps,
            teacher.timestep_shift,
        )


def read_captions(path: str) -> list[str]:
    """The prompts of a file; none without one."""
    return [prompt.text for prompt in read_prompts(path)] if path else []

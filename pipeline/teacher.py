"""Sample the bidirectional teacher: many steps over a whole clip, with classifier-free guidance."""

import contextlib
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from diffusers import UniPCMultistepScheduler
from torch import Tensor
from tqdm import tqdm

from model.causal_wan import CausalWanModel
from model.compilation import compiles
from model.conditioning import TextContext
from model.denoiser import clip_flow
from model.embeddings import EmbeddingCache
from model.flow import guide, solver_sigmas
from model.weights import ModelDirectory
from pipeline.build import check_size, choose_attention_backend, latent_size, load_vae
from pipeline.output import VideoJob, VideoOutput, video_metadata
from utils.config import Config
from utils.device import DTYPES, pick_device
from utils.distributed import rank
from utils.files import write_json
from utils.rng import keyed_noise


class Teacher:
    """The teacher network of a configuration on one device, with its text encoder."""

    def __init__(self, config: Config, net: CausalWanModel, embeddings: EmbeddingCache):
        self.config = config
        self.net = net.eval().requires_grad_(False)
        self.embeddings = embeddings

    @classmethod
    def load(cls, config: Config, device: torch.device) -> "Teacher":
        """Load the weights of `teacher.path` (empty: the transformer of its base) and the text encoder of `model.base`.

        Raises:
            UserError: for missing or corrupt files, or an impossible video size (see `check_size`).
        """
        model, dtype = config.model, DTYPES[config.model.dtype]
        directory = ModelDirectory.open(model.base)
        own = ModelDirectory.open(config.teacher.base) if config.teacher.base else directory
        check_size(config, own.transformer_config())
        net = own.load_transformer(CausalWanModel, dtype, weights=config.teacher.path or None).to(device)
        choose_attention_backend(net, model.attention_backend)
        if compiles(model.compile, device):
            net.compile_layers()
        return cls(config, net, EmbeddingCache.load(directory, dtype, model.text_length, model.text_cache).to(device))

    def noise(self, seed: int, samples: Sequence[int]) -> Tensor:
        """Return the noise of these samples, [B, F, C, h, w], where F is `data.num_frames`; a clip is block 0."""
        size = latent_size(self.config.video)
        shape = (self.config.data.num_frames, self.net.config.in_channels, *size)
        return torch.stack([keyed_noise(seed, sample, 0, 0, shape) for sample in samples]).to(self.net.device)

    def flow(self, prompts: Sequence[str]) -> Callable[[Tensor, float], Tensor]:
        """Return the guided flow for a batch of prompts, a function of x [B, F, C, h, w] and sigma."""
        with torch.no_grad():  # once: keys and values of the text are the same at every step
            text = self.net.encode_text(self.embeddings.get(prompts).to(self.net.device))
            negative = self.embeddings.get([self.config.teacher.negative_prompt]).to(self.net.device)
            negative = self.net.encode_text(negative.expand(len(prompts), -1, -1))
        scale = self.config.teacher.guidance_scale
        return lambda x, sigma: guided_flow(self.net, x, sigma, text, negative, scale)


@torch.no_grad()
def guided_flow(
    net: CausalWanModel,
    x: Tensor,
    sigma: float | Tensor,
    text: Tensor | TextContext,
    negative: Tensor | TextContext,
    scale: float,
) -> Tensor:
    """Return the flow with classifier-free guidance, float32 [B, F, C, h, w].

    Args:
        x: clips at level sigma, [B, F, C, h, w].
        sigma: one level for all clips, or [B].
        text, negative: embeddings [B, L, text_dim] of the prompts and the negative prompt, or the network's
            `encode_text` of them.
        scale: guidance scale; 1 means no guidance and skips the negative prompt's pass.
    """
    conditional = clip_flow(net, x, sigma, text).float()
    if scale == 1:
        return conditional
    return guide(conditional, clip_flow(net, x, sigma, negative).float(), scale)


def sample_euler(
    flow: Callable[[Tensor, float], Tensor],
    noise: Tensor,
    sigmas: Sequence[float],
    on_step: Callable[[int], None] | None = None,
) -> list[Tensor]:
    """Solve the probability-flow ODE dx/dsigma = flow(x, sigma) by Euler steps; return x at each of `sigmas`.

    Args:
        flow: maps x [B, F, C, h, w] and sigma to the flow.
        noise: x at the first level, [B, F, C, h, w].
        sigmas: noise levels in descending order.
        on_step: called with the index of every finished step.
    """
    points = [noise]
    for index, (sigma, next_sigma) in enumerate(itertools.pairwise(sigmas)):
        x = points[-1]
        points.append(x + (next_sigma - sigma) * flow(x, sigma))
        if on_step is not None:
            on_step(index)
    return points


def sample_unipc(flow: Callable[[Tensor, float], Tensor], noise: Tensor, num_steps: int, shift: float) -> Tensor:
    """Sample with diffusers' UniPC (arXiv 2302.04867), the solver of Wan's own pipeline; return x0 [B, F, C, h, w].

    Args:
        flow: maps x [B, F, C, h, w] and sigma to the flow.
        noise: x at sigma 1, [B, F, C, h, w].
        shift: shift of the noise levels.
    """
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    solver.set_timesteps(num_steps, device=noise.device)
    x = noise
    for index, timestep in enumerate(solver.timesteps):
        sigma = float(solver.sigmas[index])
        x = solver.step(flow(x, sigma), timestep, x, return_dict=False)[0]
    return x


def write_teacher_videos(
    config: Config, jobs: Sequence[VideoJob], solver: Literal["euler", "unipc"] = "unipc", batch_size: int = 1
) -> None:
    """Sample the teacher for every job and write the video with its metadata.

    A video's noise depends only on the seed and the sample number, so all prompts share the noise of a sample.

    Args:
        batch_size: videos to sample at once.

    Raises:
        UserError: for wrong files, for a video with NaN, or if another process makes one of the videos.
    """
    device = pick_device(config.runtime.device, config.runtime.threads)
    teacher, vae = Teacher.load(config, device), load_vae(config, device)
    steps, shift = config.teacher.num_inference_steps, config.teacher.timestep_shift
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    for batch in tqdm(batches, unit="batch", disable=rank() > 0):
        with contextlib.ExitStack() as stack:  # locks the videos before they are sampled
            length = config.data.num_frames
            outputs = [
                stack.enter_context(VideoOutput(vae, [job.files], config.video.fps, length, crf=config.video.crf))
                for job in batch
            ]
            flow = teacher.flow([job.prompt.text for job in batch])
            noise = teacher.noise(config.runtime.seed, [job.sample for job in batch])
            if solver == "unipc":
                latents = sample_unipc(flow, noise, steps, shift)
            else:
                latents = sample_euler(flow, noise, solver_sigmas(steps, shift))[-1]
            for clip, job, output in zip(latents, batch, outputs, strict=True):
                for frame in clip[None].split(1, dim=1):
                    output.emit(frame)
                output.decoder.wait()  # one video is decoded at a time
                metadata = video_metadata(config, job.prompt, job.sample, "") | {"solver": solver}
                write_json(job.files.metadata, metadata)

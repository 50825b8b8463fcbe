"""Text to video: the Python API, and the batch interface for inference, training and benchmarks."""

import copy
import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.causal_wan import CausalWanModel
from model.conditioning import TextContext
from model.denoiser import Denoiser, GuidedDenoiser
from model.embeddings import EmbeddingCache
from model.vae import WanVAE
from model.weight_checks import is_finite
from model.weights import ModelDirectory
from pipeline.arguments import TrackSource, as_prompt, prefix_of
from pipeline.batching import Batch, arrange, count_ops, streaming_order
from pipeline.build import (
    build_rollout,
    build_schedule,
    check_precision,
    check_size,
    load_embeddings,
    load_vae,
    load_weights,
    overlap_pixel_frames,
    prepare_network,
    rollout_sigmas,
)
from pipeline.build_track import build_switch_ops, build_track
from pipeline.decoding import decode_frames, frame_range, not_finite
from pipeline.output import video_metadata
from pipeline.overlap import FrameKeeper, Overlap
from pipeline.prefix import check_one_input, read_prefix
from pipeline.prompt_embeddings import PromptEmbeddings
from pipeline.prompt_track import LivePrompts, PromptTrack, TrackEntries, track_entries
from pipeline.rollout import Rollout
from pipeline.schedule import Op, Schedule
from pipeline.session import Session
from pipeline.source import fit_to_source, source_frames
from pipeline.video import Video
from utils.config import Config
from utils.config_checks import MAX_FRAMES
from utils.config_loading import load_config, override_config
from utils.device import pick_device
from utils.errors import UserError
from utils.prompts import Prompt

REPOSITORY = Path(__file__).resolve().parents[1]


class TextToVideo:
    """The networks of one configuration on one device, ready to generate.

    Example:
        pipe = TextToVideo.load("configs/shapes.yaml")
        video = pipe.generate("a red circle moving right fast on a blue background")
        video.save("x.mp4")
    """

    def __init__(self, config: Config, net: CausalWanModel, embeddings: EmbeddingCache, vae: WanVAE):
        self.config = config
        self.net = net
        self.vae = vae
        self.embeddings = PromptEmbeddings(embeddings, net.device, config.model.offload)

    # ---- Loading ----

    @classmethod
    def load(
        cls,
        config: str | os.PathLike[str] | Config,
        *overrides: str,
        device: str | torch.device | None = None,
        seed: int | None = None,
        prompts: Sequence[str] = (),
    ) -> "TextToVideo":
        """Load the networks that `config.model` names.

        Relative paths are looked up in the current directory, then in this repository. With `model.offload`, the text
        encoder encodes `prompts` before the other networks move to the device, so that they never share its memory.

        Args:
            config: path of a YAML file, or of the JSON file beside a video; or a configuration.
            overrides: changes such as `"rollout.order=diagonal"`, see docs/config.md.
            device: cuda, cuda:1, mps or cpu; default: `runtime.device`.
            seed: default: `runtime.seed`.
            prompts: prompts to encode now, and with guidance the negative one; others are encoded when they are used.

        Raises:
            UserError: for a wrong configuration, or missing or broken files.
        """
        changes = list(overrides) + ([] if seed is None else [f"runtime.seed={seed}"])
        if isinstance(config, Config):
            config = override_config(config, changes)
        else:
            config = load_config(find_file(os.fspath(config)), changes)
        for key in ("base", "generator", "lora"):
            setattr(config.model, key, find_file(getattr(config.model, key)))
        if not isinstance(device, torch.device):
            device = pick_device(device or config.runtime.device, config.runtime.threads)
        cls.check(config, prefix_frames=None)
        check_precision(config, device)
        net = load_weights(config)
        offload = config.model.offload
        cache = load_embeddings(config, device if offload == "none" else torch.device("cpu"))
        if prompts:
            negative = [config.teacher.negative_prompt] * (config.rollout.guidance_scale != 1)
            PromptEmbeddings(cache, device, offload).encode([*prompts, *negative])
        return cls(config, prepare_network(net, config, device), cache, load_vae(config, device))

    @staticmethod
    def check(config: Config, prefix_frames: int | None = 0, track: TrackEntries = ()) -> None:
        """Check the video's size and length. No weights are loaded.

        Args:
            prefix_frames: latent frames of the prefix; None to check the size only.
            track: later prompts.

        Raises:
            UserError: with values that work.
        """
        check_size(config, ModelDirectory.open(config.model.base).transformer_config())
        if prefix_frames is not None:
            build_schedule(
                config.rollout,
                config.video.num_output_frames,
                prefix_frames,
                short_last_block=bool(config.video.source),
            )
            if track:
                build_track(config, track, "", prefix_frames)

    # ---- One video ----

    def generate(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        sample: int = 0,
        num_frames: int | None = None,
        image: str | os.PathLike[str] | None = None,
        video: str | os.PathLike[str] | None = None,
        strength: float | None = None,
        prompt_track: TrackSource | None = None,
    ) -> Video:
        """Generate a video.

        Args:
            seed: default: the configuration's. Seed and sample number determine all noise.
            sample: index of the video among those of the same prompt and seed.
            num_frames: latent frames, prefix included; default: the configuration's, or the whole clip if `video` is
                changed. F make 4(F-1)+1 pixel frames.
            image: path of the image that is the first frame.
            video: path of the clip, or of the saved latents, that the video continues or, with `strength`, changes.
            strength: video-to-video: factor on all noise levels, above 0 and at most 1. A small value keeps the clip, a
                large one follows the prompt.
            prompt_track: prompts of later blocks: a file, a mapping such as {7: "a blue circle", "12.5s": "a star"}, or
                `LivePrompts` (its prompt replaces `prompt`).

        Raises:
            UserError: for an empty prompt, an impossible length or strength, a file that cannot be read, or a video
                with NaN.
        """
        started = time.perf_counter()
        pipe, prefix_path = self._with(seed, num_frames, image, video, strength)
        blocks: list[Tensor] = []
        video_prompt = as_prompt(prompt, prompt_track)
        live = prompt_track if isinstance(prompt_track, LivePrompts) else None
        for part, latents in pipe._blocks_of(video_prompt, sample, prefix_path, live=live):
            blocks.append(latents.cpu())
            if not is_finite(blocks[-1]):
                raise UserError(not_finite(part))
        if live is not None:
            [(_, text), *later] = live.to_metadata()
            video_prompt = Prompt(0, text, text, track=track_entries(later) if later else ())
        metadata = video_metadata(pipe.config, video_prompt, sample, prefix_path)
        latents = torch.cat(blocks, dim=1)[0]
        return Video(latents, self.vae, pipe.config.video.fps, metadata, time.perf_counter() - started)

    def stream(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        sample: int = 0,
        num_frames: int | None = None,
        image: str | os.PathLike[str] | None = None,
        video: str | os.PathLike[str] | None = None,
        strength: float | None = None,
        prompt_track: TrackSource | None = None,
    ) -> Iterator[np.ndarray]:
        """Generate a video and yield the pixel frames [T, H, W, 3], uint8, of each block as it finishes.

        The arguments and the frames are those of `generate`; a prefix comes first. Memory does not grow with the video.
        """
        pipe, prefix_path = self._with(seed, num_frames, image, video, strength)
        pipe.config.rollout.order = streaming_order(pipe.config.rollout.order)
        decoder = self.vae.stream(overlap_pixel_frames(pipe.config.rollout))
        live = prompt_track if isinstance(prompt_track, LivePrompts) else None
        for part, latents in pipe._blocks_of(as_prompt(prompt, prompt_track), sample, prefix_path, decoder, live):
            yield decode_frames(decoder, latents, part)[0]

    def session(
        self,
        prompt: str,
        *,
        seed: int | None = None,
        sample: int = 0,
        schedule: str | None = None,
        image: str | os.PathLike[str] | None = None,
        prompt_switch: str | None = None,
        num_frames: int | None = None,
    ) -> Session:
        """Return a live video, endless without `num_frames`; see `Session` and docs/api.md.

        Args:
            schedule: block_first or timestep_first; default: the configuration's.
            prompt_switch: context at a new prompt: keep, recache or flush; default: the configuration's.

        Raises:
            UserError: as `generate`, and for settings that allow no live video.
        """
        pipe, prefix_path = self._with(seed, num_frames, image, None, None)
        values = {"order": "diagonal", "schedule": schedule, "prompt_switch": prompt_switch}
        pipe.config = override_config(pipe.config, [f"rollout.{k}={v}" for k, v in values.items() if v is not None])
        return Session(pipe, LivePrompts(prompt), sample, prefix_path, endless=num_frames is None)

    def _with(
        self,
        seed: int | None,
        num_frames: int | None,
        image: str | os.PathLike[str] | None,
        video: str | os.PathLike[str] | None,
        strength: float | None,
    ) -> tuple["TextToVideo", str]:
        """Return a pipeline with these settings and the same networks, and the path of the prefix; empty for none."""
        pipe, config = copy.copy(self), copy.deepcopy(self.config)
        prefix_path = prefix_of(image, video)
        if seed is not None:
            config.runtime.seed = seed
        if num_frames is not None:
            config.video.num_output_frames = num_frames
        if strength is not None:
            if video is None and not config.video.source:
                raise UserError("strength needs video=CLIP")
            config.rollout.strength = strength
            if video is not None:
                config.video.source, prefix_path = prefix_path, ""
                config.video.num_output_frames = num_frames or MAX_FRAMES
        check_one_input(config, prefix_path)
        pipe.config = fit_to_source(override_config(config, []))  # checks the values
        return pipe, prefix_path

    def _blocks_of(
        self,
        prompt: Prompt,
        sample: int,
        prefix_path: str,
        decoder: FrameKeeper | None = None,
        live: LivePrompts | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield a name for messages and the latents [1, F, C, h, w] of the prefix, if there is one, and each block.

        `decoder`: see `generate_blocks`.
        """
        prefix = read_prefix(prefix_path, self.config, self.vae) if prefix_path else None
        frames = 0 if prefix is None else prefix.shape[1]
        if prefix is not None:
            yield "the prefix", prefix
        blocks = self.generate_blocks([prompt.text], [sample], prefix, None, decoder, live or prompt.track)
        for block, latents in enumerate(blocks, start=self.schedule(frames).prefix_blocks):
            yield frame_range(frames, latents.shape[1], block), latents
            frames += latents.shape[1]

    # ---- Batches of blocks ----

    def generate_blocks(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        on_op: Callable[[Op], None] | None = None,
        decoder: FrameKeeper | None = None,
        track: TrackEntries | PromptTrack = (),
    ) -> Iterator[Tensor]:
        """Generate a batch of videos; yield the latents [B, F, C, h, w] of each block as it finishes.

        Args:
            prompts: one per video.
            samples: the sample number of each video.
            prefix: clean latents [1 or B, F, C, h, w] that the videos continue; they are not yielded.
            on_op: called after every op.
            decoder: decoder that the caller pushes the prefix and each yielded block to, so that repeated rollouts need
                not decode them again. It keeps `overlap_pixel_frames` pixel frames.
            track: prompts of later blocks, the same for all videos.
        """
        settings = self.config.rollout
        overlap = Overlap(self.vae, settings.overlap_frames, decoder) if settings.num_rollouts > 1 else None
        if overlap is not None and prefix is not None:
            overlap.add(prefix.to(self.net.device).expand(len(samples), -1, -1, -1, -1))
        noise_offset = 0
        for number in range(settings.num_rollouts):
            if overlap is not None and number:
                prefix = overlap.prefix()
            prefix_frames = 0 if prefix is None else prefix.shape[1]
            schedule = self.schedule(prefix_frames)
            if track and not isinstance(track, PromptTrack):
                track = build_track(self.config, track, prompts[0], prefix_frames)
            options = {"track": track} if isinstance(track, PromptTrack) else {}
            rollout = self.rollout(prompts, samples, prefix, on_op, noise_offset, **options)
            ops = self.ops(schedule, prefix_frames=prefix_frames, **options)
            for _, latents in rollout.run(ops if isinstance(track, LivePrompts) else list(ops), schedule.caches):
                yield latents
                if overlap is not None:
                    overlap.add(latents)
            noise_offset += schedule.num_blocks or 0

    def rollout(
        self,
        prompts: Sequence[str],
        samples: Sequence[int],
        prefix: Tensor | None = None,
        on_op: Callable[[Op], None] | None = None,
        noise_offset: int = 0,
        track: PromptTrack | None = None,
    ) -> Rollout:
        """Return the first rollout that `generate_blocks` runs with the same arguments.

        Args:
            noise_offset: see `build_rollout`.
            track: prompt of each block. Pass it to `ops`, too.
        """
        assert len(prompts) == len(samples)
        source = source_frames(self.config, self.vae) if self.config.video.source else None
        options: dict[str, Any] = {}
        if track is not None:  # a block's prompt in all its steps, and a few to write context again
            of_prompts = functools.lru_cache(len(rollout_sigmas(self.config.rollout)) + 2)(self._denoiser)
            options["denoiser_at"] = lambda block: of_prompts(tuple(track.prompts_at(block, prompts)))
        return build_rollout(
            self.config,
            self._denoiser(prompts),
            samples,
            prefix=prefix,
            source=source,
            noise_offset=noise_offset,
            on_op=on_op,
            **options,
        )

    def _denoiser(self, prompts: Sequence[str]) -> Denoiser | GuidedDenoiser:
        """Return a denoiser for these prompts, with guidance if it is configured."""
        scale = self.config.rollout.guidance_scale
        denoiser = Denoiser(self.net, self._encode_text(prompts))
        if scale == 1:
            return denoiser
        negative = self._encode_text([self.config.teacher.negative_prompt] * len(prompts))
        return GuidedDenoiser(denoiser, Denoiser(self.net, negative), scale)

    @torch.no_grad()
    def _encode_text(self, prompts: Sequence[str]) -> TextContext:
        return self.net.encode_text(self.embeddings.of(prompts).to(self.net.device))

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Encode all prompts of a run at once, with the negative prompt if guidance needs it."""
        guided = self.config.rollout.guidance_scale != 1
        self.embeddings.encode([*prompts, *[self.config.teacher.negative_prompt] * guided])

    def schedule(self, prefix_frames: int = 0) -> Schedule:
        """Return the schedule of a video with a prefix of `prefix_frames` latent frames.

        Raises:
            UserError: if the frames to generate do not fill whole blocks.
        """
        video = self.config.video
        return build_schedule(self.config.rollout, video.num_output_frames, prefix_frames, bool(video.source))

    def ops(self, schedule: Schedule, track: PromptTrack | None = None, prefix_frames: int = 0) -> Iterator[Op | Batch]:
        """Return a schedule's ops in the configured order, with those of prompt switches."""
        ops = arrange(schedule, self.config.rollout.order, self.config.rollout.fuse_context)
        return ops if track is None else build_switch_ops(self.config, ops, track, prefix_frames)

    def num_ops(self, prefix_frames: int = 0) -> int:
        """Return the number of ops of one video without prompt switches, for progress bars."""
        later = [self.config.rollout.overlap_frames] * (self.config.rollout.num_rollouts - 1)
        return sum(count_ops(self.ops(self.schedule(frames))) for frames in [prefix_frames, *later])


def find_file(path: str) -> str:
    """Return a path unchanged if it exists or is not in the repository either; otherwise its path in the repository."""
    in_repository = REPOSITORY / path
    return str(in_repository) if path and not os.path.exists(path) and in_repository.exists() else path

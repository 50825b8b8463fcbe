"""Generate the videos that a folder lacks. Finished blocks are decoded and written beside the denoising."""

import contextlib
import functools
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from model.attention_backends import describe_attention
from pipeline.build import check_causal, num_pixel_frames
from pipeline.output import VideoFiles, VideoJob, VideoOutput, video_metadata
from pipeline.prefix import check_one_input, check_prefix_exists, is_image, read_prefix
from pipeline.prompt_track import TrackEntries
from pipeline.schedule import Op
from pipeline.source import fit_to_source
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.config_checks import video_frames
from utils.device import pick_device
from utils.distributed import rank
from utils.errors import UserError
from utils.files import read_json, writable_folder
from utils.locks import check_unlocked
from utils.prompts import Prompt

KEYS_WITHOUT_EFFECT = {  # (section, key) that does not change the video
    ("rollout", "order"),
    ("model", "text_cache"),
    ("model", "offload"),
    ("model", "decode_frames"),
    ("model", "compile"),
    ("model", "cuda_graphs"),
    ("runtime", "device"),
    ("runtime", "threads"),
}


@dataclass(frozen=True)
class RunSummary:
    """Number of videos that a run wrote, and its speed."""

    written: int
    existing: int
    folder: str
    seconds: float = 0.0  # from noise to the last file, without loading weights and encoding prompts
    pixel_frames: int = 0  # of all written videos

    def __str__(self) -> str:
        existing = f" ({self.existing} existed)" if self.existing else ""
        videos = f"wrote {self.written} video{'s' * (self.written != 1)}{existing} to {self.folder}"
        if not self.written:
            return videos
        speed = self.pixel_frames / self.seconds
        return f"{videos} in {self.seconds:.{0 if self.seconds >= 10 else 1}f} s: {speed:.1f} pixel frames/s"


def generate_videos(
    config: Config,
    items: list[tuple[Prompt, int, str]],
    folder: str,
    prefix_path: str = "",
    save_latents: bool = False,
    overwrite: bool = False,
    batch_size: int = 1,
) -> RunSummary:
    """Generate the video of every (prompt, sample, file stem) that the folder lacks.

    With a batch size of 1, a video does not depend on the other videos. Larger batches change it by rounding only.

    Args:
        prefix_path: path of the prefix (an image, a video or saved latents) of every video; empty for none.
        save_latents: also write `latents` [F, C, h, w] as float32 safetensors.
        overwrite: replace existing videos.
        batch_size: number of videos to generate at once.

    Raises:
        UserError: for wrong settings or files, for a video with NaN, or if another process makes one of these videos.
    """
    config = fit_to_source(config)
    jobs = missing_videos(config, items, folder, prefix_path, save_latents, overwrite)
    existing = len(items) - len(jobs)
    if not jobs:
        return RunSummary(0, existing, folder)
    for path in dict.fromkeys(job.prompt.image or prefix_path for job in jobs):
        check_request(config, path, jobs[0].prompt.track)
    texts = [text for job in jobs for text in job.prompt.texts]
    device = pick_device(config.runtime.device, config.runtime.threads)
    pipeline = TextToVideo.load(config, device=device, prompts=texts)
    if rank() == 0:
        print(describe_attention(pipeline.net, config.model.attention_backend))
    started = time.perf_counter()
    read = functools.lru_cache(maxsize=batch_size)(lambda path: read_prefix(path, config, pipeline.vae))
    first = jobs[0].prompt.image or prefix_path
    num_ops = pipeline.num_ops(read(first).shape[1] if first else 0)
    interval = 0.5 if sys.stderr.isatty() else 15
    batches = [jobs[i : i + batch_size] for i in range(0, len(jobs), batch_size)]
    total, hidden = num_ops * len(batches), rank() != 0
    last: VideoOutput | None = None
    with tqdm(total=total, unit="op", disable=hidden, mininterval=interval, smoothing=0.1) as bar:
        try:
            for number, batch in enumerate(batches):
                started_videos = number * batch_size + len(batch)
                bar.set_description(f"video {started_videos}/{len(jobs)}", refresh=False)
                if overwrite or not all(job.files.is_complete(save_latents) for job in batch):
                    paths = [job.prompt.image or prefix_path for job in batch]
                    prefix = torch.cat([read(path) for path in paths]) if paths[0] else None
                    last = make_videos(pipeline, batch, prefix, prefix_path, save_latents, bar, last)
        finally:  # all blocks of the last batch are denoised, so it is completed even after Ctrl-C
            if last is not None:
                last.wait()
    pixel_frames = len(jobs) * num_pixel_frames(video_frames(config))
    return RunSummary(len(jobs), existing, folder, time.perf_counter() - started, pixel_frames)


def missing_videos(
    config: Config,
    items: Sequence[tuple[Prompt, int, str]],
    folder: str,
    prefix_path: str,
    save_latents: bool,
    overwrite: bool,
) -> list[VideoJob]:
    """Return a job for every video that the folder lacks, and print how many exist. See `generate_videos`.

    Raises:
        UserError: if the folder is not writable, or another process makes one of these videos.
    """
    output = writable_folder(folder)
    jobs = []
    for prompt, sample, stem in items:
        files = VideoFiles(output, stem)
        if overwrite or not files.is_complete(save_latents):
            files.require_no_folders()
            check_unlocked(files.lock, files.activity)
            jobs.append(VideoJob(prompt, sample, files))
        else:
            print_changed_settings(files, video_metadata(config, prompt, sample, prefix_path))
    if len(jobs) < len(items):
        print(f"{len(items) - len(jobs)} of {len(items)} videos exist already and are kept")
    return jobs


def print_changed_settings(files: VideoFiles, metadata: dict[str, Any]) -> None:
    """Print a note if an existing video was made with settings other than those in `metadata`."""
    if not files.metadata.exists():
        return
    try:
        before = read_json(files.metadata, "metadata file of a video")
        before.setdefault("prefix", before.get("condition"))  # its key in older files
        changed = _changed_keys(before["config"], metadata["config"])
        changed += [key for key in ("prompt", "prefix", "prompt_track") if before.get(key) != metadata.get(key)]
    except (UserError, KeyError, TypeError, AttributeError):
        print(f"kept {files.video}, although its metadata {files.metadata} is damaged; --overwrite replaces both")
        return
    if changed:
        print(f"kept {files.video}, made with other settings ({', '.join(changed)}); --overwrite replaces it")


def _changed_keys(before: dict[str, Any], config: dict[str, Any]) -> list[str]:
    """Return the keys, as section.key, whose values affect the video and differ between two configurations."""
    defaults = asdict(Config())  # of keys that older files lack
    keys = [(name, key) for name in ("model", "rollout", "video", "runtime") for key in config[name]]
    if config["rollout"]["guidance_scale"] != 1:
        keys.append(("teacher", "negative_prompt"))
    return [
        f"{name}.{key}"
        for name, key in keys
        if before.get(name, {}).get(key, defaults[name][key]) != config[name][key]
        and (name, key) not in KEYS_WITHOUT_EFFECT
    ]


def check_request(config: Config, prefix_path: str, track: TrackEntries = ()) -> None:
    """Check before weights are loaded that the size, length, prefix file and prompt track of the videos are valid.

    Raises:
        UserError: with values that work.
    """
    check_one_input(config, prefix_path)
    if prefix_path:
        check_causal(config.rollout)
        check_prefix_exists(prefix_path)
    # An image is one latent frame. The length of a clip is unknown until it is read.
    TextToVideo.check(config, 0 if not prefix_path else 1 if is_image(prefix_path) else None, track)


class _PreviousFailed(Exception):
    """The batch before could not be completed, so this one ends, too."""


def make_videos(
    pipeline: TextToVideo,
    batch: Sequence[VideoJob],
    prefix: Tensor | None,
    prefix_path: str,
    save_latents: bool,
    bar: tqdm,
    previous: VideoOutput | None = None,
) -> VideoOutput:
    """Generate one batch of videos. Return their output; its files are complete after `wait`.

    Args:
        previous: output of the batch before, which may still be decoded and written.
    """

    def show_progress(op: Op) -> None:
        bar.set_postfix_str(f"block {op.block + 1}", refresh=False)
        bar.update()

    output = VideoOutput.for_jobs(pipeline.config, pipeline.vae, batch, prefix_path, save_latents, wait_at_end=False)
    failed: Exception | None = None
    with contextlib.suppress(_PreviousFailed), output:
        prompts, samples = [job.prompt.text for job in batch], [job.sample for job in batch]
        first = pipeline.schedule(0 if prefix is None else prefix.shape[1]).prefix_blocks
        track = batch[0].prompt.track
        blocks = pipeline.generate_blocks(prompts, samples, prefix, show_progress, output.decoder, track)
        for block, latents in enumerate(blocks, start=first):
            if block == first:  # one video is decoded at a time
                try:
                    if previous is not None:
                        previous.wait()
                except Exception as error:
                    failed = error
                    raise _PreviousFailed from None
                if prefix is not None:
                    output.emit(prefix)
            output.emit(latents, block)
    if failed is not None:  # raised here, because the files of this batch would put their own names into the message
        raise failed
    return output

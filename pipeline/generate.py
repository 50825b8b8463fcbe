"""From prompts to files: every block that is finished goes to the decoder and on to the disk at once."""

import contextlib
import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

import diffusers
import torch
import transformers
from torch import Tensor
from tqdm import tqdm

from model.vae import WanVAE
from pipeline.latents import LatentsWriter, read_latents
from pipeline.schedule import Op
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.contact_sheet import ContactSheetSampler, save_contact_sheet
from utils.device import pick_device
from utils.distributed import rank
from utils.errors import UserError
from utils.files import writable_folder, write_json
from utils.prompts import Prompt
from utils.video import VideoWriter, fit, read_image, read_video, to_uint8

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Files:
    """The files of one video."""

    folder: Path
    stem: str

    @property
    def video(self) -> Path:
        """The video; the last file to appear."""
        return self.folder / f"{self.stem}.mp4"

    @property
    def record(self) -> Path:
        """What it takes to make the video again."""
        return self.folder / f"{self.stem}.json"

    @property
    def sheet(self) -> Path:
        """A few of its frames."""
        return self.folder / f"{self.stem}.png"

    @property
    def latents(self) -> Path:
        """Its latents."""
        return self.folder / f"{self.stem}.safetensors"

    @property
    def unfinished(self) -> Path:
        """What there was of the video when a pipeline failed."""
        return self.folder / f"{self.stem}.unfinished.mp4"

    def remove_leftovers(self) -> None:
        """Delete what a killed run was writing."""
        # Names as `atomic_path` makes them, once or, while a video is rewritten, twice over.
        ours = re.compile(rf"\.+{re.escape(self.stem)}(\.\d+\.partial)+(\.\w+)?")
        for file in self.folder.iterdir():
            if ours.fullmatch(file.name):
                file.unlink(missing_ok=True)
        self.unfinished.unlink(missing_ok=True)


@dataclass(frozen=True)
class VideoJob:
    """A video to make."""

    prompt: Prompt
    sample: int
    files: Files


def generate_videos(
    config: Config,
    items: list[tuple[Prompt, int, str]],
    folder: str,
    condition: str = "",
    save_latents: bool = False,
    overwrite: bool = False,
    batch_size: int = 1,
) -> None:
    """Make a video of every (prompt, sample, stem).

    One at a time, none depends on which others are made. Together they are made faster, and equal that up to rounding.

    Args:
        condition: image, video or saved latents that every video starts with; empty for none.
        save_latents: also write `latents` [F, C, h, w] as float32 safetensors.
        overwrite: make videos that exist once more.
        batch_size: videos at a time.

    Raises:
        UserError: for anything that the user can mend.
    """
    todo = missing_videos(config, items, folder, condition, save_latents, overwrite)
    if not todo:
        return
    check_request(config, condition)
    pipeline = TextToVideo.load(config, pick_device(config.runtime.device))
    prefix = read_condition(condition, config, pipeline.vae) if condition else None
    prefix_frames = 0 if prefix is None else prefix.shape[1]
    num_ops = pipeline.num_ops(prefix_frames)
    pipeline.embeddings.encode([video.prompt.text for video in todo])
    quiet = rank() != 0
    interval = 0.5 if sys.stderr.isatty() else 15
    batches = [todo[i : i + batch_size] for i in range(0, len(todo), batch_size)]
    with tqdm(total=num_ops * len(batches), unit="op", disable=quiet, mininterval=interval, smoothing=0.1) as bar:
        for number, batch in enumerate(batches):
            last = number * batch_size + len(batch)
            bar.set_description(f"video {last}/{len(todo)}", refresh=False)
            make_videos(pipeline, batch, prefix, condition, save_latents, bar)


def missing_videos(
    config: Config,
    items: Sequence[tuple[Prompt, int, str]],
    folder: str,
    condition: str,
    save_latents: bool,
    overwrite: bool,
) -> list[VideoJob]:
    """Which of the videos are not in the folder yet; says which are kept. The arguments are `generate_videos`'s."""
    output = writable_folder(folder)
    todo = []
    for prompt, sample, stem in items:
        files = Files(output, stem)
        complete = files.video.exists() and (files.latents.exists() or not save_latents)
        if overwrite or not complete:
            todo.append(VideoJob(prompt, sample, files))
        else:
            warn_if_different(files.record, make_metadata(config, prompt, sample, condition))
    if len(todo) < len(items):
        print(f"{len(items) - len(todo)} of {len(items)} videos exist already and are kept")
    return todo


def check_request(config: Config, condition: str) -> None:
    """Find out before weights are loaded whether these videos can be made.

    Raises:
        UserError: naming what would work.
    """
    if condition and not Path(condition).is_file():
        raise UserError(f"cannot read {condition}: there is no such file")
    # An image is one latent frame; how many a clip has is known once it has been read.
    TextToVideo.check(config, prefix_frames=0 if not condition else 1 if is_image(condition) else None)


def make_videos(
    pipeline: TextToVideo,
    batch: Sequence[VideoJob],
    prefix: Tensor | None,
    condition: str,
    save_latents: bool,
    bar: tqdm,
) -> None:
    """Generate, decode and write videos."""

    def progress(op: Op) -> None:
        bar.set_postfix_str(f"block {op.block + 1}", refresh=False)
        bar.update()

    with VideoOutput(pipeline.config, pipeline.vae, batch, condition, save_latents) as output:
        if prefix is not None:
            output.emit(prefix.expand(len(batch), -1, -1, -1, -1))
        prompts, samples = [w.prompt.text for w in batch], [w.sample for w in batch]
        for latents in pipeline.generate_blocks(prompts, samples, prefix, progress):
            output.emit(latents)


class VideoOutput:
    """The files of a batch of videos, decoded and written as latents come; each `video` appears last, when all else is
    there."""

    def __init__(self, config: Config, vae: WanVAE, batch: Sequence[VideoJob], condition: str, save_latents: bool):
        self.config, self.vae, self.batch, self.condition = config, vae, batch, condition
        num_frames = config.video.num_output_frames
        self._shape = (num_frames, *vae.latent_shape(config.video.height, config.video.width))
        self._save_latents = save_latents
        self._decoder = vae.stream()
        self._sheets = [ContactSheetSampler(vae.num_pixel_frames(num_frames), fps=config.video.fps) for _ in batch]
        self._files = contextlib.ExitStack()
        self._videos: list[VideoWriter] = []
        self._latents: list[LatentsWriter] = []

    def __enter__(self) -> "VideoOutput":
        self._started = time.perf_counter()
        for wanted in self.batch:
            wanted.files.remove_leftovers()
        fps = self.config.video.fps
        with contextlib.ExitStack() as files:
            self._videos = [files.enter_context(VideoWriter(w.files.video, fps=fps)) for w in self.batch]
            if self._save_latents:
                self._latents = [files.enter_context(LatentsWriter(w.files.latents, self._shape)) for w in self.batch]
            self._files = files.pop_all()
        return self

    def emit(self, latents: Tensor) -> None:
        """Decode and write the next latents [B, F, C, h, w]."""
        for video, sheet, pixels in zip(self._videos, self._sheets, self._decoder.push(latents), strict=True):
            # Colours side by side, as files have them: the device rearranges pixels far faster than the host would.
            frames = to_uint8(pixels.contiguous(memory_format=torch.channels_last))
            video.write(frames)
            sheet.add(frames)
        for file, own in zip(self._latents, latents, strict=False):
            file.write(own)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._files.__exit__(kind, error, trace)
            return
        with self._files:  # which an error removes
            for wanted, sheet in zip(self.batch, self._sheets, strict=True):
                self._write_sheet_and_record(wanted, sheet)

    def _write_sheet_and_record(self, wanted: VideoJob, sheet: ContactSheetSampler) -> None:
        config, num_frames = self.config, self.config.video.num_output_frames
        save_contact_sheet(wanted.files.sheet, [sheet.strip(wanted.prompt.name)], fps=config.video.fps)
        record = make_metadata(config, wanted.prompt, wanted.sample, self.condition) | {
            "latent_frames": num_frames,
            "pixel_frames": self.vae.num_pixel_frames(num_frames),
            "seconds": round((time.perf_counter() - self._started) / len(self.batch), 3),
            "device": device_name(self.vae.net.device),
        }
        write_json(wanted.files.record, record)

    def keep_unfinished(self) -> list[Path]:
        """End the videos where they are, for a run that fails; returns the files that hold what there is of them."""
        kept = [video.keep_unfinished(w.files.unfinished) for video, w in zip(self._videos, self.batch, strict=False)]
        return [path for path in kept if path is not None]


def make_metadata(config: Config, prompt: Prompt, sample: int, condition: str) -> dict:
    """What decides about a video: `inference.py --config_path` reads it back."""
    return {
        "prompt": prompt.text,
        "name": prompt.name,
        "sample": sample,
        "condition": os.path.abspath(condition) if condition else "",
        "command": shlex.join(["python", *sys.argv]),
        "config": asdict(config),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
        },
    }


def warn_if_different(file: Path, record: dict) -> None:
    """Say so if a video that is kept was made with other settings than those asked for now."""
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        sections = before["config"]
    except (OSError, ValueError, KeyError):
        return
    changed = [
        f"{name}.{key}"
        for name in ("model", "rollout", "video", "runtime")
        for key, value in record["config"][name].items()
        if sections.get(name, {}).get(key) != value and (name, key) not in IRRELEVANT
    ]
    changed += [key for key in ("prompt", "condition") if before.get(key) != record[key]]
    if changed:
        print(
            f"kept {file.with_suffix('.mp4')}, made with other settings ({', '.join(changed)}); --overwrite remakes it"
        )


IRRELEVANT = {  # keys that do not change what is in a video
    ("rollout", "order"),
    ("model", "text_cache"),
    ("model", "offload"),
    ("model", "compile"),
    ("runtime", "device"),
}


def read_condition(path: str, config: Config, vae: WanVAE) -> Tensor:
    """The latents [1, F, C, h, w] of the image, clip or saved latents that videos start with: float32, contiguous.

    A clip is resampled to the video's frame rate, fitted to its size, and cut to 4n+1 frames.

    Raises:
        UserError: if the file cannot be read or does not fit.
    """
    video = config.video
    if path.endswith(".safetensors"):
        latents = read_latents(path)[None].float()
        expected = vae.latent_shape(video.height, video.width)
        if latents.shape[2:] != expected:
            raise UserError(f"latents in {path} are {list(latents.shape[2:])}, the video's are {list(expected)}")
        return latents
    if is_image(path):
        frames = read_image(path)[None]
    else:
        longest = vae.num_pixel_frames(video.num_output_frames)
        frames, _ = read_video(path, max_frames=longest, fps=video.fps)
        if len(frames) == longest:
            raise UserError(
                f"{path} fills all {video.num_output_frames} latent frames of the video; "
                "cut it shorter, or raise --num_output_frames"
            )
    stride = vae.temporal_stride
    frames = frames[: (len(frames) - 1) // stride * stride + 1]
    pixels = torch.from_numpy(fit(frames, video.height, video.width).copy()).permute(0, 3, 1, 2)[None]
    return vae.encode(pixels.float() / 127.5 - 1).cpu().contiguous()  # messages between ranks have to be


def is_image(path: str) -> bool:
    """Whether a condition is a single image, by its name."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def device_name(device: torch.device) -> str:
    """What the record calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

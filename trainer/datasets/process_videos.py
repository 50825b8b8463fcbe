"""Turns videos of any size, frame rate, length and codec into clips of one size, frame rate and length."""

import contextlib
import errno
import itertools
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from trainer.datasets.video_folder import CAPTIONS_FILE, find_video_names, is_utf8, read_captions
from utils.clips import VIDEO_SUFFIXES, VideoReader, resize_and_crop
from utils.errors import UserError
from utils.files import atomic_path, read_json, write_json
from utils.locks import lock_file
from utils.mp4 import is_complete_mp4
from utils.video import VideoWriter

SETTINGS_FILE = "clips.json"
_START_METHOD = "fork" if sys.platform == "linux" else "spawn"  # a spawned process imports torch again, for seconds
WRITTEN, KEPT, SKIPPED, FAILED, BUSY = "written", "kept", "skipped", "failed", "busy"


@dataclass(frozen=True)
class ClipFormat:
    """The clips to write.

    Attributes:
        num_frames: frames of a clip; the first ones of a video.
        height, width: pixels; frames are resized to cover them, and the centre is cropped.
        fps: frames per second; frames are dropped or repeated by their timestamps.
        aspect_tolerance: a video is skipped if its aspect ratio differs from width / height by more than this part.
        all_segments: cut a video into consecutive clips in a folder of its name; a shorter rest is dropped.
        crf: quality of x264, from 0 (lossless) to 51.
    """

    num_frames: int = 81
    height: int = 480
    width: int = 832
    fps: float = 16.0
    aspect_tolerance: float = 0.1
    all_segments: bool = False
    crf: int = 10


@dataclass(frozen=True)
class Outcome:
    """The result for one video: "written", "kept", "skipped", "failed" or "busy", with a reason or number of clips."""

    name: str
    kind: str
    reason: str = ""
    num_clips: int = 0


class _SkippedVideoError(Exception):
    """The reason why a video gives no clips."""


def process_videos(
    source: Path, output: Path, form: ClipFormat, *, captions: Path | None, shard: int, num_shards: int, workers: int
) -> list[Outcome]:
    """Write clips of the videos in `source` to `output`, and their captions to captions.json; return the outcomes.

    Finished clips are kept, so a second call continues. Several processes may share one output folder.

    Args:
        captions: file of captions; see `read_captions`.
        shard, num_shards: process every num_shards-th video, from number `shard`.
        workers: number of processes.

    Raises:
        UserError: if there are no videos, or `output` holds clips of another format or lies in `source`.
    """
    names = find_video_names(source)
    if output.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{output} lies in {source}, so its clips would be read again; choose another output folder")
    _write_settings(output, form)
    named = [name for name in names if is_utf8(name)]
    _write_captions(output, {clip_name(name): text for name, text in read_captions(source, named, captions).items()})
    chosen = names[shard::num_shards]
    outcomes = _map(partial(process_video, source, output, form), chosen, workers)
    return list(tqdm(outcomes, total=len(chosen), unit="video"))


def _map(process: Callable[[str], Outcome], names: Sequence[str], workers: int) -> Iterator[Outcome]:
    """Yield the outcomes of videos, in order, from this process or from `workers` processes."""
    if workers == 1:
        yield from map(process, names)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context(_START_METHOD)) as pool:
        try:
            yield from pool.map(process, names)
        except BaseException:  # Ctrl-C would otherwise end only the videos in work, and the pool would go on
            pool.shutdown(cancel_futures=True)
            raise


def clip_name(name: str) -> str:
    """Return the clip's path for a video's path: alike for .mp4; `a.mov` becomes `a.mov.mp4`."""
    return name if name.endswith(".mp4") else f"{name}.mp4"


def process_video(source: Path, output: Path, form: ClipFormat, name: str) -> Outcome:
    """Write the clips of one video, unless they exist or another process is writing them.

    Raises:
        OSError: if the disk is full or not writable.
    """
    if not is_utf8(name):
        return Outcome(name.encode(errors="replace").decode(), FAILED, "its name is not UTF-8; rename it")
    target = output / clip_name(name)
    other = source / name.removesuffix(".mp4")
    if name.endswith(".mp4") and other.suffix.lower() in VIDEO_SUFFIXES and other.is_file():
        return Outcome(name, FAILED, f"its clip has the name of the clip of {other}; rename it")
    if _is_finished(target, form):
        return Outcome(name, KEPT)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(lock_file(target.with_name(f".{target.name}.lock"), f"writing {target}", False))
            except UserError as error:
                return Outcome(name, BUSY, str(error))
            if _is_finished(target, form):
                return Outcome(name, KEPT)
            return Outcome(name, WRITTEN, num_clips=_write_clips(source / name, target, form))
    except _SkippedVideoError as reason:
        return Outcome(name, SKIPPED, str(reason))
    except UserError as error:
        return Outcome(name, FAILED, str(error))
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
            raise
        return Outcome(name, FAILED, f"cannot write {target}: {error.strerror}")


def _is_finished(target: Path, form: ClipFormat) -> bool:
    return target.is_dir() if form.all_segments else is_complete_mp4(target)


def _write_clips(path: Path, target: Path, form: ClipFormat) -> int:
    """Write the clip `target`, or the clips of the folder `target`; return their number."""
    longest = None if form.all_segments else form.num_frames
    with VideoReader(path, longest, form.fps, strict=True) as reader:
        ratio = form.width / form.height
        if abs(reader.width / reader.height / ratio - 1) > form.aspect_tolerance:
            raise _SkippedVideoError(
                f"{reader.width}x{reader.height} pixels have the aspect ratio {reader.width / reader.height:.3f}, not "
                f"{ratio:.3f} within {form.aspect_tolerance:.0%} (--aspect_tolerance)"
            )
        if form.all_segments:
            return _write_segments(iter(reader), target, form)
        _write_clip(iter(reader), target, form)
        return 1


def _write_segments(frames: Iterator[np.ndarray], target: Path, form: ClipFormat) -> int:
    """Write consecutive clips to the new folder `target` and return their number; the last frames may be left over."""
    with atomic_path(target) as folder:
        folder.mkdir()
        for number in itertools.count():
            try:
                _write_clip(frames, folder / f"{number:03d}.mp4", form)
            except _SkippedVideoError:
                if not number:
                    raise
                break
    return number


def _write_clip(frames: Iterator[np.ndarray], target: Path, form: ClipFormat) -> None:
    """Write the next frames as one clip; raise `_SkippedVideoError` if there are too few."""
    with VideoWriter(target, form.fps, crf=form.crf) as writer:
        for frame in itertools.islice(frames, form.num_frames):
            writer.write(resize_and_crop(frame[None], form.height, form.width))
        if writer.num_frames < form.num_frames:
            raise _SkippedVideoError(
                f"{writer.num_frames} frames at {form.fps:g} fps ({writer.num_frames / form.fps:.2f} s) are fewer than "
                f"{form.num_frames}"
            )


def _write_settings(output: Path, form: ClipFormat) -> None:
    """Write clips.json; raise UserError if the folder holds clips of another format."""
    settings = {key: value for key, value in asdict(form).items() if key != "aspect_tolerance"}
    file = output / SETTINGS_FILE
    if not file.exists():
        write_json(file, settings)
    stored = read_json(file, "description of clips")
    if stored != settings:
        changed = [key for key in settings if not isinstance(stored, dict) or stored.get(key) != settings[key]]
        raise UserError(f"{output} holds clips of other settings ({', '.join(changed)}); choose another output folder")


def _write_captions(output: Path, captions: dict[str, str]) -> None:
    if captions:
        write_json(output / CAPTIONS_FILE, captions)


def summary(outcomes: Sequence[Outcome]) -> str:
    """Return the numbers of clips and videos, and the names of skipped and failed videos with the reasons."""
    names = {kind: [outcome for outcome in outcomes if outcome.kind == kind] for kind in (KEPT, SKIPPED, FAILED, BUSY)}
    num_clips = sum(outcome.num_clips for outcome in outcomes)
    lines = [
        f"{num_clips} clips written; videos: {len(names[KEPT])} finished before, {len(names[SKIPPED])} skipped, "
        f"{len(names[FAILED])} failed, {len(names[BUSY])} in work by other processes"
    ]
    for kind in (SKIPPED, FAILED):
        lines += [f"{kind}: {outcome.name}: {outcome.reason}" for outcome in names[kind]]
    return "\n".join(lines)


def any_clip(outcomes: Sequence[Outcome]) -> bool:
    """Return whether a video has clips, or may have them soon."""
    return any(outcome.kind in (WRITTEN, KEPT, BUSY) for outcome in outcomes)

"""Find the videos of a folder, with the prompt, seed and sample that identify each.

A video's identity comes from the metadata beside it (`X.json`), or from its name and a prompt file.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from utils.errors import UserError
from utils.files import read_json
from utils.prompts import Prompt, file_stem


@dataclass(frozen=True, order=True)
class VideoKey:
    """The identity of a video. Videos of several methods are paired by it."""

    prompt: str
    seed: int
    sample: int

    def __str__(self) -> str:
        prompt = self.prompt if len(self.prompt) <= 60 else self.prompt[:57] + "..."
        return f"'{prompt}' (seed {self.seed}, sample {self.sample})"


@dataclass(frozen=True)
class VideoFile:
    """A video on disk.

    Attributes:
        metadata: content of the JSON file beside the video; empty if there is none.
    """

    path: Path
    key: VideoKey
    metadata: dict[str, Any] = field(default_factory=dict)


class LabelledPath(NamedTuple):
    """A folder of videos, or a video, with the name of the method that made it."""

    label: str
    path: str


@dataclass(frozen=True)
class VideoFolder:
    """A folder with its videos, sorted by key."""

    label: str
    path: str
    videos: list[VideoFile]


def parse_labelled_path(argument: str) -> LabelledPath:
    """Parse `name=path`; without a name, the last part of the path is the label."""
    label, separator, path = argument.partition("=")
    return LabelledPath(label, path) if separator else LabelledPath(Path(argument).name or argument, argument)


def require_distinct_labels(paths: Sequence[LabelledPath]) -> None:
    """Check that all labels differ.

    Raises:
        UserError: if two labels are equal.
    """
    if len({path.label for path in paths}) < len(paths):
        raise UserError("two folders have the same name; tell them apart with name=folder")


def open_folders(arguments: Sequence[str], prompts: Sequence[Prompt] = ()) -> list[VideoFolder]:
    """Find the videos of folders that are passed as `[name=]folder`.

    Raises:
        UserError: if two labels are equal, and as `find_videos`.
    """
    folders = [parse_labelled_path(argument) for argument in arguments]
    require_distinct_labels(folders)
    return [VideoFolder(label, path, find_videos(path, prompts)) for label, path in folders]


def find_videos(folder: str, prompts: Sequence[Prompt] = ()) -> list[VideoFile]:
    """Return the videos of a folder, sorted by key.

    Args:
        prompts: identify videos without metadata by their file name.

    Raises:
        UserError: if there are no videos, a video has neither metadata nor a prompt, or two videos have the same key.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no folder {folder}; check the path")
    found: dict[VideoKey, VideoFile] = {}
    for path in sorted(Path(folder).glob("*.mp4")):
        if path.name.startswith(".") or path.name.endswith(".unfinished.mp4"):
            continue
        video = _from_metadata(path) or VideoFile(path, _key_from_name(path, prompts))
        if video.key in found:
            raise UserError(f"{found[video.key].path} and {path} have the same prompt, seed and sample; remove one")
        found[video.key] = video
    if not found:
        raise UserError(f"no videos in {folder}; generate some with inference.py")
    return [found[key] for key in sorted(found)]


def _from_metadata(path: Path) -> VideoFile | None:
    """Identify a video by the JSON file beside it; None if that file is missing or incomplete."""
    try:
        metadata = read_json(path.with_suffix(".json"), "video metadata file")
        key = VideoKey(metadata["prompt"], int(metadata["config"]["runtime"]["seed"]), int(metadata["sample"]))
    except (ValueError, KeyError, TypeError, OverflowError):  # `UserError` is a ValueError
        return None
    if not isinstance(key.prompt, str):
        return None
    return VideoFile(path, key, metadata)


def _key_from_name(path: Path, prompts: Sequence[Prompt]) -> VideoKey:
    """Find the prompt that a video is named after.

    A name is the prompt's text or its line number from 0, then `-SAMPLE`, then optionally `_MODEL`. This repository,
    Self-Forcing and VBench all use such names.
    """
    if not prompts:
        raise UserError(
            f"{path} has no metadata file {path.stem}.json, which inference.py and scripts/sample_teacher.py write; "
            "for videos from elsewhere, pass their prompts with --data_path"
        )
    match = re.fullmatch(r"(.+)-(\d+)(_[a-zA-Z]\w*)?", path.stem)
    name, sample = (match[1], int(match[2])) if match else (path.stem, 0)
    for prompt in prompts:
        by_text, by_number = (file_stem(prompt, sample, number) for number in (False, True))
        if f"{name}-{sample}" in (by_text, by_number) or name == prompt.name[:100].rstrip():
            return VideoKey(prompt.text, 0, sample)
    raise UserError(f"{path} matches none of the {len(prompts)} prompts; name it after a prompt's text or number")

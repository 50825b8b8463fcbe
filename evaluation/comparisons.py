"""Pair the videos of several folders by prompt, seed and sample, to show them side by side."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from evaluation.side_by_side import write_side_by_side
from evaluation.videos import LabelledPath, find_videos, require_distinct_labels
from utils.errors import UserError
from utils.files import read_json, writable_folder, write_json


@dataclass(frozen=True)
class Comparison:
    """One side-by-side video to write.

    Attributes:
        videos: (label, file) of every panel.
    """

    path: Path
    videos: list[tuple[str, Path]]
    caption: str

    @property
    def metadata_path(self) -> Path:
        """The JSON file beside the video. It is written first."""
        return self.path.with_suffix(".json")

    @property
    def metadata(self) -> dict[str, Any]:
        """The caption and the compared videos."""
        videos = [{"label": label, "video": os.path.abspath(path)} for label, path in self.videos]
        return {"caption": self.caption, "videos": videos}


def plan_comparisons(inputs: Sequence[LabelledPath], output: str) -> list[Comparison]:
    """Return the comparisons of several folders, or the one comparison of several video files.

    Args:
        output: folder for the results; if the inputs are files, it may also be an mp4 file.

    Raises:
        UserError: if there are fewer than two inputs, folders and files are mixed, or folders share no videos.
    """
    if len(inputs) < 2:
        raise UserError(f"there is nothing to compare {inputs[0].path} with; give at least two folders or two files")
    are_files = [_is_video_file(item.path) for item in inputs]
    if all(are_files):
        return [compare_files(inputs, output)]
    if any(are_files):
        raise UserError("give folders or files, not both: " + ", ".join(item.path for item in inputs))
    return compare_folders(inputs, output)


def write_comparisons(comparisons: Sequence[Comparison], overwrite: bool, **options: Any) -> None:
    """Write comparisons with a progress bar, and print what was written and what was kept.

    Args:
        overwrite: also write videos that exist.
        options: passed on to `write_side_by_side`.
    """
    missing = [comparison for comparison in comparisons if overwrite or not _is_kept(comparison)]
    if len(missing) < len(comparisons):
        print(f"{len(comparisons) - len(missing)} of {len(comparisons)} videos exist already and are kept")
    for comparison in tqdm(missing, desc="side by side", unit="video", disable=len(missing) < 2):
        write_json(comparison.metadata_path, comparison.metadata)
        write_side_by_side(comparison.path, comparison.videos, comparison.caption, **options)
    if missing:
        print(f"wrote {missing[0].path if len(missing) == 1 else f'{len(missing)} videos to {missing[0].path.parent}'}")


def compare_files(files: Sequence[LabelledPath], output: str) -> Comparison:
    """Return the comparison of single files. Its caption is their prompt if all prompts are equal.

    Raises:
        UserError: if the output is one of the files or not writable.
    """
    videos = [(label.removesuffix(".mp4"), Path(path)) for label, path in files]
    path = Path(output)
    if path.suffix.lower() != ".mp4":
        path = path / ("-vs-".join(Path(label).name for label, _ in videos) + ".mp4")
    if any(path.resolve() == video.resolve() for _, video in videos):
        raise UserError(f"{path} is one of the videos to compare; choose another --output")
    writable_folder(path.parent)
    prompts = {_prompt_of(video) for _, video in videos}
    return Comparison(path, videos, prompts.pop() if len(prompts) == 1 else "")


def compare_folders(folders: Sequence[LabelledPath], output: str) -> list[Comparison]:
    """Return a comparison for every prompt, seed and sample that all folders have, sorted by these.

    Raises:
        UserError: if the folders have no videos in common, or the output is one of them or not a folder.
    """
    require_distinct_labels(folders)
    found = {label: {video.key: video for video in find_videos(path)} for label, path in folders}
    first, *others = found.values()
    common = [key for key in first if all(key in other for other in others)]
    if not common:
        examples = (f"{label} has {len(videos)}, such as {next(iter(videos))}" for label, videos in found.items())
        raise UserError(f"no prompt, seed and sample is in all folders: {'; '.join(examples)}")
    for label, videos in found.items():
        if skipped := len(videos) - len(common):
            print(f"skipping {skipped} of {label}'s {len(videos)} videos, which are not in all folders")
    if output.lower().endswith(".mp4"):
        raise UserError(f"--output must be a folder to compare folders, not {output}")
    folder = writable_folder(output)
    if any(folder.resolve() == Path(path).resolve() for _, path in folders):
        raise UserError(f"{folder} is one of the folders to compare; choose another --output")
    return [
        Comparison(
            folder / first[key].path.name,
            [(label, videos[key].path) for label, videos in found.items()],
            first[key].metadata.get("name", key.prompt),
        )
        for key in common
    ]


def _is_video_file(path: str) -> bool:
    """Return whether an argument names a video file, existing or not, instead of a folder."""
    return not Path(path).is_dir() and (Path(path).is_file() or path.lower().endswith(".mp4"))


def _prompt_of(video: Path) -> str:
    """Return the prompt in a video's metadata; empty if there is none."""
    try:
        return str(read_json(video.with_suffix(".json"))["name"])
    except (ValueError, KeyError, TypeError):  # `UserError` is a ValueError
        return ""


def _is_kept(comparison: Comparison) -> bool:
    """Return whether a comparison exists; print a note if it shows other videos."""
    if not comparison.path.exists():
        return False
    try:
        existing = read_json(comparison.metadata_path)
    except UserError:
        existing = None
    if existing != comparison.metadata:
        print(f"kept {comparison.path}, which shows other videos; use --overwrite to replace it")
    return True

"""Videos of several methods beside each other, under their labels and above the prompt.

python scripts/compare_videos.py block_first=outputs/a timestep_first=outputs/b --output outputs/side_by_side
python scripts/compare_videos.py before=old.mp4 after=new.mp4 --output before_after.mp4

Folders hold X.mp4 with X.json beside it, as inference.py writes them, and are paired by prompt, seed and sample: one
video for each that all of them have, named as in the first folder. Plain files make one video. The highest video
decides how high all panels are; one that is over shows its last frame, darkened. Videos that exist are kept.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from evaluation.side_by_side import write_side_by_side
from evaluation.videos import VideoKey as Key
from evaluation.videos import find_videos, parse_labelled_path
from evaluation.videos import require_distinct_labels as require_distinct
from utils.errors import UserError, command
from utils.files import writable_folder, write_json


@dataclass(frozen=True)
class Comparison:
    """A video to make."""

    path: Path
    videos: list[tuple[str, Path]]
    caption: str

    @property
    def record(self) -> Path:
        """What the video is made of; appears before it."""
        return self.path.with_suffix(".json")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="+", metavar="[name=]folder", help="or [name=]file.mp4")
    parser.add_argument("--output", default="outputs/side_by_side", help="folder; for files, may be the file to write")
    parser.add_argument("--columns", type=int, default=0, help="panels per row; default: one row of up to four")
    parser.add_argument("--scale", type=int, default=0, help="enlargement; default: the least with legible text")
    parser.add_argument("--fps", type=float, default=0, help="frames per second; default: the highest of the videos'")
    parser.add_argument("--limit", type=int, default=0, help="make so many videos; default: all")
    parser.add_argument("--timestamp", action="store_true", help="show the time at the lower right")
    parser.add_argument("--overwrite", action="store_true", help="make videos that exist once more")
    args = parser.parse_args()
    if min(args.columns, args.scale, args.fps, args.limit) < 0:
        raise UserError("--columns, --scale, --fps and --limit must not be negative")
    methods = [parse_labelled_path(word) for word in args.methods]
    if len(methods) < 2:
        raise UserError(f"there is nothing to compare {methods[0][1]} with; give at least two folders or two files")
    are_files = [is_file(path) for _, path in methods]
    if any(are_files) and not all(are_files):
        raise UserError("give folders or files, not both: " + ", ".join(path for _, path in methods))
    wanted = [of_files(methods, args.output)] if all(are_files) else of_folders(methods, args.output)
    if args.limit:
        wanted = wanted[: args.limit]

    todo = [comparison for comparison in wanted if args.overwrite or not is_kept(comparison)]
    if len(todo) < len(wanted):
        print(f"{len(wanted) - len(todo)} of {len(wanted)} videos exist already and are kept")
    options = {"columns": args.columns or None, "scale": args.scale or None, "fps": args.fps or None}
    for comparison in tqdm(todo, desc="side by side", unit="video", disable=len(todo) < 2):
        write_json(comparison.record, describe(comparison))
        write_side_by_side(comparison.path, comparison.videos, comparison.caption, **options, timestamp=args.timestamp)
    if todo:
        print(f"wrote {todo[0].path if len(todo) == 1 else f'{len(todo)} videos to {todo[0].path.parent}'}")


def is_file(path: str) -> bool:
    """Whether an argument means a video and not a folder of them."""
    return not Path(path).is_dir() and (Path(path).is_file() or path.lower().endswith(".mp4"))


def of_files(methods: Sequence[tuple[str, str]], output: str) -> Comparison:
    """The one comparison of plain files, under their prompt if their records state the same one."""
    videos = [(label.removesuffix(".mp4"), Path(path)) for label, path in methods]
    path = Path(output)
    if path.suffix.lower() != ".mp4":
        path = path / ("-vs-".join(Path(label).name for label, _ in videos) + ".mp4")
    if any(path.resolve() == video.resolve() for _, video in videos):
        raise UserError(f"{path} is one of the videos to compare; choose another --output")
    writable_folder(path.parent)
    prompts = {prompt_of(video) for _, video in videos}
    return Comparison(path, videos, prompts.pop() if len(prompts) == 1 else "")


def prompt_of(video: Path) -> str:
    """The prompt that the record of a video states; empty if there is none."""
    try:
        return str(json.loads(video.with_suffix(".json").read_text(encoding="utf-8"))["name"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def of_folders(methods: Sequence[tuple[str, str]], output: str) -> list[Comparison]:
    """A comparison for every prompt, seed and sample that all folders have, in their order."""
    require_distinct(methods)
    found = {label: {v.key: (v.path, v.metadata) for v in find_videos(path)} for label, path in methods}
    first, *others = found.values()
    common = [key for key in first if all(key in other for other in others)]
    if not common:
        have = (f"{label} has {len(videos)}, such as {show(next(iter(videos)))}" for label, videos in found.items())
        raise UserError(f"no prompt, seed and sample is in all folders: {'; '.join(have)}")
    for label, videos in found.items():
        if left_out := len(videos) - len(common):
            print(f"{left_out} of {label}'s {len(videos)} videos are not in all folders and are left out")
    if output.lower().endswith(".mp4"):
        raise UserError(f"--output must be a folder where folders are compared, not {output}")
    folder = writable_folder(output)
    if any(folder.resolve() == Path(path).resolve() for _, path in methods):
        raise UserError(f"{folder} is one of the folders to compare; choose another --output")
    return [
        Comparison(
            folder / first[key][0].name,
            [(label, videos[key][0]) for label, videos in found.items()],
            first[key][1].get("name", key.prompt),
        )
        for key in common
    ]


def show(key: Key) -> str:
    """A key in an error message."""
    prompt = key.prompt if len(key.prompt) <= 60 else key.prompt[:57] + "..."
    return f"'{prompt}' (seed {key.seed}, sample {key.sample})"


def describe(comparison: Comparison) -> dict:
    """The record of a comparison."""
    videos = [{"label": label, "video": os.path.abspath(path)} for label, path in comparison.videos]
    return {"caption": comparison.caption, "videos": videos}


def is_kept(comparison: Comparison) -> bool:
    """Whether a comparison is there already; says so if it is one of other videos."""
    if not comparison.path.exists():
        return False
    try:
        before = json.loads(comparison.record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        before = None
    if before != describe(comparison):
        print(f"kept {comparison.path}, made of other videos; --overwrite remakes it")
    return True


if __name__ == "__main__":
    main()

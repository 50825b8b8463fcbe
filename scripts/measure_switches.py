"""Measure prompt switches on the miniature: three rules, two schedules. Prints the table of docs/prompts.md.

python scripts/measure_switches.py --output_folder outputs/switches [--num_videos 12]

Each video changes the colour of its shape in the middle. Existing videos are replaced.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from pipeline import TextToVideo
from pipeline.build import num_pixel_frames
from shapes.edits import measurement_table, sample_edit
from shapes.switches import measure_switch
from utils.arguments import require_range
from utils.errors import command
from utils.files import writable_folder

SCHEDULES, RULES = ("block_first", "timestep_first"), ("keep", "recache", "flush")
BLOCKS_BEFORE, BLOCKS_AFTER = 8, 4
"""The window of the miniature is seven blocks, so it has moved at the switch."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", default="configs/shapes.yaml")
    parser.add_argument("--output_folder", required=True, help="folder for videos")
    parser.add_argument("--num_videos", type=int, default=12, help="videos per row")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    require_range(args, 1, math.inf, "num_videos")
    return args


@command
def main() -> None:
    args = parse_arguments()
    folder = writable_folder(args.output_folder)
    pipe = TextToVideo.load(args.config_path, *args.overrides)
    block = pipe.config.rollout.block_frames
    rows: dict[str, list] = {f"{schedule}, {rule}": [] for schedule in SCHEDULES for rule in RULES}
    with tqdm(total=args.num_videos * len(rows), unit="video") as bar:
        for index in range(args.num_videos):
            edit = sample_edit(5, index)
            for name, measured in rows.items():
                pipe.config.rollout.schedule, pipe.config.rollout.prompt_switch = name.split(", ")  # type: ignore[assignment]
                video = pipe.generate(
                    edit.clip.scene.caption,
                    prompt_track={BLOCKS_BEFORE: edit.scene.caption},
                    num_frames=(BLOCKS_BEFORE + BLOCKS_AFTER) * block,
                    sample=index,
                )
                video.save(folder / f"{index} {name}.mp4")
                switch = num_pixel_frames(BLOCKS_BEFORE * block)
                measured.append(measure_switch(video.frames, edit, switch, 4 * block))
                bar.update()
    print(measurement_table("schedule, rule", rows, scale=1, digits=3))


if __name__ == "__main__":
    main()

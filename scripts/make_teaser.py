"""Write an animated WebP picture of a folder of videos: a grid with the prompt below each video.

python scripts/make_teaser.py outputs/demo --output docs/images/teaser.webp
"""

import argparse
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from utils.arguments import require_range
from utils.clips import read_video
from utils.config_files import read_metadata
from utils.errors import UserError, command
from utils.files import atomic_path, output_file

GAP, LINE = 10, 14  # pixels
BACKGROUND, TEXT = (24, 26, 31), (214, 218, 226)  # legible beside light and dark pages


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="folder of mp4 files, each with its JSON beside it")
    parser.add_argument("--output", required=True, help="animated .webp to write")
    parser.add_argument("--columns", type=int, default=5, help="videos per row")
    parser.add_argument("--panel", type=int, default=150, help="width of a video in the picture, in pixels")
    parser.add_argument("--quality", type=int, default=70, help="WebP quality, 0 to 100")
    args = parser.parse_args()
    require_range(args, 1, 1000, "columns")
    require_range(args, 8, 4096, "panel")
    require_range(args, 0, 100, "quality")
    output_file(args.output)
    paths = sorted(Path(args.folder).glob("*.mp4"))
    if not paths:
        raise UserError(f"no mp4 files in {args.folder}; make some with `make demo`")
    videos = [read_video(path) for path in paths]
    prompts = [(read_metadata(str(path.with_suffix(".json"))) or {})["prompt"] for path in paths]
    length = min(len(frames) for frames, _ in videos)
    pictures = [
        draw_grid([frames[index] for frames, _ in videos], prompts, args.columns, args.panel) for index in range(length)
    ]
    with atomic_path(Path(args.output)) as temporary:
        pictures[0].save(
            temporary,
            format="WEBP",
            save_all=True,
            append_images=pictures[1:],
            duration=round(1000 / videos[0][1]),
            loop=0,
            quality=args.quality,
            method=6,
        )
    print(f"wrote {args.output}: {len(paths)} videos, {length} frames, {Path(args.output).stat().st_size} bytes")


def draw_grid(frames: list[np.ndarray], prompts: list[str], columns: int, panel: int) -> Image.Image:
    """Draw one frame [H, W, 3] of every video in a grid, with the prompt below."""
    font = ImageFont.load_default(size=11)
    height = panel * frames[0].shape[0] // frames[0].shape[1]
    cell_width, cell_height = panel + GAP, height + 3 * LINE + GAP
    rows = -(-len(frames) // columns)
    picture = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for number, (frame, prompt) in enumerate(zip(frames, prompts, strict=True)):
        x, y = GAP + number % columns * cell_width, GAP + number // columns * cell_height
        picture.paste(Image.fromarray(frame).resize((panel, height), Image.Resampling.BICUBIC), (x, y))
        for line, words in enumerate(textwrap.wrap(prompt, panel // 6)):
            draw.text((x, y + height + 3 + line * LINE), words, TEXT, font)
    return picture


if __name__ == "__main__":
    main()

"""Measure the reconstruction error of the miniature's VAE on held-out clips, and its drift over long clips.

python scripts/evaluate_vae.py --num_clips 12 --num_frames 81

Prints the PSNR as the mean over clips and over all pixels. Then prints errors for each quarter of the clips: the PSNR,
the mean pixel error, and the colour errors of shape and background (as in scripts/evaluate.py). Of clips of 96x96
pixels, it prints the errors of all unnamed attributes instead.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

from evaluation.metrics import MetricCurve
from model.tiny_decoder import load_tiny_decoder
from model.vae import WanVAE
from model.weights import ModelDirectory
from shapes import world
from shapes.drift import UNNAMED
from shapes.look import STYLES
from shapes.metrics import detect_shapes, ground_truth_curves
from shapes.unnamed import attribute_errors
from utils.arguments import MAX_COUNT, require_range
from utils.errors import UserError, command
from utils.video import to_uint8

QUARTERS = 4
UNITS = {f"{a.name}_error": a.unit for a in UNNAMED} | dict.fromkeys(("absent", "wrong_shape"), "of the frames")


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="data/shapes-wan", help="model directory")
    parser.add_argument("--tiny_decoder", help="file of a tiny decoder; decodes instead of the VAE")
    parser.add_argument("--num_clips", type=int, default=12, help="number of clips")
    parser.add_argument("--num_frames", type=int, default=81, help="pixel frames per clip, 4n+1")
    parser.add_argument("--size", type=int, choices=list(STYLES), default=64, help="height and width in pixels")
    parser.add_argument("--seed", type=int, default=9, help="seed of the clips")
    args = parser.parse_args()
    require_range(args, 1, MAX_COUNT, "num_clips")
    require_range(args, 5, 100_000, "num_frames")
    require_range(args, 0, math.inf, "seed")
    if args.num_frames % 4 != 1:
        raise UserError(f"--num_frames must be of the form 4n+1, not {args.num_frames}")
    vae = WanVAE(ModelDirectory.open(args.base).load_vae(torch.float32))
    if args.tiny_decoder:
        vae.decoder = load_tiny_decoder(args.tiny_decoder, vae, torch.float32)
    squared = np.zeros((args.num_clips, args.num_frames))
    errors: dict[str, list[list[float]]] = {}
    for index in tqdm(range(args.num_clips), unit="clip"):
        clip = world.sample_clip(args.seed, index, held_out=True, size=args.size)
        rendering = world.render(clip, args.num_frames)
        pixels = world.to_pixels(rendering).transpose(0, 1)[None]
        decoded = vae.decode(vae.encode(pixels))
        squared[index] = (decoded - pixels).square().mean(dim=(0, 2, 3, 4)).numpy()
        pixel_error = 127.5 * (decoded - pixels).abs().mean(dim=(0, 2, 3, 4)).numpy()
        curves = {"pixel_error": MetricCurve(pixel_error, np.ones(args.num_frames, dtype=bool))}
        curves |= vae_errors(clip, rendering, to_uint8(decoded[0]))
        for name, curve in curves.items():
            sums = [curve.sum_between(q / QUARTERS, (q + 1) / QUARTERS) for q in range(QUARTERS)]
            errors.setdefault(name, []).append([total / count if count else np.nan for total, count in sums])
    mean = np.mean([psnr(clip) for clip in squared])
    print(
        f"{args.num_clips} held-out clips of {args.num_frames} frames: {mean:.2f} dB (mean over clips), "
        f"{psnr(squared):.2f} dB (over all pixels)"
    )
    quarter_psnr = [f"{psnr(quarter):.2f}" for quarter in np.array_split(squared, QUARTERS, axis=1)]
    print(f"by quarter: {', '.join(quarter_psnr)} dB")
    for name, rows in errors.items():
        quarters = np.ma.masked_invalid(rows).mean(axis=0).filled(np.nan)
        change = quarters[-1] / quarters[0] - 1 if quarters[0] else 0.0
        unit = UNITS.get(name, "of 255")
        print(f"{name} by quarter: {', '.join(f'{q:.2f}' for q in quarters)} {unit}; first to last {change:+.1%}")


def vae_errors(clip: world.Clip, rendering: np.ndarray, decoded: np.ndarray) -> dict[str, MetricCurve]:
    """Return the errors in the colours of the first style, and in every unnamed attribute of the second."""
    if clip.style.unnamed:
        return attribute_errors(rendering, decoded)
    curves = ground_truth_curves(detect_shapes(decoded), clip.scene)
    return {name: curves[name] for name in ("color_error", "background_error")}


def psnr(squared: np.ndarray) -> float:
    """Return the PSNR in dB of squared errors of pixels in [-1, 1]."""
    return float(-10 * np.log10(squared.mean() / 4))


if __name__ == "__main__":
    main()

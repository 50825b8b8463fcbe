"""Noise floors of the metrics: the scores of exact renderings, and of these renderings after the VAE."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from evaluation.evaluate import compute_metrics
from evaluation.measurements import measure_file
from evaluation.methods import Method
from model.vae import WanVAE
from model.weights import ModelDirectory
from shapes import world
from shapes.metrics import ShapesWorld
from shapes.unnamed import UnnamedShapesWorld
from utils.video import VideoWriter


def measure_noise_floors(
    method: Method,
    shapes_world: ShapesWorld | UnnamedShapesWorld,
    num_videos: int,
    model_folder: str,
    block_frames: int,
) -> list[Method]:
    """Measure renderings of some prompts of a method, before and after the VAE.

    Both pass through the video encoder, as generated videos do. They have the length of the method's longest video.

    Args:
        shapes_world: the world of the method's videos.
        num_videos: number of prompts, spread evenly over the method's videos.
        model_folder: model directory with the VAE.
        block_frames: latent frames per block.
    """
    vae = WanVAE(ModelDirectory.open(model_folder).load_vae(torch.float32))
    num_frames = max(len(video.curves["presence"].value) for video in method.videos)
    num_frames = (num_frames - 1) // vae.temporal_stride * vae.temporal_stride + 1
    selected = np.linspace(0, len(method.videos) - 1, min(num_videos, len(method.videos))).round().astype(int)
    floors = Method("truth"), Method("truth through VAE")
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(selected, desc="noise floors", unit="video"):
            key = method.videos[number].key
            rng = np.random.default_rng([key.seed, key.sample, int(number)])
            rendering = world.render(
                world.draw_clip(world.parse_caption(key.prompt), rng, shapes_world.size), num_frames
            )
            pixels = world.to_pixels(rendering).transpose(0, 1)[None]
            versions: tuple[np.ndarray | torch.Tensor, ...] = rendering, vae.decode(vae.encode(pixels))[0]
            for floor, frames in zip(floors, versions, strict=True):
                path = Path(folder) / f"{floor.label} {number}.mp4"
                with VideoWriter(path, fps=world.FPS) as video:
                    video.write(frames)
                measurements = measure_file(path, shapes_world)
                floor.videos.append(compute_metrics(measurements, key, path.name, shapes_world, block_frames))
    return list(floors)

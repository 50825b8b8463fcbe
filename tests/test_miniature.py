"""The shipped miniature does what its prompts say: claims about data/shapes-wan, measured on decoded pixels.

Claims: the VAE reconstructs held-out clips and does not drift over them; background and shape colours of generated
videos follow the prompt; the folder is an ordinary diffusers pipeline, whose transformer is our network run
bidirectionally; the whole of data/ stays small.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

from model.vae import WanVAE
from model.weights import ModelDirectory
from pipeline.text_to_video import TextToVideo
from utils import shapes
from utils.config import load_config
from utils.video import to_uint8

MODEL = "data/shapes-wan"
PROMPTS = [line for line in Path("data/shapes_prompts.txt").read_text().splitlines() if line]


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return WanVAE(ModelDirectory.open(MODEL).load_vae(torch.float32))


def nearest(pixels: np.ndarray, palette: dict[str, tuple[int, int, int]]) -> list[str]:
    """Name of the palette colour that is nearest to each of pixels [..., 3], flattened."""
    names, colors = list(palette), np.array(list(palette.values()), dtype=np.float32)
    distances = np.linalg.norm(pixels.reshape(-1, 1, 3).astype(np.float32) - colors, axis=-1)
    return [names[i] for i in distances.argmin(axis=1)]


def background_of(frame: np.ndarray) -> str:
    """The background of a frame [H, W, 3]: shapes are smaller than half of it."""
    return nearest(np.median(frame, axis=(0, 1)), shapes.BACKGROUNDS)[0]


def shape_color_of(frame: np.ndarray) -> str:
    """The colour of the shape: of the pixels that are farthest from the background, row by row for graded ones."""
    background = np.median(frame, axis=1, keepdims=True)
    distance = np.linalg.norm(frame.astype(np.float32) - background, axis=-1)
    shape = frame[distance >= np.quantile(distance, 0.95)]
    return nearest(np.median(shape, axis=0), shapes.COLORS)[0]


@pytest.mark.parametrize("index", range(4))
def test_measures_are_right_on_rendered_truth(index):
    """The yardstick of the tests below, on clips whose answer is known."""
    clip = shapes.sample_clip(5, index)
    frames = shapes.render(clip, 20)[::5]
    if not clip.scene.graded:
        assert {background_of(frame) for frame in frames} == {clip.scene.background}
    assert {shape_color_of(frame) for frame in frames} == {clip.scene.color}


def test_vae_reconstructs_held_out_clips_without_drift(vae):
    errors = []
    for index in range(3):
        pixels = shapes.to_pixels(shapes.render(shapes.sample_clip(9, index, held_out=True), 81)).transpose(0, 1)[None]
        errors.append((vae.decode(vae.encode(pixels)) - pixels).square().mean(dim=(0, 2, 3, 4)))
    psnr = -10 * torch.log10(torch.stack(errors) / 4)  # [clip, frame], pixels span 2
    assert psnr.mean() > 26
    assert (psnr[:, -20:].mean() - psnr[:, :20].mean()).abs() < 1.5


@pytest.mark.slow
def test_colours_follow_the_prompts():
    config = load_config("configs/shapes.yaml", ["runtime.seed=7"])
    pipeline = TextToVideo.load(config, torch.device("cpu"))
    backgrounds, colors, count = 0, 0, 0
    for prompt in PROMPTS:
        scene = shapes.parse_caption(prompt)
        latents = torch.cat(list(pipeline.generate([prompt], [0])), dim=1)
        frames = to_uint8(pipeline.vae.decode(latents)[0])[10::10]
        backgrounds += sum(background_of(frame) == scene.background for frame in frames)
        colors += sum(shape_color_of(frame) == scene.color for frame in frames)
        count += len(frames)
    print(f"background {backgrounds} and shape colour {colors} right in {count} frames")
    assert backgrounds > 0.85 * count  # chance: one in five
    assert colors > 0.5 * count  # chance: one in six


def test_it_is_an_ordinary_diffusers_pipeline():
    from diffusers import WanPipeline, WanTransformer3DModel

    from model.causal_wan import CausalWanModel

    pipeline = WanPipeline.from_pretrained(MODEL, dtype=torch.float32)
    assert isinstance(pipeline.transformer, WanTransformer3DModel)
    ours = ModelDirectory.open(MODEL).load_transformer(CausalWanModel, torch.float32)
    x, timestep, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([700.0]), torch.randn(1, 80, 64)
    with torch.no_grad():
        theirs = pipeline.transformer(x, timestep, text, return_dict=False)[0]
        torch.testing.assert_close(ours(x, timestep, text), theirs, atol=1e-5, rtol=1e-5)


def test_data_is_small():
    total = sum(file.stat().st_size for file in Path("data").rglob("*") if file.is_file())
    assert total < 32e6

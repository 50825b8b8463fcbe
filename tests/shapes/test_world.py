"""shapes/world.py: captions and pixels of the miniature world agree.

Claims: captions parse back; held-out scenes are fixed and disjoint from the others; colours, motion and positions in
the pixels match the caption; the world wraps around; a clip does not depend on its first rendered frame; clip numbers
are stable.
"""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch

from shapes.world import (
    BACKGROUNDS,
    COLORS,
    DIRECTIONS,
    NUM_CLASSES,
    SHAPES,
    SIZE,
    SPEEDS,
    Clip,
    Scene,
    all_scenes,
    parse_caption,
    render,
    sample_clip,
    to_pixels,
)

SCENE = Scene("red", "circle", "gray", False, "right", "slowly")
EVERY = [*all_scenes(held_out=False), *all_scenes(held_out=True)]


# ---- captions ----


def test_captions_parse_back():
    assert all(parse_caption(scene.caption) == scene for scene in EVERY)
    assert len({scene.caption for scene in EVERY}) == len(EVERY)


def test_captions_are_english_sentences():
    assert SCENE.caption == "a red circle moving right slowly on a gray background"
    other = Scene("orange", "square", "blue", True, "down left", "fast")
    assert other.caption == "an orange square moving down left fast on a graded blue background"
    assert parse_caption(f"  {other.caption.replace(' ', '  ')}. ") == other


@pytest.mark.parametrize(
    "caption",
    [
        "",
        "a cat",
        "a pink circle moving right slowly on a gray background",
        "a red blob moving right slowly on a gray background",
        "a red circle moving right quickly on a gray background",
        "a red circle moving right slowly on a pink background",
        "a red circle moving left right slowly on a gray background",
        "a red circle moving right slowly on a gray background, and more",
    ],
)
def test_other_captions_are_refused(caption):
    with pytest.raises(ValueError, match="not a caption"):
        parse_caption(caption)


def test_labels_are_classes():
    for scene in EVERY:
        assert all(0 <= label < NUM_CLASSES[name] for name, label in scene.labels.items())
    assert len({tuple(scene.labels.values()) for scene in EVERY}) == len(EVERY)
    assert {name: len({s.labels[name] for s in EVERY}) for name in NUM_CLASSES} == NUM_CLASSES


# ---- the held-out split ----


def test_held_out_combinations_are_never_trained_on():
    def combinations(held_out: bool) -> set[tuple[str, str, str]]:
        return {(s.color, s.shape, s.background) for s in all_scenes(held_out)}

    assert combinations(True).isdisjoint(combinations(False))
    assert len(list(all_scenes(True))) == 384 and len(list(all_scenes(False))) == 2304
    assert not any(scene.color == scene.background for scene in EVERY)


def test_held_out_combinations_are_always_the_same():
    held_out = {(s.color, s.shape, s.background) for s in all_scenes(True)}
    assert len(held_out) == 12
    assert {("red", "circle", "gray"), ("orange", "square", "gray")} <= held_out


def test_every_attribute_is_trained_on():
    """Only combinations are held out; training shows every single attribute."""
    trained = list(all_scenes(False))
    for name, count in NUM_CLASSES.items():
        assert len({scene.labels[name] for scene in trained}) == count


# ---- the training set ----


def test_a_clip_number_always_gives_the_same_clip():
    clip = sample_clip(0, 0)
    assert clip.scene == Scene("orange", "circle", "white", False, "down", "fast")
    assert (clip.x, clip.y) == pytest.approx((17.2663496808877, 2.62230553191646))
    assert sample_clip(0, 0) == clip
    assert len({sample_clip(seed, index) for seed in range(3) for index in range(30)}) == 90


def test_sampled_clips_respect_the_held_out_split():
    assert not any(sample_clip(0, index).scene.held_out for index in range(300))
    assert all(sample_clip(0, index, held_out=True).scene.held_out for index in range(300))
    assert len(Counter(sample_clip(0, index).scene.direction for index in range(300))) == len(DIRECTIONS)


# ---- pixels ----


def empty(scene: Scene) -> np.ndarray:
    """Return the background, float [H, W, 3], from two renderings whose circles hide different rows."""
    circle = replace(scene, shape="circle")
    above, middle = (render(Clip(circle, 0.0, y), 1)[0].astype(float) for y in (0.0, SIZE / 2))
    rows = np.arange(SIZE)[:, None, None]
    return np.where((rows >= SIZE // 4) & (rows < 3 * SIZE // 4), above, middle)


def coverage(frames: np.ndarray, scene: Scene) -> np.ndarray:
    """Return the fraction of the shape's colour in each pixel, [T, H, W]; 0 is the background."""
    background = empty(scene)
    way = np.array(COLORS[scene.color]) - background
    return ((frames - background) * way).sum(-1) / (way * way).sum(-1)


def centroids(mask: np.ndarray) -> np.ndarray:
    """Return each frame's circular mean (x, y) in pixels, [T, 2], because the world wraps around."""
    turns = np.exp(2j * np.pi * (np.arange(SIZE) + 0.5) / SIZE)
    means = [(mask.sum(axis) * turns).sum(1) for axis in (1, 2)]
    return np.stack([np.angle(mean) / (2 * np.pi) * SIZE % SIZE for mean in means], axis=1)


def moved(positions: np.ndarray) -> np.ndarray:
    """Return the steps between positions, [T-1, 2], along the shortest path on the torus."""
    return (np.diff(positions, axis=0) + SIZE / 2) % SIZE - SIZE / 2


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_shapes_move_as_the_caption_states(direction, speed, shape):
    scene = Scene("yellow", shape, "blue", True, direction, speed)
    positions = centroids(coverage(render(Clip(scene, 50.0, 9.0), 33), scene))
    words = {"right": (1, 0), "left": (-1, 0), "up": (0, -1), "down": (0, 1)}
    heading = np.sum([words[word] for word in direction.split()], axis=0)
    expected = heading / np.linalg.norm(heading) * {"slowly": 0.75, "fast": 2.25}[speed]
    np.testing.assert_allclose(moved(positions).mean(0), expected, atol=0.02)
    np.testing.assert_allclose(moved(positions), np.broadcast_to(expected, (32, 2)), atol=0.25)


def test_a_circle_is_rendered_at_its_position():
    clip = Clip(replace(SCENE, direction="down left"), 3.0, 60.0)
    positions = centroids(coverage(render(clip, 20), clip.scene))
    expected = np.stack(clip.position(np.arange(20)), axis=1)
    assert ((expected >= 0) & (expected < SIZE)).all()
    np.testing.assert_allclose(moved(np.stack([positions, expected], axis=1).reshape(-1, 2))[::2], 0, atol=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_world_wraps_around(shape):
    """A shape on the edge equals the shifted shape in the middle."""
    scene = replace(SCENE, shape=shape)
    middle, edge = (render(Clip(scene, xy, xy), 1)[0] for xy in (SIZE / 2, 0.0))
    assert np.array_equal(np.roll(middle, (SIZE // 2, SIZE // 2), axis=(0, 1)), edge)


@pytest.mark.parametrize("color", COLORS)
def test_shape_and_background_have_their_colours(color):
    background = "white"
    image = render(Clip(Scene(color, "circle", background, False, "up", "fast"), 32.0, 32.0), 1)[0]
    assert tuple(image[32, 32]) == COLORS[color]
    assert tuple(image[0, 0]) == BACKGROUNDS[background]


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_graded_backgrounds_darken_downwards(background):
    scene = Scene("purple", "circle", background, True, "up", "fast")
    rows = empty(scene).sum(axis=2)[:, 0]
    assert (np.diff(rows) <= 0).all() and rows[-1] < 0.7 * rows[0]
    flat = empty(replace(scene, graded=False))
    assert (flat == flat[0, 0]).all()


def test_shapes_differ_in_form_but_hardly_in_size():
    masks = {
        s: coverage(render(Clip(replace(SCENE, shape=s), 32.0, 32.0), 1), replace(SCENE, shape=s))[0] for s in SHAPES
    }
    areas = {shape: mask.sum() for shape, mask in masks.items()}
    assert areas["circle"] == pytest.approx(np.pi * 15**2, rel=0.02)
    assert max(areas.values()) < 1.25 * min(areas.values())
    width = {shape: mask.max(axis=0).sum() / mask.max(axis=1).sum() for shape, mask in masks.items()}
    assert width["circle"] == pytest.approx(1, abs=0.01) and width["square"] == pytest.approx(1, abs=0.01)
    top, bottom = masks["triangle"][:30].sum(), masks["triangle"][34:].sum()
    assert bottom > 1.2 * top
    corner = (slice(20, 21), slice(20, 21))
    assert masks["square"][corner].min() > 0.9 and masks["circle"][corner].max() < 0.1


def test_rendering_can_start_at_any_frame():
    clip = Clip(replace(SCENE, direction="up right", speed="fast"), 10.0, 20.0)
    assert np.array_equal(render(clip, 5, first_frame=90), render(clip, 100)[90:95])


def test_motion_never_ends():
    scene = replace(SCENE, direction="left")
    late = render(Clip(scene, 10.0, 20.0), 2, first_frame=10**6)
    np.testing.assert_allclose(moved(centroids(coverage(late, scene))), [[-0.75, 0]], atol=0.05)


def test_pixels_are_scaled_for_the_vae():
    frames = render(Clip(SCENE, 32.0, 32.0), 2)
    pixels = to_pixels(frames)
    assert pixels.shape == (3, 2, SIZE, SIZE) and pixels.dtype == torch.float32
    assert pixels[:, 0, 32, 32].tolist() == pytest.approx([c / 127.5 - 1 for c in COLORS["red"]])
    assert to_pixels(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1)).flatten().tolist() == [-1, 1]

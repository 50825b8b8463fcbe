"""The second style of the miniature's world: its captions, its looks, and the drift that is measured in them.

Claims: captions may omit attributes and parse back; looks are drawn within their ranges and leave the first style's
clips as they are; the attributes are estimated from pixels within stated errors, also in noisy frames; a drift of known
size in one attribute is recovered and changes no other attribute; identity needs every attribute, motion, the shape and
the pebble.
"""

import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from tiny_model import all_clips, write_model

from evaluation.metrics import MetricCurve
from model.presets import TRANSFORMERS
from scripts import encode_clips, evaluate, write_shapes_clips
from shapes import look as looks
from shapes import world
from shapes.detection import FrameAttributes, detect_attributes
from shapes.drift import DRIFT_METRICS, HORIZONS, SIZE, TRAINING_FRAMES, UNNAMED, identity, num_pixel_frames
from shapes.look import PATTERNS, STYLES, Look, Pebble
from shapes.metrics import ShapesWorld, torus_difference
from shapes.objectives import TextAttributes, VAEReconstruction
from shapes.unnamed import UnnamedShapesWorld, attribute_curves, attribute_errors, world_of_video
from shapes.world import OMITTABLE, Clip, Scene, parse_caption, render, sample_clip
from utils.config import Config
from utils.config_checks import FRAME_SIZES
from utils.config_loading import override_config
from utils.video import VideoWriter

STYLE = STYLES[SIZE]
CLIPS_5 = [sample_clip(5, index, size=SIZE) for index in range(2)]
CLIPS = [sample_clip(5, index, held_out=index % 3 == 0, size=SIZE) for index in range(200)]


# ---- Captions ----


def test_half_of_the_captions_omit_attributes():
    omitting = [clip for clip in CLIPS if clip.omitted]
    assert 0.4 < len(omitting) / len(CLIPS) < 0.6
    assert {name for clip in omitting for name in clip.omitted} == set(OMITTABLE)
    assert not any(clip.omitted for clip in (sample_clip(5, index) for index in range(50)))


def test_captions_name_everything_but_the_omitted_attributes():
    for clip in CLIPS:
        named = parse_caption(clip.caption)
        assert named == clip.scene.without(clip.omitted) and named.caption == clip.caption
        assert {name for name in OMITTABLE if not getattr(named, name)} == set(clip.omitted)
        assert {name for name, label in named.labels.items() if label < 0} - {"graded"} == set(clip.omitted)


def test_captions_stay_english_when_they_omit_attributes():
    scene = Scene("orange", "circle", "blue", True, "up left", "fast")
    assert scene.without(["color"]).caption == "a circle moving up left fast on a graded blue background"
    assert scene.without(["shape", "background"]).caption == "an orange shape moving up left fast"
    assert scene.without(["direction", "speed"]).caption == "an orange circle moving on a graded blue background"
    assert scene.without(OMITTABLE).caption == "a shape moving"
    assert not ShapesWorld().is_caption("a shape moving") and UnnamedShapesWorld().is_caption("a shape moving")
    assert ShapesWorld().is_caption(scene.caption)


# ---- Looks ----


def test_the_configuration_accepts_the_sizes_of_the_styles():
    assert set(FRAME_SIZES) == set(STYLES)


def test_a_clip_number_always_gives_the_same_clip():
    clip = sample_clip(0, 1, size=SIZE)
    assert clip == sample_clip(0, 1, size=SIZE)
    assert clip.caption == "a shape moving left fast"
    assert clip.scene == sample_clip(0, 1).scene
    assert (clip.look.hue, clip.look.size) == pytest.approx((-9.99383519285697, 0.9975066645030942))


def test_looks_vary_over_their_ranges():
    values = {name: [getattr(clip.look, name) for clip in CLIPS] for name in ("hue", "brightness", "size", "gradient")}
    for name, low, high in (("hue", -10, 10), ("brightness", 0.72, 1.02), ("size", 0.75, 1.15), ("gradient", 0, 360)):
        assert low <= min(values[name]) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values[name]) <= high
    assert {clip.look.pattern for clip in CLIPS} == set(PATTERNS)
    assert np.abs([clip.look.tone for clip in CLIPS]).max() <= looks.TONE


def test_the_pebble_never_has_the_colour_of_the_shape():
    for clip in CLIPS:
        assert clip.look.pebble is not None
        assert np.abs(np.array(clip.look.pebble.color) - clip.color).max() > 5


def test_circles_are_round_and_have_smooth_edges():
    scene = Scene("red", "circle", "gray", False, "up", "fast")
    image = render(Clip(scene, SIZE / 2, SIZE / 2, style=STYLE), 1)[0].astype(int)
    for turned in (image[::-1], image[:, ::-1], image.transpose(1, 0, 2)):
        assert np.array_equal(turned, image)
    inside = (image[..., 0] - 125) / 100
    x, y = np.meshgrid(np.arange(SIZE) + 0.5 - SIZE / 2, np.arange(SIZE) + 0.5 - SIZE / 2)
    outline = np.hypot(x, y)[np.abs(inside - 0.5) < 0.45]  # pixels on the edge
    assert len(outline) > 100 and np.abs(outline - STYLE.radius).max() < 0.8


def test_the_pattern_moves_with_the_shape_and_the_pebble_does_not():
    look = Look(pattern="dots", pebble=Pebble((20, 200, 40), 0.1, 0.1))
    clip = Clip(Scene("red", "square", "gray", False, "right", "fast"), 40.0, 60.0, look, STYLE)
    first, later = render(clip, 9)[[0, 8]]  # 8 frames of 3.375 pixels: 27 pixels
    assert np.array_equal(first[42:79, 22:59], later[42:79, 49:86])
    assert np.array_equal(first[:20, :20], later[:20, :20])
    assert tuple(first[9, 9]) == (20, 200, 40)


# ---- Estimates ----


def errors(frames: np.ndarray, clip: Clip, found: FrameAttributes) -> dict[str, float]:
    """Return the largest error of every attribute over the frames of a clip."""
    look, seen = clip.look, found.pebble
    truth = np.stack(clip.position(np.arange(len(frames))), axis=1)
    depth = world.PATTERN_DEPTH * np.array([look.pattern == name for name in ("stripes", "dots")])
    assert look.pebble is not None
    middle = world.background(clip.scene, replace(look, pebble=None), clip.style)[47:49, 47:49].mean((0, 1))
    place = SIZE * np.array([look.pebble.x, look.pebble.y])
    scale = world.SIZE / SIZE
    return {
        "absent": float((~found.present).sum()),
        "shape": float((found.shape != clip.scene.labels["shape"]).sum()),
        "position": np.hypot(*torus_difference(scale * (found.position - truth)).T).max() / scale,
        "size": np.abs(np.log(found.size / look.size)).max(),
        "elongation": np.abs(np.log(found.elongation / look.elongation)).max(),
        "color": np.abs(found.color - clip.color).mean(1).max(),
        "pattern": np.abs(found.pattern - depth).max(),
        "tone": np.abs(found.tone - middle).mean(1).max(),
        "pebble_position": np.abs(torus_difference(scale * (found.pebble_position - place)[seen])).max(initial=0)
        / scale,
        "pebble_color": np.abs(found.pebble_color - look.pebble.color).mean(1)[seen].max(initial=0),
    }


# Largest errors in pixels, natural logarithms, of 255, and parts of the brightness; with noise of 6 of 255 added.
LIMITS = {
    "absent": (0, 0), "shape": (0, 0), "position": (0.8, 0.8), "size": (0.02, 0.02), "elongation": (0.06, 0.06),
    "color": (2, 2.5), "pattern": (0.03, 0.03), "tone": (1.5, 4), "pebble_position": (0.6, 0.6), "pebble_color": (1, 3),
}  # fmt: skip


@pytest.mark.parametrize("noise", [0, 6])
def test_attributes_are_estimated_from_pixels(noise):
    rng = np.random.default_rng(1)
    visible = []
    for clip in CLIPS[:20]:
        frames = render(clip, 4)
        noisy = np.clip(frames + rng.normal(0, noise, frames.shape), 0, 255).astype(np.uint8) if noise else frames
        found = detect_attributes(noisy)
        measured = errors(frames, clip, found)
        assert {name: e for name, e in measured.items() if e > LIMITS[name][noise > 0]} == {}, clip
        visible.append(found.pebble.mean())
    assert np.mean(visible) > 0.6


def test_frames_without_a_shape_have_no_shape_and_no_pebble():
    plain = np.full((3, SIZE, SIZE, 3), 80, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    for frames in (plain, noise):
        found = detect_attributes(frames)
        assert not found.present.any() and not found.pebble.any()
    with pytest.raises(ValueError, match="frames with unnamed attributes are"):
        detect_attributes(np.zeros((3, 64, 64, 3), np.uint8))


def test_the_frame_size_selects_the_world(tmp_path):
    for size, kind in ((64, ShapesWorld), (96, UnnamedShapesWorld), (32, ShapesWorld)):
        with VideoWriter(tmp_path / f"{size}.mp4") as video:
            video.write(np.zeros((2, size, size, 3), np.uint8))
        assert type(world_of_video(tmp_path / f"{size}.mp4")) is kind


# ---- Injected drift ----

FRAMES = 48
SCENE = Scene("orange", "square", "gray", True, "right", "fast")
LOOK = Look(2.0, 0.85, 0.9, 1.0, "plain", (5.0, -5.0, 0.0), 30.0, Pebble((60, 60, 200), 0.5, 0.1))
CLIP = Clip(SCENE, 20.0, 60.0, LOOK, STYLE)


def rendered(look_at: Callable[[float], Look]) -> np.ndarray:
    """Render the clip with a look that changes from `look_at(0)` in the first second to `look_at(1)` in the last."""
    times = np.clip((np.arange(FRAMES) // 16) / (FRAMES // 16 - 1), 0, 1)
    return np.concatenate([render(replace(CLIP, look=look_at(t)), 1, frame) for frame, t in enumerate(times)])


def with_pebble(x: float = 0.5, red: float = 60) -> Look:
    return replace(LOOK, pebble=Pebble((red, 60, 200), x, 0.1))


def brighter(amount: float) -> tuple[float, float, float]:
    """Return the clip's tone with all channels raised by `amount`."""
    red, green, blue = LOOK.tone
    return red + amount, green + amount, blue + amount


def fading_in(pattern: str) -> np.ndarray:
    """A pattern appears with half of its usual depth."""
    plain, patterned = (rendered(lambda t, p=p: replace(LOOK, pattern=p)).astype(float) for p in ("plain", pattern))
    times = np.clip((np.arange(FRAMES) // 16) / (FRAMES // 16 - 1), 0, 1)[:, None, None, None]
    return np.round(plain + 0.5 * times * (patterned - plain)).astype(np.uint8)


def turning() -> np.ndarray:
    """The shape turns by 40 degrees after the first second."""
    x, y = 20 + 3.375 * np.arange(FRAMES), np.full(FRAMES, 60.0)
    angle = np.radians(40) * (np.arange(FRAMES) >= 16)
    x, y = 20 + 3.375 * np.cumsum(np.cos(angle)), 60 + 3.375 * np.cumsum(np.sin(angle))
    still = [replace(CLIP, x=a % SIZE, y=b % SIZE) for a, b in zip(x, y, strict=True)]
    return np.concatenate([render(clip, 1) for clip in still])


# Attribute: frames that drift in it, the size of the drift, and the other attributes that measure the same change.
INJECTED: dict[str, tuple[Callable[[], np.ndarray], float, set[str]]] = {
    "hue": (lambda: rendered(lambda t: replace(LOOK, hue=2 + 12 * t)), 12, {"color"}),
    "brightness": (
        lambda: rendered(lambda t: replace(LOOK, brightness=0.85 - 0.15 * t)), 0.15 * 250, {"color"},
    ),
    "size": (lambda: rendered(lambda t: replace(LOOK, size=0.9 * np.exp(0.2 * t))), 20, set()),
    "elongation": (lambda: rendered(lambda t: replace(LOOK, elongation=np.exp(-0.25 * t))), 25, set()),
    "pattern": (lambda: fading_in("stripes"), 20, set()),
    "tone": (lambda: rendered(lambda t: replace(LOOK, tone=brighter(20 * t))), 0.85 * 20, {"gradient"}),
    "gradient": (lambda: rendered(lambda t: replace(LOOK, gradient=30 + 90 * t)), 71.8, set()),
    "pebble_color": (lambda: rendered(lambda t: with_pebble(red=60 + 90 * t)), 30, set()),
    "pebble_position": (lambda: rendered(lambda t: with_pebble(x=0.5 + 0.1 * t)), 10, set()),
    "heading": (turning, 40, set()),
}  # fmt: skip


@pytest.mark.parametrize("name", INJECTED)
def test_injected_drift_is_recovered(name):
    make, size, same = INJECTED[name]
    curves = attribute_curves(detect_attributes(make()), SCENE)
    found = {a.name: float(curves[f"{a.name}_distance"].value[-16]) for a in UNNAMED}
    assert found[name] == pytest.approx(size, rel=0.1)
    limits = {a.name: 0.25 * a.tolerance for a in UNNAMED if a.name != name and a.name not in same}
    assert {other: found[other] for other, limit in limits.items() if found[other] > limit} == {}
    assert curves["kept"].value[-16:].max() == 0 and curves["kept"].value[:16].min() == 1


def test_every_attribute_is_injected():
    assert {a.name for a in UNNAMED} - {"color"} == set(INJECTED)
    assert all("color" in INJECTED[name][2] for name in ("hue", "brightness"))


def test_errors_of_a_vae_are_the_differences_of_the_attributes():
    truth = render(CLIP, 6)
    changed = render(replace(CLIP, look=replace(LOOK, size=0.9 * np.exp(0.1), tone=brighter(10))), 6)
    errors = attribute_errors(truth, changed)
    means = {name: float(curve.value[curve.valid].mean()) for name, curve in errors.items()}
    assert (means["size_error"], means["tone_error"]) == (pytest.approx(10, rel=0.1), pytest.approx(8.5, rel=0.1))
    assert max(means[f"{name}_error"] for name in ("hue", "elongation", "pattern", "pebble_position")) < 1
    assert means["absent"] == means["wrong_shape"] == 0
    empty = attribute_errors(truth, np.full_like(truth, 90))
    assert empty["absent"].value.min() == 1 and not empty["size_error"].valid.any()


# ---- Identity ----


@pytest.fixture(scope="module")
def truth() -> FrameAttributes:
    return detect_attributes(render(CLIP, TRAINING_FRAMES))


def frames_of(attributes: FrameAttributes, chosen: np.ndarray) -> FrameAttributes:
    """Return the attributes of these frames, in this order."""
    return FrameAttributes(**{name: rows[chosen] for name, rows in vars(attributes).items()})


def one_length(attributes: FrameAttributes) -> tuple[dict[str, MetricCurve], float]:
    """Return a video's curves, and its identity at one training length."""
    curves = attribute_curves(attributes, SCENE)
    metric = next(m for m in DRIFT_METRICS if m.name == "identity_1x")
    return curves, metric.reduce([curves[name] for name in metric.inputs]).total


def test_the_ground_truth_keeps_its_identity(truth):
    curves, kept = one_length(truth)
    assert kept == 1 and curves["presence"].value.min() == curves["kept"].value.min() == 1
    for attribute in UNNAMED:
        distance = curves[f"{attribute.name}_distance"]
        assert distance.valid.any() and distance.value.max() < 0.1 * attribute.tolerance


def test_a_frozen_video_fails_by_motion(truth):
    curves, kept = one_length(frames_of(truth, np.zeros(TRAINING_FRAMES, int)))
    assert kept == 0 and curves["kept"].value.min() == 1 and curves["moving"].value.max() == 0


def test_an_empty_video_fails_by_presence():
    empty = detect_attributes(np.full((1, SIZE, SIZE, 3), 90, np.uint8))
    curves, kept = one_length(frames_of(empty, np.zeros(TRAINING_FRAMES, int)))
    assert kept == 0 and curves["kept"].value.min() == 1 and curves["presence"].value.max() == 0


def test_a_lost_pebble_fails(truth):
    lost = np.arange(TRAINING_FRAMES) >= 16
    _, kept = one_length(FrameAttributes(**vars(truth) | {"pebble": truth.pebble & ~lost}))
    assert kept == 1  # 20% of the last frames show it: the shape may have hidden it
    _, kept = one_length(FrameAttributes(**vars(truth) | {"pebble": truth.pebble & (np.arange(TRAINING_FRAMES) < 6)}))
    assert kept == 0


def test_identity_needs_its_shares_of_a_long_video():
    num_frames = num_pixel_frames(4)
    assert num_frames == 333 and num_pixel_frames(1) == TRAINING_FRAMES

    def result(kept: float = 1, present: float = 1, moving: float = 1, pebble: float = 1, frames: int = 333) -> float:
        """Return identity at four training lengths, for curves that are 1 in a leading share of the frames."""
        time = np.arange(frames) / num_frames
        curves = [MetricCurve((time < share).astype(float), time >= 0) for share in (kept, present, moving, pebble)]
        value = identity(4)(curves)
        return value.total if value.num_values else -1

    assert result() == result(kept=0.96, present=0.92, moving=0.92) == 1
    assert result(kept=0.94) == result(present=0.88) == result(moving=0.88) == result(pebble=0.77) == 0
    assert result(frames=332) == -1 and result(frames=500) == 1
    assert [m.name for m in DRIFT_METRICS if "identity" in m.name] == [f"identity_{n}x" for n in HORIZONS]


# ---- Scripts ----


@pytest.fixture
def clips(tmp_path, call):
    """A folder of two written clips, with the metadata that inference.py writes."""
    folder = tmp_path / "clips"
    words = ("--output", folder, "--num_clips", 2, "--num_frames", 17, "--size", SIZE, "--seed", 5)
    assert call(write_shapes_clips, *words)[0] == 0
    for number, caption in enumerate((folder / "captions.txt").read_text().splitlines()):
        metadata = {"prompt": caption, "sample": 0, "config": {"runtime": {"seed": 5}}}
        (folder / f"{number:05d}.json").write_text(json.dumps(metadata))
    return folder


def test_written_clips_are_measured_with_noise_floors(tmp_path, call, clips, monkeypatch):
    assert (clips / "captions.txt").read_text().splitlines() == [clip.caption for clip in CLIPS_5[:2]]
    monkeypatch.setattr("evaluation.results.save_line_plot", lambda path, *_: Image.new("RGB", (1, 1)).save(path))
    model = write_model(tmp_path / "model")
    words = ("--output", tmp_path / "out", "--base", model, "--floor_videos", 1, "--examples", 0)
    code, out, err = call(evaluate, clips, *words)
    assert code == 0, err
    results = json.loads((tmp_path / "out/evaluation.json").read_text())["methods"]
    assert [method["label"] for method in results] == ["clips", "truth", "truth through VAE"]
    for method in results[:2]:
        means = {name: value["mean"] for name, value in method["estimates"].items()}
        assert means["presence"] == means["moving"] == means["speed"] == means["background"] == 1
        # NaN where the shape hides the pebble.
        assert not any(means[f"{a.name}_distance"] > 0.25 * a.tolerance for a in UNNAMED)
    assert results[2]["estimates"]["presence"]["mean"] == 0  # a random VAE
    assert "identity_4x [%]" in out


def test_latents_and_captions_of_a_size_are_encoded(tmp_path, call):
    model = write_model(tmp_path / "model")
    words = ("--base", model, "--output", tmp_path / "out", "--num_clips", 2, "--num_frames", 1, "--size", SIZE)
    assert call(encode_clips, *words, "--device", "cpu", "--seed", 5)[0] == 0
    latents, captions = all_clips(str(tmp_path / "out"))
    assert latents.shape == (2, 1, 16, 12, 12) and captions == [clip.caption for clip in CLIPS_5[:2]]


def test_training_renders_clips_of_the_configured_size():
    config = override_config(Config(), ["data.frame_size=96", "train.network=shapes-96", "runtime.seed=5"])
    vae = VAEReconstruction(config, torch.device("cpu"))
    assert torch.equal(vae.clip(1, 5), world.to_pixels(render(CLIPS_5[1], 5)))
    assert vae.net.config.z_dim == TRANSFORMERS["shapes-96"]["in_channels"]


def test_the_text_encoder_learns_which_attributes_a_caption_omits(monkeypatch):
    words = ["data.frame_size=96", "train.network=shapes-96", "train.batch_size=4", "train.objective=text_attributes"]
    objective = TextAttributes(override_config(Config(), words), torch.device("cpu"))
    targets = []
    monkeypatch.setattr(F, "cross_entropy", lambda logits, target: (targets.append(target), logits.sum())[1])
    objective.loss(0, 0)
    clips = [sample_clip(0, index, held_out=index % 7 == 0, size=SIZE) for index in range(4)]
    for (name, count), target in zip(world.NUM_CLASSES.items(), targets, strict=True):
        labels = [clip.scene.without(clip.omitted).labels[name] for clip in clips]
        assert target.tolist() == [label if label >= 0 else count for label in labels]
    assert any((target == world.NUM_CLASSES["color"]).any() for target in targets[:1])

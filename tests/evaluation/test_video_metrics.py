"""evaluation/video_metrics.py: each degradation of a video changes the metrics meant for it, and no others."""

from functools import cache

import cv2
import numpy as np
import pytest

from evaluation.metrics import MetricCurve, quarter_change, quarter_distance, start_end_contrast, video_sums
from evaluation.video_metrics import _QUANTILES, PIXEL_METRICS, _quantiles, borders, measure_frames, pixel_curves

FRAMES, HEIGHT, WIDTH = 45, 96, 128
TIME = np.arange(FRAMES)[:, None, None, None]
RAMP = TIME / (FRAMES - 1)

# Differences up to these do not count as a change.
SLACK = {
    "motion": 0.7, "flow": 0.15, "static": 0, "smoothness": 0.1, "warp_error": 0.7, "brightness": 2, "contrast": 2,
    "saturation": 2, "sharpness": 0.01, "flow_drift": 0.2, "brightness_drift": 2, "contrast_drift": 2,
    "saturation_drift": 2, "sharpness_drift": 0.01, "palette_drift": 2, "pixel_seam": 1, "pixel_inside": 1,
    "motion_start_end": 0.7, "brightness_start_end": 2, "contrast_start_end": 2, "saturation_start_end": 2,
    "sharpness_start_end": 0.01,
}  # fmt: skip


@cache
def texture() -> np.ndarray:
    """Smooth periodic colours around mid-gray, [HEIGHT, WIDTH, 3]."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[:HEIGHT, :WIDTH] * 2 * np.pi
    waves = np.zeros((HEIGHT, WIDTH, 3))
    for _ in range(40):
        down, right = rng.integers(-4, 5, 2)
        waves += np.cos(down * y / HEIGHT + right * x / WIDTH + rng.uniform(0, 7))[..., None] * rng.normal(0, 1, 3)
    return 128 + 30 * waves / waves.std()


def scrolling(offsets: np.ndarray) -> np.ndarray:
    """The texture shifted to the right by `offsets` pixels, float [T, HEIGHT, WIDTH, 3]."""
    return np.stack([np.roll(texture(), int(offset), axis=1) for offset in offsets])


def to_bytes(frames: np.ndarray) -> np.ndarray:
    return frames.round().clip(0, 255).astype(np.uint8)


def luma(frames: np.ndarray) -> np.ndarray:
    return (frames * [0.2126, 0.7152, 0.0722]).sum(-1, keepdims=True)


def measured(frames: np.ndarray) -> dict[str, float]:
    sums = video_sums(PIXEL_METRICS, pixel_curves(measure_frames(frames)))
    return {name: total / count if count else float("nan") for name, (total, count) in sums.items()}


CLEAN = scrolling(np.arange(FRAMES))


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_counted_quantiles_are_numpys(size):
    values = np.random.default_rng(size).integers(0, 256, (size, 1)).astype(np.uint8)
    np.testing.assert_allclose(_quantiles(values), np.quantile(values, _QUANTILES), atol=1e-12)


@pytest.fixture(scope="module")
def clean() -> dict[str, float]:
    return measured(to_bytes(CLEAN))


def blurring() -> np.ndarray:
    fine = scrolling(np.arange(FRAMES)) + 12 * ((np.indices((HEIGHT, WIDTH)).sum(0) % 4) - 1.5)[..., None]
    return np.stack([cv2.GaussianBlur(frame, (0, 0), 0.1 + 2 * t / FRAMES) for t, frame in enumerate(fine)])


DRIFT = "palette_drift"
DEGRADED = {
    "saturation": (
        lambda: luma(CLEAN) + (CLEAN - luma(CLEAN)) * (1 + 0.5 * RAMP),
        {"saturation", "saturation_drift", "saturation_start_end", "motion_start_end", DRIFT},
    ),
    "brightness": (lambda: CLEAN + 20 * RAMP, {"brightness", "brightness_drift", "brightness_start_end", DRIFT}),
    "contrast": (
        lambda: 128 + (CLEAN - 128) * (1 - 0.25 * RAMP),
        {f"{name}{change}" for name in ("contrast", "saturation") for change in ("", "_drift", "_start_end")} | {DRIFT},
    ),
    "freezing": (
        lambda: CLEAN[np.minimum(np.arange(FRAMES), FRAMES // 2)],
        {"motion", "motion_start_end", "flow", "flow_drift"},
    ),
    "frozen": (lambda: np.repeat(CLEAN[:1], FRAMES, axis=0), {"motion", "flow", "static"}),
    "speed": (lambda: scrolling(2 * np.arange(FRAMES)), {"motion", "flow"}),
    "colours": (
        lambda: np.where(RAMP > 0.5, CLEAN + np.array([30, -5.9, -30]), CLEAN),
        {DRIFT, "saturation", "saturation_drift", "saturation_start_end"},
    ),
    "trembling": (lambda: scrolling(np.arange(FRAMES) + 2 * (np.arange(FRAMES) % 2)), {"motion", "flow", "smoothness"}),
}


SHUFFLED = {"pixel_seam", "motion", "flow", "smoothness", "warp_error"}


def changed(metrics: dict[str, float], clean: dict[str, float]) -> set[str]:
    return {name for name, slack in SLACK.items() if abs(metrics[name] - clean[name]) > slack}


@pytest.mark.parametrize("degradation", DEGRADED)
def test_a_degradation_changes_its_own_metrics_and_no_others(degradation, clean):
    make, expected = DEGRADED[degradation]
    metrics = measured(to_bytes(make()))
    assert changed(metrics, clean) == expected


def test_shuffled_blocks_change_seams_and_motion_only():
    frames = scrolling(np.arange(81))
    order = [3, 0, 5, 1, 4, 2]  # of blocks of three latent frames, after the first block
    indices = np.concatenate([np.arange(9), *(np.arange(9 + 12 * i, 21 + 12 * i) for i in order)])
    metrics = changed(measured(to_bytes(frames[indices])), measured(to_bytes(frames)))
    assert metrics == SHUFFLED  # a jump counts as motion


def test_blur_over_time_lowers_sharpness():
    metrics = measured(to_bytes(blurring()))
    assert metrics["sharpness_drift"] < -0.02 < 0.02 < metrics["sharpness_start_end"]


def test_start_end_contrast_is_the_absolute_change_between_the_ends():
    value, valid = np.r_[np.full(15, 3.0), np.full(70, 50.0), np.full(15, 1.0)], np.ones(100, bool)
    assert start_end_contrast([MetricCurve(value, valid)]) == (2.0, 1.0)
    assert start_end_contrast([MetricCurve(value[::-1], valid)]) == (2.0, 1.0)
    assert start_end_contrast([MetricCurve(value, np.arange(100) > 14)]).num_values == 0


def test_flow_equals_the_rendered_motion(clean):
    percent = np.hypot(HEIGHT, WIDTH) / 100
    assert clean["flow"] * percent == pytest.approx(1, abs=0.1)
    assert clean["static"] == 0 and clean["warp_error"] < 1.5 < clean["motion"] and clean["smoothness"] > 0.8


def test_metrics_do_not_depend_on_the_video_size(clean):
    large = np.stack([cv2.resize(frame, (6 * WIDTH, 6 * HEIGHT), interpolation=cv2.INTER_CUBIC) for frame in CLEAN[:5]])
    small, large = measured(to_bytes(CLEAN[:5])), measured(to_bytes(large))
    for name in ("brightness", "contrast", "saturation", "flow", "motion"):
        assert large[name] == pytest.approx(small[name], rel=0.1, abs=0.1), name


def test_every_metric_is_covered_by_a_degradation():
    covered = set.union(SHUFFLED, *(expected for _, expected in DEGRADED.values()))
    assert {m.name for m in PIXEL_METRICS} - covered == {
        *("sharpness", "sharpness_drift", "sharpness_start_end", "pixel_inside")
    }
    assert set(SLACK) == {m.name for m in PIXEL_METRICS}


def test_blocks_end_where_the_video_ends():
    latent, block = borders(4 * 6 + 1, 3)  # 7 latent frames: a first block with one prefix frame, then two of three
    assert np.flatnonzero(latent).tolist() == [1, 5, 9, 13, 17, 21] and np.flatnonzero(block).tolist() == [1, 13]
    assert np.flatnonzero(borders(4 * 5 + 1, 3)[1]).tolist() == [9]


def test_short_videos_have_metrics():
    one = measured(to_bytes(CLEAN[:1]))
    assert one["brightness"] > 0 and np.isnan([one[name] for name in ("motion", "flow", "smoothness", "static")]).all()
    assert not np.isnan(measured(to_bytes(CLEAN[:2]))["flow"])
    with pytest.raises(ValueError, match="without frames"):
        measure_frames([])


def test_changes_need_two_quarters_with_valid_frames():
    rising = MetricCurve(np.arange(8.0), np.ones(8, dtype=bool))
    assert quarter_change([rising]) == (6.0, 1.0)
    late = MetricCurve(np.arange(8.0), np.arange(8) > 3)
    assert quarter_change([late]) == (0.0, 0.0) and quarter_distance([rising, late]) == (0.0, 0.0)
    assert quarter_distance([rising, MetricCurve(-rising.value, rising.valid)]) == (6.0, 1.0)

"""Drift of attributes that no caption names: the distance from their values in the first second of the same video.

A value of a second is the median over its frames, so that noise of single frames does not count as drift.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics import NO_VALUES, Metric, MetricCurve, SumCount
from shapes.detection import FrameAttributes
from shapes.look import STYLES
from shapes.metrics import LAG, torus_difference
from shapes.world import FPS

SIZE = 96
TRAINING_FRAMES = 81  # pixel frames of a training clip: 21 latent frames
HORIZONS = (1, 4, 8, 12, 24)  # lengths at which identity is reported, in training lengths
MIN_FRAMES = 4  # of a second, for its median
# A video keeps its identity if at least these shares of its seconds or frames pass.
KEPT, PRESENT, MOVING, PEBBLE = 0.95, 0.9, 0.9, 0.1


@dataclass(frozen=True)
class Attribute:
    """An attribute that a clip must keep.

    Attributes:
        unit: of the distance times `scale`.
        tolerance: largest distance of a kept attribute, in this unit.
        measure: returns the values [T, K] of a video and the frames [T] in which they are valid.
        period: of circular values; 0 for others.
        is_color: whether the distance is the mean over channels; it is the Euclidean length otherwise.
    """

    name: str
    meaning: str
    unit: str
    tolerance: float
    measure: "Measure"
    scale: float = 1.0
    period: float = 0.0
    is_color: bool = False

    def distance(self, attributes: FrameAttributes) -> MetricCurve:
        """Return the distance of every second from the first, in `unit`; each frame has the value of its second."""
        values, valid = self.measure(attributes)
        num_frames = len(valid)
        distance, known = np.zeros(num_frames), np.zeros(num_frames, dtype=bool)
        reference = self._reference(values, valid)
        if reference is None:
            return MetricCurve(distance, known)
        for start in range(0, num_frames, FPS):
            second = slice(start, start + FPS)
            if valid[second].sum() >= min(MIN_FRAMES, num_frames - start):
                change = np.median(self._difference(values[second][valid[second]], reference), axis=0)
                length = np.abs(change).mean() if self.is_color else np.linalg.norm(change)
                distance[second], known[second] = self.scale * length, True
        return MetricCurve(distance, known)

    def error(self, truth: FrameAttributes, found: FrameAttributes) -> MetricCurve:
        """Return the distance of each frame of `found` from the same frame of `truth`, in `unit`."""
        (expected, known), (values, valid) = self.measure(truth), self.measure(found)
        difference = self._difference(values, expected)
        length = np.abs(difference).mean(1) if self.is_color else np.linalg.norm(difference, axis=1)
        return MetricCurve(self.scale * length, known & valid)

    def _reference(self, values: np.ndarray, valid: np.ndarray) -> np.ndarray | None:
        """Return the median [K] over the first second, or over the first second that has enough valid frames.

        The shape may hide the pebble in the first second. Later than one training clip is too late.
        """
        for start in range(0, min(len(valid), TRAINING_FRAMES), FPS):
            second = values[start : start + FPS][valid[start : start + FPS]]
            if len(second) >= MIN_FRAMES:
                return second[0] + np.median(self._difference(second, second[0]), axis=0)
        return None

    def _difference(self, values: np.ndarray, reference: np.ndarray) -> np.ndarray:
        difference = values - reference
        return (difference + self.period / 2) % self.period - self.period / 2 if self.period else difference


# ---- The attributes ----


def hue(colors: np.ndarray) -> np.ndarray:
    """Return the hue in degrees of RGB colours [..., 3]."""
    red, green, blue = np.moveaxis(colors, -1, 0)
    return np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))


def heading(attributes: FrameAttributes) -> tuple[np.ndarray, np.ndarray]:
    """Return the direction of motion in degrees over one latent frame, and the frames in which the shape moves."""
    num_frames = len(attributes.present)
    angle, valid = np.zeros(num_frames), np.zeros(num_frames, dtype=bool)
    if num_frames > LAG:
        scaled = attributes.position * (64 / SIZE)
        step = torus_difference(scaled[LAG:] - scaled[:-LAG])
        angle[:-LAG] = np.degrees(np.arctan2(step[:, 1], step[:, 0]))
        valid[:-LAG] = attributes.present[LAG:] & attributes.present[:-LAG] & (np.hypot(*step.T) >= 1)
    return angle[:, None], valid


Measure = Callable[[FrameAttributes], tuple[np.ndarray, np.ndarray]]


def _of_shape(values: Callable[[FrameAttributes], np.ndarray]) -> Measure:
    return lambda attributes: (_columns(values(attributes)), attributes.present)


def _of_pebble(values: Callable[[FrameAttributes], np.ndarray]) -> Measure:
    return lambda attributes: (_columns(values(attributes)), attributes.pebble)


def _of_background(values: Callable[[FrameAttributes], np.ndarray]) -> Measure:
    return lambda attributes: (_columns(values(attributes)), np.ones(len(attributes.present), dtype=bool))


def _columns(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1)


UNNAMED = (
    Attribute("color", "colour of the shape", "of 255", 12, _of_shape(lambda a: a.color), is_color=True),
    Attribute("hue", "hue of the shape", "degrees", 8, _of_shape(lambda a: hue(a.color)), period=360),
    Attribute("brightness", "brightest channel of the shape", "of 255", 20, _of_shape(lambda a: a.color.max(1))),
    Attribute("size", "size of the shape", "%", 10, _of_shape(lambda a: np.log(a.size)), scale=100),
    Attribute("elongation", "elongation of the shape", "%", 12, _of_shape(lambda a: np.log(a.elongation)), scale=100),
    Attribute("pattern", "depth of stripes and dots", "%", 15, _of_shape(lambda a: a.pattern), scale=100),
    Attribute("tone", "colour of the background", "of 255", 12, _of_background(lambda a: a.tone), is_color=True),
    Attribute("gradient", "gradient of the background", "of 255", 20, _of_background(lambda a: a.gradient)),
    Attribute(
        "pebble_color", "colour of the pebble", "of 255", 20, _of_pebble(lambda a: a.pebble_color), is_color=True
    ),
    Attribute(
        *("pebble_position", "position of the pebble", "% of the frame", 5),
        *(_of_pebble(lambda a: a.pebble_position / SIZE), 100, 1),
    ),
    Attribute("heading", "direction of motion", "degrees", 30, heading, period=360),
)


def drift_curves(attributes: FrameAttributes) -> dict[str, MetricCurve]:
    """Return the distance curves `X_distance` of every attribute, and `kept` and `pebble` for the metrics of identity.

    `kept` is 1 in seconds in which no attribute exceeds its tolerance.
    """
    curves = {f"{a.name}_distance": a.distance(attributes) for a in UNNAMED}
    all_frames = np.ones(len(attributes.present), dtype=bool)
    exceeded = [(c.value > a.tolerance) & c.valid for a, c in zip(UNNAMED, curves.values(), strict=True)]
    kept = ~np.any(exceeded, axis=0)
    curves["kept"] = MetricCurve(kept.astype(float), all_frames)
    curves["pebble"] = MetricCurve(attributes.pebble.astype(float), all_frames)
    return curves


# ---- Metrics ----


def last_quarter(curves: Sequence[MetricCurve]) -> SumCount:
    """Return one curve's mean over the last quarter of a video; `NO_VALUES` without valid frames."""
    [curve] = curves
    late = curve.sum_between(0.75, 1)
    return SumCount(late.total / late.num_values, 1.0) if late.num_values else NO_VALUES


def identity(num_lengths: int) -> Callable[[Sequence[MetricCurve]], SumCount]:
    """Return a reduction to 1 if a video keeps its attributes for `num_lengths` training lengths, else 0.

    Its curves are `kept`, `presence`, `moving` and `pebble`. Frozen and empty videos fail. Videos that are shorter have
    no value.
    """
    num_frames = num_pixel_frames(num_lengths)

    def reduce(curves: Sequence[MetricCurve]) -> SumCount:
        if len(curves[0].value) < num_frames:
            return NO_VALUES
        kept, present, moving = (_mean(curve, 0, num_frames) for curve in curves[:3])
        pebble = _mean(curves[3], num_frames - TRAINING_FRAMES, num_frames)
        return SumCount(float(kept >= KEPT and present >= PRESENT and moving >= MOVING and pebble >= PEBBLE), 1.0)

    return reduce


def num_pixel_frames(num_lengths: int) -> int:
    """Return the pixel frames of a video of `num_lengths` times 21 latent frames."""
    return 4 * (21 * num_lengths - 1) + 1


def _mean(curve: MetricCurve, start: int, end: int) -> float:
    valid = curve.valid[start:end]
    return float(curve.value[start:end][valid].mean()) if valid.any() else 0.0


DRIFT_METRICS = (
    *(
        Metric(
            *(f"{a.name}_distance", f"{a.meaning}: last quarter's distance from the first second", a.unit, 1.0, 1),
            reduce=last_quarter,
        )
        for a in UNNAMED
    ),
    Metric("pebble", "frames in which the whole pebble is visible"),
    *(
        Metric(
            f"identity_{n}x",
            f"videos that keep every attribute for {n} training lengths, with a moving shape and the pebble",
            inputs=("kept", "presence", "moving", "pebble"),
            reduce=identity(n),
        )
        for n in HORIZONS
    ),
)
assert STYLES[SIZE].unnamed

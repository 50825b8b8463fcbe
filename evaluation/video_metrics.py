"""Metrics of any video from its pixels and optical flow: appearance, motion, drift and seams, without a neural network.

Colours are split into BT.709 luma and chroma (Y'CbCr), so that a change of saturation leaves brightness and contrast
unchanged. Flow is OpenCV's dense inverse search (Kroeger et al., arXiv 1603.03590) between luma images of at most
`FLOW_SIDE` pixels. Flow lengths are in percent of the frame's diagonal, which makes video sizes comparable.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from evaluation.metrics import (
    NO_VALUES,
    Metric,
    MetricCurve,
    SumCount,
    quarter_change,
    quarter_distance,
    start_end_contrast,
)

STRIDE = 4  # pixel frames per latent frame of Wan's VAE; the first latent frame is one pixel frame
FLOW_SIDE = 512  # pixels
STRONGEST = 0.05  # fraction of pixels with the longest flow; their mean also detects a small moving object
STILL = 0.05  # percent of the diagonal per frame: half a pixel at 480x832
_QUANTILES = np.linspace(0.05, 0.95, 7)

_PALETTE_CURVES = tuple(f"quantile_{channel}{i}" for channel in "rgb" for i in range(len(_QUANTILES)))


def _is_static(curves: Sequence[MetricCurve]) -> SumCount:
    """Return 1 if the median flow is below `STILL`, else 0."""
    [flow] = curves
    if not flow.valid.any():
        return NO_VALUES
    return SumCount(float(np.median(flow.value[flow.valid]) < STILL), 1.0)


def _drift(name: str, unit: str, scale: float, digits: int) -> Metric:
    return Metric(f"{name}_drift", f"{name}, last quarter minus first", unit, scale, digits, (name,), quarter_change)


def _start_end(name: str, unit: str, scale: float, digits: int) -> Metric:
    meaning = f"{name}: absolute difference between the first and the last 15%"
    return Metric(f"{name}_start_end", meaning, unit, scale, digits, (name,), start_end_contrast)


# Append a new metric here; docs/extend.md has an example.
PIXEL_METRICS = (
    Metric("motion", "pixel change per frame", "of 255", 1.0, 2),
    Metric("flow", "mean length of the strongest 5% of the optical flow", "% of diagonal", 1.0, 2),
    Metric("static", "videos with almost no flow", inputs=("flow",), reduce=_is_static),
    Metric("smoothness", "evenness of the flow from frame to frame"),
    Metric("warp_error", "error of predicting a frame from its neighbour by flow", "of 255", 1.0, 2),
    Metric("brightness", "mean luma", "of 255", 1.0, 1),
    Metric("contrast", "standard deviation of luma", "of 255", 1.0, 1),
    Metric("saturation", "mean chroma", "of 255", 1.0, 1),
    Metric("sharpness", "mean Laplacian of luma over its standard deviation"),
    _drift("flow", "% of diagonal", 1.0, 2),
    _drift("brightness", "of 255", 1.0, 1),
    _drift("contrast", "of 255", 1.0, 1),
    _drift("saturation", "of 255", 1.0, 1),
    _drift("sharpness", "%", 100.0, 1),
    Metric(
        "palette_drift",
        "change of the colour distribution from first to last quarter",
        "of 255",
        1.0,
        1,
        inputs=_PALETTE_CURVES,
        reduce=quarter_distance,
    ),
    _start_end("motion", "of 255", 1.0, 2),
    _start_end("brightness", "of 255", 1.0, 1),
    _start_end("contrast", "of 255", 1.0, 1),
    _start_end("saturation", "of 255", 1.0, 1),
    _start_end("sharpness", "%", 100.0, 1),
    Metric("pixel_seam", "warp_error at block borders", "of 255", 1.0, 2),
    Metric("pixel_inside", "warp_error between latent frames inside blocks", "of 255", 1.0, 2),
)
PLOTTED_PIXEL_CURVES = (
    *("motion", "flow", "smoothness", "warp_error", "brightness", "contrast", "saturation", "sharpness"),
)


_APPEARANCE = ("brightness", "contrast", "saturation", "sharpness", *_PALETTE_CURVES)
_MOTION = ("motion", "flow", "warp_error", "smoothness", "smoothness_valid")


def measure_frames(frames: Iterable[np.ndarray]) -> np.ndarray:
    """Measure every frame of a video in one pass.

    Args:
        frames: uint8 [H, W, 3] each.

    Returns:
        Float [T, K]: appearance and motion of each frame, the input of `pixel_curves`.

    Raises:
        ValueError: if there are no frames.
    """
    rows = []
    previous: _Frame | None = None
    previous_flow: np.ndarray | None = None
    for pixels in frames:
        frame = _Frame(pixels)
        motion: Sequence[float] = (0.0,) * len(_MOTION)
        if previous is not None:
            flow = _optical_flow(previous.small, frame.small)
            motion = _motion(previous, frame, flow, previous_flow)
            previous_flow = flow
        rows.append([*frame.appearance(), *motion])
        previous = frame
    if not rows:
        raise ValueError("a video without frames has no metrics")
    return np.array(rows)


def pixel_curves(measurements: np.ndarray, block_frames: int = 3) -> dict[str, MetricCurve]:
    """Return the curves of a video by name.

    Args:
        measurements: result of `measure_frames`, [T, K].
        block_frames: latent frames per block. Blocks are counted from the end, so the first one may be shorter.
    """
    values = dict(zip((*_APPEARANCE, *_MOTION), measurements.T, strict=True))
    smoothness_valid = values.pop("smoothness_valid") > 0
    all_frames = np.ones(len(measurements), dtype=bool)
    after_first = np.arange(len(measurements)) > 0
    curves = {name: MetricCurve(v, all_frames if name in _APPEARANCE else after_first) for name, v in values.items()}
    curves["smoothness"] = MetricCurve(values["smoothness"], smoothness_valid)
    latent_border, block_border = borders(len(measurements), block_frames)
    curves["pixel_seam"] = MetricCurve(values["warp_error"], block_border)
    curves["pixel_inside"] = MetricCurve(values["warp_error"], latent_border & ~block_border)
    return curves


def borders(num_frames: int, block_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Return bool masks [T]: pixel frames that start a latent frame, and that start a block. Frame 0 is in neither.

    Blocks are counted from the end: a video with a prefix may have a shorter first block.
    """
    frame = np.arange(num_frames)
    latent = (frame + STRIDE - 1) // STRIDE  # pixel frame 0 is a latent frame of its own
    num_latent = latent[-1] + 1
    starts = (frame > 0) & (frame % STRIDE == 1)
    return starts, starts & ((latent - num_latent) % block_frames == 0)


class _Frame:
    """A frame's luma and chroma, and the reduced luma image for optical flow."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        red, green, blue = (pixels[..., i].astype(np.float32) for i in range(3))
        self.luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        self.chroma = np.hypot((blue - self.luma) / 1.8556, (red - self.luma) / 1.5748)
        grey = self.luma.round().astype(np.uint8)
        shrink = FLOW_SIDE / max(grey.shape)
        self.small = cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else grey

    def appearance(self) -> list[float]:
        """Return the values of `_APPEARANCE`."""
        contrast = float(self.luma.std())
        detail = float(np.abs(cv2.Laplacian(self.luma, cv2.CV_32F)).mean())
        quantiles = [quantile for channel in range(3) for quantile in _quantiles(self.pixels[..., channel])]
        return [float(self.luma.mean()), contrast, float(self.chroma.mean()), detail / max(contrast, 1.0), *quantiles]


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Compute `np.quantile` of uint8 values from their histogram, several times faster than by sorting."""
    at_most = np.bincount(values.ravel(), minlength=256).cumsum()
    position = _QUANTILES * (values.size - 1)
    low, high = (np.searchsorted(at_most, edge(position), side="right") for edge in (np.floor, np.ceil))
    return low + (position % 1) * (high - low)


def _optical_flow(previous: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Return the displacement of each pixel of `previous`, [H, W, 2] in pixels."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return search.calc(previous, current, None)  # type: ignore[call-overload]


def _motion(
    previous: _Frame, current: _Frame, flow: np.ndarray, previous_flow: np.ndarray | None
) -> tuple[float, float, float, float, float]:
    """Return the values of `_MOTION`."""
    height, width = flow.shape[:2]
    percent = np.hypot(height, width) / 100  # one percent of the diagonal, in pixels
    length = np.hypot(flow[..., 0], flow[..., 1])
    strongest = length >= np.quantile(length, 1 - STRONGEST)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warped = cv2.remap(
        current.small, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    warp_error = float(np.abs(warped.astype(np.float32) - previous.small).mean())
    smoothness, smoothness_valid = 0.0, 0.0
    if previous_flow is not None:
        previous_length = np.hypot(previous_flow[..., 0], previous_flow[..., 1])
        total = float((length + previous_length).sum())
        if max(length[strongest].mean(), previous_length.max()) >= STILL * percent:
            difference = np.hypot(*np.moveaxis(flow - previous_flow, 2, 0)).sum()
            smoothness, smoothness_valid = 1 - float(difference) / total, 1.0
    pixel_change = float(np.abs(current.pixels.astype(np.float32) - previous.pixels).mean())
    return pixel_change, float(length[strongest].mean() / percent), warp_error, smoothness, smoothness_valid

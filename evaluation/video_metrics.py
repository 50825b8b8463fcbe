"""Measuring any video from its pixels and their optical flow: looks, motion, drift and seams, without a model.

Colours are taken apart as BT.709 luma and chroma (Y'CbCr), so that a change of saturation leaves brightness and
contrast where they are. Flow is OpenCV's dense inverse search (Kroeger et al., arXiv 1603.03590) between luma images of
at most `FLOW_SIDE` pixels; its length is given in hundredths of the frame's diagonal, which makes sizes comparable.
"""

from collections.abc import Iterable, Sequence

import cv2
import numpy as np

from evaluation.figures import Curve, Figure, Sum, change, distance

STRIDE = 4  # pixel frames per latent frame of Wan's VAE, the first one excepted
FLOW_SIDE = 512  # pixels
STRONGEST = 0.05  # share of the pixels whose flow counts as a frame's: a small thing that moves is motion too
STILL = 0.05  # hundredths of the diagonal per frame: half a pixel at 480x832
_QUANTILES = np.linspace(0.05, 0.95, 7)

COLOR_CURVES = tuple(f"quantile_{channel}{i}" for channel in "rgb" for i in range(len(_QUANTILES)))


def _static(curves: Sequence[Curve]) -> Sum:
    """Whether the median frame stands still."""
    [flow] = curves
    return float(np.median(flow.value[flow.counts]) < STILL) if flow.counts.any() else 0.0, float(flow.counts.any())


FIGURES = (
    Figure("motion", "pixel change per frame", "of 255", 1.0, 2),
    Figure("flow", "length of the strongest optical flow per frame", "% of diagonal", 1.0, 2),
    Figure("static", "videos whose strongest flow is next to none", take=_static, of=("flow",)),
    Figure("smoothness", "evenness of the flow from frame to frame", digits=1),
    Figure("warp_error", "what flow does not explain of the next frame", "of 255", 1.0, 2),
    Figure("brightness", "mean luma", "of 255", 1.0, 1),
    Figure("contrast", "standard deviation of luma", "of 255", 1.0, 1),
    Figure("saturation", "mean chroma", "of 255", 1.0, 1),
    Figure("sharpness", "mean Laplacian of luma over its standard deviation"),
    Figure("flow_drift", "flow, last quarter minus first", "% of diagonal", 1.0, 2, ("flow",), change),
    Figure("brightness_drift", "brightness, last quarter minus first", "of 255", 1.0, 1, ("brightness",), change),
    Figure("contrast_drift", "contrast, last quarter minus first", "of 255", 1.0, 1, ("contrast",), change),
    Figure("saturation_drift", "saturation, last quarter minus first", "of 255", 1.0, 1, ("saturation",), change),
    Figure("sharpness_drift", "sharpness, last quarter minus first", of=("sharpness",), take=change),
    Figure(
        "palette_drift", "distribution of colours, last quarter against first", "of 255", 1.0, 1, COLOR_CURVES, distance
    ),
    Figure("pixel_seam", "warp_error at block borders", "of 255", 1.0, 2),
    Figure("pixel_inside", "warp_error between latent frames inside blocks", "of 255", 1.0, 2),
)
CURVES = ("motion", "flow", "smoothness", "warp_error", "brightness", "contrast", "saturation", "sharpness")


_LOOKS = ("brightness", "contrast", "saturation", "sharpness", *COLOR_CURVES)
_MOTIONS = ("motion", "flow", "warp_error", "smoothness", "smoothness known")


def observe(frames: Iterable[np.ndarray]) -> np.ndarray:
    """What there is to see in each frame of a video [T, number of things], which is read once and never held.

    Args:
        frames: uint8 [H, W, 3] each.

    Raises:
        ValueError: if there are no frames.
    """
    rows = []
    before: _Frame | None = None
    flow_before: np.ndarray | None = None
    for frame in frames:
        now = _Frame(frame)
        motion: Sequence[float] = (0.0,) * len(_MOTIONS)
        if before is not None:
            flow = _flow(before.small, now.small)
            motion = _motion(before, now, flow, flow_before)
            flow_before = flow
        rows.append([*now.looks(), *motion])
        before = now
    if not rows:
        raise ValueError("a video without frames has no figures")
    return np.array(rows)


def measure(observed: np.ndarray, block_frames: int = 3) -> dict[str, Curve]:
    """Every curve of a video.

    Args:
        observed: what `observe` saw in it.
        block_frames: latent frames per block. Frames that fill no whole block are the first ones of the video.
    """
    values = dict(zip((*_LOOKS, *_MOTIONS), observed.T, strict=True))
    known = values.pop("smoothness known") > 0
    always = np.ones(len(observed), dtype=bool)
    later = np.arange(len(observed)) > 0
    curves = {name: Curve(value, always if name in _LOOKS else later) for name, value in values.items()}
    curves["smoothness"] = Curve(values["smoothness"], known)
    latent_border, block_border = borders(len(observed), block_frames)
    curves["pixel_seam"] = Curve(values["warp_error"], block_border)
    curves["pixel_inside"] = Curve(values["warp_error"], latent_border & ~block_border)
    return curves


def borders(num_frames: int, block_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Which pixel frames are the first of a latent frame, and the first of a block: [T] bool each, frame 0 excepted.

    A video that continues given frames has a short first block: whole blocks end where the video ends.
    """
    frame = np.arange(num_frames)
    latent = (frame + STRIDE - 1) // STRIDE  # pixel frame 0 is a latent frame of its own
    num_latent = latent[-1] + 1
    begins = (frame > 0) & (frame % STRIDE == 1)
    return begins, begins & ((latent - num_latent) % block_frames == 0)


class _Frame:
    """A frame's luma and chroma, and the small luma image that flow is computed on."""

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        red, green, blue = (pixels[..., i].astype(np.float32) for i in range(3))
        self.luma = 0.2126 * red + 0.7152 * green + 0.0722 * blue
        self.chroma = np.hypot((blue - self.luma) / 1.8556, (red - self.luma) / 1.5748)
        grey = self.luma.round().astype(np.uint8)
        shrink = FLOW_SIDE / max(grey.shape)
        self.small = cv2.resize(grey, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA) if shrink < 1 else grey

    def looks(self) -> list[float]:
        contrast = float(self.luma.std())
        detail = float(np.abs(cv2.Laplacian(self.luma, cv2.CV_32F)).mean())
        quantiles = [quantile for channel in range(3) for quantile in _quantiles(self.pixels[..., channel])]
        return [float(self.luma.mean()), contrast, float(self.chroma.mean()), detail / max(contrast, 1.0), *quantiles]


def _quantiles(values: np.ndarray) -> np.ndarray:
    """`np.quantile` of uint8 values, by counting them: several times as fast as sorting."""
    at_most = np.bincount(values.ravel(), minlength=256).cumsum()
    position = _QUANTILES * (values.size - 1)
    low, high = (np.searchsorted(at_most, edge(position), side="right") for edge in (np.floor, np.ceil))
    return low + (position % 1) * (high - low)


def _flow(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Where each pixel of `before` went: [H, W, 2] in pixels."""
    search = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return search.calc(before, now, None)  # type: ignore[call-overload]


def _motion(
    before: _Frame, now: _Frame, flow: np.ndarray, flow_before: np.ndarray | None
) -> tuple[float, float, float, float, float]:
    """Pixel change, flow length, warp error, smoothness, and whether the last one is known."""
    height, width = flow.shape[:2]
    hundredth = np.hypot(height, width) / 100
    length = np.hypot(flow[..., 0], flow[..., 1])
    strongest = length >= np.quantile(length, 1 - STRONGEST)
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    warped = cv2.remap(
        now.small, columns + flow[..., 0], rows + flow[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    warp_error = float(np.abs(warped.astype(np.float32) - before.small).mean())
    smoothness, known = 0.0, 0.0
    if flow_before is not None:
        length_before = np.hypot(flow_before[..., 0], flow_before[..., 1])
        total = float((length + length_before).sum())
        if max(length[strongest].mean(), length_before.max()) >= STILL * hundredth:
            turned = np.hypot(*np.moveaxis(flow - flow_before, 2, 0)).sum()
            smoothness, known = 1 - float(turned) / total, 1.0
    change = float(np.abs(now.pixels.astype(np.float32) - before.pixels).mean())
    return change, float(length[strongest].mean() / hundredth), warp_error, smoothness, known

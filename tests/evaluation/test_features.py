"""evaluation/features.py: features of a tiny image model, their metrics, and the command that measures them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

from evaluation.features import RATE, FeatureModel, add_feature_metrics
from evaluation.methods import MeasuredVideo
from evaluation.videos import VideoKey
from scripts import evaluate
from utils.errors import UserError
from utils.video import VideoWriter


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random Dinov2 with images of 28x28 pixels."""
    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14)
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return folder


def measured(features: np.ndarray, fps: float = 16.0) -> MeasuredVideo:
    video = MeasuredVideo(VideoKey("a", 0, 0), "a.mp4", {}, {}, fps)
    add_feature_metrics(video, features.astype(np.float32), round(len(features) * fps / RATE))
    return video


def value(video: MeasuredVideo, name: str) -> float:
    total, count = video.sums[name]
    return total / count


def test_a_video_that_stays_the_same_does_not_drift():
    video = measured(np.tile([[0.6, 0.8]], (20, 1)))
    assert value(video, "clip_similarity") == pytest.approx(1)
    assert value(video, "feature_start_end") == pytest.approx(0, abs=1e-6)
    assert np.allclose(video.curves["similarity_over_distance"].value, 1)
    assert video.curves["similarity_over_distance"].valid.all()


def test_turning_features_lose_similarity_with_distance():
    """Features that turn by two degrees a sample: all similarities are cosines of known angles."""
    angle = np.radians(2 * np.arange(40))
    video = measured(np.stack([np.cos(angle), np.sin(angle)], axis=1))
    assert value(video, "clip_similarity") == pytest.approx(np.cos(np.radians(8)), abs=1e-5)  # four samples a clip
    assert value(video, "feature_start_end") == pytest.approx(1 - np.cos(np.radians(68)), abs=1e-5)  # 34 samples
    curve = video.curves["similarity_over_distance"].value
    expected = np.cos(np.radians(2 * np.arange(40)))
    np.testing.assert_allclose(curve[::8], expected, atol=1e-5)
    np.testing.assert_allclose(curve[7::8], expected, atol=1e-5)


def test_features_have_length_one_and_do_not_depend_on_the_batch(model):
    frames = np.random.default_rng(0).integers(0, 256, (20, 30, 40, 3)).astype(np.uint8)
    net = FeatureModel(str(model), torch.device("cpu"))
    features = net.features(list(frames))
    assert features.shape == (20, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(net.features(list(frames[17:])), features[17:], atol=1e-5)


def test_the_command_measures_features_once(tmp_path, call, model, monkeypatch):
    monkeypatch.setattr("evaluation.results.save_line_plot", lambda path, *_: path.write_bytes(b""))
    frames = np.full((33, 32, 32, 3), 60, np.uint8)
    frames[17:, :, :16] = 200
    with VideoWriter(tmp_path / "a.mp4") as video:
        video.write(frames)
    (tmp_path / "a.json").write_text(json.dumps({"prompt": "a", "sample": 0, "config": {"runtime": {"seed": 0}}}))
    words = (tmp_path, "--output", tmp_path / "out", "--examples", 0, "--features", model, "--device", "cpu")
    code, out, err = call(evaluate, *words)
    assert code == 0, err
    assert "feature_start_end" in out
    [first] = json.loads((tmp_path / "out/evaluation.json").read_text())["methods"]
    assert 0 < first["estimates"]["feature_start_end"]["mean"] < 2
    assert len(first["curves"]["similarity_over_distance"]["values"]) > 3
    monkeypatch.setattr(FeatureModel, "features", lambda *_: pytest.fail("measured again"))
    assert call(evaluate, *words)[0] == 0
    [again] = json.loads((tmp_path / "out/evaluation.json").read_text())["methods"]
    assert again == first


def test_other_models_are_refused(tmp_path):
    with pytest.raises(UserError, match=f"--features {tmp_path} is not an image model of transformers: "):
        FeatureModel(str(tmp_path), torch.device("cpu"))

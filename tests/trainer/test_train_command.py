"""train.py: from random weights to a model that diffusers opens, and its error messages."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from tiny_model import write_config, write_model_index

import train
from model.causal_wan import CausalWanModel
from model.tiny_decoder import load_tiny_decoder
from model.vae import WanVAE
from model.weights import ModelDirectory
from shapes.objectives import VAEReconstruction

pytestmark = pytest.mark.usefixtures("tiny_presets")


def run_train(monkeypatch: pytest.MonkeyPatch, *args: object) -> int:
    """Run train.py in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, args)])
    try:
        train.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_train_makes_a_model_from_random_weights_that_diffusers_opens(tmp_path, clips, pairs, monkeypatch, capsys):
    def small_clip(self, index, num_frames):  # exporting the VAE measures its latents on many clips
        generator = torch.Generator().manual_seed(index)
        return 2 * torch.rand(3, 5, 32, 32, generator=generator) - 1

    monkeypatch.setattr(VAEReconstruction, "clip", small_clip)
    model = tmp_path / "model"
    write_model_index(model)
    runs = [
        ("text_attributes", model, {"batch_size": 8}),
        ("vae_reconstruction", model, {"clip_frames": [5], "optimizer": "muon"}),
        ("tiny_decoder", model, {"clip_frames": [5]}),
        ("flow_matching", model / "transformer", {}),
        ("ode_regression", model / "generator", {"init": str(model / "transformer")}),
    ]
    for name, output, changes in runs:
        section = dict(network="tiny", max_iterations=2, batch_size=2, warmup=1, log_every=1, ema_decay=0.5)
        section |= {"objective": name, "output": str(output)} | changes
        data = {"flow_matching": {"path": str(clips)}, "ode_regression": {"path": str(pairs), "num_frames": 6}}
        config = write_config(tmp_path / "config.yaml", model, train=section, data=data.get(name, {}))
        code = run_train(monkeypatch, "--config_path", config, "--logdir", tmp_path / name, "--no_save")
        captured = capsys.readouterr()
        assert code == 0, captured.err
        assert f"wrote {output}" in captured.out
        assert len((tmp_path / name / "metrics.jsonl").read_text().splitlines()) == 2

    directory = ModelDirectory.open(model)
    vae = WanVAE(directory.load_vae())
    assert load_tiny_decoder(model / "tiny_decoder", vae).decode(torch.zeros(1, 2, 16, 2, 2)).shape == (1, 5, 3, 16, 16)
    vae_config = directory.load_vae().config
    assert len(vae_config.latents_std) == 16 and min(vae_config.latents_std) > 0 and any(vae_config.latents_mean)

    # The generator has moved away from the teacher. Both open in diffusers and compute the same there.
    x = torch.randn(2, 16, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep, text = torch.tensor([900.0, 300.0]), torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))
    flows = []
    for folder in ("transformer", "generator"):
        ours = directory.load_transformer(CausalWanModel, torch.float32, weights=model / folder)
        theirs = WanTransformer3DModel.from_pretrained(model / folder, dtype=torch.float32)
        with torch.no_grad():
            flows.append(ours(x, timestep, text))
            torch.testing.assert_close(theirs(x, timestep, text).sample, flows[-1], atol=1e-5, rtol=1e-5)
    assert flows[0].abs().max() > 0 and not torch.equal(*flows)

    pipeline = WanPipeline.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    size = dict(height=32, width=32, num_frames=5, num_inference_steps=1, max_sequence_length=24)
    video = pipeline("a red circle", output_type="pt", generator=torch.Generator().manual_seed(0), **size).frames
    assert video.shape == (1, 5, 3, 32, 32) and video.isfinite().all()


def test_bad_arguments_of_train_are_one_line_errors(tmp_path, monkeypatch, capsys, model):
    config = write_config(tmp_path / "c.yaml", model)
    logdir = ("--logdir", tmp_path / "log")
    for args, message in [
        ([], "--logdir"),
        (logdir, "sets no train.objective"),
        ((*logdir, "train.objective=magic"), "train.objective"),
        ((*logdir, "train.max_iterations=0"), "train.max_iterations must be positive"),
        (["--logdir", config, "train.objective=text_attributes", "train.network=shapes"], "cannot write to folder"),
        ((*logdir, "train.objective=flow_matching", "train.network=shapes"), "no encoded clips"),
        ((*logdir, "train.objective=text_attributes", "train.network=no"), "choose from"),
    ]:
        assert run_train(monkeypatch, "--config_path", config, *args) == 2
        err = capsys.readouterr().err
        assert message in err and err.startswith("error:") and err.count("\n") == 1, err


def test_missing_wandb_credentials_are_reported_before_anything_is_loaded(tmp_path, monkeypatch, capsys, model, clips):
    config = write_config(
        tmp_path / "c.yaml", model, train={"objective": "flow_matching", "wandb": "online"}, data={"path": str(clips)}
    )
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setattr("trainer.objectives.build_objective", lambda *_: pytest.fail("something was loaded"))
    assert run_train(monkeypatch, "--config_path", config, "--logdir", tmp_path / "log") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: train.wandb=online needs credentials") and "Traceback" not in err


def test_train_dry_run_prints_the_configuration(monkeypatch, capsys):
    root = Path(train.__file__).parent
    for file in sorted((root / "configs/shapes").glob("*.yaml")):
        assert run_train(monkeypatch, "--config_path", file, "--dry-run", "train.max_iterations=3") == 0
        assert "max_iterations: 3" in capsys.readouterr().out

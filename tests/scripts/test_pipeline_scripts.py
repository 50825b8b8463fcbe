"""scripts/plan_pipeline.py and random_transformer.py."""

import json

import pytest
from tiny_model import write_model

from model.causal_wan import CausalWanModel
from scripts import plan_pipeline, random_transformer


def test_a_profile_becomes_a_table(call, tmp_path):
    spans = [("denoise", 0, 0.0, 1.0), ("context", 0, 1.0, 2.0), ("denoise", 1, 2.0, 3.0), ("decode", 0, 3.0, 3.5)]
    keys = ("name", "block", "start", "end")
    profile = tmp_path / "p_rank0.json"
    profile.write_text(json.dumps({"rank": 0, "duties": "", "spans": [dict(zip(keys, s, strict=True)) for s in spans]}))
    words = ["--config_path", "configs/shapes.yaml", "--profile", str(profile), "--num_output_frames", "6"]
    code, out, _ = call(plan_pipeline, *words, "--ranks", "2")
    assert code == 0
    first = out.splitlines()[2].split("|")
    # one rank: block 0 after all of the two blocks' first three steps and its own last, as the diagonal has it
    assert first[1].strip() == "1" and first[4].strip() == "1.00x" and len(out.splitlines()) == 4


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--denoise", "1"], "give --profile FILES, or --denoise, --context and --decode"),
        (["--profile", "none.json"], "none.json is no profile"),
        (
            ["--denoise", "1", "--context", "1", "--decode", "0", "--ranks", "0"],
            "--ranks and --bandwidth must be positive",
        ),
    ],
)
def test_bad_plans_are_one_line(call, words, says):
    code, _, err = call(plan_pipeline, "--config_path", "configs/shapes.yaml", *words)
    assert code == 2 and says in err and err.count("\n") == 1


def test_a_random_transformer_has_its_size_and_loads(call, tmp_path):
    model = write_model(tmp_path / "model")
    words = [
        "--base",
        str(model),
        "--output",
        str(tmp_path / "r"),
        "--width",
        "64",
        "--layers",
        "3",
        "--head_dim",
        "32",
    ]
    code, out, _ = call(random_transformer, *words)
    assert code == 0 and "weights" in out
    from model.weights import ModelDirectory

    net = ModelDirectory.open(model).load_transformer(CausalWanModel, weights=tmp_path / "r")
    assert len(net.layers) == 3 and net.config.num_attention_heads == 2
    code, _, err = call(random_transformer, "--output", "x", "--width", "65")
    assert code == 2 and "--width must be a multiple" in err

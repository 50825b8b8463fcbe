"""scripts/plan_pipeline.py: a table from a profile, and clear errors."""

import pytest

from pipeline.parallel.profile import RankProfile, Span
from scripts import plan_pipeline


def test_a_profile_becomes_a_table(call, tmp_path):
    spans = [
        Span("denoise", 0, 0.0, 1.0), Span("context", 0, 1.0, 2.0), Span("denoise", 1, 2.0, 3.0),
        Span("decode", 0, 3.0, 3.5),
    ]  # fmt: skip
    profile = tmp_path / "p_rank0.json"
    RankProfile(0, "text", spans).save(profile)
    words = ["--config_path", "configs/shapes.yaml", "--profile", profile, "--num_output_frames", "6", "--ranks", "2"]
    code, out, _ = call(plan_pipeline, *words)
    assert code == 0 and len(out.splitlines()) == 4
    one_rank = [cell.strip() for cell in out.splitlines()[2].split("|")]
    assert one_rank[1] == "1" and one_rank[4] == "1.00x"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--denoise", "1"], "give --profile FILES, or --denoise, --context and --decode"),
        (["--profile", "none.json"], "cannot read profile of scripts/pipeline_parallel_inference.py none.json"),
        (["--profile", "LICENSE"], "LICENSE is not a valid profile of scripts/pipeline_parallel_inference.py"),
        (["--profile", "data/shapes-wan/model_index.json"], "model_index.json is not a profile of scripts"),
        (
            ["--denoise", "1", "--context", "1", "--decode", "0", "--ranks", "0"],
            "--ranks must be 1 to 1,000",
        ),
        (["rollout.guidance_scale=2"], "ranks of a pipeline run without guidance"),
        (["rollout.num_rollouts=2"], "ranks of a pipeline make one rollout per video"),
    ],
)
def test_bad_arguments_are_one_line(call, words, message):
    code, _, err = call(plan_pipeline, "--config_path", "configs/shapes.yaml", *words)
    assert code == 2 and message in err and err.count("\n") == 1

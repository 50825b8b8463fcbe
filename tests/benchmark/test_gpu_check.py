"""scripts/gpu_check.py: its commands parse and fit into ten minutes; a failed part is reported and stops no other.

`scripts/gpu_check.sh --device cpu --small` runs all commands on a CPU; this takes minutes.
"""

import json
import sys
import time

import pytest

from benchmark import gpu_check
from benchmark.cases import PRESETS, make_cases
from benchmark.gpu_check import ROOT, Part, check_parts, is_available, run_part
from pipeline.command_line import resolve_config
from scripts import benchmark, pipeline_parallel_inference, profile_pass
from scripts import gpu_check as script


@pytest.mark.parametrize("small", [False, True])
def test_every_command_parses(small, tmp_path, monkeypatch):
    parts = [part for part in check_parts("cuda", small, tmp_path) if is_available(part)]
    assert len(parts) > 8 and {"tests", "rollouts", "decoder", "profile"} <= {part.name for part in parts}
    for _, _, words, results in parts:
        names = [word for word in words if word.startswith("scripts/")]
        monkeypatch.setattr(sys, "argv", words[words.index(names[0]) :] if names else words)
        if words[:2] == ["-m", "pytest"]:
            assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))
        elif names == ["scripts/benchmark.py"]:
            args = benchmark.parse_arguments()
            assert args.output == results
            cases = list(make_cases(PRESETS[args.preset], args.what, vars(args), args.overrides, args.iterations))
            assert {case.config.runtime.device for case in cases} == {"cuda"}
        elif names == ["scripts/profile_pass.py"]:
            assert profile_pass.parse_arguments().overrides == ["runtime.device=cuda"]
        else:
            assert names == ["scripts/pipeline_parallel_inference.py"]
            assert resolve_config(pipeline_parallel_inference.parse_arguments()).runtime.device == "cuda"


def test_the_parts_fit_into_ten_minutes(call):
    code, out, _ = call(script, "--dry-run")
    seconds = [int(line.split("at most ")[1].split()[0]) for line in out.splitlines() if ", at most " in line]
    assert code == 0 and sum(seconds) <= 600 and out.splitlines()[-1] == f"together at most {sum(seconds)} s"
    code, out, _ = call(script, "--dry-run", "--parts", "passes", "decoder")
    assert code == 0 and out.count("scripts/benchmark.py") > 4 and "pytest" not in out
    code, _, err = call(script, "--parts", "none")
    assert code == 2 and "no part has a name that starts with none" in err


def test_a_failed_part_is_reported_and_stops_no_other(call, tmp_path, monkeypatch):
    results = tmp_path / "results.json"
    write = f"from pathlib import Path; Path({str(results)!r}).write_text('[1]'); print('| a table |')"
    parts = [
        Part("good", 60, ["-c", write], results),
        Part("bad", 60, ["-c", "import sys; print('half'); sys.exit('no such kernel')"]),
        Part("slow", 1, ["-c", "import time; time.sleep(60)"]),
        Part("new", 60, ["-c", "", "model.no_such_key=1"]),
    ]
    monkeypatch.setattr(script, "check_parts", lambda *_: parts)
    code, out, err = call(script, "--device", "cpu", "--output", tmp_path / "report")
    assert code == 1, err
    statuses = {"good": "passed", "bad": "failed", "slow": "timed out", "new": "not available"}
    for name, status in statuses.items():
        assert f"{name}: {status}" in out
    report = (tmp_path / "report/report.md").read_text()
    assert "| a table |" in report and "no such kernel" in report and "half" in report
    document = json.loads((tmp_path / "report/report.json").read_text())
    assert {part["part"]: part["status"] for part in document["parts"]} == statuses
    assert document["parts"][0]["results"] == [1] and document["machine"]["torch"]


def test_children_of_a_part_end_with_it(tmp_path):
    """torchrun starts processes of its own."""
    file = tmp_path / "alive"
    child = f"import time; time.sleep(1); open({str(file)!r}, 'w')"
    words = ["-c", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"]
    assert run_part(Part("parent", 1, words), patience=0.4).status == "timed out"
    time.sleep(1)
    assert not file.exists()


def test_the_memory_of_a_preset_is_measured_with_its_options(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("inherit: a.yaml\nmodel:\n  base: x\n  offload: all\nrollout:\n  order: diagonal\n")
    part = gpu_check.memory_part(file, lambda *words: Part(words[0], words[1], list(words[2:])), ["--preset", "h100"])
    assert part.words[-2:] == ["model.offload=all", "rollout.order=diagonal"] and part.name == "memory, small"

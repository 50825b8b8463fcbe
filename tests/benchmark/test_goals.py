"""scripts/check_cpu_speed.py: ratios to the plain loop and to an older checkout, and the goals that they meet."""

import json

import pytest
from tiny_model import write_config, write_model

from benchmark import cases, goals
from benchmark.goals import Ratio, ratio_table
from benchmark.measure import Measurement
from scripts import check_cpu_speed as script

# A checkout whose benchmark takes no time.
OLD_BENCHMARK = """
import json, sys
from pathlib import Path
count = Path("count")
run = int(count.read_text()) if count.exists() else 0
count.write_text(str(run + 1))
assert "--no-plain" not in sys.argv and sys.argv[sys.argv.index("--frames") + 1] == "21"
rows = [{"what": "rollout", "settings": {"schedule": schedule, "fuse": fuse}, "figures": {"fps_video": {"median": fps}}}
        for schedule, fuse, fps in (("block_first", "on", 20.0), ("block_first", "off", 10.0), ("other", "on", 5.0))]
rows += [{"what": "decoder", "settings": {}, "figures": {"fps_decode": {"median": 50.0 + run}}},
         {"what": "text_encoder", "settings": {}, "figures": {}}]
Path(sys.argv[sys.argv.index("--output") + 1]).write_text(json.dumps({"results": rows}))
"""


@pytest.fixture
def old_checkout(tmp_path):
    (tmp_path / "old/scripts").mkdir(parents=True)
    (tmp_path / "old/scripts/benchmark.py").write_text(OLD_BENCHMARK)
    return tmp_path / "old"


def test_ratios_to_the_plain_loop(call, tmp_path, monkeypatch):
    config = write_config(tmp_path / "tiny.yaml", write_model(tmp_path / "model"))
    preset = cases.Preset(str(config), "", ["rollout.denoising_step_list=[1000]", "rollout.window=6"])
    for name in ("shapes", "wide"):
        monkeypatch.setitem(cases.PRESETS, name, preset)
    output = tmp_path / "ratios.json"
    code, out, err = call(script, "--repeats", "2", "--turns", "1", "--clock", "cpu", "--output", output)
    assert code == 0, err
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")][2:]
    assert len(rows) == 2 * 3 + 2 and {row[1] for row in rows} == {"plain loop"}
    ratios = json.loads(output.read_text())["ratios"]
    assert [row["work"] for row in ratios] == [row[0] for row in rows]
    assert all(0 < row["measured"]["low"] <= row["measured"]["high"] for row in ratios)


def test_ratios_to_an_older_checkout_and_to_its_results(call, old_checkout, monkeypatch):
    words = ["--what", "videos", "--turns", "2", "--old"]
    monkeypatch.setattr("benchmark.checkouts.ROOT", old_checkout)  # stands in for this checkout too
    code, out, err = call(script, *words, old_checkout)
    assert code == 0, err
    assert (old_checkout / "count").read_text() == "4"
    [decoding] = [line for line in out.splitlines() if line.startswith("| decoding")]
    assert "1.02 (1.02-1.02)" in decoding and decoding.split("|")[-3:] == [" 2    ", " no  ", ""]  # 51/50 and 53/52
    assert out.count("video of 21 frames") == 2 and "1.00 (1.00-1.00)" in out

    results = old_checkout / "results.json"
    rows = [{"what": "decoder", "settings": {}, "figures": {"fps_decode": {"median": 20.0}}}]
    results.write_text(json.dumps({"results": rows}))
    code, out, err = call(script, *words, results)
    assert code == 0 and "2.73 (2.70-2.75)" in out and "| yes" in out, err  # (54 and 55) / 20
    assert "video of" not in out  # not in the file


def test_a_goal_is_met_by_the_median():
    rows = [Ratio("a", "b", Measurement(median, 0.5, 3), goal) for median, goal in ((2, 2.0), (1.9, 2.0), (1.9, 0.0))]
    cells = [line.split("|")[-2].strip() for line in ratio_table(rows).splitlines()[2:]]
    assert cells == ["yes", "no", ""]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "videos"], "--what videos requires --old"),
        (["--turns", "0"], "--repeats and --turns must be at least 1"),
        (["--old", "/none.json"], "cannot read result file of scripts/benchmark.py /none.json"),
        (["--old", "/"], "/ is no checkout of this repository: it has no scripts/benchmark.py"),
    ],
)
def test_a_mistake_gives_one_line(call, words, message, monkeypatch):
    monkeypatch.setattr(goals, "run_case", None)  # no measurement starts
    code, out, err = call(script, *words)
    assert code == 2 and err.splitlines()[-1].startswith("error: ") and message in err and not out


def test_a_failed_benchmark_is_reported(call, old_checkout):
    (old_checkout / "scripts/benchmark.py").write_text("raise SystemExit('error: no such preset')")
    code, _, err = call(script, "--what", "videos", "--old", old_checkout)
    assert code == 2 and "scripts/benchmark.py failed: error: no such preset" in err

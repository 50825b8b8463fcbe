"""scripts/estimate_speed.py: the arithmetic of docs/benchmarks.md."""

import json

import pytest

from benchmark.estimate import Gpu, estimate
from scripts import estimate_speed as script


def row(work: str, compiled: str, tera_flop: float, gigabytes: float, kernels: int) -> dict:
    figures = {"flops": tera_flop * 1e12, "elementwise_bytes": gigabytes * 1e9, "kernels": kernels}
    return {"what": "kernels", "settings": {"work": work, "compile": compiled}, "figures": figures}


def test_the_slower_of_gpu_and_host_counts():
    gpu = Gpu(flops=100e12, bandwidth=1e12, gap=1e-6, launch=5e-6)
    seconds = estimate(row("denoise", "off", 1, 2, 1000)["figures"], gpu)
    assert seconds.total == pytest.approx(0.01 + 0.002 + 0.001)
    assert estimate(row("denoise", "off", 0.1, 0.2, 1000)["figures"], gpu).total == pytest.approx(0.005)


def test_frames_per_second_of_both_schedules(call, tmp_path):
    file = tmp_path / "counts.json"
    rows = [row("denoise", "on", 30, 0, 0), row("context+denoise", "on", 60, 0, 0), row("decoder", "off", 30, 0, 0)]
    file.write_text(json.dumps({"results": rows}))
    code, out, err = call(script, file)  # 50, 100 and 50 ms
    assert code == 0 and out.startswith("ESTIMATE for H100"), err
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if "_first" in line]
    assert cells == [["on", "block_first", "250", "48.0", "40.0"], ["on", "timestep_first", "400", "30.0", "26.7"]]
    file.write_text(json.dumps({"results": []}))
    code, _, err = call(script, file)
    assert code == 2 and "has no counts" in err

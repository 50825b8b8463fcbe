"""Run VBench in its own environment for scripts/evaluate_vbench.py: locate it, or score one dimension.

This script imports nothing of this repository. VBench pins other versions of numpy and transformers, and DINO, which
VBench loads, has a module `utils` that ours would hide.

python scripts/vbench_worker.py               prints the folders of vbench and vbench2_beta_long, and the version
python scripts/vbench_worker.py score < job   runs a job in the format of evaluation/vbench/folder.py
"""

from __future__ import annotations  # VBench's environment may have an older Python

import importlib.metadata
import importlib.util
import json
import shutil
import sys
from pathlib import Path

del sys.path[0]  # this folder, because its files would hide packages of the same names


def locate_packages() -> dict:
    """Return the folders of the packages and VBench's version, without importing them."""
    found: dict[str, str | None] = {}
    for name in ("vbench", "vbench2_beta_long"):
        spec = importlib.util.find_spec(name)
        found[name] = str(Path(spec.origin).parent) if spec and spec.origin else None
    try:
        found["version"] = importlib.metadata.version("vbench")
    except importlib.metadata.PackageNotFoundError:  # not installed: a checkout on the path
        found["version"] = "unknown"
    return found


def score(job: dict) -> None:
    """Score one dimension; VBench writes <dimension>_eval_results.json to the job's output folder."""
    import torch

    device = torch.device(job["device"] or ("cuda" if torch.cuda.is_available() else "cpu"))
    if job["long"]:
        benchmark = long_benchmark(job)
    else:
        from vbench import VBench as benchmark
    benchmark(device, job["suite_file"], job["output"]).evaluate(**job["arguments"])


def long_benchmark(job: dict) -> type:
    """Return a subclass of VBenchLong that assigns clips to prompts correctly and survives an interruption.

    VBenchLong itself uses the file name with its index as the prompt. With VBench's own prompts, it may find no clips,
    depending on the order of the folder listing. It also treats the clips of an interrupted run as complete.
    """
    from vbench2_beta_long import VBenchLong

    class Benchmark(VBenchLong):
        def preprocess(self, videos_path: str, mode: str, **options: object) -> None:
            first_frames = Path(videos_path, f"{job['dimension']}_cat_firstframes_videos")
            shutil.rmtree(first_frames, ignore_errors=True)
            if not Path(job["clips_complete"]).exists():
                shutil.rmtree(Path(videos_path, "split_clip"), ignore_errors=True)
                super().preprocess(videos_path, mode, **options)
                Path(job["clips_complete"]).touch()

        def build_full_info_json(self, videos_path: str, name: str, *_: object, **__: object) -> str:
            info = []
            for entry in job["entries"]:
                folders = [Path(videos_path, "split_clip", stem) for stem in entry["videos"]]
                clips = [str(clip) for folder in folders for clip in sorted(folder.glob("*.mp4"))]
                info.append({**entry, "video_list": clips})
            path = Path(self.output_path, f"{name}_full_info.json")
            path.write_text(json.dumps(info), encoding="utf-8")
            return str(path)

    return Benchmark


if __name__ == "__main__":
    if sys.argv[1:] == ["score"]:
        score(json.load(sys.stdin))
    else:
        print(json.dumps(locate_packages()))

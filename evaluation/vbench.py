"""VBench (arXiv 2311.17982) for folders of our videos: what it scores, the layout it wants, and what it answers.

The facts are those of the Python package vbench 0.1.5 and its VBench-Long (`vbench2_beta_long`). VBench itself runs in
a process of its own, scripts/vbench_worker.py.
"""

import json
import math
import os
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evaluation.videos import find_videos
from utils.errors import UserError
from utils.files import write_json

DIMENSIONS = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"),
    *("imaging_quality", "temporal_flickering", "temporal_style", "overall_consistency", "human_action"),
    *("object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style"),
)
# What VBench's documentation offers for videos of any prompt.
USUAL = DIMENSIONS[:6]
# What its code takes for them as well: it compares with the whole prompt, or with none.
CUSTOM = DIMENSIONS[:9]
# The others look for something that only the suite's own prompts and file names state.
SAMPLES_PER_PROMPT = 5  # of the suite, as many as VBench reads
WORKER = Path(__file__).resolve().parents[1] / "scripts" / "vbench_worker.py"


@dataclass(frozen=True)
class Protocol:
    """How VBench is run.

    Attributes:
        suite: the videos are of VBench's own prompts.
        long: VBench-Long, which cuts videos into clips.
    """

    suite: bool
    long: bool

    @property
    def mode(self) -> str:
        """VBench's name for it."""
        return ("long_" if self.long else "") + ("vbench_standard" if self.suite else "custom_input")

    def check(self, dimensions: Sequence[str]) -> None:
        """Raise `UserError` for a dimension that there is not, or not for videos of any prompt."""
        for name in dimensions:
            if name not in DIMENSIONS:
                raise UserError(f"VBench has no dimension {name!r}; it has {', '.join(DIMENSIONS)}")
            if not self.suite and name not in CUSTOM:
                raise UserError(
                    f"dimension {name} needs VBench's own prompts (--suite); for other videos there are "
                    f"{', '.join(CUSTOM)}"
                )


@dataclass(frozen=True)
class Video:
    """A video as VBench gets it.

    Attributes:
        path: our file.
        stem: name of the link to it, without suffix.
        prompt: the original one. VBench compares with this one, also where an extended prompt was fed to the model.
        extended: whether one was.
    """

    path: Path
    stem: str
    prompt: str
    seed: int
    sample: int
    extended: bool

    def identity(self) -> list:
        """What a score depends on, as JSON; it changes when the file does."""
        state = self.path.stat()
        return [self.stem, os.path.abspath(self.path), state.st_size, state.st_mtime_ns, self.prompt]


@dataclass(frozen=True)
class Installation:
    """Where VBench is."""

    python: str  # interpreter that has it
    version: str
    folder: Path
    long_folder: Path | None

    @classmethod
    def find(cls, python: str) -> "Installation":
        """Ask an interpreter.

        Raises:
            UserError: if it cannot be started, or has no VBench.
        """
        try:
            answer = subprocess.run([python, WORKER], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot run {python}: {error}; --python must name a Python interpreter") from None
        found = json.loads(answer)
        if found["vbench"] is None:
            raise UserError(
                f"VBench is not installed for {python}: pip install -r requirements-vbench.txt in an environment of "
                "its own, and name its interpreter with --python"
            )
        long_folder = found["vbench2_beta_long"]
        return cls(python, found["version"], Path(found["vbench"]), Path(long_folder) if long_folder else None)

    @property
    def suite_file(self) -> Path:
        """VBench's list of its prompts."""
        return self.folder / "VBench_full_info.json"

    def suite(self) -> list[dict]:
        """Entries with `prompt_en`, `dimension` (a list) and, for some, `auxiliary_info`. A prompt may have several.

        Raises:
            UserError: if the file is missing or broken.
        """
        try:
            return json.loads(self.suite_file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read VBench's prompts {self.suite_file}: {error}") from None

    def long_options(self, configs: str) -> dict:
        """Arguments of VBench-Long as its own evaluation script passes them (slow-fast, no static filter).

        Args:
            configs: folder of VBench-Long's tables; empty for the one in the package.

        Raises:
            UserError: if VBench-Long or a table is missing.
        """
        if self.long_folder is None:
            raise UserError(f"VBench of {self.python} comes without VBench-Long (vbench2_beta_long): install 0.1.5")
        folder = Path(configs or self.long_folder / "configs").resolve()
        names = ("clip_length_mix", "slow_fast_params", "subject_mapping_table", "background_mapping_table")
        files = [folder / f"{name}.yaml" for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"VBench-Long's table {file} is missing, as in the package of 0.1.5: git clone "
                    "https://github.com/Vchitect/VBench and add --long_configs VBench/vbench2_beta_long/configs"
                )
        # VBench joins the first name to a folder of its own, which an absolute path overrides.
        keys = ("clip_length_config", "slow_fast_eval_config", "sb_mapping_file_path", "bg_mapping_file_path")
        return {
            **{key: str(file) for key, file in zip(keys, files, strict=True)},
            "sb_clip2clip_feat_extractor": "dinov2",
            "bg_clip2clip_feat_extractor": "dreamsim",
            "w_inclip": 1.0,  # dev_flag puts slow_fast_params' weights in the place of these two
            "w_clip2clip": 0.0,
            "dev_flag": True,
            "use_semantic_splitting": False,
            "static_filter_flag": False,
            "num_of_samples_per_prompt": SAMPLES_PER_PROMPT,
        }


@dataclass
class Method:
    """One column of the table."""

    label: str
    source: str  # our folder of videos
    folder: Path  # of what belongs to this method and protocol
    videos: list[Video]

    @property
    def links(self) -> Path:
        """The folder that VBench reads, and VBench-Long writes clips into."""
        return self.folder / "videos"

    @property
    def raw(self) -> Path:
        """The folder that VBench writes its results to."""
        return self.folder / "raw"

    def result_file(self, dimension: str) -> Path:
        """Where a dimension's score is kept."""
        return self.folder / f"{dimension}.json"

    def log_file(self, dimension: str) -> Path:
        """What VBench printed."""
        return self.folder / f"{dimension}.log"

    def lay_out(self) -> None:
        """Make the folder of links, unless it is there and of the same videos."""
        layout, identities = self.folder / "layout.json", [video.identity() for video in self.videos]
        if _read(layout) == identities:
            return
        layout.unlink(missing_ok=True)
        shutil.rmtree(self.links, ignore_errors=True)
        self.clips_complete.unlink(missing_ok=True)
        self.links.mkdir(parents=True)
        for video in self.videos:
            (self.links / f"{video.stem}.mp4").symlink_to(os.path.abspath(video.path))
        write_json(layout, identities)

    @property
    def clips_complete(self) -> Path:
        """A file that is there once VBench-Long has cut all videos into clips."""
        return self.folder / "clips_complete"

    def result(self, dimension: str, version: str) -> dict | None:
        """A dimension's result, if there is one of these very videos and this version of VBench."""
        result = _read(self.result_file(dimension))
        identities = [video.identity() for video in self.videos]
        same = result and (result["vbench"], result["inputs"]) == (version, identities)
        return result if same else None

    def score(
        self, dimension: str, protocol: Protocol, installed: Installation, options: dict, device: str, local: bool
    ) -> dict:
        """Have VBench score a dimension, and keep the result.

        Args:
            options: further arguments of VBench's `evaluate`.
            device: torch's name for it; empty for CUDA if there is some, else the CPU.
            local: take weights from VBench's cache folder only.

        Returns:
            The result: `score` as VBench gives it and `videos` with a score each.

        Raises:
            UserError: if VBench fails; what it printed is in `log_file`.
        """
        self.lay_out()
        entries = self.entries(dimension, protocol, installed)
        job = {
            **{"dimension": dimension, "long": protocol.long, "device": device, "clips_complete": self.clips_complete},
            **{"suite_file": installed.suite_file, "output": self.raw, "entries": entries},
            "arguments": {
                **{"videos_path": self.links, "name": dimension, "dimension_list": [dimension], "mode": protocol.mode},
                "prompt_list": {} if protocol.suite else {f"{video.stem}.mp4": video.prompt for video in self.videos},
                **{"local": local, "read_frame": False, "imaging_quality_preprocessing_mode": "longer", **options},
            },
        }
        answer = self.raw / f"{dimension}_eval_results.json"
        answer.unlink(missing_ok=True)
        log = self.log_file(dimension)
        with log.open("wb") as file:
            text = json.dumps(job, default=str).encode()
            call = subprocess.run(
                [installed.python, WORKER, "score"], input=text, stdout=file, stderr=subprocess.STDOUT
            )
        raw = _read(answer)
        if call.returncode or raw is None:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), f"exit code {call.returncode}")
            raise UserError(f"VBench could not score {dimension} of {self.label}: {reason.strip()} (all of it: {log})")
        result = {
            "dimension": dimension,
            "mode": protocol.mode,
            "vbench": installed.version,
            **self._scores(raw[dimension]),
            "inputs": [video.identity() for video in self.videos],
        }
        if not math.isfinite(result["score"]):
            raise UserError(f"VBench gives no score for {dimension} of {self.label}; see {log}")
        write_json(self.result_file(dimension), result)
        return result

    def entries(self, dimension: str, protocol: Protocol, installed: Installation) -> list[dict]:
        """What a dimension is scored on: VBench's entries with the stems of the `videos` of each."""
        if not protocol.suite:
            return [{"prompt_en": v.prompt, "dimension": [dimension], "videos": [v.stem]} for v in self.videos]
        stems = defaultdict(list)
        for video in self.videos:
            stems[video.prompt].append(video.stem)
        return [
            {**entry, "videos": stems[entry["prompt_en"]]}
            for entry in installed.suite()
            if dimension in entry["dimension"] and entry["prompt_en"] in stems
        ]

    def _scores(self, raw: list) -> dict:
        """VBench's answer: [mean, videos], or of VBench-Long also [mean, clips, videos]."""
        by_stem = {video.stem: video for video in self.videos}
        videos = []
        for item in raw[-1]:
            video = by_stem.get(Path(item.get("video_path", "")).stem)
            if video is not None:
                videos.append(
                    {
                        **{"file": video.path.name, "prompt": video.prompt, "seed": video.seed, "sample": video.sample},
                        "score": float(item["video_results"]),
                    }
                )
        return {"score": float(raw[0]), "videos": videos}


def find_method(label: str, source: str, folder: Path, suite: Sequence[dict] | None) -> Method:
    """The videos of a folder, named as VBench wants them.

    For VBench's suite that is `<prompt>-<index>`, else a number: their prompts are passed beside them.

    Raises:
        UserError: if a video has no record, or is not of the suite's prompts.
    """
    prompts = None if suite is None else {entry["prompt_en"] for entry in suite}
    count: dict[str, int] = defaultdict(int)
    found = [(v.metadata.get("name") or v.key.prompt, v.key, v.path) for v in find_videos(source)]
    videos = []
    for number, (prompt, key, path) in enumerate(sorted(found, key=lambda v: (v[0], v[1].seed, v[1].sample))):
        stem = f"{number:05d}"
        if prompts is not None:
            if prompt not in prompts:
                raise UserError(f"{path} is not of VBench's prompts ({prompt[:60]!r}); leave --suite out, or the video")
            stem = f"{prompt}-{count[prompt]}"
            count[prompt] += 1
        videos.append(Video(path, stem, prompt, key.seed, key.sample, prompt != key.prompt))
    if prompts is not None and max(count.values()) > SAMPLES_PER_PROMPT:
        raise UserError(
            f"{source} has up to {max(count.values())} videos of a prompt; VBench reads {SAMPLES_PER_PROMPT}"
        )
    return Method(label, source, folder, videos)


def _read(path: Path) -> Any:
    """A JSON file; None if it is missing or broken."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None

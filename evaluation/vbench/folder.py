"""Score a folder of videos with VBench, one dimension at a time, and store every score on disk."""

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

from evaluation.vbench.installation import SAMPLES_PER_PROMPT, WORKER, VBenchInstallation, VBenchMode
from evaluation.videos import find_videos
from utils.errors import UserError
from utils.files import open_own_file, read_json, write_json


@dataclass(frozen=True)
class VBenchVideo:
    """A video with the name and prompt that VBench needs.

    Attributes:
        path: the video file.
        link: name without suffix of the link to the video in VBench's folder.
        prompt: the original prompt. VBench uses it even if an extended prompt generated the video.
        extended: whether an extended prompt generated the video.
    """

    path: Path
    link: str
    prompt: str
    seed: int
    sample: int
    extended: bool

    def identity(self) -> list:
        """Return JSON values that identify the file and its prompt. A stored score is valid only for equal values."""
        status = self.path.stat()
        return [self.link, os.path.abspath(self.path), status.st_size, status.st_mtime_ns, self.prompt]


@dataclass
class VBenchFolder:
    """The videos of one method with their scores in one mode: one column of the table.

    Attributes:
        source: the folder of videos.
        folder: folder for links, scores and logs of this method and mode.
    """

    label: str
    source: str
    folder: Path
    videos: list[VBenchVideo]

    @property
    def links(self) -> Path:
        """The folder that VBench reads; VBench-Long also writes its clips there."""
        return self.folder / "videos"

    @property
    def clips_complete(self) -> Path:
        """A marker file; it exists once VBench-Long has cut all videos into clips."""
        return self.folder / "clips_complete"

    @property
    def _raw(self) -> Path:
        """The folder for VBench's own result files."""
        return self.folder / "raw"

    def _score_file(self, dimension: str) -> Path:
        return self.folder / f"{dimension}.json"

    def _log_file(self, dimension: str) -> Path:
        return self.folder / f"{dimension}.log"

    def load_score(self, dimension: str, version: str) -> dict | None:
        """Return the stored score of a dimension; None if it is missing or outdated.

        A score is outdated if the videos or VBench's version have changed.
        """
        stored = _read_json_or_none(self._score_file(dimension))
        identities = [video.identity() for video in self.videos]
        return stored if stored and (stored["vbench"], stored["inputs"]) == (version, identities) else None

    def score(
        self,
        dimension: str,
        mode: VBenchMode,
        installation: VBenchInstallation,
        options: dict,
        device: str,
        local: bool,
    ) -> dict:
        """Score a dimension in a process of VBench's environment, and store the result.

        Args:
            options: further arguments of VBench's `evaluate`.
            device: torch device name; empty for CUDA if available, else the CPU.
            local: whether to load weights only from VBench's cache folder.

        Returns:
            A dictionary with the mean as `score`, and the scores of the videos as `videos`.

        Raises:
            UserError: if VBench fails. Its output is in the dimension's log file.
        """
        self._create_links()
        raw = self._run_vbench(
            dimension, self._job(dimension, mode, installation, options, device, local), installation
        )
        result = {
            "dimension": dimension,
            "mode": mode.name,
            "vbench": installation.version,
            **self._parse_scores(raw[dimension]),
            "inputs": [video.identity() for video in self.videos],
        }
        if not math.isfinite(result["score"]):
            log = self._log_file(dimension)
            raise UserError(f"VBench returned no score for {dimension} of {self.label}; see {log}")
        write_json(self._score_file(dimension), result)
        return result

    def _create_links(self) -> None:
        """Create the folder of links, unless it exists for the same videos."""
        layout, identities = self.folder / "layout.json", [video.identity() for video in self.videos]
        if _read_json_or_none(layout) == identities:
            return
        layout.unlink(missing_ok=True)
        shutil.rmtree(self.links, ignore_errors=True)
        self.clips_complete.unlink(missing_ok=True)
        self.links.mkdir(parents=True)
        for video in self.videos:
            (self.links / f"{video.link}.mp4").symlink_to(os.path.abspath(video.path))
        write_json(layout, identities)

    def _job(
        self,
        dimension: str,
        mode: VBenchMode,
        installation: VBenchInstallation,
        options: dict,
        device: str,
        local: bool,
    ) -> dict:
        """Return the input of scripts/vbench_worker.py."""
        return {
            "dimension": dimension,
            "long": mode.long,
            "device": device,
            "clips_complete": self.clips_complete,
            "suite_file": installation.suite_file,
            "output": self._raw,
            "entries": self._entries(dimension, mode, installation),
            "arguments": {
                "videos_path": self.links,
                "name": dimension,
                "dimension_list": [dimension],
                "mode": mode.name,
                "prompt_list": {} if mode.suite else {f"{video.link}.mp4": video.prompt for video in self.videos},
                "local": local,
                "read_frame": False,
                "imaging_quality_preprocessing_mode": "longer",
                **options,
            },
        }

    def _entries(self, dimension: str, mode: VBenchMode, installation: VBenchInstallation) -> list[dict]:
        """Return the suite's entries of a dimension, or one entry per video. Each lists the links of its videos."""
        if not mode.suite:
            return [{"prompt_en": v.prompt, "dimension": [dimension], "videos": [v.link]} for v in self.videos]
        links = defaultdict(list)
        for video in self.videos:
            links[video.prompt].append(video.link)
        return [
            {**entry, "videos": links[entry["prompt_en"]]}
            for entry in installation.read_suite()
            if dimension in entry["dimension"] and entry["prompt_en"] in links
        ]

    def _run_vbench(self, dimension: str, job: dict, installation: VBenchInstallation) -> dict:
        """Run the worker process and return VBench's own result file."""
        result_file = self._raw / f"{dimension}_eval_results.json"
        result_file.unlink(missing_ok=True)
        log = self._log_file(dimension)
        with open_own_file(log, "wb") as file:
            command: list[str | Path] = [installation.python, WORKER, "score"]
            process = subprocess.run(
                command, input=json.dumps(job, default=str).encode(), stdout=file, stderr=subprocess.STDOUT
            )
        raw = _read_json_or_none(result_file)
        if process.returncode or raw is None:
            lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
            reason = next((line for line in reversed(lines) if line.strip()), f"exit code {process.returncode}")
            raise UserError(f"VBench could not score {dimension} of {self.label}: {reason.strip()} (full log: {log})")
        return raw

    def _parse_scores(self, raw: list) -> dict:
        """Parse VBench's [mean, videos], or VBench-Long's [mean, clips, videos]."""
        by_link = {video.link: video for video in self.videos}
        videos = []
        for item in raw[-1]:
            video = by_link.get(Path(item.get("video_path", "")).stem)
            if video is not None:
                videos.append(
                    {
                        "file": video.path.name,
                        "prompt": video.prompt,
                        "seed": video.seed,
                        "sample": video.sample,
                        "score": float(item["video_results"]),
                    }
                )
        return {"score": float(raw[0]), "videos": videos}


def open_vbench_folder(label: str, source: str, folder: Path, suite: Sequence[dict] | None) -> VBenchFolder:
    """Find the videos of a folder and name their links as VBench expects.

    Names are `<prompt>-<index>` for VBench's suite. Otherwise they are numbers, and prompts are passed separately.

    Args:
        suite: VBench's entries; None for videos of any prompts.

    Raises:
        UserError: if a video has no metadata or is not of the suite's prompts, or a prompt has too many videos.
    """
    suite_prompts = None if suite is None else {entry["prompt_en"] for entry in suite}
    found = [(video.metadata.get("name") or video.key.prompt, video) for video in find_videos(source)]
    found.sort(key=lambda item: (item[0], item[1].key.seed, item[1].key.sample))
    count: dict[str, int] = defaultdict(int)
    videos = []
    for number, (prompt, video) in enumerate(found):
        link = f"{number:05d}"
        if suite_prompts is not None:
            if prompt not in suite_prompts:
                raise UserError(
                    f"{video.path} has none of VBench's prompts ({prompt[:60]!r}); omit --suite, or remove the video"
                )
            link = f"{prompt}-{count[prompt]}"
            count[prompt] += 1
        key = video.key
        videos.append(VBenchVideo(video.path, link, prompt, key.seed, key.sample, prompt != key.prompt))
    if suite_prompts is not None and max(count.values()) > SAMPLES_PER_PROMPT:
        raise UserError(
            f"{source} has up to {max(count.values())} videos per prompt; VBench reads {SAMPLES_PER_PROMPT}, so remove "
            "the others"
        )
    return VBenchFolder(label, source, folder, videos)


def _read_json_or_none(path: Path) -> Any:
    """Return the content of a JSON file; None if it is missing or damaged."""
    try:
        return read_json(path)
    except UserError:
        return None

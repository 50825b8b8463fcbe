"""VBench (arXiv 2311.17982): its dimensions, its modes, and an installed copy.

All facts are those of the Python package vbench 0.1.5 with its VBench-Long (`vbench2_beta_long`). VBench runs in its
own processes: scripts/vbench_worker.py.
"""

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.errors import UserError
from utils.files import read_json

DIMENSIONS = (
    *("subject_consistency", "background_consistency", "motion_smoothness", "dynamic_degree", "aesthetic_quality"),
    *("imaging_quality", "temporal_flickering", "temporal_style", "overall_consistency", "human_action"),
    *("object_class", "multiple_objects", "color", "spatial_relationship", "scene", "appearance_style"),
)
# VBench documents these for videos of any prompt.
DEFAULT_DIMENSIONS = DIMENSIONS[:6]
# VBench's code also accepts the next three for any prompt. They compare with the whole prompt, or with none.
CUSTOM_DIMENSIONS = DIMENSIONS[:9]
# The other dimensions need information that only the suite's own prompts and file names contain.
SAMPLES_PER_PROMPT = 5  # videos per prompt of the suite; VBench reads no more
WORKER = Path(__file__).resolve().parents[2] / "scripts" / "vbench_worker.py"


@dataclass(frozen=True)
class VBenchMode:
    """One of VBench's four modes.

    Attributes:
        suite: whether the videos have VBench's own prompts.
        long: whether VBench-Long is used, which cuts videos into clips.
    """

    suite: bool
    long: bool

    @property
    def name(self) -> str:
        """VBench's name of the mode."""
        return ("long_" if self.long else "") + ("vbench_standard" if self.suite else "custom_input")

    def check_dimensions(self, dimensions: Sequence[str]) -> None:
        """Raise `UserError` for a dimension that is unknown, or unavailable in this mode."""
        for name in dimensions:
            if name not in DIMENSIONS:
                raise UserError(f"VBench has no dimension {name!r}; it has {', '.join(DIMENSIONS)}")
            if not self.suite and name not in CUSTOM_DIMENSIONS:
                raise UserError(
                    f"dimension {name} needs VBench's own prompts (--suite); for other videos choose from "
                    f"{', '.join(CUSTOM_DIMENSIONS)}"
                )


@dataclass(frozen=True)
class VBenchInstallation:
    """An installed VBench.

    Attributes:
        python: interpreter of the environment that contains it.
        folder: folder of the package vbench.
        long_folder: folder of the package vbench2_beta_long; None if it is missing.
    """

    python: str
    version: str
    folder: Path
    long_folder: Path | None

    @classmethod
    def find(cls, python: str) -> "VBenchInstallation":
        """Find VBench in an interpreter's environment.

        Raises:
            UserError: if the interpreter does not start, or does not have VBench.
        """
        try:
            answer = subprocess.run([python, WORKER], capture_output=True, text=True, check=True).stdout
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"cannot run {python}: {error}; --python must name a Python interpreter") from None
        found = json.loads(answer)
        if found["vbench"] is None:
            raise UserError(
                f"VBench is not installed for {python}: pip install -r requirements-vbench.txt in an environment of "
                "its own, and pass its interpreter with --python"
            )
        long_folder = found["vbench2_beta_long"]
        return cls(python, found["version"], Path(found["vbench"]), Path(long_folder) if long_folder else None)

    @property
    def suite_file(self) -> Path:
        """VBench's list of its prompts."""
        return self.folder / "VBench_full_info.json"

    def read_suite(self) -> list[dict]:
        """Return the entries of VBench's suite: `prompt_en`, `dimension` (a list) and sometimes `auxiliary_info`.

        A prompt may have several entries.

        Raises:
            UserError: if the file is missing or damaged.
        """
        return read_json(self.suite_file, "list of VBench's prompts")

    def long_options(self, config_folder: str) -> dict:
        """Return the arguments that VBench-Long's own evaluation script passes (slow-fast, no static filter).

        Args:
            config_folder: folder of VBench-Long's tables; empty for the folder in the package.

        Raises:
            UserError: if VBench-Long or a table is missing.
        """
        if self.long_folder is None:
            raise UserError(f"VBench of {self.python} lacks VBench-Long (vbench2_beta_long); install vbench 0.1.5")
        folder = Path(config_folder or self.long_folder / "configs").resolve()
        names = ("clip_length_mix", "slow_fast_params", "subject_mapping_table", "background_mapping_table")
        files = [folder / f"{name}.yaml" for name in names]
        for file in files:
            if not file.is_file():
                raise UserError(
                    f"VBench-Long's table {file} is missing (the Python package 0.1.5 has no tables); git clone "
                    "https://github.com/Vchitect/VBench and add --long_configs VBench/vbench2_beta_long/configs"
                )
        # VBench joins the first path to a folder of its own; an absolute path overrides that folder.
        keys = ("clip_length_config", "slow_fast_eval_config", "sb_mapping_file_path", "bg_mapping_file_path")
        return {
            **{key: str(file) for key, file in zip(keys, files, strict=True)},
            "sb_clip2clip_feat_extractor": "dinov2",
            "bg_clip2clip_feat_extractor": "dreamsim",
            "w_inclip": 1.0,  # with dev_flag, VBench takes both weights from slow_fast_params instead
            "w_clip2clip": 0.0,
            "dev_flag": True,
            "use_semantic_splitting": False,
            "static_filter_flag": False,
            "num_of_samples_per_prompt": SAMPLES_PER_PROMPT,
        }

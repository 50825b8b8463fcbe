"""Reads and writes ODE pairs: teacher trajectories from noise to clip, with their prompts.

Two layouts are read, those of CausVid and Self-Forcing:
- a folder of `{index:05d}.pt` files, each a dict {prompt: float tensor [1, P, F, C, h, w]} of P points, noisy to clean;
- LMDB environments (trainer/datasets/lmdb.py).

Two JSON files of ours lie beside either: `sigmas.json` lists the noise levels of the P points, and `pairs.json` stores
the settings that generated the pairs. The levels are the teacher's. The generator must be conditioned on them and
not on the levels of its own steps.
"""

import pickle
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from model.weight_checks import check_zip, is_finite
from pipeline.build import block_layout, describe_blocks
from trainer.datasets.lmdb import open_latent_lmdb
from utils.config import RolloutConfig
from utils.config_checks import are_noise_levels, is_number
from utils.distributed import rank
from utils.errors import UserError
from utils.files import atomic_path, read_json, write_json

SIGMAS_FILE = "sigmas.json"
SETTINGS_FILE = "pairs.json"
_HIAR_SIGMAS = (  # sigma = 8 u / (1 + 7 u) at u = 1 - i/48
    "HiAR's defaults (48 steps, shift 8, save_indices 0,12,24,36,-1) are data.sigmas=[1,0.96,0.888889,0.727273,0]"
)
_PROGRESS_FROM = 1000  # files; reading fewer takes too little time for a progress bar


class TrajectoryStore(Protocol):
    """Trajectories on disk: prompts and shape in memory, latents read on request."""

    prompts: list[str]
    shape: tuple[int, ...]  # of one trajectory: [P, F, C, h, w]

    def read(self, index: int) -> Tensor:
        """Return trajectory `index` in its stored type."""
        ...


class ODEPairs:
    """The ODE pairs of a folder with the noise levels of their points; trajectories are read on request."""

    def __init__(self, trajectories: TrajectoryStore, sigmas: Sequence[float]):
        self._trajectories = trajectories
        self.sigmas = list(sigmas)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def prompts(self) -> list[str]:
        """The prompt of each pair."""
        return self._trajectories.prompts

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one trajectory, [P, F, C, h, w]."""
        return self._trajectories.shape

    def read(self, indices: Iterable[int], points: Sequence[int] | None = None) -> Tensor:
        """Return trajectories [B, P, F, C, h, w] in their stored type, or only the points with indices `points`."""
        chosen = slice(None) if points is None else list(points)
        return torch.stack([self._trajectories.read(index)[chosen] for index in indices])

    def check_size(self, frames: int, size: tuple[int, int], source: str) -> None:
        """Check that clips have this number of latent frames and this height and width.

        Args:
            source: name of the folder, for the message.

        Raises:
            UserError: if they do not.
        """
        found = (self.shape[1], *self.shape[3:])
        if found != (frames, *size):
            raise UserError(
                f"the ODE pairs in {source} have {found[0]} latent frames of {found[1]}x{found[2]}, but the "
                f"configuration has {frames} of {size[0]}x{size[1]} (data.num_frames; video.height, video.width / 8);"
                " change these keys or regenerate the pairs"
            )

    def check_channels(self, channels: int, source: str) -> None:
        """Check that the latents have as many channels as the network.

        Raises:
            UserError: if they do not.
        """
        if self.shape[2] != channels:
            raise UserError(
                f"the ODE pairs in {source} have {self.shape[2]} channels, but the network has {channels}; regenerate "
                "the pairs with its own model"
            )

    def check_blocks(self, rollout: RolloutConfig, source: str) -> None:
        """Check that the rollout's blocks divide the clips; `source` is the folder's name for the message.

        Raises:
            UserError: if they do not.
        """
        if not block_layout(rollout, self.shape[1]).is_whole:
            blocks = describe_blocks(rollout)
            raise UserError(
                f"the ODE pairs in {source} have {self.shape[1]} frames, which {blocks} do not divide; "
                "change rollout.block_frames or regenerate the pairs with another --num_frames"
            )


def open_ode_pairs(folder: str, sigmas: Sequence[float], num_points: int) -> ODEPairs:
    """Open the ODE pairs in a folder, of either layout.

    Args:
        sigmas: noise levels of the points, in place of those in sigmas.json; empty to use the file.
        num_points: number of leading points that the caller reads from each trajectory.

    Raises:
        UserError: if there are no pairs, a file is corrupt, there are too few points, or their levels are unknown.
    """
    path = Path(folder)
    if not folder or not path.is_dir():
        raise UserError(f"no ODE pairs in {folder or 'data.path'}; generate them with scripts/generate_ode_pairs.py")
    trajectories: TrajectoryStore = open_latent_lmdb(path) or PairFolder(path)
    if trajectories.shape[0] == 1:
        raise UserError(f"{folder} holds clips, not ODE pairs; use it with train.objective=flow_matching")
    levels = list(sigmas) or read_sigmas(path)
    if levels is None or len(levels) != trajectories.shape[0]:
        raise UserError(
            f"{folder} has no {SIGMAS_FILE} for its {trajectories.shape[0]} points; "
            f"set data.sigmas to their noise levels; {_HIAR_SIGMAS}"
        )
    if not are_noise_levels(levels):
        raise UserError(
            f"the noise levels of the points in {folder} must fall from at most 1 to at least 0, not {levels}; "
            f"correct data.sigmas or {SIGMAS_FILE}"
        )
    if trajectories.shape[0] < num_points:
        raise UserError(
            f"the trajectories in {folder} have {trajectories.shape[0]} points, but {num_points} are needed; "
            "regenerate the pairs with that many --save_indices"
        )
    return ODEPairs(trajectories, levels)


# ---- .pt files ----


class PairFolder:
    """A folder of .pt files, one trajectory each.

    Raises:
        UserError: if the folder has none, a file is corrupt, or their shapes differ.
    """

    def __init__(self, folder: Path):
        self.files = sorted(file for file in folder.glob("*.pt") if not file.name.startswith("."))
        if not self.files:
            raise UserError(f"no ODE pairs in {folder}; generate them with scripts/generate_ode_pairs.py")
        self._checked: set[int] = set()  # files of which the checksums are right
        self.prompts: list[str] = []
        self.shape: tuple[int, ...] = ()
        quiet = len(self.files) < _PROGRESS_FROM or rank() > 0
        for file in tqdm(self.files, desc="reading ODE pairs", unit="pair", disable=quiet):
            prompt, trajectory = load_pair(file)
            self.prompts.append(prompt)
            self.shape = self.shape or tuple(trajectory.shape)
            if tuple(trajectory.shape) != self.shape:
                raise UserError(f"{file} differs in size from {self.files[0]}; keep pairs of one size in a folder")

    def read(self, index: int) -> Tensor:
        """Return trajectory `index`, [P, F, C, h, w]. The first read of a file compares its checksums.

        Raises:
            UserError: if the file is damaged.
        """
        if index not in self._checked and zipfile.is_zipfile(self.files[index]):
            check_zip(self.files[index])
            self._checked.add(index)
        return load_pair(self.files[index])[1]


def load_pair(file: Path) -> tuple[str, Tensor]:
    """Return the prompt and the trajectory [P, F, C, h, w] of a .pt file; a clip is a trajectory of one point.

    The file is memory-mapped, so only the points that the caller touches are read.

    Raises:
        UserError: if the file is corrupt or not an ODE pair.
    """
    try:
        [(prompt, trajectory)] = torch.load(file, weights_only=True, map_location="cpu", mmap=True).items()
        if trajectory.ndim == 5:  # the latents of one clip, as CausVid writes them
            return prompt, trajectory[:1]
        _, _, _, _, _, _ = trajectory.shape
        return prompt, trajectory[0]
    # torch.load raises any of these for a corrupt file.
    except (
        pickle.UnpicklingError,
        RuntimeError,
        EOFError,
        ValueError,
        TypeError,
        LookupError,
        AttributeError,
        OSError,
    ):
        raise UserError(f"{file} is corrupt or not an ODE pair; delete it and regenerate it") from None


def pair_file(folder: Path, index: int) -> Path:
    """Return the path of pair `index`."""
    return folder / f"{index:05d}.pt"


def write_ode_pair(file: Path, prompt: str, points: Tensor) -> None:
    """Write one pair atomically; `points` is its trajectory [P, F, C, h, w], noisy to clean.

    Raises:
        UserError: if it holds NaN or infinity.
    """
    # torch.save writes the whole storage of a view, and given a path, it writes the file's (temporary) name too.
    if not is_finite(points):
        raise UserError(f"the trajectory of {prompt!r:.60} holds NaN or infinity in {points.dtype}; no pair is written")
    with atomic_path(file) as path, path.open("xb") as stream:
        torch.save({prompt: points[None].cpu().clone()}, stream)


# ---- sigmas.json and pairs.json ----


def write_sigmas(folder: Path, sigmas: Sequence[float]) -> None:
    """Write the noise levels of a folder's points, noisy to clean.

    Raises:
        UserError: if the folder already has other levels.
    """
    file = folder / SIGMAS_FILE
    existing = read_sigmas(folder)
    if existing is None:
        write_json(file, list(sigmas), indent=None)
    elif existing != list(sigmas):
        raise UserError(f"{folder} holds pairs of other noise levels ({file}); choose another output folder")


def read_sigmas(folder: Path) -> list[float] | None:
    """Return the noise levels of a folder's points, noisy to clean, or None if it has no sigmas.json.

    Raises:
        UserError: if the file is damaged.
    """
    file = folder / SIGMAS_FILE
    if not file.exists():
        return None
    levels = read_json(file, "list of noise levels")
    if not isinstance(levels, list) or not levels or not all(map(is_number, levels)):
        raise UserError(f"{file} is not a list of noise levels; correct it or regenerate the pairs")
    return levels


def check_pair_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Check that the pairs in a folder, if any, were generated with `settings` (JSON values by name).

    Folders of other tools have no pairs.json; for those only the noise levels are compared.

    Raises:
        UserError: naming the first setting that differs.
    """
    file = folder / SETTINGS_FILE
    if file.exists():
        stored = read_json(file, "JSON object of pair settings")
        if not isinstance(stored, dict):
            raise UserError(f"{file} is not a JSON object; delete it if the pairs beside it have the new settings")
    else:
        sigmas = read_sigmas(folder)
        stored = {} if sigmas is None else {"sigmas": sigmas}
        settings = {name: value for name, value in settings.items() if name in stored}
    for name in dict.fromkeys([*settings, *stored]):
        old, new = stored.get(name), settings.get(name)
        if old != new:
            raise UserError(
                f"{folder} holds pairs of {name} {old}, not {new}: choose another --output_folder, or delete this one"
            )


def write_pair_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    """Write pairs.json, and sigmas.json from the setting `sigmas`. Several ranks may write the same settings at once.

    Raises:
        UserError: if the folder holds pairs of other settings.
    """
    check_pair_settings(folder, settings)
    write_sigmas(folder, settings["sigmas"])
    if not (folder / SETTINGS_FILE).exists():
        write_json(folder / SETTINGS_FILE, dict(settings))

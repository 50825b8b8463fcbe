"""Teacher ODE trajectories on disk: one file per prompt, as CausVid and Self-Forcing write them.

`{index:05d}.pt` holds {prompt: float tensor [1, saves, F, C, h, w]}, noisy to clean. Beside them `sigmas.json` (ours)
holds the saved points' noise levels: they are the teacher's, and a student must be told those and not its own.
"""

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from utils.errors import UserError
from utils.files import atomic_path


def pair_file(folder: Path, index: int) -> Path:
    """The file of pair number `index`."""
    return folder / f"{index:05d}.pt"


def write_ode_pair(file: Path, prompt: str, points: Tensor) -> None:
    """Write the saved points [saves, F, C, h, w] of one trajectory, noisy to clean; atomic."""
    with atomic_path(file) as path:
        torch.save({prompt: points[None].cpu().clone()}, path)


SIGMAS = "sigmas.json"


def write_sigmas(folder: Path, sigmas: Sequence[float]) -> None:
    """Note the noise levels of the points that a folder's pairs save.

    Raises:
        UserError: if the folder holds pairs of other levels.
    """
    file = folder / SIGMAS
    if file.exists() and json.loads(file.read_text()) != list(sigmas):
        raise UserError(f"{folder} holds pairs of other noise levels ({file}); choose another output folder")
    with atomic_path(file) as path:
        path.write_text(json.dumps(list(sigmas)) + "\n")


def read_sigmas(folder: str) -> list[float] | None:
    """The noise levels of a folder's points, noisy to clean; None if nobody noted them."""
    file = Path(folder) / SIGMAS
    return json.loads(file.read_text()) if file.exists() else None


def read_ode_pairs(folder: str, num_saves: int) -> tuple[Tensor, list[str]]:
    """All pairs of a folder: points [N, saves, F, C, h, w] in their stored type, and N prompts.

    Raises:
        UserError: if there is none, one is broken, does not hold `num_saves` points or is of another size.
    """
    files = sorted(file for file in Path(folder).glob("*.pt") if not file.name.startswith("."))
    if not folder or not files:
        raise UserError(f"no ODE pairs in {folder or 'data.path'}; make them with scripts/generate_ode_pairs.py")
    points, prompts = [], []
    for file in tqdm(files, desc="reading ODE pairs", unit="pair", disable=len(files) < 1000):
        try:
            [(prompt, trajectory)] = torch.load(file, weights_only=True, map_location="cpu").items()
            _, num_points, *_ = trajectory.shape
        # torch.load reports broken files by any of these.
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, TypeError, LookupError, AttributeError):
            raise UserError(f"{file} is no ODE pair, or cut off; delete it and make it again") from None
        if num_points != num_saves:
            raise UserError(
                f"{file} holds {num_points} points, but the rollout has {num_saves} levels; make the pairs with "
                "as many --save_indices as denoising steps and one"
            )
        points.append(trajectory[0])
        if points[-1].shape != points[0].shape:
            raise UserError(f"{file} is of another size than {files[0]}; keep pairs of one size in a folder")
        prompts.append(prompt)
    return torch.stack(points), prompts

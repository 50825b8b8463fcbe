"""Teacher ODE trajectories on disk, in the layouts that CausVid and Self-Forcing write and read.

A folder of `{index:05d}.pt`, each {prompt: float tensor [1, saves, F, C, h, w]}, noisy to clean; or an LMDB, or a
folder of LMDBs, with `latents_shape` and `prompts_shape` (ASCII integers, the first the count), `latents_{i}_data` (a
float16 row) and `prompts_{i}_data` (UTF-8). Beside them `sigmas.json` (ours) holds the saved points' noise levels: they
are the teacher's, and a student must be told those and not its own. `pairs.json` (ours too) says what made the pairs.

LMDBs of the same layout also hold clips: rows without an axis of points, which trainer/datasets/clips.py reads.
"""

import bisect
import itertools
import json
import math
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from utils.config_checks import are_noise_levels
from utils.distributed import rank
from utils.errors import UserError
from utils.files import atomic_path, write_json

SIGMAS = "sigmas.json"
ORIGIN = "pairs.json"
_LMDB_FILE = "data.mdb"


class Trajectories(Protocol):
    """Where pairs are kept: prompts, the shape of one trajectory, and single ones read when they are needed."""

    prompts: list[str]
    shape: tuple[int, ...]  # [saves, F, C, h, w]

    def read(self, index: int) -> Tensor:
        """Trajectory number `index`, in its stored type."""
        ...


class ODEPairs:
    """The pairs of a folder with the noise levels of their points; trajectories are read when they are needed."""

    def __init__(self, trajectories: Trajectories, sigmas: Sequence[float]):
        self._trajectories = trajectories
        self.sigmas = list(sigmas)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def prompts(self) -> list[str]:
        """The pairs' prompts, in their order."""
        return self._trajectories.prompts

    @property
    def shape(self) -> tuple[int, ...]:
        """[saves, F, C, h, w] of a trajectory."""
        return self._trajectories.shape

    def read(self, indices: Iterable[int], points: Sequence[int] | None = None) -> Tensor:
        """Trajectories by index, [B, saves, F, C, h, w] in their stored type, or some of their points only."""
        chosen = slice(None) if points is None else list(points)
        return torch.stack([self._trajectories.read(index)[chosen] for index in indices])


def open_ode_pairs(folder: str, sigmas: Sequence[float], num_points: int) -> ODEPairs:
    """Open the pairs of a folder, of whichever layout.

    Args:
        sigmas: noise levels of the points, which come before those of sigmas.json; empty if that has them.
        num_points: first points of each trajectory that will be read.

    Raises:
        UserError: if there are no pairs, one is broken or has too few points, or nobody says their levels.
    """
    path = Path(folder)
    if not folder or not path.is_dir():
        raise UserError(f"no ODE pairs in {folder or 'data.path'}; make them with scripts/generate_ode_pairs.py")
    packed = open_latents(path)
    if packed is not None and packed.shape[0] == 1:
        raise UserError(f"{folder} holds clips, not ODE pairs: train.objective=flow_matching reads them")
    trajectories: Trajectories = Files(path) if packed is None else packed
    levels = list(sigmas) or read_sigmas(path)
    if levels is None or len(levels) != trajectories.shape[0]:
        raise UserError(
            f"{folder} has no {SIGMAS} for its {trajectories.shape[0]} points: set data.sigmas to their noise levels"
        )
    if not are_noise_levels(levels):
        raise UserError(
            f"the noise levels of the points in {folder} must fall from at most 1 to at least 0, not {levels}"
        )
    if trajectories.shape[0] < num_points:
        raise UserError(
            f"the trajectories in {folder} hold {trajectories.shape[0]} points, but {num_points} are needed; make the "
            "pairs with as many --save_indices"
        )
    return ODEPairs(trajectories, levels)


# ---- Folders of .pt files ----


class Files:
    """A folder of .pt files."""

    def __init__(self, folder: Path):
        self.files = sorted(file for file in folder.glob("*.pt") if not file.name.startswith("."))
        if not self.files:
            raise UserError(f"no ODE pairs in {folder}; make them with scripts/generate_ode_pairs.py")
        self.prompts: list[str] = []
        self.shape: tuple[int, ...] = ()
        for file in tqdm(
            self.files, desc="reading ODE pairs", unit="pair", disable=len(self.files) < 1000 or rank() > 0
        ):
            prompt, trajectory = load_pair(file)
            self.prompts.append(prompt)
            self.shape = self.shape or tuple(trajectory.shape)
            if tuple(trajectory.shape) != self.shape:
                raise UserError(f"{file} is of another size than {self.files[0]}; keep pairs of one size in a folder")

    def read(self, index: int) -> Tensor:
        """Trajectory number `index`."""
        return load_pair(self.files[index])[1]


def load_pair(file: Path) -> tuple[str, Tensor]:
    """Prompt and trajectory [saves, F, C, h, w] of a .pt file; the tensor's pages are read when they are touched.

    Raises:
        UserError: if the file is broken or something else.
    """
    try:
        [(prompt, trajectory)] = torch.load(file, weights_only=True, map_location="cpu", mmap=True).items()
        _, _, _, _, _, _ = trajectory.shape
        return prompt, trajectory[0]
    # torch.load reports broken files by any of these.
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
        raise UserError(f"{file} is no ODE pair, or cut off; delete it and make it again") from None


def pair_file(folder: Path, index: int) -> Path:
    """The file of pair number `index`."""
    return folder / f"{index:05d}.pt"


def write_ode_pair(file: Path, prompt: str, points: Tensor) -> None:
    """Write the saved points [saves, F, C, h, w] of one trajectory, noisy to clean; atomic."""
    with atomic_path(file) as path:
        torch.save({prompt: points[None].cpu().clone()}, path)


def write_sigmas(folder: Path, sigmas: Sequence[float]) -> None:
    """Note the noise levels of the points that a folder's pairs save.

    Raises:
        UserError: if the folder holds pairs of other levels.
    """
    file = folder / SIGMAS
    if not file.exists():
        write_json(file, list(sigmas), indent=None)
    elif json.loads(file.read_text()) != list(sigmas):
        raise UserError(f"{folder} holds pairs of other noise levels ({file}); choose another output folder")


def read_sigmas(folder: Path) -> list[float] | None:
    """The noise levels of a folder's points, noisy to clean; None if nobody noted them."""
    file = folder / SIGMAS
    return json.loads(file.read_text()) if file.exists() else None


# ---- What made them ----


def check_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Make sure that the pairs of a folder, if it has any, were made as `origin` says: values by name, in JSON's types.

    Folders that others wrote don't say what made them; of those only the noise levels are compared.

    Raises:
        UserError: if something differs, naming the first that does.
    """
    file = folder / ORIGIN
    if file.exists():
        try:
            noted = dict(json.loads(file.read_text(encoding="utf-8")))
        except (TypeError, ValueError):
            raise UserError(f"{file} is broken; delete it if the pairs beside it were made as the new ones") from None
    else:
        sigmas = read_sigmas(folder)
        noted = {} if sigmas is None else {"sigmas": sigmas}
        origin = {name: value for name, value in origin.items() if name in noted}
    for name in dict.fromkeys([*origin, *noted]):
        old, new = noted.get(name), origin.get(name)
        if old != new:
            raise UserError(
                f"{folder} holds pairs of {name} {old}, not {new}: choose another --output_folder, or delete this one"
            )


def write_origin(folder: Path, origin: Mapping[str, Any]) -> None:
    """Note what makes a folder's pairs, and for their readers the noise levels among it (`sigmas`).

    Ranks that note the same don't disturb each other.

    Raises:
        UserError: if pairs of another origin are there.
    """
    check_origin(folder, origin)
    write_sigmas(folder, origin["sigmas"])
    if not (folder / ORIGIN).exists():
        write_json(folder / ORIGIN, dict(origin))


# ---- LMDB ----


class LMDB:
    """One LMDB environment of trajectories, or of clips: those are trajectories of one point."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._environment = open_lmdb(folder)
        # To touch what is cut off would kill the process. (The last few pages may be unused, and never written.)
        num_pages = self._environment.info()["last_pgno"] + 1
        if (folder / _LMDB_FILE).stat().st_size < (num_pages - 16) * self._environment.stat()["psize"]:
            raise UserError(f"the LMDB {folder} is cut off; copy or make it again")
        with self._environment.begin() as transaction:
            count, *shape = self._numbers(transaction, "latents_shape")
            if len(shape) not in (4, 5):
                raise UserError(
                    f"latents in {folder} have the shape {shape}, not [points, frames, channels, height, width], nor "
                    "that of clips, without points"
                )
            self.prompts = [self._text(transaction, f"prompts_{i}_data") for i in range(count)]
        self.shape = tuple(shape) if len(shape) == 5 else (1, *shape)

    def read(self, index: int) -> Tensor:
        """Trajectory number `index`, float16."""
        name = f"latents_{index}_data"
        with self._environment.begin() as transaction:
            row = self._entry(transaction, name)
        if len(row) != 2 * math.prod(self.shape):
            raise UserError(f"{name} in the LMDB {self.folder} has {len(row)} bytes, not float16 {list(self.shape)}")
        return torch.from_numpy(np.frombuffer(row, dtype=np.float16).reshape(self.shape).copy())

    def _numbers(self, transaction: Any, name: str) -> list[int]:
        words = self._entry(transaction, name).split()
        if not words or not all(word.isdigit() for word in words):
            raise UserError(
                f"{name} in the LMDB {self.folder} is no list of numbers: it is not one of ODE pairs or latents"
            )
        return [int(word) for word in words]

    def _text(self, transaction: Any, name: str) -> str:
        try:
            return self._entry(transaction, name).decode()
        except UnicodeDecodeError:
            raise UserError(f"{name} in the LMDB {self.folder} is not UTF-8") from None

    def _entry(self, transaction: Any, name: str) -> bytes:
        import lmdb

        try:
            value = transaction.get(name.encode())
        except lmdb.Error as error:
            raise UserError(f"the LMDB {self.folder} is broken ({error}); copy or make it again") from None
        if value is None:
            raise UserError(f"the LMDB {self.folder} has no entry {name}: it is not one of ODE pairs or latents")
        return value


class Sharded:
    """Several environments behind each other."""

    def __init__(self, parts: Sequence[LMDB]):
        self.parts = parts
        self.shape = parts[0].shape
        if any(part.shape != self.shape for part in parts):
            raise UserError(f"the LMDBs in {parts[0].folder.parent} hold latents of different sizes")
        self.prompts = [prompt for part in parts for prompt in part.prompts]
        self._starts = [0, *itertools.accumulate(len(part.prompts) for part in parts)]

    def read(self, index: int) -> Tensor:
        """Trajectory number `index`, float16."""
        part = bisect.bisect_right(self._starts, index) - 1
        return self.parts[part].read(index - self._starts[part])


def open_latents(folder: Path) -> LMDB | Sharded | None:
    """The LMDB that a folder is, or those in its folders behind each other; None if there is none.

    Raises:
        UserError: if one cannot be read, or they hold nothing.
    """
    if (folder / _LMDB_FILE).exists():
        opened: LMDB | Sharded = LMDB(folder)
    else:
        files = sorted(file for file in folder.glob(f"*/{_LMDB_FILE}") if not file.parent.name.startswith("."))
        if not files:
            return None
        opened = Sharded([LMDB(file.parent) for file in files])
    if not opened.prompts:
        raise UserError(f"the LMDB {folder} holds no latents")
    return opened


def open_lmdb(folder: Path, size: int | None = None) -> Any:
    """An LMDB environment to read, or to write with room for `size` bytes.

    Raises:
        UserError: if it cannot be opened.
    """
    import lmdb  # one of many ways to keep data: not needed for the others

    try:
        if size is None:
            return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_readers=512)
        return lmdb.open(str(folder), map_size=size)
    except lmdb.Error as error:
        raise UserError(f"cannot open the LMDB {folder}: {error}") from None


def write_lmdb(folder: Path, prompts: Sequence[str], trajectories: Iterable[Tensor], shape: Sequence[int]) -> None:
    """Write trajectories of `shape` [saves, F, C, h, w] (or latents [F, C, h, w]) with their prompts, as float16.

    `folder` must be new; the counts are written last, so that what was cut off is not taken for complete.
    """
    row_bytes = 2 * int(np.prod(shape))
    size = (row_bytes + 65536) * len(prompts) * 2 + 2**24  # a map may be larger than what is put into it
    environment = open_lmdb(folder, size)
    for start, pair in enumerate(zip(prompts, trajectories, strict=True)):
        prompt, trajectory = pair
        with environment.begin(write=True) as transaction:
            row = trajectory.to(torch.float16).contiguous().numpy()
            if list(row.shape) != list(shape):
                raise ValueError(f"trajectory {start} is {list(row.shape)}, not {list(shape)}")
            transaction.put(f"latents_{start}_data".encode(), row.tobytes())
            transaction.put(f"prompts_{start}_data".encode(), prompt.encode())
    with environment.begin(write=True) as transaction:
        count = len(prompts)
        transaction.put(b"latents_shape", " ".join(map(str, [count, *shape])).encode())
        transaction.put(b"prompts_shape", str(count).encode())
    environment.sync()
    environment.close()

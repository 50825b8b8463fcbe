"""Reads and writes latents with their prompts in LMDB environments, in Self-Forcing's layout.

Keys of one environment with N entries:

    latents_shape      ASCII integers: N, then the shape of an entry
    prompts_shape      ASCII integer: N
    latents_{i}_data   float16 values of entry i
    prompts_{i}_data   prompt of entry i, UTF-8

An entry is an ODE trajectory [P, F, C, h, w] of P points or a clip [F, C, h, w]; a clip is read as a trajectory of one
point. A data set is one environment, or a folder of environments that are read in the order of their names.
"""

import bisect
import itertools
import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from utils.errors import UserError

_DATA_FILE = "data.mdb"


class LatentLMDB:
    """One LMDB environment of trajectories or clips, opened for reading.

    Raises:
        UserError: if the environment is corrupt, truncated or of another layout.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._environment = _open_environment(folder)
        # LMDB maps the file: reading beyond its end would kill the process. The last pages may be unused and unwritten.
        num_pages = self._environment.info()["last_pgno"] + 1
        if (folder / _DATA_FILE).stat().st_size < (num_pages - 16) * self._environment.stat()["psize"]:
            raise UserError(f"the LMDB {folder} is truncated; copy it again or recreate it")
        with self._environment.begin() as transaction:
            count, *shape = self._integers(transaction, "latents_shape")
            if len(shape) not in (4, 5):
                raise UserError(
                    f"latents in {folder} have shape {shape}; expected [points, frames, channels, height, width] for "
                    "ODE pairs or [frames, channels, height, width] for clips"
                )
            self.prompts = [self._text(transaction, f"prompts_{i}_data") for i in range(count)]
        self.shape = tuple(shape) if len(shape) == 5 else (1, *shape)  # [P, F, C, h, w]

    def read(self, index: int) -> Tensor:
        """Return trajectory `index`, float16 [P, F, C, h, w]."""
        key = f"latents_{index}_data"
        with self._environment.begin() as transaction:
            row = self._value(transaction, key)
        if len(row) != 2 * math.prod(self.shape):
            raise UserError(
                f"{key} in the LMDB {self.folder} has {len(row)} bytes; float16 {list(self.shape)} expected"
            )
        return torch.from_numpy(np.frombuffer(row, dtype=np.float16).reshape(self.shape).copy())

    def _integers(self, transaction: Any, key: str) -> list[int]:
        words = self._value(transaction, key).split()
        if not words or not all(word.isdigit() for word in words):
            raise UserError(
                f"{key} in the LMDB {self.folder} is not a list of integers; choose an LMDB of ODE pairs or clips"
            )
        return [int(word) for word in words]

    def _text(self, transaction: Any, key: str) -> str:
        try:
            return self._value(transaction, key).decode()
        except UnicodeDecodeError:
            raise UserError(f"{key} in the LMDB {self.folder} is not valid UTF-8; recreate the LMDB") from None

    def _value(self, transaction: Any, key: str) -> bytes:
        import lmdb

        try:
            value = transaction.get(key.encode())
        except lmdb.Error as error:
            raise UserError(f"the LMDB {self.folder} is corrupt ({error}); copy it again or recreate it") from None
        if value is None:
            raise UserError(f"the LMDB {self.folder} has no key {key}; choose an LMDB of ODE pairs or clips")
        return value


class ShardedLMDB:
    """Several environments, read as one sequence of entries.

    Raises:
        UserError: if their entries differ in shape.
    """

    def __init__(self, shards: Sequence[LatentLMDB]):
        self.shards = shards
        self.shape = shards[0].shape
        if any(shard.shape != self.shape for shard in shards):
            raise UserError(f"the LMDBs in {shards[0].folder.parent} hold latents of different sizes; separate them")
        self.prompts = [prompt for shard in shards for prompt in shard.prompts]
        self._starts = [0, *itertools.accumulate(len(shard.prompts) for shard in shards)]

    def read(self, index: int) -> Tensor:
        """Return trajectory `index`, float16 [P, F, C, h, w]."""
        number = bisect.bisect_right(self._starts, index) - 1
        return self.shards[number].read(index - self._starts[number])


def open_latent_lmdb(folder: Path) -> LatentLMDB | ShardedLMDB | None:
    """Open the LMDB at `folder`, or the LMDBs in its subfolders; return None if there are none.

    Raises:
        UserError: if an LMDB cannot be read, or there are no entries.
    """
    if (folder / _DATA_FILE).exists():
        opened: LatentLMDB | ShardedLMDB = LatentLMDB(folder)
    else:
        files = sorted(file for file in folder.glob(f"*/{_DATA_FILE}") if not file.parent.name.startswith("."))
        if not files:
            return None
        opened = ShardedLMDB([LatentLMDB(file.parent) for file in files])
    if not opened.prompts:
        raise UserError(f"the LMDB {folder} is empty; recreate it with scripts/create_lmdb.py")
    return opened


def write_lmdb(folder: Path, prompts: Sequence[str], latents: Iterable[Tensor], shape: Sequence[int]) -> None:
    """Write one entry per prompt to a new environment at `folder`, as float16.

    The shapes are written last, so an interrupted environment is never read as complete.

    Args:
        latents: trajectories [P, F, C, h, w] or clips [F, C, h, w], one per prompt.
        shape: shape of one entry.

    Raises:
        ValueError: if an entry has another shape, or the numbers of prompts and latents differ.
        UserError: if the environment cannot be opened or written.
    """
    import lmdb

    row_bytes = 2 * math.prod(shape)
    _check_free_bytes(folder, row_bytes * len(prompts) + 2**17)
    map_size = (row_bytes + 65536) * len(prompts) * 2 + 2**24  # an upper bound: the file grows only as needed
    environment = _open_environment(folder, map_size)
    try:
        _write_entries(environment, prompts, latents, shape)
        environment.sync()
    except lmdb.Error as error:
        raise UserError(f"cannot write an LMDB to {folder.parent}: {error}; check that the disk is not full") from None
    finally:
        environment.close()


def _check_free_bytes(folder: Path, needed: int) -> None:
    """Check that the disk has room for `needed` bytes: lmdb maps a lock file, and a full disk would kill the process.

    Raises:
        UserError: with both sizes.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(
            f"the LMDB needs at least {needed / 1e6:,.1f} MB, but the disk has {free / 1e6:,.1f} MB: "
            "No space left on device; choose another --lmdb_path, or delete files"
        )


def _write_entries(environment: Any, prompts: Sequence[str], latents: Iterable[Tensor], shape: Sequence[int]) -> None:
    for index, (prompt, entry) in enumerate(zip(prompts, latents, strict=True)):
        row = entry.to(torch.float16).contiguous().numpy()
        if list(row.shape) != list(shape):
            raise ValueError(f"entry {index} has shape {list(row.shape)}, not {list(shape)}")
        with environment.begin(write=True) as transaction:
            transaction.put(f"latents_{index}_data".encode(), row.tobytes())
            transaction.put(f"prompts_{index}_data".encode(), prompt.encode())
    with environment.begin(write=True) as transaction:
        count = len(prompts)
        transaction.put(b"latents_shape", " ".join(map(str, [count, *shape])).encode())
        transaction.put(b"prompts_shape", str(count).encode())


def _open_environment(folder: Path, map_size: int | None = None) -> Any:
    """Open an environment: read-only, or for writing up to `map_size` bytes."""
    import lmdb  # imported here: only runs that read or write LMDBs need it

    try:
        if map_size is None:
            return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, max_readers=512)
        return lmdb.open(str(folder), map_size=map_size)
    except lmdb.Error as error:
        raise UserError(f"cannot open the LMDB {folder}: {error}; copy it again or recreate it") from None

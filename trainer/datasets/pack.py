"""Packs a folder of ODE pairs or encoded clips into LMDBs."""

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from trainer.datasets.clips import ClipShards, shard_files
from trainer.datasets.lmdb import write_lmdb
from trainer.datasets.ode_pairs import SIGMAS_FILE, PairFolder
from utils.errors import UserError
from utils.files import atomic_path


def pack_lmdb(source: Path, target: Path, shards: int) -> str:
    """Write the pairs (.pt) or clips (.safetensors) in `source` to `shards` LMDBs in the new folder `target`.

    The folder appears only when it is complete. Latents become float16.

    Returns:
        The number and kind of the entries, such as "64 clips".

    Raises:
        UserError: if `source` holds neither or both, a file is corrupt, or there are fewer entries than shards.
    """
    prompts, shape, latents = _read_folder(source)
    count, unit = len(prompts), "clips" if len(shape) == 4 else "pairs"
    if shards > count:
        raise UserError(f"--shards must be at most {count}, the number of {unit}, not {shards}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(target) as folder:
        folder.mkdir()
        for shard in range(shards):
            start, end = (count * number // shards for number in (shard, shard + 1))
            entries = itertools.islice(latents, end - start)
            with tqdm(entries, desc=f"shard {shard}", total=end - start, unit=unit[:-1]) as bar:
                write_lmdb(folder if shards == 1 else folder / f"{shard:05d}", prompts[start:end], bar, shape)
        if unit == "pairs" and (source / SIGMAS_FILE).exists():
            shutil.copy(source / SIGMAS_FILE, folder)
    return f"{count} {unit}"


def _read_folder(folder: Path) -> tuple[list[str], tuple[int, ...], Iterator[Tensor]]:
    """Return the prompts, the shape of one entry, and an iterator that reads the entries one by one."""
    if not shard_files(folder):
        pairs = PairFolder(folder)
        rows = (pairs.read(index) for index in range(len(pairs.prompts)))
        if pairs.shape[0] == 1:  # clips
            return pairs.prompts, pairs.shape[1:], (row[0] for row in rows)
        return pairs.prompts, pairs.shape, rows
    if any(folder.glob("*.pt")):
        raise UserError(f"{folder} holds both clips (.safetensors) and ODE pairs (.pt); move them to separate folders")
    clips = ClipShards(folder)
    return clips.captions, clips.shape, (clips.read([index])[0] for index in range(len(clips.captions)))

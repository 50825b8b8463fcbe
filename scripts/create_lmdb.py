"""Pack a folder of ODE pairs (.pt files) or of encoded clips (.safetensors) into an LMDB, or several, as Self-Forcing
reads them.

python scripts/create_lmdb.py --data_path runs/ode_pairs --lmdb_path runs/ode_lmdb [--shards 4]

Latents are stored as float16, in the order of the folder. The result appears under its name when it is complete.
"""

import argparse
import itertools
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from torch import Tensor
from tqdm import tqdm

from trainer.datasets.clips import Shards, shard_files
from trainer.datasets.ode_pairs import SIGMAS, Files, write_lmdb
from utils.errors import UserError, command
from utils.files import atomic_path


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder of .pt or .safetensors files")
    parser.add_argument("--lmdb_path", type=Path, required=True, help="new folder")
    parser.add_argument("--shards", type=int, default=1, help="environments that share out the entries")
    args = parser.parse_args()
    if args.shards < 1:
        raise UserError(f"--shards must be at least 1, not {args.shards}")
    if args.lmdb_path.exists():
        raise UserError(f"{args.lmdb_path} is there already; choose a new folder, or delete it")
    if not args.data_path.is_dir():
        raise UserError(f"no folder {args.data_path}")
    prompts, shape, latents = read_folder(args.data_path)
    count, unit = len(prompts), "clips" if len(shape) == 4 else "pairs"
    if args.shards > count:
        raise UserError(f"--shards must be at most {count}, the number of {unit}, not {args.shards}")
    args.lmdb_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.lmdb_path) as folder:
        folder.mkdir()
        for shard in range(args.shards):
            start, end = (count * number // args.shards for number in (shard, shard + 1))
            target = folder if args.shards == 1 else folder / f"{shard:05d}"
            part = itertools.islice(latents, end - start)
            part = tqdm(part, desc=f"shard {shard}", total=end - start, unit=unit[:-1])
            write_lmdb(target, prompts[start:end], part, shape)
        if unit == "pairs" and (args.data_path / SIGMAS).exists():
            shutil.copy(args.data_path / SIGMAS, folder)
    print(f"wrote {args.lmdb_path}: {count} {unit}")


def read_folder(folder: Path) -> tuple[list[str], tuple[int, ...], Iterator[Tensor]]:
    """Prompts, shape of an entry, and the entries, read as they are taken: clips [F, C, h, w], or trajectories of ODE
    pairs [saves, F, C, h, w]."""
    if not shard_files(folder):
        pairs = Files(folder)
        return pairs.prompts, pairs.shape, (pairs.read(index) for index in range(len(pairs.prompts)))
    if any(folder.glob("*.pt")):
        raise UserError(
            f"{folder} holds both clips (.safetensors) and ODE pairs (.pt); keep them in folders of their own"
        )
    clips = Shards(folder)
    return clips.captions, clips.shape, (clips.read([index])[0] for index in range(len(clips.captions)))


if __name__ == "__main__":
    main()

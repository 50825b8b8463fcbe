"""Pack a folder of ODE pairs (.pt files) into an LMDB, or several, as Self-Forcing reads them.

python scripts/create_lmdb.py --data_path runs/ode_pairs --lmdb_path runs/ode_lmdb [--shards 4]

Latents are stored as float16. The result appears under its name when it is complete.
"""

import argparse
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tqdm import tqdm

from utils.errors import UserError, command
from utils.files import atomic_path
from utils.ode_pairs import SIGMAS, Files, write_lmdb


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder of .pt files")
    parser.add_argument("--lmdb_path", type=Path, required=True, help="new folder")
    parser.add_argument("--shards", type=int, default=1, help="environments that share out the pairs")
    args = parser.parse_args()
    if args.shards < 1:
        raise UserError(f"--shards must be at least 1, not {args.shards}")
    if args.lmdb_path.exists():
        raise UserError(f"{args.lmdb_path} is there already; choose a new folder, or delete it")
    if not args.data_path.is_dir():
        raise UserError(f"no folder {args.data_path}")
    pairs = Files(args.data_path)
    args.lmdb_path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(args.lmdb_path) as folder:
        folder.mkdir()
        for shard in range(args.shards):
            chosen = range(shard, len(pairs.prompts), args.shards)
            target = folder if args.shards == 1 else folder / f"{shard:05d}"
            trajectories = (pairs.read(index) for index in tqdm(chosen, desc=f"shard {shard}", unit="pair"))
            write_lmdb(target, [pairs.prompts[index] for index in chosen], trajectories, pairs.shape)
        if (args.data_path / SIGMAS).exists():
            shutil.copy(args.data_path / SIGMAS, folder)
    print(f"wrote {args.lmdb_path}: {len(pairs.prompts)} pairs")


if __name__ == "__main__":
    main()

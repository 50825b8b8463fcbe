"""Pack a folder of ODE pairs (.pt files) or encoded clips (.safetensors) into LMDBs of Self-Forcing's layout.

python scripts/create_lmdb.py --data_path runs/ode_pairs --lmdb_path runs/ode_lmdb [--shards 4]

Latents are stored as float16 in the order of the folder. The output folder appears only when it is complete.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer.datasets.pack import pack_lmdb
from utils.arguments import MAX_COUNT, require_range
from utils.errors import UserError, command
from utils.files import writable_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", type=Path, required=True, help="folder of .pt or .safetensors files")
    parser.add_argument("--lmdb_path", type=Path, required=True, help="new folder")
    parser.add_argument(
        "--shards", "--num_shards", type=int, default=1, help="number of LMDBs to spread the entries over"
    )
    args = parser.parse_args()
    require_range(args, 1, MAX_COUNT, "shards")
    if args.lmdb_path.exists():
        raise UserError(f"{args.lmdb_path} exists already; choose a new folder or delete it")
    if not args.data_path.is_dir():
        raise UserError(f"no folder {args.data_path}; set --data_path to a folder of pairs or clips")
    writable_folder(args.lmdb_path.parent)
    packed = pack_lmdb(args.data_path, args.lmdb_path, args.shards)
    print(f"wrote {args.lmdb_path}: {packed}")


if __name__ == "__main__":
    main()

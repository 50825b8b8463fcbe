"""Convert a transformer's weights to the layout of diffusers, of Wan (native), or of HiAR and Self-Forcing (generator).

    python scripts/convert_checkpoint.py --input ckpts/hiar.pt --use_ema --output hiar-diffusers --to diffusers
    python scripts/convert_checkpoint.py --input hiar-diffusers --output hiar.pt --to generator --dtype bf16

The input is any transformer that model/weights.py can read. The suffix of the output selects the format: .safetensors,
or .pt or .pth for a torch file. Without a suffix, the output is a folder (config.json and weights) for diffusers.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.conversion import EXPORT_DTYPES, LAYOUTS, convert_checkpoint
from utils.arguments import require_range
from utils.errors import command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="checkpoint file, weights folder or model folder")
    parser.add_argument("--output", type=Path, required=True, help="file to write, or folder (no suffix)")
    parser.add_argument("--to", choices=LAYOUTS, required=True, help="layout to write")
    parser.add_argument("--use_ema", action="store_true", help="convert the EMA weights in the checkpoint")
    parser.add_argument("--dtype", choices=EXPORT_DTYPES, default="keep", help="type to write (default: as stored)")
    parser.add_argument("--num_heads", type=int, help="attention heads, for a folder; default: width / 128")
    args = parser.parse_args()
    require_range(args, 1, 4096, "num_heads")
    print(convert_checkpoint(args.input, args.output, args.to, args.use_ema, args.dtype, args.num_heads))


if __name__ == "__main__":
    main()

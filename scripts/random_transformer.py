"""Write a transformer of any size with random weights, for speed measurements. Its videos are noise.

python scripts/random_transformer.py --output outputs/random --width 1536 --layers 8
python inference.py --config_path configs/shapes.yaml --checkpoint_path outputs/random ...
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from model.causal_wan import CausalWanModel
from model.presets import random_network
from model.weight_files import save_transformer
from model.weights import ModelDirectory
from utils.arguments import require_range
from utils.device import DTYPES
from utils.errors import UserError, command
from utils.files import writable_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--base", default="data/shapes-wan", help="model directory with a text encoder and a VAE")
    parser.add_argument("--width", type=int, default=1536, help="channels, a multiple of --head_dim")
    parser.add_argument("--layers", type=int, default=8, help="number of layers")
    parser.add_argument("--head_dim", type=int, default=128, help="channels per attention head, even")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bfloat16", help="type of the weights")
    args = parser.parse_args()
    require_range(args, 1, 65_536, "width", "head_dim")
    require_range(args, 1, 1000, "layers")
    writable_folder(args.output)
    if args.width % args.head_dim or args.head_dim % 2:
        raise UserError("--width must be a multiple of --head_dim, which must be even")
    sizes = ModelDirectory.open(args.base).transformer_config() | {
        "num_attention_heads": args.width // args.head_dim,
        "attention_head_dim": args.head_dim,
        "ffn_dim": 4 * args.width,
        "num_layers": args.layers,
    }
    torch.manual_seed(0)
    net = random_network(CausalWanModel, sizes, DTYPES[args.dtype])
    save_transformer(args.output, net.state_dict(), {k: v for k, v in net.config.items() if not k.startswith("_")})
    print(f"wrote {args.output}: {sum(p.numel() for p in net.parameters()):,} weights")


if __name__ == "__main__":
    main()

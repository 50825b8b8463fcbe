"""Export the generator of a training run as a checkpoint for inference.

python scripts/export_generator.py --logdir runs/hiar --output ckpts/hiar.pt [--use_ema] [--iteration 600]

The suffix of --output selects the format. A .pt file contains the weights and their EMA, with the names of the original
checkpoints. A .safetensors file has diffusers' names. A folder has diffusers' layout. The run may have used any number
of ranks.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from model.conversion import TORCH_SUFFIXES, weights_suffix
from model.weight_checks import check_weights
from model.weight_files import save_transformer, save_weights
from model.weight_names import export_state
from trainer.checkpoints import CONFIG_FILE, find_checkpoint, read_tensors
from trainer.planner import trained_dit_config
from utils.config import DIT_OBJECTIVES
from utils.config_loading import load_config
from utils.errors import UserError, command
from utils.files import output_file, writable_folder


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, required=True, help="folder of the training run")
    parser.add_argument("--output", type=Path, required=True, help="FILE.pt, FILE.safetensors or a folder")
    parser.add_argument("--use_ema", action="store_true", help="export the EMA weights; a .pt file contains both")
    parser.add_argument("--iteration", type=int, help="iteration of the checkpoint; default: the last one")
    args = parser.parse_args()
    suffix = weights_suffix(args.output)
    if suffix not in ("", ".safetensors", *TORCH_SUFFIXES):
        raise UserError(f"--output {args.output} must end in .pt or .safetensors, or be a folder without a suffix")
    if suffix:
        output_file(args.output)
    else:
        writable_folder(args.output)
    checkpoint = find_checkpoint(args.logdir, args.iteration)
    config_file = checkpoint / CONFIG_FILE
    config = load_config(str(config_file if config_file.exists() else args.logdir / CONFIG_FILE))
    if config.train.objective not in DIT_OBJECTIVES:
        raise UserError(f"{args.logdir} is a run of {config.train.objective}, which trains no generator")
    prefix = "nets/generator/" if config.train.objective == "score_distillation" else "nets/net/"
    if suffix in TORCH_SUFFIXES:
        states = {"generator": read_tensors(checkpoint, prefix), "generator_ema": read_tensors(checkpoint, "ema/")}
        for key, state in states.items():
            check_weights(state, f"{checkpoint} ({key})")
        save_weights(args.output, {k: export_state(state, "generator")["generator"] for k, state in states.items()})
    else:
        state = read_tensors(checkpoint, "ema/" if args.use_ema else prefix)
        check_weights(state, checkpoint)
        if suffix:
            save_weights(args.output, state)
        else:
            save_transformer(args.output, state, trained_dit_config(config))
    print(f"wrote {args.output} from {checkpoint}")


if __name__ == "__main__":
    main()

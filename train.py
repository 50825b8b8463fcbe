"""Train: python train.py --config_path configs/shapes/vae.yaml --logdir runs/shapes/vae [section.key=value ...]

Several processes, each with a share of the batch: torchrun --nproc_per_node=2 train.py ...
The same command again resumes from the last checkpoint in --logdir.
"""

import argparse

from utils.config import load_config
from utils.errors import UserError, command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML file under configs/")
    parser.add_argument("--logdir", help="folder of checkpoints and logs")
    parser.add_argument("--dry-run", action="store_true", help="print the resolved configuration and exit")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    config = load_config(args.config_path, args.overrides)
    if args.dry_run:
        print(config.to_yaml(), end="")
        return
    if not args.logdir:
        raise UserError("say where checkpoints and logs go: --logdir DIR")
    if not config.train.objective:
        raise UserError(f"{args.config_path} has no train.objective; configs/shapes/ holds those that train")

    # Heavy imports wait until the arguments are known to be good.
    from trainer.objectives import build_objective
    from trainer.trainer import Trainer
    from utils.device import pick_device
    from utils.distributed import process_group

    device = pick_device(config.runtime.device)
    with process_group(device):
        Trainer(config, build_objective(config, device), args.logdir).train()


if __name__ == "__main__":
    main()

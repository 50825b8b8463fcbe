"""Train: python train.py --config_path configs/shapes/vae.yaml --logdir runs/shapes/vae [section.key=value ...]

Several processes, each with a share of the batch: torchrun --nproc_per_node=2 train.py ...
The same command again resumes from the last checkpoint in --logdir.
"""

import argparse
from pathlib import Path

from utils.config import DIT_OBJECTIVES, Config, load_config, num_micro_batches
from utils.distributed import world_size
from utils.errors import UserError, command


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML file under configs/")
    parser.add_argument("--logdir", help="folder of checkpoints and logs")
    parser.add_argument("--resume", default="auto", help="auto: the logdir's last checkpoint, if any; or a checkpoint")
    parser.add_argument("--min_exit_step", type=int, help="first step at which a rollout may end")
    parser.add_argument("--disable-wandb", action="store_true", help="as train.wandb=off")
    parser.add_argument("--wandb-save-dir", help="as train.wandb_dir")
    parser.add_argument("--no_save", action="store_true", help="write no checkpoints")
    parser.add_argument("--no_visualize", action="store_true", help="sample no videos, as train.sample_every=0")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the resolved configuration and what it takes per process, for world_size=N processes, and exit",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    args = parser.parse_intermixed_args()
    processes = [word.partition("=")[2] for word in args.overrides if word.startswith("world_size=")]
    flags = {
        "distill.min_exit_step": args.min_exit_step,
        "train.wandb": "off" if args.disable_wandb else None,
        "train.wandb_dir": args.wandb_save_dir,
        "train.save": "false" if args.no_save else None,
        "train.sample_every": 0 if args.no_visualize else None,
    }
    words = [word for word in args.overrides if not word.startswith("world_size=")]
    words += [f"{key}={value}" for key, value in flags.items() if value is not None]
    config = load_config(args.config_path, words)
    if args.dry_run:
        dry_run(config, processes[-1] if processes else str(world_size()))
        return
    if processes:
        raise UserError("world_size=N is for --dry-run; torchrun says how many processes there are")
    if not args.logdir:
        raise UserError("say where checkpoints and logs go: --logdir DIR")
    if not config.train.objective:
        raise UserError(f"{args.config_path} has no train.objective; configs/hiar.yaml and configs/shapes/ have")
    num_micro_batches(config.train, world_size())  # says so if they do not divide the batch

    # Heavy imports wait until the arguments are known to be good.
    import shapes.objectives  # noqa: F401 -- registers the miniature's own objectives
    from trainer.logging import check_wandb
    from trainer.objectives import build_objective
    from trainer.trainer import Trainer
    from utils.device import pick_device
    from utils.process_group import process_group

    check_wandb(config.train.wandb)
    device = pick_device(config.runtime.device)
    with process_group(device):
        resume = None if args.resume == "auto" else Path(args.resume)
        Trainer(config, build_objective(config, device), args.logdir).train(resume)


def dry_run(config: Config, processes: str) -> None:
    """Print the configuration, and the memory that it takes if it trains DiTs."""
    if not processes.isdigit() or int(processes) < 1:
        raise UserError(f"world_size={processes} must be a number of processes")
    num_micro_batches(config.train, int(processes))  # as training would
    print(config.to_yaml(), end="")
    if config.train.objective in DIT_OBJECTIVES:
        from trainer.planner import plan

        print(plan(config, int(processes)))


if __name__ == "__main__":
    main()

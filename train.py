"""Train a network.

python train.py --config_path configs/shapes/vae.yaml --logdir runs/shapes/vae [section.key=value ...]

To train on several GPUs, start it with torchrun --nproc_per_node=N. The same command resumes from the last checkpoint
in --logdir. docs/config.md lists all configuration keys, docs/training.md explains the recipes.
"""

import argparse
from pathlib import Path

from utils.config import DIT_OBJECTIVES, Config
from utils.config_checks import num_micro_batches
from utils.config_loading import config_flags, load_config
from utils.distributed import world_size
from utils.errors import UserError, command

WORLD_SIZE = "world_size="


def parse_arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config_path", required=True, help="YAML file under configs/")
    parser.add_argument("--logdir", help="folder for checkpoints, logs and sample videos")
    parser.add_argument(
        "--resume", default="auto", help="a checkpoint folder, or auto: the last one in --logdir, if any"
    )
    parser.add_argument("--no-auto-resume", action="store_true", help="stop if --logdir holds checkpoints")
    parser.add_argument("--min_exit_step", type=int, help="same as distill.min_exit_step")
    parser.add_argument("--disable-wandb", action="store_true", help="same as train.wandb=off")
    parser.add_argument("--wandb-save-dir", help="same as train.wandb_dir")
    parser.add_argument("--no_save", action="store_true", help="same as train.save=false")
    parser.add_argument("--no_visualize", action="store_true", help="same as train.sample_every=0: no sample videos")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="print the configuration and the memory per rank, and exit; world_size=N sets the number of ranks",
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the configuration")
    return parser.parse_intermixed_args()


def read_config(args: argparse.Namespace) -> Config:
    """Load the configuration and apply the changes of the command line."""
    flags = {
        "distill.min_exit_step": args.min_exit_step,
        "train.wandb": "off" if args.disable_wandb else None,
        "train.wandb_dir": args.wandb_save_dir,
        "train.save": "false" if args.no_save else None,
        "train.sample_every": 0 if args.no_visualize else None,
    }
    overrides = [word for word in args.overrides if not word.startswith(WORLD_SIZE)]
    overrides += [f"{key}={value}" for key, value in flags.items() if value is not None]
    return load_config(args.config_path, overrides, for_training=True)


@command(
    lowers_memory="train.batch_size, data.num_frames, train.activation_checkpointing=true, train.sharding=shard or "
    "model.text_cache; --dry-run prints the memory per rank"
)
def main() -> None:
    args = parse_arguments()
    config = read_config(args)
    args.logdir = args.logdir or config_flags(args.config_path).get("logdir")
    planned = [word.removeprefix(WORLD_SIZE) for word in args.overrides if word.startswith(WORLD_SIZE)]
    if args.dry_run:
        dry_run(config, planned[-1] if planned else str(world_size()))
        return
    if planned:
        raise UserError("world_size=N works only with --dry-run; torchrun sets the number of ranks")
    if not args.logdir:
        raise UserError("choose a folder for checkpoints and logs: --logdir DIR")
    if not config.train.objective:
        raise UserError(f"{args.config_path} sets no train.objective; use a file such as configs/hiar.yaml")
    if Path(args.resume).is_file():
        raise UserError(
            f"--resume {args.resume} is no checkpoint folder; to start from its weights: train.init={args.resume}"
        )
    if args.no_auto_resume and Path(args.logdir, "checkpoints").exists():
        raise UserError(f"{args.logdir} holds checkpoints; choose another --logdir to start again")
    num_micro_batches(config.train, world_size())  # raises an error if the batch does not divide evenly

    # Import heavy modules after the arguments are checked, so that errors appear at once.
    import shapes.objectives
    import shapes.tiny_decoder  # noqa: F401 -- both register the miniature's objectives
    from trainer.logging import check_wandb
    from trainer.objectives import build_objective
    from trainer.trainer import Trainer
    from utils.device import pick_device
    from utils.process_group import process_group

    check_wandb(config.train.wandb)
    device = pick_device(config.runtime.device, config.runtime.threads)
    with process_group(device):
        resume = None if args.resume == "auto" else Path(args.resume)
        Trainer(config, build_objective(config, device), args.logdir).train(resume)


def dry_run(config: Config, num_ranks: str) -> None:
    """Print the configuration and, for objectives that train a DiT, the memory per rank."""
    if not num_ranks.isdigit() or int(num_ranks) < 1:
        raise UserError(f"world_size={num_ranks} must be a positive number of ranks")
    num_micro_batches(config.train, int(num_ranks))
    print(config.to_yaml(), end="")
    if config.train.objective in DIT_OBJECTIVES:
        from trainer.planner import memory_plan

        print(memory_plan(config, int(num_ranks)))


if __name__ == "__main__":
    main()

"""The text that train.py prints before the first iteration and after the last one."""

from pathlib import Path

from model.sizes import num_parameters
from trainer.objectives.base import Objective
from utils.config import DIT_OBJECTIVES, Config
from utils.config_checks import num_micro_batches
from utils.distributed import world_size


def training_banner(config: Config, objective: Objective, logdir: Path, iteration: int) -> str:
    """Return a summary of a run: its networks, data, batch and log folder, one line each."""
    train, ranks = config.train, world_size()
    micro_batches = num_micro_batches(train, ranks)
    sizes = [f"{name} {num_parameters(net) / 1e6:,.2f}M" for name, net in objective.nets.items()]
    sizes += [f"{name} {num_parameters(net) / 1e6:,.2f}M (frozen)" for name, net in objective.frozen_nets.items()]
    rows = {
        "objective": f"{train.objective}, iterations {iteration} to {train.max_iterations}",
        "parameters": ", ".join(sizes),
        "data": objective.data_summary(),
        "batch": (
            f"{micro_batches * train.batch_size} clips: world size {ranks}, {micro_batches // ranks} x "
            f"{train.batch_size} clips per rank"
        ),
        "log folder": str(logdir),
    }
    lines = [f"{name:<12}{text}" for name, text in rows.items()]
    if train.compile and iteration < train.max_iterations:
        lines.append("compiling the layers; the first iterations take longer ...")
    return "\n".join(lines)


def next_command(config: Config, logdir: Path) -> str:
    """Return the command that a user would run after training; empty if the run leaves nothing to sample from."""
    train = config.train
    if train.objective not in DIT_OBJECTIVES or not (train.output or train.save):
        return ""
    if not train.output:
        return f"python scripts/export_generator.py --logdir {logdir} --output ckpts/{logdir.name}.pt"
    paths = f"--data_path {config.data.prompts or 'data/prompts.txt'} --output_folder outputs/{logdir.name}"
    if train.objective == "flow_matching" and train.forcing == "none":
        return (
            f"python scripts/sample_teacher.py --config_path {logdir}/config.yaml {paths} teacher.path={train.output}"
        )
    return f"python inference.py --config_path {logdir}/config.yaml --checkpoint_path {train.output} {paths}"

"""Compares the configuration of a checkpoint with that of the run that resumes from it."""

from dataclasses import fields

from utils.config import Config

_FREE_KEYS = {
    *("train.output", "train.save", "train.checkpoint_every", "train.keep_checkpoints"),
    *(
        "train.snapshot_every",
        "train.sample_every",
        "train.sample_prompts",
        "train.log_every",
        "train.wandb",
        "train.wandb_dir",
    ),
    *("train.project", "train.stop_grad_norm", "train.stop_loss_growth", "model.text_cache", "runtime.device"),
}
"""Keys that may change when a run resumes: they do not affect its weights."""
_POSITION_KEYS = {"train.total_batch_size", "distill.generator_every"}
"""Keys that, with the iteration, determine the position in the data."""


def changed_keys(before: Config, now: Config) -> list[str]:
    """Return one line for each changed key that affects the weights of the resumed run."""
    free = _FREE_KEYS | ({"train.max_iterations"} if now.train.decay == "constant" else set())
    lines = []
    for section in fields(Config):
        old_section, new_section = getattr(before, section.name), getattr(now, section.name)
        for key in fields(old_section):
            name = f"{section.name}.{key.name}"
            old, new = getattr(old_section, key.name), getattr(new_section, key.name)
            if old != new and name not in free:
                moved = ", which also moves the position in the data" if name in _POSITION_KEYS else ""
                lines.append(f"{name} changes from {old!r} to {new!r}{moved}")
    return lines

"""Training does not mix devices, and waits for the device only to read the metrics of a step.

The networks are moved to the meta device, where nothing is computed, so every operation is checked without a GPU.
"""

from dataclasses import is_dataclass
from typing import Any

import pytest
import torch

from benchmark.kernels import KernelCounter
from trainer.objectives.score_distillation import ScoreDistillation

META = torch.device("meta")


@pytest.fixture
def objective(make_config, pairs, model) -> ScoreDistillation:
    """Score distillation on the meta device. Its prompts are encoded."""
    config = make_config(pairs, objective="score_distillation", init=str(model / "transformer"))
    config.video.height = config.video.width = 32
    config.data.num_frames = config.distill.max_rollout_frames = 6
    config.teacher.negative_prompt = ""
    objective = ScoreDistillation(config, torch.device("cpu"))
    for role in objective.nets:
        objective.backward(role, 0, 0, 1.0, True)
    to_meta(objective, set())
    objective.negative = objective.negative.to(META)
    return objective


def to_meta(part: Any, seen: set[int]) -> None:
    """Move all networks of an objective to the meta device, and make it the device of all their inputs."""
    if id(part) in seen or is_dataclass(part):  # the configuration
        return
    seen.add(id(part))
    for name, value in vars(part).items():
        if isinstance(value, torch.device):
            setattr(part, name, META)
        elif isinstance(value, torch.nn.Module):
            value.zero_grad(set_to_none=True)
            value.to(META)
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("trainer."):
            to_meta(value, seen)


@pytest.mark.parametrize("role", ["generator", "critic"])
def test_a_step_waits_only_for_its_metrics(objective, role):
    with KernelCounter("meta") as counter:
        metrics = objective.backward(role, 0, 0, 1.0, True)
    assert counter.count.device_mismatches == 0 and counter.count.flops > 1e6
    assert set(counter.problems) == {"aten._local_scalar_dense.default"}
    assert counter.count.host_syncs <= len(metrics)

"""Training objectives, one file each; `OBJECTIVES` maps the values of `train.objective` to their classes.

base.py defines the interface of objectives, losses.py all losses as functions of tensors. shapes/objectives.py adds the
objectives that only the miniature needs.
"""

from collections.abc import Callable

import torch

from trainer.objectives.base import Objective
from trainer.objectives.flow_matching import FlowMatching
from trainer.objectives.ode_regression import ODERegression
from trainer.objectives.score_distillation import ScoreDistillation
from utils.config import Config

OBJECTIVES: dict[str, Callable[[Config, torch.device], Objective]] = {
    "score_distillation": ScoreDistillation,
    "flow_matching": FlowMatching,
    "ode_regression": ODERegression,
}


def build_objective(config: Config, device: torch.device) -> Objective:
    """Return the objective that `config.train.objective` names."""
    return OBJECTIVES[config.train.objective](config, device)

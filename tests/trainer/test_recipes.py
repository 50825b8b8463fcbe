"""The recipes in configs/: each trains small networks for five iterations. Those with a history resume bit for bit."""

from pathlib import Path

import pytest
import torch
from toy import Killed, assert_same_bits, state_of

from trainer.objectives import build_objective
from trainer.trainer import Trainer
from utils.config import Config
from utils.config_loading import load_config

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ("hiar", "hiar_released", "self_forcing", "sgf", "saf")


def small_config(name: str, model: Path, pairs: Path, prompts: Path) -> Config:
    """Return a published recipe for clips of six latent frames of 4x4, with blocks of one frame.

    A window that is shorter than the published clip of 21 frames also becomes shorter than this clip.
    """
    words = [
        *(f"model.base={model}", "model.text_length=24", "model.dtype=float32", "teacher.base=", "runtime.device=cpu"),
        *(f"data.path={pairs}", f"data.prompts={prompts}", f"train.init={model / 'transformer'}"),
        *("video.height=32", "video.width=32", "data.num_frames=6", "distill.max_rollout_frames=6"),
        *("rollout.block_frames=1", "train.total_batch_size=2", "train.max_iterations=5", "train.ema_start=1"),
        *("train.dtype=float32", "train.sharding=replicate", "train.wandb=off", "train.log_every=1"),
        *("train.checkpoint_every=2", "distill.generator_every=2", "teacher.negative_prompt="),
    ]
    published = load_config(str(ROOT / f"configs/{name}.yaml"))
    if published.rollout.window < published.data.num_frames:
        words += ["rollout.window=4", "rollout.sink=1"]
    if published.distill.critic_warmup:
        words.append("distill.critic_warmup=1")
    return load_config(str(ROOT / f"configs/{name}.yaml"), words, for_training=True)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains(name, model, pairs, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green triangle\n")
    config = small_config(name, model, pairs, tmp_path / "prompts.txt")

    def trainer(folder: str) -> Trainer:
        return Trainer(config, build_objective(config, torch.device("cpu")), str(tmp_path / folder))

    plain = trainer("plain")
    before = {key: value.clone() for key, value in plain.objective.nets["generator"].state_dict().items()}
    plain.train()
    after = plain.objective.nets["generator"].state_dict()
    assert all(value.isfinite().all() for value in after.values())
    assert not torch.equal(after["blocks.0.attn1.to_k.weight"], before["blocks.0.attn1.to_k.weight"])

    if name not in ("hiar_released", "saf"):
        return
    cut = trainer("cut")
    step = cut.step
    cut.step = lambda: step() if cut.iteration < 3 else (_ for _ in ()).throw(Killed)
    with pytest.raises(Killed):
        cut.train()
    resumed = trainer("cut")
    resumed.train()
    assert_same_bits(state_of(resumed), state_of(plain))


def test_recipes_differ_only_where_their_methods_do():
    """Each recipe against the one that it inherits: the keys that differ."""
    parents = {"hiar_released": "hiar", "self_forcing": "hiar", "sgf": "self_forcing", "saf": "hiar"}
    window = {"rollout.window", "rollout.sink"}
    expected = {
        "hiar_released": {"distill.forward_kl_mode", "distill.history_gradient"},
        "self_forcing": {
            *("rollout.schedule", "train.max_iterations", "distill.critic_learning_rate", "distill.forward_kl_weight")
        },
        "sgf": window | {"distill.history_gradient"},
        "saf": {
            *("rollout.context", "rollout.leading_blocks", "distill.critic_learning_rate", "distill.critic_warmup"),
            *("distill.forward_kl_weight", "distill.history_gradient"),
        }
        | window,
    }
    for name, parent in parents.items():
        ours, theirs = (load_config(str(ROOT / f"configs/{n}.yaml")) for n in (name, parent))
        different = {
            f"{section}.{key}"
            for section, keys in vars(ours).items()
            for key, value in vars(keys).items()
            if vars(vars(theirs)[section])[key] != value
        }
        assert different == expected[name], name

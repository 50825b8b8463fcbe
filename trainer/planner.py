"""What a training run takes of every process's memory, from shapes alone: nothing is loaded, nothing is computed."""

from dataclasses import dataclass

import torch

from model import presets
from model.causal_wan import CausalWanModel
from model.weights import ModelDirectory
from pipeline.text_to_video import VAE_STRIDE, context_frames
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError

GB = 1e9
_LIMIT = 80  # GB of the GPUs that people train on


@dataclass(frozen=True)
class Net:
    """A DiT of the run."""

    name: str
    config: dict
    num_parameters: int
    trained: bool


def plan(config: Config, processes: int) -> str:
    """A table of memory per process, in GB, with what would not fit in 80 GB.

    Weights, gradients, optimizer state and averages are exact; activations and gathered weights are estimates: what a
    forward pass keeps for its backward pass, in `train.dtype`, with attention that keeps no matrix of its own.
    """
    train = config.train
    shards = processes if train.sharding == "shard" else min(8, processes) if train.sharding == "hybrid" else 1
    element = DTYPES[train.dtype].itemsize
    rows: list[tuple[str, float]] = []
    nets = networks(config)
    for net in nets:
        count = net.num_parameters
        if net.trained:
            average = 1 if net.name == "generator" else 0
            kinds = "float32 weights, gradients" + (", average" if average else "")
            rows.append((f"{net.name}: {kinds}", 4 * (2 + average) * count / shards))
            rows.append((f"{net.name}: optimizer state", 4 * 2 * count / shards))
        else:
            rows.append((f"{net.name}: weights ({train.dtype})", element * count / shards))
        if shards > 1:
            largest = count / net.config["num_layers"]
            rows.append((f"{net.name}: two layers gathered", 2 * element * largest))
    student = nets[0].config
    patch_h, patch_w = student.get("patch_size", (1, 2, 2))[1:]
    tokens = (config.video.height // VAE_STRIDE // patch_h) * (config.video.width // VAE_STRIDE // patch_w)
    frames = config.data.num_frames
    if train.objective == "score_distillation":
        longest = config.distill.max_rollout_frames
        context, _ = context_frames(config.rollout, longest)
        written = longest - config.rollout.block_frames
        held = context + (longest - frames if config.distill.block_backward and written > context else 0)
        width = student["num_attention_heads"] * student["attention_head_dim"]
        lane = 2 * student["num_layers"] * train.batch_size * (held + config.rollout.block_frames) * tokens * width
        rows.append((f"KV cache of a rollout, {held} frames", element * lane))
        together = config.rollout.block_frames if config.distill.block_backward else frames
        kept = activations(config, student, together * tokens)
        rows.append((f"activations of {together} frames of the generator", kept))
        # Not at the same time as those above, but memory that was freed is not always whole.
        kept = activations(config, student, frames * tokens)
        rows.append((f"activations of {frames} frames (critic, forward KL)", kept))
    else:
        rows.append((f"activations of {frames} frames", activations(config, student, frames * tokens)))
    total = sum(size for _, size in rows)
    sizes = ", ".join(f"{net.name} {net.num_parameters / 1e9:.2f}B" for net in nets)
    lines = [f"# {processes} processes, sharding {train.sharding} ({shards} shards); parameters: {sizes}"]
    lines += [f"# {size / GB:8.2f} GB  {name}" for name, size in rows]
    lines.append(f"# {total / GB:8.2f} GB  in all; " + verdict(total / GB, rows))
    return "\n".join(lines)


def verdict(total: float, rows: list[tuple[str, float]]) -> str:
    """Whether it fits, and if not, what takes the most."""
    if total <= _LIMIT:
        return f"fits in {_LIMIT} GB"
    most = sorted(rows, key=lambda row: -row[1])[:3]
    return f"does NOT fit in {_LIMIT} GB; the most is taken by " + "; ".join(name for name, _ in most)


def activations(config: Config, net: dict, tokens: int) -> float:
    """Bytes that a forward pass of `tokens` tokens per clip keeps for its backward pass.

    Per layer and token: 2 float32 and 14 other activations of the width (inputs of norms and linear layers, q, k, v and
    outputs of both attentions), and two of the feed-forward's; with checkpointing, a layer's input and one whole layer.
    """
    width = net["num_attention_heads"] * net["attention_head_dim"]
    element = DTYPES[config.train.dtype].itemsize
    layer = tokens * config.train.batch_size * (width * (2 * 4 + 14 * element) + 2 * net["ffn_dim"] * element)
    if not config.train.activation_checkpointing:
        return net["num_layers"] * layer
    return net["num_layers"] * tokens * config.train.batch_size * width * element + layer


def networks(config: Config) -> list[Net]:
    """The DiTs of a run, sized on the meta device. The first is the one that it is for."""
    train = config.train
    if train.objective != "score_distillation":
        return [sized("net", student_config(config), True)]
    base = base_config(config.model.base)
    return [
        sized("generator", student_config(config), True),
        sized("critic", base, True),
        sized("teacher", base_config(config.teacher.base or config.model.base), False),
    ]


def student_config(config: Config) -> dict:
    """Sizes of the net that is trained: a preset's if it starts from nothing, else the base's."""
    if not config.train.init and config.train.network in presets.TRANSFORMERS:
        return presets.TRANSFORMERS[config.train.network]
    return base_config(config.model.base)


def base_config(base: str) -> dict:
    """Sizes of a model directory's transformer; of one that has not been downloaded, by its name."""
    try:
        return ModelDirectory.open(base).transformer_config()
    except UserError:
        for part, name in (("1.3b", "wan-1.3b"), ("14b", "wan-14b")):
            if part in base.lower():
                return presets.TRANSFORMERS[name]
        raise


def sized(name: str, config: dict, trained: bool) -> Net:
    """Count a DiT's parameters without making them."""
    with torch.device("meta"):
        net = CausalWanModel(**config)
    return Net(name, dict(net.config), sum(p.numel() for p in net.parameters()), trained)

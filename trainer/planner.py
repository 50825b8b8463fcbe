"""What a training run takes of every process's memory, from shapes alone: nothing is loaded, nothing is computed."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import AutoencoderKLWan
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from model import presets
from model.causal_wan import CausalWanModel
from model.weights import ModelDirectory
from pipeline.build import context_frames, tokens_per_frame
from utils.config import Config
from utils.device import DTYPES
from utils.errors import UserError

Module = TypeVar("Module", bound=nn.Module)

GB = 1e9
_LIMIT = 80  # GB of the GPUs that people train on

Rows = list[tuple[str, float]]  # what takes memory, and how many bytes


@dataclass(frozen=True)
class Net:
    """A DiT of the run."""

    name: str
    config: dict
    num_parameters: int
    trained: bool


def plan(config: Config, processes: int) -> str:
    """A table of memory per process, in GB, with what would not fit in 80 GB.

    Weights, gradients, averages and optimizer state (AdamW's) are exact; activations, contexts and gathered weights are
    estimates: what a forward pass keeps for its backward pass, in `train.dtype`, with attention that keeps no matrix of
    its own. What VAE and text encoder take beside their weights is left out.
    """
    nets = networks(config)
    rows = taken(config, nets, processes)
    total = sum(size for _, size in rows)
    sizes = ", ".join(f"{net.name} {net.num_parameters / 1e9:.2f}B" for net in nets)
    sharding = f"sharding {config.train.sharding} ({num_shards(config, processes)} shards)"
    lines = [f"# {processes} processes, {sharding}; parameters: {sizes}"]
    lines += [f"# {size / GB:8.2f} GB  {name}" for name, size in rows]
    lines.append(f"# {total / GB:8.2f} GB  in all; " + verdict(total / GB, rows))
    return "\n".join(lines)


def verdict(total: float, rows: Rows) -> str:
    """Whether it fits, and if not, what takes the most."""
    if total <= _LIMIT:
        return f"fits in {_LIMIT} GB"
    most = sorted(rows, key=lambda row: -row[1])[:3]
    return f"does NOT fit in {_LIMIT} GB; the most is taken by " + "; ".join(name for name, _ in most)


# ---- What takes memory ----


def taken(config: Config, nets: list[Net], processes: int) -> Rows:
    """What each process holds."""
    student, frames, shards = nets[0].config, config.data.num_frames, num_shards(config, processes)
    rows = [row for net in nets for row in states(config, net, net is nets[0], shards)]
    if shards > 1 and (adding := adding_up(config, nets, processes)):
        largest = max(adding, key=lambda net: net.num_parameters)
        rows.append((f"{largest.name}: whole float32 gradients while they add up", 4 * largest.num_parameters))
    distilled = config.train.objective == "score_distillation"
    rows += of_rollouts(config, student) if distilled else []
    # Not at the same time as a rollout's, but memory that was freed is not always whole.
    whose = " (critic, forward KL)" if distilled else ""
    rows.append((f"activations of {frames} frames{whose}", activations(config, student, frames)))
    if shards > 1 and config.train.sample_every > 0:
        size = DTYPES[config.train.dtype].itemsize * nets[0].num_parameters
        rows.append((f"{nets[0].name}: whole, for sample videos ({config.train.dtype})", size))
    return rows + around(config, student, shards)


def states(config: Config, net: Net, averaged: bool, shards: int) -> Rows:
    """What a net holds from the start of a run to its end, and the layers that are gathered for a pass."""
    count, element = net.num_parameters, DTYPES[config.train.dtype].itemsize
    if net.trained:
        kinds = "float32 weights, gradients" + (", average" if averaged else "")
        rows: Rows = [(f"{net.name}: {kinds}", 4 * (2 + averaged) * count / shards)]
        rows.append((f"{net.name}: optimizer state", 4 * 2 * count / shards))
    else:
        rows = [(f"{net.name}: weights ({config.train.dtype})", element * count / shards)]
    if shards > 1:
        rows.append((f"{net.name}: two layers gathered", 2 * element * count / net.config["num_layers"]))
    return rows


def adding_up(config: Config, nets: list[Net], processes: int) -> list[Net]:
    """The nets whose gradients several backward passes add up to; FSDP2 has them whole until the last of these. It is
    never two nets' turn at once."""
    train, distill = config.train, config.distill
    parts = train.total_batch_size > train.batch_size * processes
    blocks = distill.block_backward and config.data.num_frames > config.rollout.block_frames
    several = train.objective == "score_distillation" and (blocks or distill.forward_kl_weight > 0)
    return [net for net in nets if net.trained and (parts or (several and net is nets[0]))]


def of_rollouts(config: Config, student: dict) -> Rows:
    """What the generator's rollouts leave for its backward passes: caches, the context that blocks see, activations."""
    train, distill, block = config.train, config.distill, config.rollout.block_frames
    frames, longest, layers = config.data.num_frames, distill.max_rollout_frames, student["num_layers"]
    context, _ = context_frames(config.rollout, longest)
    written = longest - block
    held = context + (longest - frames if distill.block_backward and written > context else 0)
    seen = seen_at_once(config)
    together = block if distill.block_backward else frames
    frame = 2 * train.batch_size * frame_tokens(config, student) * width(student) * DTYPES[train.dtype].itemsize
    rows: Rows = [(f"KV cache of a rollout, {held} frames", layers * (held + block) * frame)]
    if kl_rolls_out(config):
        own, _ = context_frames(config.rollout, frames)
        rows.append((f"KV cache of the forward KL's rollout, {own} frames", layers * (own + block) * frame))
    if train.activation_checkpointing:  # one layer at a time has its context beside the block
        # A cache that goes on while graphs exist is copied for all layers.
        copied = sum(seen) if kl_rolls_out(config) or not distill.block_backward else 0
        name = "context that checkpointed blocks see" + (f", {copied} frames copied" if copied else "")
        rows.append((name, (layers * copied + max(seen) + block) * frame))
    else:
        name = f"keys and values of context and block in every layer, {sum(seen) + len(seen) * block} frames"
        rows.append((name, layers * (sum(seen) + len(seen) * block) * frame))
    rows.append((f"activations of {together} frames of the generator", activations(config, student, together)))
    return rows


def seen_at_once(config: Config) -> list[int]:
    """Frames of context that each block sees of those whose graphs exist at the same time, where they are the most."""
    rollout, distill, window = config.rollout, config.distill, config.data.num_frames

    def seen(frames: int, first: int) -> list[int]:
        context, _ = context_frames(rollout, frames)
        return [min(start, context) for start in range(first, frames, rollout.block_frames)]

    lengths = range(window, max(window, distill.max_rollout_frames) + 1, rollout.block_frames)
    # Of a rollout that is cut to its end, the first block is not trained.
    cases = [seen(n, n - window + (rollout.block_frames if n > window else 0)) for n in lengths]
    if distill.block_backward:
        cases = [[max(case)] for case in cases if case]
    if kl_rolls_out(config):
        cases.append(seen(window, 0))
    return max(cases, key=lambda case: sum(case) + len(case) * rollout.block_frames)


def kl_rolls_out(config: Config) -> bool:
    """Whether the forward KL has a rollout of its own."""
    return config.distill.forward_kl_weight > 0 and config.distill.forward_kl_mode == "rollout"


def activations(config: Config, net: dict, frames: int) -> float:
    """Bytes that a forward pass of `frames` frames per clip keeps for its backward pass.

    Per layer and token: 2 float32 and 14 other activations of the width (inputs of norms and linear layers, q, k, v and
    outputs of both attentions), and two of the feed-forward's; with checkpointing, a layer's input and one whole layer.
    """
    train = config.train
    element, tokens = DTYPES[train.dtype].itemsize, frames * frame_tokens(config, net) * train.batch_size
    layer = tokens * (width(net) * (2 * 4 + 14 * element) + 2 * net["ffn_dim"] * element)
    if not train.activation_checkpointing:
        return net["num_layers"] * layer
    return net["num_layers"] * tokens * width(net) * element + layer


def around(config: Config, student: dict, shards: int = 1) -> Rows:
    """Weights of the text encoder, if it is not spared by `model.text_cache`, and of a VAE each for rollouts that are
    cut and for sample videos."""
    rows: Rows = []
    train, folder = config.train, Path(config.model.base)
    if not config.model.text_cache:
        sizes = part_config(folder / "text_encoder") or preset_of_width(student["text_dim"], folder)
        dtype = "float32" if config.runtime.device == "cpu" else config.model.dtype
        encoder = on_meta(lambda: UMT5EncoderModel(UMT5Config.from_dict(sizes)))
        element = DTYPES[dtype].itemsize
        rows.append((f"text encoder: weights ({dtype})", element * num_parameters(encoder) / shards))
        if shards > 1:  # the table of tokens stands outside of the layers
            gathered = num_parameters(encoder.shared) + 2 * num_parameters(encoder.encoder.block[0])
            rows.append(("text encoder: tokens and two layers gathered", element * gathered))
    distilled = train.objective == "score_distillation"
    cut = distilled and config.distill.max_rollout_frames > config.data.num_frames
    sampled = train.sample_every > 0
    if cut or sampled:
        vae = part_config(folder / "vae") or presets.VAES["wan"]
        size = DTYPES[train.dtype].itemsize * num_parameters(on_meta(lambda: AutoencoderKLWan.from_config(vae)))
        rows.append((f"VAE: weights ({train.dtype})" + ", twice" * (cut and sampled), (cut + sampled) * size))
    return rows


# ---- Sizes ----


def num_shards(config: Config, processes: int) -> int:
    """Into how many parts weights are shared out; machines are taken to have 8 GPUs."""
    sharding = config.train.sharding
    return processes if sharding == "shard" else min(8, processes) if sharding == "hybrid" else 1


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


def part_config(folder: Path) -> dict[str, Any]:
    """What the config.json of a model directory's part says; nothing if there is none, as in Wan's own layout."""
    file = folder / "config.json"
    try:
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file} ({error}); copy or download the model folder again") from None


def preset_of_width(text_dim: int, base: Path) -> dict[str, Any]:
    """Sizes of the text encoder that makes embeddings of this width.

    Raises:
        UserError: if none is known.
    """
    for sizes in presets.TEXT_ENCODERS.values():
        if sizes["d_model"] == text_dim:
            return sizes
    raise UserError(f"{base} has no text_encoder/config.json, and no text encoder of width {text_dim} is known")


def width(net: dict) -> int:
    """A DiT's width D."""
    return net["num_attention_heads"] * net["attention_head_dim"]


def frame_tokens(config: Config, net: dict) -> int:
    """A DiT's tokens per frame of the configuration's videos."""
    return tokens_per_frame(config.video, net.get("patch_size", (1, 2, 2)))


def sized(name: str, config: dict, trained: bool) -> Net:
    """Count a DiT's parameters without making them."""
    net = on_meta(lambda: CausalWanModel(**config))
    return Net(name, dict(net.config), num_parameters(net), trained)


def on_meta(make: Callable[[], Module]) -> Module:
    """A network that is made without its parameters' memory."""
    with torch.device("meta"):
        return make()


def num_parameters(net: nn.Module) -> int:
    """Parameters of a network; those it shares with itself count once."""
    return sum(p.numel() for p in net.parameters())

"""Estimates the memory of a training run per rank from tensor shapes, without loading weights."""

from dataclasses import dataclass
from pathlib import Path

from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from model import presets
from model.causal_wan import CausalWanModel
from model.sizes import base_config, component_config, num_parameters, on_meta, text_encoder_preset, width
from pipeline.build import block_layout, context_frames, rollout_sigmas, tokens_per_frame
from trainer.objectives.self_rollout import backward_by_blocks, history_plan, replay_history, trained_blocks
from utils.config import Config
from utils.device import DTYPES

GB = 1e9
_GPU_GB = 80  # memory of common training GPUs
_GPUS_PER_MACHINE = 8

Rows = list[tuple[str, float]]  # label and size in bytes


@dataclass(frozen=True)
class NetworkSize:
    """A DiT of the run: its configuration and its number of parameters."""

    name: str
    config: dict
    num_parameters: int
    trained: bool


def memory_plan(config: Config, world_size: int) -> str:
    """Return a table of the memory per rank in GB, and whether it fits in 80 GB.

    Weights, gradients, EMA and optimizer state (AdamW's) are exact. Activations, contexts and gathered weights are
    estimates: what a forward pass stores for its backward pass, in `train.dtype`, with an attention kernel that stores
    no attention matrix. Activations of the VAE and the text encoder are not counted.
    """
    nets = dit_sizes(config)
    rows = memory_rows(config, nets, world_size)
    total = sum(size for _, size in rows) / GB
    sizes = ", ".join(f"{net.name} {net.num_parameters / 1e9:.2f}B" for net in nets)
    sharding = f"sharding {config.train.sharding} ({num_shards(config, world_size)} shards)"
    lines = [f"# {world_size} ranks, {sharding}; parameters: {sizes}"]
    lines += [f"# {size / GB:8.2f} GB  {label}" for label, size in rows]
    if total <= _GPU_GB:
        verdict = f"fits in {_GPU_GB} GB"
    else:
        largest = sorted(rows, key=lambda row: -row[1])[:3]
        verdict = f"does NOT fit in {_GPU_GB} GB; the largest: " + "; ".join(label for label, _ in largest)
    lines.append(f"# {total:8.2f} GB  in total; {verdict}")
    return "\n".join(lines)


# ---- Rows of the table ----


def memory_rows(config: Config, nets: list[NetworkSize], world_size: int) -> Rows:
    """Return one row for each use of memory on a rank."""
    trained_dit, frames, shards = nets[0].config, config.data.num_frames, num_shards(config, world_size)
    rows = [row for net in nets for row in network_rows(config, net, net is nets[0], shards)]
    if shards > 1 and (accumulating := accumulating_nets(config, nets, world_size)):
        largest = max(accumulating, key=lambda net: net.num_parameters)
        rows.append((f"{largest.name}: unsharded float32 gradients while they accumulate", 4 * largest.num_parameters))
    distilled = config.train.objective == "score_distillation"
    if distilled and has_blockwise_rollouts(config):
        rows += rollout_rows(config, trained_dit)
    # The rollout's memory is free by then, but fragmented memory cannot always be reused.
    users = " (critic, forward KL)" if distilled else ""
    rows.append((f"activations of {frames} frames{users}", activation_bytes(config, trained_dit, frames)))
    if shards > 1 and config.train.sample_every > 0:
        size = DTYPES[config.train.dtype].itemsize * nets[0].num_parameters
        rows.append((f"{nets[0].name}: unsharded copy for sample videos ({config.train.dtype})", size))
    return rows + encoder_and_vae_rows(config, trained_dit, shards)


def network_rows(config: Config, net: NetworkSize, has_ema: bool, shards: int) -> Rows:
    """Return a network's rows: weights, gradients, EMA, optimizer state, and layers gathered for a pass."""
    count, element = net.num_parameters, DTYPES[config.train.dtype].itemsize
    if net.trained:
        tensors = "float32 weights, gradients" + (", EMA" if has_ema else "")
        rows: Rows = [(f"{net.name}: {tensors}", 4 * (2 + has_ema) * count / shards)]
        rows.append((f"{net.name}: optimizer state", 4 * 2 * count / shards))
    else:
        rows = [(f"{net.name}: weights ({config.train.dtype})", element * count / shards)]
    if shards > 1:
        rows.append((f"{net.name}: two gathered layers", 2 * element * count / net.config["num_layers"]))
    return rows


def accumulating_nets(config: Config, nets: list[NetworkSize], world_size: int) -> list[NetworkSize]:
    """Return the networks whose gradients accumulate over several backward passes.

    FSDP2 keeps these gradients unsharded until the last pass. Only one network is updated at a time.
    """
    train, distill = config.train, config.distill
    several_micro_batches = train.total_batch_size > train.batch_size * world_size
    blocks = config.data.num_frames > config.rollout.block_frames and has_blockwise_rollouts(config)
    block_by_block = backward_by_blocks(config) and blocks
    several_losses = train.objective == "score_distillation" and (block_by_block or distill.forward_kl_weight > 0)
    return [net for net in nets if net.trained and (several_micro_batches or (several_losses and net is nets[0]))]


def has_blockwise_rollouts(config: Config) -> bool:
    """Return whether score distillation generates clips block by block, and not in passes over whole clips."""
    return config.distill.backward_simulation and config.rollout.schedule != "bidirectional"


def rollout_rows(config: Config, trained_dit: dict) -> Rows:
    """Return the rows of the generator's rollouts: KV caches, keys and values for the backward pass, and activations.

    All are numbers of frames times the bytes of one frame's keys and values in one layer.
    """
    train, distill, block_frames = config.train, config.distill, config.rollout.block_frames
    clip_frames, longest, num_layers = config.data.num_frames, distill.max_rollout_frames, trained_dit["num_layers"]
    tokens = train.batch_size * frame_tokens(config, trained_dit)
    frame_bytes = 2 * tokens * width(trained_dit) * DTYPES[train.dtype].itemsize  # 2: keys and values

    context, _ = context_frames(config.rollout, longest)
    cached = context + (replay_history(config, longest) if backward_by_blocks(config) else 0)
    rows: Rows = [(f"KV cache of a rollout, {cached} frames", num_layers * (cached + block_frames) * frame_bytes)]
    if forward_kl_has_rollout(config):
        cached, _ = context_frames(config.rollout, clip_frames)
        label = f"KV cache of the forward KL's rollout, {cached} frames"
        rows.append((label, num_layers * (cached + block_frames) * frame_bytes))

    if distill.history_gradient != "none":
        return [*rows, *replay_rows(config, trained_dit, frame_bytes)]
    contexts = block_contexts(config)
    if train.activation_checkpointing:
        # A cache that is still appended to is copied in every layer, because the graph needs its old content.
        copied = sum(contexts) if forward_kl_has_rollout(config) or not distill.block_backward else 0
        one_layer = max(contexts) + block_frames  # concatenated in one layer at a time
        label = "context of checkpointed blocks" + (f", {copied} frames copied" if copied else "")
        rows.append((label, (num_layers * copied + one_layer) * frame_bytes))
    else:
        stored = sum(contexts) + len(contexts) * block_frames
        label = f"keys and values of context and block in every layer, {stored} frames"
        rows.append((label, num_layers * stored * frame_bytes))

    in_graph = block_frames if distill.block_backward else clip_frames
    label = f"activations of {in_graph} frames of the generator"
    rows.append((label, activation_bytes(config, trained_dit, in_graph)))
    return rows


def replay_rows(config: Config, trained_dit: dict, frame_bytes: float) -> Rows:
    """Return the rows of the pass that gives the gradient of `distill.history_gradient`, for the longest rollout.

    Args:
        frame_bytes: keys and values of one frame in one layer.
    """
    longest, layers = config.distill.max_rollout_frames, trained_dit["num_layers"]
    steps = range(config.distill.min_exit_step, len(rollout_sigmas(config.rollout)) - 1)
    masks = [history_plan(config, longest, step).mask for step in steps]
    frames = max(sum(count for _, count in mask.positions) for mask in masks)
    # Attention to several runs of frames concatenates them.
    copied = max(
        sum(end - start for *_, runs in mask.visible() if len(runs) > 1 for start, end in runs) for mask in masks
    )
    copies = 1 if config.train.activation_checkpointing else layers
    return [
        (f"keys and values of the replay's contexts, {copied} frames", copies * copied * frame_bytes),
        (f"activations of {frames} frames of the replay", activation_bytes(config, trained_dit, frames)),
    ]


def block_contexts(config: Config) -> list[int]:
    """Return the context frames of each block whose graph is in memory, at the moment that needs the most memory.

    With `distill.block_backward`, a rollout has the graph of one block at a time, otherwise of all its trained blocks.
    The forward KL's rollout always has all of them.
    """
    rollout, distill, clip_frames = config.rollout, config.distill, config.data.num_frames

    def contexts_of_rollout(num_frames: int) -> list[int]:
        layout, (context, _) = block_layout(rollout, num_frames), context_frames(rollout, num_frames)
        return [min(layout.start(block), context) for block in trained_blocks(config, num_frames)]

    lengths = range(clip_frames, max(clip_frames, distill.max_rollout_frames) + 1, rollout.block_frames)
    moments = [contexts_of_rollout(num_frames) for num_frames in lengths]
    if distill.block_backward:
        moments = [[max(contexts)] for contexts in moments if contexts]
    if forward_kl_has_rollout(config):
        moments.append(contexts_of_rollout(clip_frames))
    return max(moments, key=lambda contexts: sum(contexts) + len(contexts) * rollout.block_frames)


def forward_kl_has_rollout(config: Config) -> bool:
    """Return whether the forward KL runs a rollout of its own."""
    return config.distill.forward_kl_weight > 0 and config.distill.forward_kl_mode == "rollout"


def activation_bytes(config: Config, net: dict, frames: int) -> float:
    """Return the bytes that a forward pass of `frames` frames per clip stores for its backward pass.

    A layer stores per token 2 float32 and 14 other activations of the DiT's width D: inputs of norms and linear layers,
    q, k, v and outputs of both attentions. The feed-forward adds two of its own width. With checkpointing, every layer
    stores its input, and one layer at a time stores everything.
    """
    train, dim, item = config.train, width(net), DTYPES[config.train.dtype].itemsize
    tokens = train.batch_size * frames * frame_tokens(config, net)
    whole_layer = tokens * (dim * (2 * 4 + 14 * item) + net["ffn_dim"] * 2 * item)
    layer_input = tokens * dim * item
    if train.activation_checkpointing:
        return net["num_layers"] * layer_input + whole_layer
    return net["num_layers"] * whole_layer


def encoder_and_vae_rows(config: Config, trained_dit: dict, shards: int = 1) -> Rows:
    """Return the weights of the text encoder, unless `model.text_cache` replaces it, and of the VAEs.

    Rollouts longer than a clip need one VAE, sample videos another.
    """
    rows: Rows = []
    train, folder = config.train, Path(config.model.base)
    if not config.model.text_cache:
        sizes = component_config(folder / "text_encoder") or text_encoder_preset(trained_dit["text_dim"], folder)
        dtype = "float32" if config.runtime.device == "cpu" else config.model.dtype
        encoder = on_meta(lambda: UMT5EncoderModel(UMT5Config.from_dict(sizes)))
        element = DTYPES[dtype].itemsize
        rows.append((f"text encoder: weights ({dtype})", element * num_parameters(encoder) / shards))
        if shards > 1:  # the token table is not part of a layer
            gathered = num_parameters(encoder.shared) + 2 * num_parameters(encoder.encoder.block[0])
            rows.append(("text encoder: gathered token table and two layers", element * gathered))
    distilled = train.objective == "score_distillation"
    longer_rollouts = distilled and config.distill.max_rollout_frames > config.data.num_frames
    samples = train.sample_every > 0
    if longer_rollouts or samples:
        vae = component_config(folder / "vae") or presets.VAES["wan"]
        size = DTYPES[train.dtype].itemsize * num_parameters(on_meta(lambda: AutoencoderKLWan.from_config(vae)))
        twice = ", twice" if longer_rollouts and samples else ""
        rows.append((f"VAE: weights ({train.dtype}){twice}", (longer_rollouts + samples) * size))
    return rows


# ---- Sizes ----


def num_shards(config: Config, world_size: int) -> int:
    """Return the number of shards of the weights. Machines are assumed to have 8 GPUs."""
    sharding = config.train.sharding
    return {"replicate": 1, "shard": world_size, "hybrid": min(_GPUS_PER_MACHINE, world_size)}[sharding]


def dit_sizes(config: Config) -> list[NetworkSize]:
    """Return the sizes of the DiTs of a run, counted on the meta device. The trained result comes first."""
    if config.train.objective != "score_distillation":
        return [network_size("net", trained_dit_config(config), True)]
    base = base_config(config.model.base)
    return [
        network_size("generator", trained_dit_config(config), True),
        network_size("critic", base, True),
        network_size("teacher", base_config(config.teacher.base or config.model.base), False),
    ]


def trained_dit_config(config: Config) -> dict:
    """Return the configuration of the trained DiT: a preset's if it starts from random weights, else the base's."""
    if not config.train.init and config.train.network in presets.TRANSFORMERS:
        return presets.TRANSFORMERS[config.train.network]
    return base_config(config.model.base)


def frame_tokens(config: Config, net: dict) -> int:
    """Return a DiT's tokens per frame for `config.video`."""
    return tokens_per_frame(config.video, net.get("patch_size", (1, 2, 2)))


def network_size(name: str, config: dict, trained: bool) -> NetworkSize:
    """Count a DiT's parameters on the meta device."""
    net = on_meta(lambda: CausalWanModel(**config))
    return NetworkSize(name, dict(net.config), num_parameters(net), trained)

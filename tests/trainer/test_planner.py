"""trainer/planner.py: each row of the memory table appears when it should, with the right size.

Contexts and text encoders are also compared with the stored tensors of real networks.
"""

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import train
from model import presets
from model.causal_wan import CausalWanModel
from model.weights import ModelDirectory
from trainer.datasets.captions import load_caption_cache
from trainer.planner import (
    NetworkSize,
    block_contexts,
    dit_sizes,
    encoder_and_vae_rows,
    memory_plan,
    memory_rows,
    rollout_rows,
)
from utils.config import Config
from utils.config_loading import load_config
from utils.errors import UserError

ROOT = Path(train.__file__).parent
MINIATURE = ROOT / "data/shapes-wan"
SHAPES = presets.TRANSFORMERS["shapes"]


def published(*words: str) -> Config:
    return load_config(str(ROOT / "configs/hiar.yaml"), words)


def miniature(*words: str) -> Config:
    return load_config(str(ROOT / "configs/shapes/hiar.yaml"), [f"model.base={MINIATURE}", *words])


def size(rows: list[tuple[str, float]], words: str) -> float | None:
    """Return the bytes of the only row whose label starts with `words`; None if there is none."""
    found = [size for name, size in rows if name.startswith(words)]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.fixture(scope="module")
def nets() -> list[NetworkSize]:
    return dit_sizes(published())


# ---- Accumulated gradients ----

UNSHARDED = "unsharded float32 gradients while they accumulate"


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        ([], 64, True),  # block by block, and the forward KL
        ([], 1, False),  # one shard
        (["train.sharding=replicate"], 64, False),
        (["distill.block_backward=false"], 64, True),  # two losses
        (["distill.forward_kl_weight=0"], 64, True),  # block by block
        (["distill.forward_kl_weight=0", "data.num_frames=3"], 64, False),  # one block
        (["distill.forward_kl_weight=0", "distill.block_backward=false"], 64, False),
        (["distill.forward_kl_weight=0", "distill.block_backward=false"], 32, True),  # two micro-batches
        (["distill.forward_kl_weight=0", "distill.block_backward=false", "train.total_batch_size=0"], 8, False),
    ],
)
def test_accumulated_gradients_are_unsharded(nets, words, processes, expected):
    rows = memory_rows(published(*words), nets, processes)
    assert size(rows, f"generator: {UNSHARDED}") == (4 * 1_418_996_800 if expected else None)
    assert size(rows, f"critic: {UNSHARDED}") is None


def test_the_larger_of_generator_and_critic_counts(nets):
    """The critic's gradients accumulate only over micro-batches, and never together with the generator's."""
    generator, critic, teacher = nets
    nets = [generator, replace(critic, num_parameters=2_000_000_000), teacher]
    assert size(memory_rows(published(), nets, 64), f"generator: {UNSHARDED}") == 4 * 1_418_996_800
    rows = memory_rows(published(), nets, 32)
    assert size(rows, f"critic: {UNSHARDED}") == 8e9 and size(rows, f"generator: {UNSHARDED}") is None


def test_a_single_networks_gradients_accumulate_over_micro_batches(nets):
    net, config = replace(nets[0], name="net"), published("train.objective=ode_regression", "train.total_batch_size=16")
    assert size(memory_rows(config, [net], 16), f"net: {UNSHARDED}") is None
    assert size(memory_rows(config, [net], 8), f"net: {UNSHARDED}") == 4 * 1_418_996_800


# ---- Contexts ----

COPIED, STORED = "context of checkpointed blocks", "keys and values of context and block"


def test_the_context_of_the_published_configuration(nets):
    """21 frames of 1560 tokens, in one layer or in all 30: keys and values of width 1536 in bfloat16. A cache that is
    still appended to is copied."""
    frame = 2 * 1560 * 1536 * 2
    rows = rollout_rows(published(), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, COPIED) == 21 * frame and size(rows, STORED) is None
    rows = rollout_rows(published("distill.block_backward=false"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, COPIED) == (30 * (3 + 6 + 9 + 12 + 15 + 18) + 21) * frame
    rows = rollout_rows(published("train.activation_checkpointing=false"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, STORED) == 30 * 21 * frame and size(rows, COPIED) is None
    assert size(memory_rows(published("train.objective=ode_regression"), nets[:1], 64), COPIED) is None


def test_layers_store_context_and_block_as_planned():
    """Count the tensors that autograd saves in a forward pass of the miniature's last block."""
    config = miniature("train.batch_size=1")
    net, cache, x = last_block()
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() == 21 * 16 * 192:
            saved[tensor.untyped_storage().data_ptr()] = tensor.numel() * 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = net.denoise_block(x, torch.full((1,), 500.0), torch.zeros(1, 80, 64), cache, first_frame=18)
    assert len(saved) == 12 and output.requires_grad
    assert size(rollout_rows(config, SHAPES), STORED) == sum(saved.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_copy_their_context_as_planned(frozen):
    """Count the cache copies after a pass over the miniature's last block; a frozen cache is not copied."""
    config = miniature("train.batch_size=1", "train.activation_checkpointing=true")
    net, cache, x = last_block()
    net.gradient_checkpointing = True
    if frozen:
        cache.freeze()
    output = net.denoise_block(x, torch.full((1,), 500.0), torch.zeros(1, 80, 64), cache, first_frame=18)
    alive = [t for t in gc.get_objects() if type(t) is Tensor and t.shape == (1, 18 * 16, 6, 32)]
    copies = {t.untyped_storage().data_ptr() for t in alive if t.untyped_storage().nbytes() == t.nbytes}
    assert len(copies) == (0 if frozen else 12) and output.requires_grad
    one_layer = 2 * 21 * 16 * 192 * 4
    if frozen:
        assert size(rollout_rows(config, SHAPES), COPIED) == one_layer
    else:
        config.distill.forward_kl_mode, config.data.num_frames = "rollout", 21
        blocks = [3, 6, 9, 12, 15, 18]
        assert size(rollout_rows(config, SHAPES), COPIED) == 12 * sum(blocks) * 16 * 192 * 4 + one_layer


def last_block():
    net = CausalWanModel(**SHAPES)
    cache = net.new_cache(1, 8, 8, context_frames=18, block_frames=3)
    cache._k.zero_(), cache._v.zero_()
    cache.commit(18)
    return net, cache, torch.zeros(1, 16, 3, 8, 8)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], [18]),
        (["rollout.window=9"], [6]),
        (["rollout.window=9", "rollout.sink=3"], [6]),
        (["data.num_frames=6"], [18]),  # a longer rollout: its last block
        (["data.num_frames=3"], [0]),  # a longer rollout trains nothing of it
        (["distill.block_backward=false"], [0, 3, 6, 9, 12, 15, 18]),
        (["distill.block_backward=false", "distill.max_rollout_frames=24"], [6, 9, 12, 15, 18, 18]),
        (["distill.block_backward=false", "rollout.window=6"], [0, 3, 3, 3, 3, 3, 3]),
        (["distill.forward_kl_mode=rollout"], [0, 3, 6, 9, 12, 15, 18]),
        (["distill.forward_kl_mode=rollout", "distill.forward_kl_weight=0"], [18]),
    ],
)
def test_contexts_whose_graphs_exist_together(words, expected):
    assert block_contexts(published(*words)) == expected


def test_a_replay_of_the_history_holds_contexts_and_exit_inputs():
    """Six contexts and seven exit inputs of three frames; all but the first exit input have two runs of frames."""
    dit = presets.TRANSFORMERS["wan-1.3b"]
    frame = 2 * 1560 * 1536 * 2
    rows = rollout_rows(published("distill.history_gradient=context"), dit)
    assert size(rows, "KV cache of a rollout, 18 frames") == 30 * 21 * frame
    assert size(rows, "keys and values of the replay's contexts") == sum(3 * b + 3 for b in range(1, 7)) * frame
    assert size(rows, "activations of 39 frames of the replay") is not None
    rows = rollout_rows(published("distill.history_gradient=context", "rollout.context=input"), dit)
    assert size(rows, "activations of 21 frames of the replay") is not None
    plain = published("distill.history_gradient=context", "train.activation_checkpointing=false", "rollout.window=6")
    assert size(rollout_rows(plain, dit), "keys and values of the replay's contexts") > 30 * frame


def test_a_rollout_of_the_forward_kl_has_its_own_cache():
    cache = "KV cache of the forward KL"
    assert size(rollout_rows(published(), presets.TRANSFORMERS["wan-1.3b"]), cache) is None
    rows = rollout_rows(published("distill.forward_kl_mode=rollout"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, cache) == 30 * 21 * 2 * 1560 * 1536 * 2


# ---- Text encoder and VAE ----

TEXT, VAE = "text encoder: weights", "VAE: weights"


def test_the_text_encoder_counts_unless_embeddings_are_cached(tmp_path):
    """UMT5-XXL's encoder has 5.68 billion parameters; its size is known without a download."""
    wan = presets.TRANSFORMERS["wan-1.3b"]
    assert size(encoder_and_vae_rows(published(), wan), f"{TEXT} (bfloat16)") == 2 * 5_680_910_336
    assert size(encoder_and_vae_rows(published("model.dtype=float32"), wan), f"{TEXT} (float32)") == 4 * 5_680_910_336
    assert size(encoder_and_vae_rows(published(f"model.text_cache={tmp_path / 'cache'}"), wan), TEXT) is None
    for objective in ("flow_matching", "ode_regression"):
        assert size(encoder_and_vae_rows(published(f"train.objective={objective}"), wan), TEXT) == 2 * 5_680_910_336


def test_the_miniatures_text_encoder_has_its_loaded_size():
    for words, device in ([], "cpu"), (["model.dtype=bfloat16"], "cpu"), (["runtime.device=cuda"], "meta"):
        config = miniature(*words)
        encoder, _ = load_caption_cache(config, torch.device(device)).encoder.networks()
        assert next(encoder.parameters()).device.type == device
        assert size(encoder_and_vae_rows(config, SHAPES), TEXT) == sum(p.nbytes for p in encoder.parameters())


def test_sharded_text_encoders_are_gathered_layer_by_layer():
    wan = presets.TRANSFORMERS["wan-1.3b"]
    rows = encoder_and_vae_rows(published(), wan, shards=8)
    assert size(rows, f"{TEXT} (bfloat16)") == 2 * 5_680_910_336 / 8
    tokens, layer = 256_384 * 4096, 4 * 4096**2 + 3 * 4096 * 10_240 + 2 * 4096 + 32 * 64
    assert size(rows, "text encoder: gathered token table and two layers") == 2 * (tokens + 2 * layer)


def test_a_sharded_network_is_copied_for_sample_videos():
    name = "generator: unsharded copy for sample videos"
    for words, expected in ([], None), (["train.sample_every=5"], 2 * 1_418_996_800):
        config = published("train.sharding=shard", *words)
        assert size(memory_rows(config, dit_sizes(config), 8), name) == expected


def test_an_unknown_text_encoder_width_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no text_encoder/config\.json"):
        encoder_and_vae_rows(miniature(f"model.base={tmp_path}"), SHAPES | {"text_dim": 65})
    assert size(encoder_and_vae_rows(miniature(f"model.base={tmp_path}"), SHAPES), TEXT) == 4 * 166_720


def test_vaes_count_for_longer_rollouts_and_sample_videos():
    one = sum(p.numel() for p in ModelDirectory.open(MINIATURE).load_vae().parameters()) * 4
    longer, sampled = "distill.max_rollout_frames=24", "train.sample_every=5"
    for words, expected in ([], None), ([longer], one), ([sampled], one), ([longer, sampled], 2 * one):
        assert size(encoder_and_vae_rows(miniature(*words), SHAPES), VAE) == expected
    for objective in ("ode_regression", "flow_matching"):  # no rollouts
        for words, expected in ([longer], None), ([longer, sampled], one):
            words = [f"train.objective={objective}", *words]
            assert size(encoder_and_vae_rows(miniature(*words), SHAPES), VAE) == expected
    assert (
        size(encoder_and_vae_rows(published(sampled), presets.TRANSFORMERS["wan-1.3b"]), f"{VAE} (bfloat16)")
        == 2 * 126_892_531
    )


def test_the_table_prints_every_row_and_the_total():
    config = miniature("train.sample_every=5", "train.sharding=shard")
    rows = memory_rows(config, dit_sizes(config), 2)
    first, *lines, last = memory_plan(config, 2).splitlines()
    assert "sharding shard (2 shards)" in first
    assert lines == [f"# {size / 1e9:8.2f} GB  {name}" for name, size in rows] and len(rows) == 17
    assert last == f"# {sum(size for _, size in rows) / 1e9:8.2f} GB  in total; fits in 80 GB"


def test_the_network_of_an_objective_without_a_critic_is_net():
    plan = memory_plan(miniature("train.objective=flow_matching"), 1)
    assert "GB  net: float32 weights, gradients, " in plan and "critic" not in plan

"""trainer/planner.py: every row of the table appears when its memory is taken, with the size that it has.

The first claims are checked against the nets themselves: what their passes leave behind is counted.
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
from trainer.planner import Net, around, networks, of_rollouts, plan, seen_at_once, taken
from utils.config import Config, load_config
from utils.errors import UserError

ROOT = Path(train.__file__).parent
MINIATURE = ROOT / "data/shapes-wan"
SHAPES = presets.TRANSFORMERS["shapes"]


def published(*words: str) -> Config:
    return load_config(str(ROOT / "configs/hiar.yaml"), words)


def miniature(*words: str) -> Config:
    return load_config(str(ROOT / "configs/shapes/hiar.yaml"), [f"model.base={MINIATURE}", *words])


def size(rows: list[tuple[str, float]], words: str) -> float | None:
    """Bytes of the one row whose name begins with `words`; None if there is none."""
    found = [size for name, size in rows if name.startswith(words)]
    assert len(found) <= 1
    return found[0] if found else None


@pytest.fixture(scope="module")
def nets() -> list[Net]:
    return networks(published())


# ---- gradients that add up ----

WHOLE = "whole float32 gradients while they add up"


@pytest.mark.parametrize(
    ("words", "processes", "expected"),
    [
        ([], 64, True),  # block by block, then the forward KL
        ([], 1, False),  # one shard
        (["train.sharding=replicate"], 64, False),
        (["distill.block_backward=false"], 64, True),  # the forward KL comes after
        (["distill.forward_kl_weight=0"], 64, True),  # block by block
        (["distill.forward_kl_weight=0", "data.num_frames=3"], 64, False),  # one block
        (["distill.forward_kl_weight=0", "distill.block_backward=false"], 64, False),
        (["distill.forward_kl_weight=0", "distill.block_backward=false"], 32, True),  # two parts
        (["distill.forward_kl_weight=0", "distill.block_backward=false", "train.total_batch_size=0"], 8, False),
    ],
)
def test_gradients_are_whole_while_they_add_up(nets, words, processes, expected):
    rows = taken(published(*words), nets, processes)
    assert size(rows, f"generator: {WHOLE}") == (4 * 1_418_996_800 if expected else None)
    assert size(rows, f"critic: {WHOLE}") is None


def test_of_generator_and_critic_the_larger_one_counts(nets):
    """The critic's add up only over the parts of a batch, and never while the generator's do."""
    generator, critic, teacher = nets
    nets = [generator, replace(critic, num_parameters=2_000_000_000), teacher]
    assert size(taken(published(), nets, 64), f"generator: {WHOLE}") == 4 * 1_418_996_800
    rows = taken(published(), nets, 32)
    assert size(rows, f"critic: {WHOLE}") == 8e9 and size(rows, f"generator: {WHOLE}") is None


def test_a_single_nets_gradients_add_up_over_parts(nets):
    net, config = replace(nets[0], name="net"), published("train.objective=ode_regression", "train.total_batch_size=16")
    assert size(taken(config, [net], 16), f"net: {WHOLE}") is None
    assert size(taken(config, [net], 8), f"net: {WHOLE}") == 4 * 1_418_996_800


# ---- the context that blocks see ----

COPIED, BESIDE = "context that checkpointed blocks see", "keys and values of context and block"


def test_the_context_of_the_published_configuration(nets):
    """21 frames of 1560 tokens, in one layer or in all, whose copies a cache that goes on needs too: keys and values,
    width 1536, bfloat16."""
    frame = 2 * 1560 * 1536 * 2
    rows = of_rollouts(published(), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, COPIED) == 21 * frame and size(rows, BESIDE) is None
    rows = of_rollouts(published("distill.block_backward=false"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, COPIED) == (30 * (3 + 6 + 9 + 12 + 15 + 18) + 21) * frame
    rows = of_rollouts(published("train.activation_checkpointing=false"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, BESIDE) == 30 * 21 * frame and size(rows, COPIED) is None
    assert size(taken(published("train.objective=ode_regression"), nets[:1], 64), COPIED) is None


def test_layers_keep_context_and_block_as_planned():
    """A forward of the miniature's last block, whose saved tensors are counted."""
    config = miniature("train.batch_size=1")
    net, cache, x = last_block()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.numel() == 21 * 16 * 192:
            kept[tensor.untyped_storage().data_ptr()] = tensor.numel() * 4
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = net.denoise_block(x, torch.full((1,), 500.0), torch.zeros(1, 80, 64), cache, first_frame=18)
    assert len(kept) == 12 and output.requires_grad
    assert size(of_rollouts(config, SHAPES), BESIDE) == sum(kept.values())


@pytest.mark.parametrize("frozen", [False, True])
def test_checkpointed_layers_copy_their_context_as_planned(frozen):
    """The copies that live after a forward of the miniature's last block: none where nothing is appended any more."""
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
        assert size(of_rollouts(config, SHAPES), COPIED) == one_layer
    else:
        config.distill.forward_kl_mode, config.data.num_frames = "rollout", 21
        blocks = [3, 6, 9, 12, 15, 18]
        assert size(of_rollouts(config, SHAPES), COPIED) == 12 * sum(blocks) * 16 * 192 * 4 + one_layer


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
        (["data.num_frames=6"], [18]),  # the last block of a long rollout
        (["data.num_frames=3"], [0]),  # of which nothing is trained where it is cut
        (["distill.block_backward=false"], [0, 3, 6, 9, 12, 15, 18]),
        (["distill.block_backward=false", "distill.max_rollout_frames=24"], [6, 9, 12, 15, 18, 18]),
        (["distill.block_backward=false", "rollout.window=6"], [0, 3, 3, 3, 3, 3, 3]),
        (["distill.forward_kl_mode=rollout"], [0, 3, 6, 9, 12, 15, 18]),
        (["distill.forward_kl_mode=rollout", "distill.forward_kl_weight=0"], [18]),
    ],
)
def test_what_blocks_see_at_once(words, expected):
    assert seen_at_once(published(*words)) == expected


def test_the_forward_kls_own_rollout_has_a_cache():
    cache = "KV cache of the forward KL"
    assert size(of_rollouts(published(), presets.TRANSFORMERS["wan-1.3b"]), cache) is None
    rows = of_rollouts(published("distill.forward_kl_mode=rollout"), presets.TRANSFORMERS["wan-1.3b"])
    assert size(rows, cache) == 30 * 21 * 2 * 1560 * 1536 * 2


# ---- text encoder and VAE ----

TEXT, VAE = "text encoder: weights", "VAE: weights"


def test_the_text_encoder_counts_unless_embeddings_are_kept(tmp_path):
    """UMT5-XXL's encoder has 5.68 billion parameters; nothing of it has been downloaded."""
    wan = presets.TRANSFORMERS["wan-1.3b"]
    assert size(around(published(), wan), f"{TEXT} (bfloat16)") == 2 * 5_680_910_336
    assert size(around(published("model.dtype=float32"), wan), f"{TEXT} (float32)") == 4 * 5_680_910_336
    assert size(around(published(f"model.text_cache={tmp_path / 'cache'}"), wan), TEXT) is None
    for objective in ("flow_matching", "ode_regression"):
        assert size(around(published(f"train.objective={objective}"), wan), TEXT) == 2 * 5_680_910_336


def test_the_miniatures_text_encoder_is_as_large_as_it_is_loaded():
    for words, device in ([], "cpu"), (["model.dtype=bfloat16"], "cpu"), (["runtime.device=cuda"], "meta"):
        config = miniature(*words)
        encoder, _ = load_caption_cache(config, torch.device(device)).encoder.networks()
        assert next(encoder.parameters()).device.type == device  # it is moved, and not left on the CPU
        assert size(around(config, SHAPES), TEXT) == sum(p.nbytes for p in encoder.parameters())


def test_sharded_text_encoders_are_gathered_layer_by_layer():
    wan = presets.TRANSFORMERS["wan-1.3b"]
    rows = around(published(), wan, shards=8)
    assert size(rows, f"{TEXT} (bfloat16)") == 2 * 5_680_910_336 / 8
    tokens, layer = 256_384 * 4096, 4 * 4096**2 + 3 * 4096 * 10_240 + 2 * 4096 + 32 * 64
    assert size(rows, "text encoder: tokens and two layers gathered") == 2 * (tokens + 2 * layer)


def test_a_sharded_net_is_copied_for_sample_videos():
    name = "generator: whole, for sample videos"
    for words, expected in ([], None), (["train.sample_every=5"], 2 * 1_418_996_800):
        config = published("train.sharding=shard", *words)
        assert size(taken(config, networks(config), 8), name) == expected


def test_the_text_encoder_of_an_unknown_width_cannot_be_planned(tmp_path):
    with pytest.raises(UserError, match=r"no text_encoder/config\.json"):
        around(miniature(f"model.base={tmp_path}"), SHAPES | {"text_dim": 65})
    assert size(around(miniature(f"model.base={tmp_path}"), SHAPES), TEXT) == 4 * 166_720


def test_a_vae_counts_where_rollouts_are_cut_or_videos_made():
    one = sum(p.numel() for p in ModelDirectory.open(MINIATURE).load_vae().parameters()) * 4
    cut, sampled = "distill.max_rollout_frames=24", "train.sample_every=5"
    for words, expected in ([], None), ([cut], one), ([sampled], one), ([cut, sampled], 2 * one):
        assert size(around(miniature(*words), SHAPES), VAE) == expected
    for objective in ("ode_regression", "flow_matching"):  # they have no rollouts
        for words, expected in ([cut], None), ([cut, sampled], one):
            words = [f"train.objective={objective}", *words]
            assert size(around(miniature(*words), SHAPES), VAE) == expected
    assert size(around(published(sampled), presets.TRANSFORMERS["wan-1.3b"]), f"{VAE} (bfloat16)") == 2 * 126_892_531


def test_the_table_shows_every_row_and_their_sum():
    config = miniature("train.sample_every=5", "train.sharding=shard")
    rows = taken(config, networks(config), 2)
    first, *lines, last = plan(config, 2).splitlines()
    assert "sharding shard (2 shards)" in first
    assert lines == [f"# {size / 1e9:8.2f} GB  {name}" for name, size in rows] and len(rows) == 17
    assert last == f"# {sum(size for _, size in rows) / 1e9:8.2f} GB  in all; fits in 80 GB"

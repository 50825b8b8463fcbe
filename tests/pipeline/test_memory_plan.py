"""pipeline/memory_plan.py and memory_options.py: sizes equal those of real networks, and proposed options fit."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from commands import run_main
from tiny_model import ROOT

import inference
from model.offload import num_bytes
from pipeline.batching import arrange
from pipeline.build import build_schedule
from pipeline.memory_options import fitting_options
from pipeline.memory_plan import GB, live_caches, memory_plan
from pipeline.rollout import BlockLayout, Rollout
from pipeline.text_to_video import TextToVideo
from utils.config import Config
from utils.config_loading import load_config
from utils.peak_memory import FusedAttention, PeakMemory

HIAR = str(ROOT / "configs/hiar.yaml")


def sizes(plan) -> dict[str, tuple[float, float]]:
    return {part.label.split(" (")[0]: (part.encoding, part.generating) for part in plan.parts}


def test_peak_memory_counts_live_tensors_but_no_views():
    with PeakMemory() as memory, torch.device("meta"):
        a = torch.empty(100)
        b = a + 1
        assert (memory.now, memory.peak) == (800, 800)
        b[:50].view(5, 10).mul_(2)
        del a
        assert (memory.now, memory.peak) == (400, 800)
        memory.peak = memory.now
        b = b.double()
        assert (memory.now, memory.peak) == (800, 1200)


def test_fused_attention_allocates_no_matrix():
    q = torch.empty(1, 2, 64, 4, device="meta")
    with FusedAttention(), PeakMemory() as memory:
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    assert memory.peak == 4 * q.numel()


@pytest.mark.parametrize("guidance", [1, 2])
def test_weights_and_caches_have_the_planned_sizes(world, guidance):
    config = load_config(str(world.config), [f"rollout.guidance_scale={guidance}", "model.offload=none"])
    plan, pipe = sizes(memory_plan(config, 2)), TextToVideo.load(config)
    encoder, _ = pipe.embeddings.cache.encoder.networks()
    assert plan["text encoder: weights"] == (num_bytes(encoder),) * 2
    assert plan["DiT: weights"] == (0, num_bytes(pipe.net)) and plan["VAE: weights"] == (0, num_bytes(pipe.vae.net))
    rollout = pipe.rollout(["a", "b"], [0, 1])
    cache, text = rollout.new_cache(), pipe._encode_text(["a", "b"])
    caches = [cache.conditional, cache.unconditional] if guidance > 1 else [cache]
    assert plan[f"KV caches: {guidance} of 6 frames and a block"] == (0, sum(c.num_bytes for c in caches))
    assert plan["DiT: keys and values of the prompt"] == (0, guidance * sum(x.nbytes for x in [*text.k, *text.v]))


@pytest.mark.parametrize("order", ["step_major", "diagonal", "batched"])
@pytest.mark.parametrize("changes", [{}, {"leading_blocks": 1}, {"leading_steps": 2}, {"schedule": "block_first"}])
def test_live_caches_equals_the_caches_of_a_rollout(order, changes):
    config = Config()
    for key, value in ({"order": order} | changes).items():
        setattr(config.rollout, key, value)
    schedule, caches = build_schedule(config.rollout, 21), []
    still = SimpleNamespace(
        denoise=lambda x, *arguments: x,
        write_context=lambda *arguments: None,
        write_then_denoise=lambda context, sigma, x, *arguments: x,
    )

    def new_cache():
        caches.append(SimpleNamespace(reset=lambda: None))
        return caches[-1]

    zeros = torch.zeros(1, 3, 1, 1, 1)
    rollout = Rollout(still, [1, 0.75, 0.5, 0.25, 0], lambda block, step: zeros, new_cache, BlockLayout(3))
    assert len(list(rollout.run(list(arrange(schedule, order, True)), schedule.caches))) == 7
    assert live_caches(config)[0] == len(caches)


def test_the_full_size_plan_follows_the_options():
    def plan(*overrides, batch_size=1):
        return sizes(memory_plan(load_config(HIAR, ["rollout.order=diagonal", *overrides]), batch_size))

    frame = 2 * 30 * 1560 * 12 * 128  # numbers in the keys and values of a frame
    assert plan()["KV caches: 4 of 18 frames and a block"] == (0, 4 * 21 * 2 * frame)
    small = plan("rollout.cache_dtype=float8_e4m3fn", batch_size=2)
    assert small["KV caches: 4 of 18 frames and a block"] == (0, 2 * 4 * 18 * (frame + 4 * frame / 128))
    assert plan("model.quantization=int8")["DiT: weights"][1] < 0.6 * plan()["DiT: weights"][1]
    streamed = plan("model.offload=all")
    assert streamed["DiT: weights"][1] < 0.2 * GB and streamed["text encoder: weights"][0] < 0.2 * GB
    decoding = "VAE: activations of decoding"
    assert plan("model.decode_frames=1")[decoding][1] < 0.5 * plan()[decoding][1]
    batched = plan("rollout.order=batched")["DiT: activations of a pass"][1]
    assert batched > 3 * plan()["DiT: activations of a pass"][1]  # four blocks in one pass
    resident = plan("model.offload=none")
    assert plan()["text encoder: weights"][::-1] == (0, resident["text encoder: weights"][1])


@pytest.mark.parametrize(("limit", "batch_size"), [(24, 1), (40, 2)])
def test_proposed_options_fit(limit, batch_size):
    config = load_config(HIAR, ["rollout.order=diagonal"])
    head, *lines = fitting_options(config, batch_size, limit).splitlines()
    assert f"does not fit in {limit} GB" in head and 0 < len(lines) <= 4
    for line in lines:
        _, peak, *words = line.replace("--batch_size ", "--batch_size=").split()
        size = [int(word.split("=")[1]) for word in words if word.startswith("--")]
        overrides = ["rollout.order=diagonal", *(word for word in words if not word.startswith("--"))]
        plan = memory_plan(load_config(HIAR, overrides), *(size or [batch_size]))
        assert float(peak) == round(plan.peak / GB, 2) <= limit


def test_a_configuration_that_fits_and_one_that_never_does():
    config = load_config(HIAR)
    assert fitting_options(config, 1, 24) == f"# fits in 24 GB: {memory_plan(config).peak / GB:.2f} GB"
    config.rollout.window = 6
    head, line = fitting_options(config, 1, 1).splitlines()
    assert "does not fit in 1 GB" in head and "model.offload=all" in line


@pytest.mark.parametrize(("name", "memory"), [("h100", 80), ("rtx4090", 24), ("16gb", 16), ("12gb", 12)])
def test_presets_fit_into_their_gpu(name, memory):
    words = "--config_path", ROOT / f"configs/gpu/{name}.yaml", "--dry-run"
    result = run_main(inference.main, *words, name="inference.py")
    assert result.code == 0 and yaml.safe_load(result.out)["model"]["base"] == load_config(HIAR).model.base
    peak = memory_plan(load_config(str(words[1]))).peak
    assert peak < memory * GB and f"the peak is {peak / GB:.2f} GB" in result.out
    comment = words[1].read_text().splitlines()[0]
    assert comment.endswith(f" {peak / GB:.0f} GB.")


def test_memory_prints_the_plan_and_options(world):
    words = "--config_path", HIAR, "--order", "diagonal", "--memory", "24"
    result = run_main(inference.main, *words, name="inference.py")
    assert result.code == 0 and "  model.decode_frames=1 rollout.cache_dtype=float8_e4m3fn" in result.out
    assert "KV caches: 4 of 18 frames" in result.out and "model:" not in result.out
    result = run_main(inference.main, "--config_path", world.config, "--dry-run", name="inference.py")
    assert "GPU memory" not in result.out  # its device is the CPU
    unknown = "--config_path", HIAR, "--dry-run", "model.base=nowhere"
    assert "# no memory plan: " in run_main(inference.main, *unknown, name="inference.py").out

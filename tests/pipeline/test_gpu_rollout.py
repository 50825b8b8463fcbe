"""The pipeline on a GPU: the latents of a CPU, no host syncs, 8-bit caches, compiled layers, and whole videos.

GPU_TESTS_ON_CPU=1 runs these tests on a CPU, to try the tests themselves.
"""

import pytest
import torch
from torch import Tensor

from benchmark.host_syncs import host_syncs
from model.causal_wan import CausalWanModel
from model.denoiser import Denoiser
from pipeline.batching import arrange
from pipeline.build import build_rollout, build_schedule, prepare_network
from utils.clips import read_video
from utils.config import Config
from utils.config_loading import override_config
from utils.device import DTYPES

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CPU = torch.device("cpu")
SIZES = ["model.dtype=float32", "video.num_output_frames=15", "video.height=64", "video.width=96", "rollout.window=9"]
STEPS = "rollout.denoising_step_list=[1000,750,500]"


@pytest.fixture
def latents(make_net):
    """latents(device, word, ...): return the latents of a rollout with these overrides, and its host syncs."""

    def run(device: torch.device, *words: str) -> tuple[Tensor, list[str]]:
        config = override_config(Config(), [*SIZES, STEPS, *words])
        net = make_net(attention_head_dim=64).to(DTYPES[config.model.dtype])
        net = prepare_network(net, config, device, fall_back=False)
        embeddings = torch.randn(1, 5, net.config.text_dim, generator=torch.Generator().manual_seed(1)).to(device)
        make_rollout(net, config, embeddings)()  # compiles and loads kernels
        with host_syncs(device) as syncs:
            result = make_rollout(net, config, embeddings)()
        return result.cpu(), syncs

    return run


def make_rollout(net: CausalWanModel, config: Config, embeddings: Tensor):
    with torch.no_grad():
        rollout = build_rollout(config, Denoiser(net, net.encode_text(embeddings)), [0])
    schedule = build_schedule(config.rollout, config.video.num_output_frames)
    ops = list(arrange(schedule, config.rollout.order, config.rollout.fuse_context))
    return lambda: torch.cat([block for _, block in rollout.run(ops, schedule.caches)], dim=1)


def relative_error(result: Tensor, expected: Tensor) -> float:
    return ((result - expected).square().mean() / expected.square().mean()).sqrt().item()


@pytest.mark.parametrize("words", [
    ["rollout.schedule=block_first"],
    ["rollout.schedule=timestep_first", "rollout.order=diagonal", "rollout.sink=3"],
    ["rollout.schedule=timestep_first", "rollout.order=batched"],
])  # fmt: skip
def test_a_rollout_has_the_latents_of_the_cpu_and_never_waits(latents, words):
    result, syncs = latents(DEVICE, *words)
    assert syncs == []
    assert relative_error(result, latents(CPU, *words)[0]) < 1e-4


def test_bfloat16_and_every_attention_kernel_are_close_to_float32(latents):
    expected = latents(CPU)[0]
    kernels = ["native", "auto", "_native_cudnn"] if DEVICE.type == "cuda" else ["native", "auto"]
    for name in kernels:
        result = latents(DEVICE, "model.dtype=bfloat16", f"model.attention_backend={name}")[0]
        assert relative_error(result, expected) < 0.1, name


def test_compiled_layers_have_the_latents_of_eager_ones(latents):
    result, syncs = latents(DEVICE, "model.compile=on")
    assert syncs == []
    assert relative_error(result, latents(DEVICE, "model.compile=off")[0]) < 1e-3


def test_cuda_graphs_have_the_latents_of_direct_passes(latents):
    """Each place in the ring is visited several times: run directly, recorded, and replayed."""
    words = ["video.num_output_frames=36", "model.compile=off"]
    result, _ = latents(DEVICE, "model.cuda_graphs=true", *words)
    assert relative_error(result, latents(DEVICE, *words)[0]) < 1e-5


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "int8"])
def test_8_bit_caches_are_close_to_float_caches(latents, dtype):
    result, syncs = latents(DEVICE, f"rollout.cache_dtype={dtype}")
    assert syncs == []
    assert 0 < relative_error(result, latents(DEVICE)[0]) < 0.15


def test_a_video_is_that_of_the_cpu(infer, world, tmp_path):
    """Decoding runs beside the denoising, on a stream of its own; a missing wait would damage frames."""
    for device in {"cpu", DEVICE.type}:
        infer(tmp_path / device, "--prompt", "a red circle", "--seed", "3", f"runtime.device={device}")
    files = [next((tmp_path / device).glob("*.mp4")) for device in ("cpu", DEVICE.type)]
    expected, result = (torch.from_numpy(read_video(str(file))[0]).float() for file in files)
    assert expected.shape == result.shape and (expected - result).abs().mean() < 1

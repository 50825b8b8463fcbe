"""model/quantized_cache.py: an 8-bit cache holds the frames of a `KVCache`, up to the rounding of its type."""

import pytest
import torch

from model.denoiser import Denoiser
from model.kv_cache import KVCache
from model.quantized_cache import QuantizedKVCache, new_kv_cache, quantize
from pipeline.build import build_rollout, build_schedule
from utils.config import Config

FP8, INT8 = torch.float8_e4m3fn, torch.int8
ERROR = {FP8: 2**-4, INT8: 0.5 / 127}  # of a value, relative to the largest one of its head and token
SIZES = dict(num_layers=2, batch_size=2, num_heads=2, head_dim=16, tokens_per_frame=3)


def assert_close(values: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    largest = exact.norm(dim=-1, keepdim=True)  # not of single channels, because a moving sink rotates its keys
    assert values.shape == exact.shape and values.dtype == exact.dtype
    assert ((values - exact).abs() <= ERROR[dtype] * largest).all()


@pytest.mark.parametrize("dtype", [FP8, INT8])
@pytest.mark.parametrize(
    ("context", "sink", "moving", "frames", "back"),
    [(6, 2, False, None, 0), (4, 1, True, None, 0), (6, 2, False, 2, 0), (6, 0, False, None, 3)],
)
def test_an_8_bit_cache_reads_as_a_float_cache(dtype, context, sink, moving, frames, back):
    sizes = SIZES | dict(context_frames=context, block_frames=3, sink_frames=sink, history_frames=back)
    small, large = (new_kv_cache(dtype=d, moving_sink=moving, **sizes) for d in (dtype, torch.float32))
    assert type(large) is KVCache and isinstance(small, QuantizedKVCache)
    for step in range(5):
        block = [torch.randn(2, 9, 2, 16, generator=torch.Generator().manual_seed(2 * step + n)) for n in range(2)]
        block[1] *= 1000  # far beyond the range of float8
        before = max(0, 3 * step - back) if step > 2 else None
        for layer in range(2):
            with torch.no_grad():
                read = small.read_with_block(layer, *block, before=before, frames=frames)
                expected = large.read_with_block(layer, *block, before=before, frames=frames)
            for values, exact, own in zip(read, expected, block, strict=True):
                assert_close(values[:, :-9], exact[:, :-9], dtype)
                assert torch.equal(values[:, -9:], own)
            for cache in (small, large):
                cache.append(layer, *block)
        for values, exact in zip(small.read(1), large.read(1), strict=True):
            assert_close(values, exact, dtype)
        for cache in (small, large):
            cache.commit(3)


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_zeros_stay_zeros_and_nan_stays_nan(dtype):
    x = torch.tensor([[0.0] * 4, [1.0, float("nan"), 0.0, -1.0], [1e-40, 0.0, 0.0, 0.0]])
    values, scales = quantize(x, dtype)
    result = values.float() * scales
    assert torch.equal(result[0], x[0]) and result[1].isnan().any() and result[2].abs().max() <= 1e-40


@pytest.mark.parametrize("dtype", [FP8, INT8])
def test_num_bytes_is_about_half_of_bfloat16(dtype):
    sizes = SIZES | dict(context_frames=18, block_frames=3, head_dim=128)
    small, large = new_kv_cache(dtype=dtype, **sizes), new_kv_cache(dtype=torch.bfloat16, **sizes)
    tensors = (small._k, small._v, small._k_scale, small._v_scale)
    assert small.num_bytes == sum(x.nbytes for x in tensors) < 0.45 * large.num_bytes  # it has no scratch space


@pytest.mark.parametrize(("cache_dtype", "fuse"), [("float8_e4m3fn", True), ("int8", False)])
def test_orders_give_equal_latents_that_differ_from_float_caches(net, text, cache_dtype, fuse):
    config = Config()
    config.video.num_output_frames, config.video.height, config.video.width = 9, 32, 32
    config.model.dtype = "float32"
    config.rollout.window = 6
    results = []
    for chosen, order in ((cache_dtype, "step_major"), (cache_dtype, "diagonal"), ("auto", "diagonal")):
        config.rollout.cache_dtype = chosen
        rollout, schedule = build_rollout(config, Denoiser(net, text), [0]), build_schedule(config.rollout, 9)
        assert isinstance(rollout.new_cache(), QuantizedKVCache) == (chosen != "auto")
        blocks = rollout.run(list(schedule.ops(order, fuse)), schedule.caches)
        results.append(torch.cat([latents for _, latents in blocks], dim=1))
    assert torch.equal(results[0], results[1])
    difference = (results[0] - results[2]).square().mean().sqrt() / results[2].square().mean().sqrt()
    assert 0 < difference < 0.1

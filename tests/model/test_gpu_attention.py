"""The attention kernels and the caches of a GPU.

GPU_TESTS_ON_CPU=1 runs these tests on a CPU, to try the tests themselves.
"""

import pytest
import torch

from model.attention_backends import FASTEST, attend, backend_works, fastest_backend, kernel_name

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
KERNELS = ("native", "_native_cudnn", "_native_flash") if DEVICE.type == "cuda" else ("native",)


@pytest.mark.parametrize("head_dim", [32, 128])
def test_the_chosen_backend_works_and_has_a_name(head_dim):
    for autograd in (False, True):
        name = fastest_backend(DEVICE, torch.bfloat16, head_dim, autograd)
        assert backend_works(name, DEVICE, torch.bfloat16, head_dim, autograd)
        kernel = kernel_name(name, DEVICE, torch.bfloat16, head_dim)
        assert kernel and "unfused" not in kernel, kernel
    assert fastest_backend(DEVICE, torch.float32, head_dim) == "native"  # the others are for 16 bits


def test_kernels_agree_on_views_of_a_cache():
    """Keys are slices of a larger tensor, so their batch stride is not their size."""
    generator = torch.Generator().manual_seed(0)
    cache = torch.randn(2, 1, 640, 4, 128, generator=generator).to(DEVICE, torch.bfloat16)
    q = torch.randn(1, 96, 4, 128, generator=generator).to(DEVICE, torch.bfloat16)
    k, v = cache[0, :, 32:544], cache[1, :, 32:544]
    expected = attend(q, k, v, "_native_math").float()
    available = [n for n in {*KERNELS, *(n for names in FASTEST.values() for n in names)}
                 if backend_works(n, DEVICE, torch.bfloat16, 128)]  # fmt: skip
    assert "native" in available
    for name in available:
        assert (attend(q, k, v, name).float() - expected).abs().max() < 0.02, name

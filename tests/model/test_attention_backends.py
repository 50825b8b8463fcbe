"""model/attention_backends.py: the choice for a GPU, the names of kernels, and cuDNN without copies.

The kernels of a GPU do not run here; `tests/model/test_gpu_attention.py` runs them where there is one.
"""

from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn

from model import attention_backends as backends
from model.attention_backends import attend, backend_works, fastest_backend, kernel_name

CPU = torch.device("cpu")


def test_the_name_of_the_kernel_that_runs():
    assert kernel_name(None, CPU, torch.float32, 32) == "PyTorch's flash attention for CPUs"
    assert kernel_name("_native_math", CPU, torch.float32, 32) == "unfused attention in PyTorch"
    assert kernel_name("sage", CPU, torch.float32, 32, lambda q, k, v, backend: q) == "SageAttention"
    assert kernel_name("own", CPU, torch.float32, 32, lambda q, k, v, backend: q) == "own"


@pytest.mark.parametrize(
    ("operator", "name"),
    [
        ("_scaled_dot_product_flash_attention", "FlashAttention-2 in PyTorch"),
        ("_scaled_dot_product_cudnn_attention", "cuDNN"),
        ("_scaled_dot_product_efficient_attention", "memory-efficient attention in PyTorch"),
    ],
)
def test_the_operators_of_a_gpu_have_names(operator, name, monkeypatch):
    assert hasattr(torch.ops.aten, operator)
    init = backends._Operators.__init__
    monkeypatch.setattr(backends._Operators, "__init__", lambda self: (init(self), self.names.append(operator))[0])
    assert kernel_name(None, CPU, torch.float32, 32, lambda q, k, v, backend: q) == name


def test_cudnn_gets_views(monkeypatch):
    """diffusers copies q, k and v, of which k and v are the whole window."""
    seen = []

    @contextmanager
    def kernel(choice):
        seen.append(choice)
        yield

    qkv = [torch.randn(1, tokens, 2, 16) for tokens in (6, 10, 10)]
    expected = dispatch_attention_fn(*qkv)
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(backends, "sdpa_kernel", kernel)
    monkeypatch.setattr(
        backends.F, "scaled_dot_product_attention", lambda *x: (seen.extend(t.data_ptr() for t in x), real(*x))[1]
    )
    torch.testing.assert_close(attend(*qkv, "_native_cudnn"), expected)
    assert seen == [torch.nn.attention.SDPBackend.CUDNN_ATTENTION, *(x.data_ptr() for x in qkv)]


def test_the_first_working_backend_of_the_gpu_is_chosen(monkeypatch):
    cuda = torch.device("cuda")
    for capability, working, chosen in (
        ((9, 0), {"_flash_3", "_native_cudnn"}, "_flash_3"),
        ((9, 0), {"_native_cudnn"}, "_native_cudnn"),
        ((9, 0), set(), "native"),
        ((10, 0), {"_flash_3", "_native_cudnn"}, "_native_cudnn"),
        ((8, 9), {"_flash_3", "_native_cudnn"}, "native"),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        monkeypatch.setattr(backends, "backend_works", lambda name, *_, w=working: name in w)
        assert fastest_backend(cuda, torch.bfloat16, 128) == chosen
    assert fastest_backend(CPU, torch.bfloat16, 128) == "native"


def test_a_backend_works_if_it_runs_and_is_right(monkeypatch):
    assert backend_works("native", CPU, torch.float32, 32) and backend_works("native", CPU, torch.bfloat16, 32, True)
    assert not backend_works("_flash_3", CPU, torch.bfloat16, 32)  # not installed
    assert not backend_works("_native_cudnn", CPU, torch.bfloat16, 32)
    real = backends.attend
    monkeypatch.setattr(backends, "attend", lambda *x: real(*x).detach())  # no backward pass
    assert backend_works("native", CPU, torch.float32, 32) and not backend_works("native", CPU, torch.float32, 32, True)
    monkeypatch.setattr(backends, "attend", lambda q, k, v, name: 0 * q + float("nan"))
    assert not backend_works("native", CPU, torch.float32, 32)

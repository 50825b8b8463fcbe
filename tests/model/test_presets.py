"""model/presets.py: random networks for measurements of speed."""

import pytest
import torch
from torch import nn

from model.causal_wan import CausalWanModel
from model.presets import random_network

SIZES = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=64, num_layers=1, text_dim=24, freq_dim=32)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_random_network_has_frozen_weights_of_the_requested_dtype_and_device(device):
    net = random_network(CausalWanModel, SIZES, torch.bfloat16, device)
    kept = tuple(CausalWanModel._keep_in_fp32_modules)
    for name, parameter in net.named_parameters():
        expected = torch.float32 if set(name.split(".")) & set(kept) else torch.bfloat16
        assert parameter.dtype == expected and parameter.device.type == device, name
        assert not parameter.requires_grad and (device == "meta" or 0 < parameter.std() < 0.1), name
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32, torch.bfloat16} and not net.training


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight


def test_shared_weights_stay_shared():
    net = random_network(Tied, {}, torch.float16)
    assert net.second.weight is net.first.weight and net.first.weight.dtype == torch.float16

"""Networks that several tests of model/ share."""

import pytest
import torch
from diffusers import WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel
from weight_samples import tiny_dit

from model.weight_names import State, export_state


@pytest.fixture(scope="session")
def umt5() -> UMT5EncoderModel:
    """A small text encoder with dropout, which inference must turn off."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.5)
    return UMT5EncoderModel(config)


@pytest.fixture(scope="session")
def dit() -> WanTransformer3DModel:
    """diffusers' transformer with random weights."""
    return tiny_dit()


@pytest.fixture(scope="session")
def state(dit) -> State:
    """Its weights under diffusers' names."""
    return dit.state_dict()


@pytest.fixture(scope="session")
def native(state) -> State:
    """Its weights under Wan's own names."""
    return export_state(state, "native")

"""Networks that several tests of model/ share."""

import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel


@pytest.fixture(scope="session")
def umt5() -> UMT5EncoderModel:
    """A small text encoder with dropout, which inference must turn off."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.5)
    return UMT5EncoderModel(config)

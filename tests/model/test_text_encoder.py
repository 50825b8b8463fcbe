"""model/text_encoder.py: Wan's use of UMT5.

Claims: embeddings behind the prompt's end are zero; a prompt's embedding depends on nothing but the prompt; long
prompts are cut; prompts are cleaned; what the cache holds are the same bits, and the encoder rests.
"""

import pytest
import torch
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model.text_encoder import TextEncoder

LENGTH = 12


@pytest.fixture(scope="module")
def umt5() -> UMT5EncoderModel:
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=384, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.5)
    return UMT5EncoderModel(config)


class Counting(nn.Module):
    """An encoder that counts its calls."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder = encoder
        self.calls = 0

    def forward(self, *args):
        self.calls += 1
        return self.encoder(*args)


@pytest.fixture
def encoder(umt5) -> TextEncoder:
    return TextEncoder(umt5, ByT5Tokenizer(), LENGTH)


def test_embeddings_behind_the_end_are_zero(encoder):
    embedding = encoder.encode(["a cat"])
    assert embedding.shape == (1, LENGTH, 16) and not embedding.requires_grad
    assert (embedding[0, :6].abs().sum(dim=1) > 0).all()  # five bytes and the end
    assert (embedding[0, 6:] == 0).all()


def test_an_empty_prompt_is_its_end_token(encoder):
    embedding = encoder.encode([""])
    assert (embedding[0, 0] != 0).any() and (embedding[0, 1:] == 0).all()


def test_padding_is_not_seen(umt5, encoder):
    """The embedding is that of the bare tokens, whatever the length it is padded to."""
    tokens = ByT5Tokenizer()(["a cat"], return_tensors="pt")
    expected = umt5(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a cat"])[:, :6], expected, atol=1e-5, rtol=1e-5)


def test_a_prompt_does_not_depend_on_its_batch(encoder):
    prompts = ["a cat", "a much longer prompt", ""]
    together = encoder.encode(prompts)
    assert together.shape == (3, LENGTH, 16)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], encoder.encode([prompt]))


def test_long_prompts_are_cut(encoder):
    long = encoder.encode(["abcdefghijklmnop"])
    assert long.shape == (1, LENGTH, 16) and (long.abs().sum(dim=2) > 0).all()
    assert torch.equal(long, encoder.encode(["abcdefghijk and other words"]))
    assert not torch.equal(long, encoder.encode(["abcdefghij"]))


def test_prompts_are_cleaned(encoder):
    assert torch.equal(encoder.encode(["  a \n cat"]), encoder.encode(["a cat"]))
    assert torch.equal(encoder.encode(["a &amp; b"]), encoder.encode(["a & b"]))


def test_there_is_no_dropout(umt5):
    encoder = TextEncoder(umt5.train(), ByT5Tokenizer(), LENGTH)
    assert torch.equal(encoder.encode(["a cat"]), encoder.encode(["a cat"]))
    assert not any(p.requires_grad for p in umt5.parameters())


# ---- the cache ----


def test_the_cache_gives_the_same_bits_and_the_encoder_rests(umt5, tmp_path):
    def make() -> tuple[TextEncoder, Counting]:
        counting = Counting(umt5)
        return TextEncoder(counting, ByT5Tokenizer(), LENGTH, str(tmp_path / "cache"), name="tiny"), counting

    first, counting = make()
    expected = first.encode(["a cat", "a dog"])
    assert counting.calls == 2
    again, counting = make()
    assert torch.equal(again.encode(["a dog", "  a  cat"]), expected.flip(0))  # cleaned before it is looked up
    assert counting.calls == 0
    again.encode(["a bird"])
    assert counting.calls == 1


def test_the_cache_tells_encoders_and_lengths_apart(umt5, tmp_path):
    def calls(length: int, name: str) -> int:
        counting = Counting(umt5)
        TextEncoder(counting, ByT5Tokenizer(), length, str(tmp_path), name).encode(["a cat"])
        return counting.calls

    assert [calls(LENGTH, "a"), calls(LENGTH, "b"), calls(LENGTH + 1, "a"), calls(LENGTH, "a")] == [1, 1, 1, 0]

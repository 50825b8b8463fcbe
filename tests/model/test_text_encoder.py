"""model/text_encoder.py: UMT5 embeddings as Wan2.1 uses them.

Claims: embeddings behind the prompt's end are zero; the embedding of a prompt depends on this prompt alone; long
prompts are cut; prompts are cleaned; dropout is off.
"""

import pytest
import torch
from tiny_model import write_model
from transformers import ByT5Tokenizer, UMT5EncoderModel

from model.text_encoder import TextEncoder
from model.weights import ModelDirectory

LENGTH = 12


@pytest.fixture
def encoder(umt5) -> TextEncoder:
    return TextEncoder(umt5, ByT5Tokenizer(), LENGTH)


@pytest.mark.parametrize(("prompt", "tokens"), [("a cat", 6), ("", 1)])  # bytes and the end token
def test_embeddings_behind_the_end_are_zero(encoder, prompt, tokens):
    embedding = encoder.encode([prompt])
    assert embedding.shape == (1, LENGTH, 16) and not embedding.requires_grad
    assert (embedding[0, :tokens].abs().sum(dim=1) > 0).all()
    assert (embedding[0, tokens:] == 0).all()


def test_padding_is_masked(umt5, encoder):
    """The embedding equals that of the prompt's tokens without padding."""
    tokens = ByT5Tokenizer()(["a cat"], return_tensors="pt")
    expected = umt5(tokens.input_ids).last_hidden_state
    torch.testing.assert_close(encoder.encode(["a cat"])[:, :6], expected, atol=1e-5, rtol=1e-5)


def test_an_embedding_does_not_depend_on_the_batch(encoder):
    prompts = ["a cat", "a much longer prompt", ""]
    together = encoder.encode(prompts)
    assert together.shape == (3, LENGTH, 16)
    for row, prompt in enumerate(prompts):
        assert torch.equal(together[row : row + 1], encoder.encode([prompt]))


def test_long_prompts_are_cut(encoder, capsys):
    long = encoder.encode(["abcdefghijklmnop"])
    assert capsys.readouterr().err == "note: a prompt is cut to its first 12 tokens: abcdefghijklmnop...\n"
    assert long.shape == (1, LENGTH, 16) and (long.abs().sum(dim=2) > 0).all()
    assert torch.equal(long, encoder.encode(["abcdefghijk and other words"]))
    assert not torch.equal(long, encoder.encode(["abcdefghij"]))


def test_prompts_are_cleaned(encoder):
    assert torch.equal(encoder.encode(["  a \n cat"]), encoder.encode(["a cat"]))
    assert torch.equal(encoder.encode(["a &amp; b"]), encoder.encode(["a & b"]))


@pytest.mark.parametrize("lazy", [False, True])
def test_a_loaded_encoder_has_the_requested_length(tmp_path, lazy):
    encoder = TextEncoder.load(ModelDirectory.open(write_model(tmp_path)), torch.float32, 7, lazy)
    assert encoder.loaded is not lazy and encoder.encode(["a cat"]).shape[1] == 7 and encoder.loaded


def test_dropout_is_off(umt5: UMT5EncoderModel):
    encoder = TextEncoder(umt5.train(), ByT5Tokenizer(), LENGTH)
    assert torch.equal(encoder.encode(["a cat"]), encoder.encode(["a cat"]))
    assert not any(p.requires_grad for p in umt5.parameters())

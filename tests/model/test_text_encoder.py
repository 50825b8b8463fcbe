"""model/text_encoder.py: Wan's use of UMT5.

Claims: embeddings behind the prompt's end are zero; a prompt's embedding depends on nothing but the prompt; long
prompts are cut; prompts are cleaned; what the cache holds are the same bits, without padding, and the encoder rests; a
copy of a model on another machine finds them, a changed one does not; what is broken is made again.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import ByT5Tokenizer, UMT5Config, UMT5EncoderModel

from model.text_encoder import TextEncoder
from model.weights import ModelDirectory

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


def test_the_cache_holds_no_padding(umt5, encoder, tmp_path):
    """Five bytes and the end, of twelve tokens; what comes back has the bits that an encoder without a cache gives."""
    cached = TextEncoder(umt5, ByT5Tokenizer(), LENGTH, str(tmp_path))
    made = cached.encode(["a cat"])
    [file] = tmp_path.iterdir()
    assert load_file(file)["embedding"].shape == (6, 16)
    for embedding in (made, cached.encode(["a cat"])):
        assert embedding.numpy().tobytes() == encoder.encode(["a cat"]).numpy().tobytes()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no such format",
        {"other": torch.zeros(6, 16)},
        {"embedding": torch.zeros(1, LENGTH, 16)},
        {"embedding": torch.zeros(LENGTH + 1, 16)},
        {"embedding": torch.zeros(6, 16, dtype=torch.int64)},
    ],
    ids=["empty", "garbage", "other names", "padded", "too long", "integers"],
)
def test_a_broken_file_is_made_again(umt5, encoder, tmp_path, content):
    cached = TextEncoder(umt5, ByT5Tokenizer(), LENGTH, str(tmp_path))
    cached.encode(["a cat"])
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    assert torch.equal(cached.encode(["a cat"]), encoder.encode(["a cat"]))
    assert file.read_bytes() == good


@pytest.fixture
def folder(umt5, tmp_path) -> Path:
    """A model directory of a text encoder."""
    umt5.save_pretrained(tmp_path / "model/text_encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "model/tokenizer")
    (tmp_path / "model/model_index.json").write_text("{}")
    return tmp_path / "model"


def has_to_load(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Whether the embedding of a prompt is missing in the cache beside `folder`. Afterwards it is there."""
    encoder = TextEncoder.load(ModelDirectory.open(folder), dtype, LENGTH, str(folder.parent / "cache"))
    encoder.encode(["a cat"])
    return encoder._opened is not None


def test_a_copy_of_the_model_elsewhere_finds_the_embeddings(folder, monkeypatch):
    assert has_to_load(folder)
    copy = folder.parent / "mounted-elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copy)  # other times
    (copy / "README.md").write_text("unrelated")
    (copy / "text_encoder/.gitattributes").write_text("unrelated")
    (copy / "tokenizer/README.md").write_text("unrelated")
    (copy / "transformer").mkdir()
    monkeypatch.chdir(copy.parent)
    assert not has_to_load(copy)
    shutil.rmtree(folder)
    assert not has_to_load(copy)


def flip(file: Path, position: int) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


def test_another_encoder_tokenizer_or_type_does_not_find_them(folder):
    """Of the same size: the last byte of the weights differs, or a setting."""
    assert has_to_load(folder) and not has_to_load(folder)
    assert has_to_load(folder, torch.bfloat16)
    weights = folder / "text_encoder/model.safetensors"
    flip(weights, -1)
    assert has_to_load(folder)
    flip(weights, -1)
    assert not has_to_load(folder)
    settings = folder / "tokenizer/tokenizer_config.json"
    changed = json.loads(settings.read_text()) | {"extra": 1}
    settings.write_text(json.dumps(changed))
    assert has_to_load(folder)


def test_weights_that_a_cache_could_have_spared_are_said_once(folder, capsys):
    cache = str(folder.parent / "cache")

    def told(prompts: list[str], cache: str, filling: bool = False) -> str:
        encoder = TextEncoder.load(ModelDirectory.open(folder), torch.float32, LENGTH, cache)
        encoder.filling = filling
        capsys.readouterr()
        for prompt in prompts:
            encoder.encode([prompt])
        return capsys.readouterr().err

    assert told(["a dog"], cache, filling=True) == ""
    said = told(["a dog", "a cat", "a cow"], cache)
    assert said.count("\n") == 1 and cache in said and "scripts/encode_prompts.py" in said
    assert told(["a dog", "a cat", "a cow"], cache) == ""
    assert told(["a hen"], "") == ""

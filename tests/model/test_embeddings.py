"""model/embeddings.py: the cache of prompt embeddings.

Claims: cached embeddings have the bits of fresh ones. Memory is bounded and drops the least recently used. Files on
disk hold no padding and are replaced if broken. A copy of the model finds them; another encoder does not. The encoder
is loaded only if an embedding is missing.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ByT5Tokenizer

from model.embeddings import EmbeddingCache
from model.text_encoder import TextEncoder
from model.weights import ModelDirectory
from utils.prompts import clean_prompt

LENGTH = 12


class CountingEncoder(TextEncoder):
    """A text encoder that lists the prompts it encodes."""

    def __init__(self, umt5, length: int = LENGTH):
        super().__init__(umt5, ByT5Tokenizer(), length)
        self.encoded: list[str] = []

    def encode(self, prompts):
        self.encoded += prompts
        return super().encode(prompts)


@pytest.fixture
def encoder(umt5) -> CountingEncoder:
    return CountingEncoder(umt5)


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.numpy().tobytes()


# ---- memory ----


def test_each_prompt_is_encoded_once(encoder):
    cache = EmbeddingCache(encoder)
    assert cache.missing(["a cat", " a  cat", "a dog"]) == [" a  cat", "a dog"]
    embeddings = cache.get(["a cat", "a dog", "a  cat "])
    assert encoder.encoded == ["a  cat ", "a dog"] and cache.missing(["a cat", "a dog"]) == []
    assert bits(embeddings) == bits(encoder.encode(["a cat", "a dog", "a cat"]))
    encoder.encoded.clear()
    cache.prepare(["a bird", "a dog"])
    assert bits(cache.get(["a bird"])) == bits(TextEncoder.encode(encoder, ["a bird"]))
    assert encoder.encoded == ["a bird"]


def test_the_least_recently_used_embedding_is_dropped_first(encoder):
    cache = EmbeddingCache(encoder, capacity=2)
    for prompt in ("a", "b", "a", "c"):
        cache.get([prompt])
    assert cache.missing(["a", "b", "c"]) == ["b"]
    assert cache.get(["a", "b", "c", "d"]).shape == (4, LENGTH, 16)  # more than it keeps


def test_a_prompt_is_cleaned_once(encoder):
    """Cleaning unescapes HTML twice; a second cleaning would change this prompt again."""
    prompt = "< &amp;amp;amp;amp; b"  # ftfy repairs no text with a bracket
    assert clean_prompt(clean_prompt(prompt)) != clean_prompt(prompt)
    assert bits(EmbeddingCache(encoder).get([prompt])) == bits(encoder.encode([prompt]))


# ---- disk ----


def test_the_disk_holds_the_same_bits_without_padding(umt5, tmp_path):
    def open_cache(name: str = "tiny", length: int = LENGTH) -> EmbeddingCache:
        return EmbeddingCache(CountingEncoder(umt5, length), str(tmp_path / "cache"), name)

    first = open_cache()
    expected = first.get(["a cat", "a dog"])
    sizes = {len(load_file(file)["embedding"]) for file in (tmp_path / "cache").iterdir()}
    assert first.encoder.encoded == ["a cat", "a dog"] and sizes == {6}  # five bytes and the end token
    again = open_cache()
    assert bits(again.get(["a dog", "  a  cat"])) == bits(expected.flip(0))
    again.store(["a dog", "a bird"])
    assert again.encoder.encoded == ["a bird"]
    assert open_cache().missing(["a bird", "a fish"]) == ["a fish"]
    assert open_cache("another encoder").missing(["a cat"]) == open_cache(length=13).missing(["a cat"]) == ["a cat"]


def test_file_names_are_stable(umt5, tmp_path):
    """Folders that earlier versions wrote must stay valid."""
    EmbeddingCache(CountingEncoder(umt5), str(tmp_path), "tiny").store(["a cat"])
    assert [file.name for file in tmp_path.iterdir()] == ["e45f4d01223ab5fe9d99491d8efdf2e0.safetensors"]


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
def test_a_broken_file_is_replaced(encoder, tmp_path, content):
    EmbeddingCache(encoder, str(tmp_path)).store(["a cat"])
    [file] = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(content) if isinstance(content, bytes) else save_file(content, file)
    assert torch.equal(EmbeddingCache(encoder, str(tmp_path)).get(["a cat"]), encoder.encode(["a cat"]))
    assert file.read_bytes() == good


# ---- model directories ----


@pytest.fixture
def folder(umt5, tmp_path) -> Path:
    """A model directory with a text encoder."""
    umt5.save_pretrained(tmp_path / "model/text_encoder")
    ByT5Tokenizer().save_pretrained(tmp_path / "model/tokenizer")
    (tmp_path / "model/model_index.json").write_text("{}")
    return tmp_path / "model"


def loads_encoder(folder: Path, dtype: torch.dtype = torch.float32) -> bool:
    """Get an embedding through the cache next to `folder`; return whether this loaded the text encoder."""
    cache = EmbeddingCache.load(ModelDirectory.open(folder), dtype, LENGTH, str(folder.parent / "cache"))
    cache.get(["a cat"])
    return cache.encoder.loaded


def test_a_copy_of_the_model_elsewhere_finds_the_embeddings(folder, monkeypatch):
    assert loads_encoder(folder)
    copy = folder.parent / "mounted-elsewhere"
    shutil.copytree(folder, copy, copy_function=shutil.copy)  # other modification times
    (copy / "README.md").write_text("unrelated")
    (copy / "text_encoder/.gitattributes").write_text("unrelated")
    (copy / "tokenizer/README.md").write_text("unrelated")
    (copy / "transformer").mkdir()
    monkeypatch.chdir(copy.parent)
    assert not loads_encoder(copy)
    shutil.rmtree(folder)
    assert not loads_encoder(copy)


def test_another_encoder_tokenizer_or_dtype_does_not_find_them(folder):
    """The dtype, the last byte of the weights or one tokenizer setting differs; all sizes are equal."""
    assert loads_encoder(folder) and not loads_encoder(folder)
    assert loads_encoder(folder, torch.bfloat16)
    weights = folder / "text_encoder/model.safetensors"
    original = weights.read_bytes()
    weights.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert loads_encoder(folder)
    weights.write_bytes(original)
    assert not loads_encoder(folder)
    settings = folder / "tokenizer/tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"extra": 1}))
    assert loads_encoder(folder)


def test_missing_embeddings_are_reported_once(folder, capsys):
    directory, cache = ModelDirectory.open(folder), str(folder.parent / "cache")

    def notes(prompts: list[str], cache: str, store: bool = False) -> str:
        embeddings = EmbeddingCache.load(directory, torch.float32, LENGTH, cache)
        capsys.readouterr()
        for prompt in prompts:
            (embeddings.store if store else embeddings.get)([prompt])
        return capsys.readouterr().err

    assert notes(["a dog"], cache, store=True) == ""
    note = notes(["a dog", "a cat", "a cow"], cache)
    assert note.count("\n") == 1 and cache in note and "scripts/encode_prompts.py" in note
    assert notes(["a dog", "a cat", "a cow"], cache) == ""
    assert notes(["a hen"], "") == ""

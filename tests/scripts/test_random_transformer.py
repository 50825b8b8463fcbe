"""scripts/random_transformer.py."""

from tiny_model import write_model

from model.causal_wan import CausalWanModel
from model.weights import ModelDirectory
from scripts import random_transformer


def test_a_random_transformer_has_the_requested_size_and_loads(call, tmp_path):
    model = write_model(tmp_path / "model")
    words = ["--base", model, "--output", tmp_path / "r", "--width", 64, "--layers", 3, "--head_dim", 32]
    code, out, _ = call(random_transformer, *words)
    assert code == 0 and "weights" in out
    net = ModelDirectory.open(model).load_transformer(CausalWanModel, weights=tmp_path / "r")
    assert len(net.layers) == 3 and net.config.num_attention_heads == 2


def test_a_width_that_heads_do_not_divide_is_refused(call):
    code, _, err = call(random_transformer, "--output", "x", "--width", "65")
    assert code == 2 and "--width must be a multiple" in err

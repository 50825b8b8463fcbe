"""demo.py loads a model and hands it to the server; its sessions are those of the pipeline."""

import sys

import pytest
from commands import run_main, write_world

import demo
from live.protocol import Start


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny model with its configuration and example prompts."""
    return write_world(tmp_path_factory.mktemp("world"), "a cat\na dog\n")


def test_demo_serves_sessions_of_the_configured_model(world, tmp_path, monkeypatch):
    served, words = [], []

    def serve(engine, settings):
        served.append((engine, settings))
        words.extend(sys.argv)

    monkeypatch.setattr("live.server.serve", serve)
    flags = ("--config_path", world.config, "--data_path", world.prompts, "--output_folder", tmp_path / "live")
    result = run_main(demo.main, *flags, "--port", 0, "--token", "a-long-secret", "rollout.prompt_switch=flush")
    assert result.code == 0, result.err
    assert not [word for word in words if "a-long-secret" in word]  # metadata holds the command
    [(engine, settings)] = served
    assert settings.token == "a-long-secret" and (tmp_path / "live").is_dir()
    info = engine.info
    assert (info.examples, info.rule, info.width, info.block_frames) == (("a cat", "a dog"), "flush", 32, 12)
    assert info.name == "model/generator" and len(info.sigmas) == 5

    with engine.open(Start("a cat", schedule="block_first"), 3, None) as session:
        blocks = [next(session)]
        session.prompt = "a dog"
        blocks += [next(session) for _ in range(6)]
    assert [block.frames.shape for block in blocks[:2]] == [(9, 32, 32, 3), (12, 32, 32, 3)]
    assert (blocks[0].prompt, blocks[-1].prompt) == ("a cat", "a dog")

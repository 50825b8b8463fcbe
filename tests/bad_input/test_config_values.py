"""Bad values of the configuration: every key, malformed overrides, malformed YAML files, and limits.

tests/utils/test_config.py checks NaN and negative numbers; these tables hold the other mistakes.
"""

from collections.abc import Iterator
from dataclasses import fields

import pytest

from utils.config import Config
from utils.config_checks import _LIMITS
from utils.config_loading import load_config, override_config
from utils.errors import UserError
from utils.files import write_text

NUMBERS = ("text", "null", "[1]", "{a: 1}")
OF_TYPE = {str: ("null", "[a]", "{a: 1}"), bool: ("null", "[true]", "maybe"), int: NUMBERS, float: NUMBERS}
LISTS = ("text", "null", "[[1]]", "{a: 1}", "[null]", "[a]")


def bad_values() -> Iterator[tuple[str, str]]:
    """Yield every key of the schema with each value of another type."""
    for section in fields(Config):
        for key in fields(section.default_factory):  # type: ignore[arg-type]
            for value in OF_TYPE.get(key.type, LISTS if "list" in str(key.type) else ("null", "[a]", "nonsense")):
                yield f"{section.name}.{key.name}", value


def refused(words: list[str], path: str = "") -> str:
    """Return the message about the overrides, or about a file."""
    with pytest.raises(UserError) as error:
        load_config(path) if path else override_config(Config(), words)
    message = " ".join(str(error.value).split())
    assert message
    return message


@pytest.mark.parametrize("key", sorted({key for key, _ in bad_values()}))
def test_every_key_refuses_values_of_other_types(key):
    for value in [value for name, value in bad_values() if name == key]:
        assert key in refused([f"{key}={value}"])


@pytest.mark.parametrize(("key", "limit"), _LIMITS.items(), ids=_LIMITS)
def test_sizes_have_a_limit_that_the_message_names(key, limit):
    for value in (limit + 1, 3 * 10**9):
        assert f"{key} must be at most {limit}" in refused([f"{key}={value}"])


@pytest.mark.parametrize(
    ("word", "fragment"),
    [
        ("model.base=${", "not valid YAML"),
        ("model.base=${nope}", "nope"),
        ("model.base=${model.base", "not valid YAML"),
        ("model.base=${oc.env:HOME}", "functions"),
        ("rollout.denoising_step_list=[[1]]", "must be a list of numbers"),
        ("rollout.denoising_step_list=[1000,[500]]", "must be a list of numbers"),
        ("rollout.context_noise=1", "sigma from 0 to below 1"),
        ("rollout.context_noise=-0.1", "sigma from 0 to below 1"),
        ("rollout.context_noise=.nan", "sigma from 0 to below 1"),
        ("data.sigmas=[[1]]", "must be a list of numbers"),
        ("train.betas=[[0.5,0.9]]", "must be a list of numbers"),
        ("train.clip_frames=[[5]]", "must be a list of numbers"),
        ("rollout.timestep_shift=1e-300", "at least 0.001"),
        ("teacher.timestep_shift=1e-300", "at least 0.001"),
        ("train.timestep_shift=1e300", "at most 1000"),
        ("distill.timestep_shift=1e300", "at most 1000"),
        ("video.num_output_frames=3000000000", "at most 1000000"),
        ("model.text_length=100000000", "at most 8192"),
        ("data.frame_size=65", "data.frame_size must be 64 or 96, not 65"),
        ("runtime.seed=1e400", "runtime.seed"),
        ("runtime.seed=", "runtime.seed"),
        ("model=null", "model"),
        ("model=3", "ModelConfig"),
        ("model=[1]", "ModelConfig"),
        (".base=1", ""),
        ("model.=1", ""),
        ("model..base=1", ""),
        ("model.base.x=1", ""),
        ("rollout.denoising_step_list.9=5", ""),
        ("model[=1", ""),
        ("=", ""),
        ("inherit=x.yaml", "inherit"),
        ("", "cannot read"),
        ("model.base", "cannot read"),
        ("model.base=[" + "[" * 2000, "not valid YAML"),
        ("model.base=!!python/object/apply:os.system [x]", "not valid YAML"),
        ("model.base=*a", "not valid YAML"),
        ('model.base="\\', "not valid YAML"),
    ],
)
def test_malformed_overrides(word, fragment):
    assert fragment in refused([word])


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("5", "must hold a mapping"),
        ("true", "must hold a mapping"),
        (".nan", "must hold a mapping"),
        ("2024-01-01", ""),
        ('"x"', ""),
        ("[]", "must hold a mapping"),
        ("{1: 2}", ""),
        ("{null: 1}", ""),
        ("model: {null: 1}", ""),
        ("model: {1: 2}", ""),
        ("model: null", "model"),
        ("model: 3", "ModelConfig"),
        ("? [1]\n: 2", "not valid YAML"),
        ("? {a: 1}\n: 2", "not valid YAML"),
        ("!!set {a}", ""),
        ("inherit: [1]", "no file name"),
        ("inherit: 3", "no file name"),
        ("inherit: {a: 1}", "no file name"),
        ('inherit: "${x}"', "inherit"),
        ('inherit: "a\\0b"', ""),
        ("inherit: .", ""),
        ("inherit: /", ""),
        ("inherit: none.yaml", "cannot be read"),
        ("inherit: config.yaml", "in a circle"),
        ("model: &a {base: *a}", ""),
        ("&a [*a]", ""),
        ("--- 1\n--- 2", "not valid YAML"),
        ("model: {base: !!timestamp 2001-01-01}", ""),
        ("model: {base: !!binary x}", ""),
        ("%YAML 9.9\n---\n", ""),
        ("\t", ""),
        ("{" * 500, "not valid YAML"),
        ("[" * 100_000, "not valid YAML"),
        ("a" * 100_000 + ": 1", ""),
        ("model: {base: '${'}", ""),
        ("model:\n\tbase: x", "not valid YAML"),
        ("model: {base: x", "not valid YAML"),
    ],
)
def test_malformed_yaml_files(tmp_path, text, fragment):
    write_text(tmp_path / "config.yaml", text)
    assert fragment in refused([], str(tmp_path / "config.yaml"))

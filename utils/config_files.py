"""Readers of YAML configuration files and of command-line overrides."""

import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils.config_checks import MAX_VIDEOS
from utils.errors import UserError
from utils.files import read_json


def read_yaml_layers(path: str, children: tuple[str, ...] = ()) -> list[DictConfig]:
    """Return the contents of all files that `path` inherits from, in the order of merging, then that of `path`.

    Args:
        children: files that inherit from `path`, to detect a circle.

    Raises:
        UserError: for a missing or malformed file, a circle of `inherit`, or as in `refuse_functions`.
    """
    path = os.path.normpath(path)
    if path in children:
        raise UserError(f"{children[-1]} inherits from {path} in a circle; remove one of the `inherit` keys")
    try:
        loaded = OmegaConf.load(path)
    except OSError as error:
        if error.errno is None:  # OmegaConf refuses a file that holds a single value
            raise UserError(f"{path} must hold a mapping of sections, see docs/config.md") from None
        advice = f"; correct the key `inherit` in {children[-1]}" if children else ""
        raise UserError(f"{path} cannot be read ({error.strerror}){advice}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{path} must hold a mapping of sections, see docs/config.md")
    refuse_functions(loaded, path)  # before `inherit` is read
    try:
        parent = loaded.pop("inherit", None)
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: the value of inherit is no file name ({str(error).splitlines()[0]})") from None
    if parent is None:
        return [loaded]
    if not isinstance(parent, str):
        raise UserError(f"{path} inherits from {parent!r}, which is no file name")
    return [*read_yaml_layers(os.path.join(os.path.dirname(path), parent), (*children, path)), loaded]


def read_metadata(path: str) -> dict[str, Any] | None:
    """Return the metadata of a video from its .json file; None if `path` does not end in .json.

    Raises:
        UserError: if the file is missing or is not the metadata of a video.
    """
    if not path.endswith(".json"):
        return None
    metadata = read_json(path, "metadata file of a video")
    complete = isinstance(metadata, dict) and {"config", "prompt", "name", "sample"} <= metadata.keys()
    if not complete or not isinstance(metadata["config"], dict):
        raise UserError(f"{path} is not the metadata of a video: it lacks config, prompt, name or sample")
    metadata.setdefault("prefix", metadata.get("condition"))  # its key in older files
    check_metadata(metadata, path)
    return metadata


def metadata_layer(metadata: dict[str, Any], path: str) -> DictConfig:
    """Return a video's configuration with the number of threads that made it: another one changes rounding.

    Raises:
        UserError: for a reference or a key that no configuration can hold.
    """
    threads, runtime = metadata.get("threads"), metadata["config"].get("runtime")
    if isinstance(threads, int) and isinstance(runtime, dict) and not runtime.get("threads"):
        runtime["threads"] = threads
    try:
        return OmegaConf.create(metadata["config"])
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: its config is not valid ({str(error).splitlines()[0]})") from None


def check_metadata(metadata: dict[str, Any], path: str) -> None:
    """Check the types in the metadata of a video.

    Raises:
        UserError: naming the first wrong value.
    """
    for key, kind, description in (("prompt", str, "text"), ("name", str, "text"), ("sample", int, "a whole number")):
        if not isinstance(metadata[key], kind) or isinstance(metadata[key], bool):
            raise UserError(f"{path} is no metadata of a video: {key} must be {description}, not {metadata[key]!r}")
    if not isinstance(metadata.get("prefix") or "", str):
        raise UserError(f"{path} is no metadata of a video: prefix must be text, not {metadata['prefix']!r}")
    if not 0 <= metadata["sample"] < MAX_VIDEOS:
        raise UserError(f"{path}: sample must be 0 to {MAX_VIDEOS - 1}, not {metadata['sample']}")


def parse_overrides(overrides: Sequence[str]) -> DictConfig:
    """Return the values of `section.key=value` arguments; `section.key=` is an empty string.

    Raises:
        UserError: for an argument of another form, a value that is not valid YAML, or as in `refuse_functions`.
    """
    for word in overrides:
        if "=" not in word or word.startswith("-"):
            raise UserError(f"cannot read {word!r}: options are --name value, config overrides are section.key=value")
    try:
        # Quote the empty value of `key=`, because YAML would read it as null.
        changes = OmegaConf.from_dotlist([f"{word}''" if word.endswith("=") else word for word in overrides])
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"cannot read a value in {' '.join(overrides)}: it is not valid YAML ({reason})") from None
    refuse_functions(changes, "the overrides")
    return changes


def restore_words(values: Any) -> Any:
    """Replace booleans by the words they stand for, such as an unquoted off of `train.wandb` or `model.compile`."""
    train = OmegaConf.select(values, "train")
    if isinstance(train, DictConfig) and train.get("wandb") is False:
        train.wandb = "off"
    model = OmegaConf.select(values, "model")
    if isinstance(model, DictConfig) and isinstance(offload := model.get("offload"), bool):
        model.offload = "text" if offload else "none"
    if isinstance(model, DictConfig) and isinstance(compiled := model.get("compile"), bool):
        model.compile = "on" if compiled else "off"
    return values


def refuse_functions(values: DictConfig, source: str) -> None:
    """Check that no value calls a function of OmegaConf, such as `${oc.env:NAME}`.

    A configuration is stored beside videos and checkpoints, printed and sent to W&B. An untrusted configuration file
    could thus copy a password from the environment to all these places. References such as `${video.fps}` are allowed.

    Raises:
        UserError: for the first such value. The message names its key and `source`.
    """
    for key, text in _strings(OmegaConf.to_container(values, resolve=False)):
        if _calls_function(text):
            raise UserError(
                f"in {source}: {key.lstrip('.')} is {text}, but functions such as oc.env are not evaluated, because "
                f'the configuration is stored and logged; write the value itself, or {key.lstrip(".")}="$NAME" in the '
                "shell"
            )


def _strings(content: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield all strings in nested dicts and lists with their keys, such as `.model.base`."""
    if isinstance(content, str):
        yield key, content
    elif isinstance(content, dict):
        for name, value in content.items():
            yield from _strings(value, f"{key}.{name}")
    elif isinstance(content, list):
        for index, value in enumerate(content):
            yield from _strings(value, f"{key}[{index}]")


def _calls_function(text: str) -> bool:
    """Return whether there is a colon inside `${...}`; in OmegaConf's grammar, only calls contain one."""
    depth = 0
    for token in re.findall(r"\$\{|[}:]", text):
        if token == ":" and depth:
            return True
        depth = max(0, depth + {"${": 1, "}": -1, ":": 0}[token])
    return False

"""Load a configuration: the defaults of utils/config.py, then a YAML file, then `section.key=value` overrides."""

import os
import pickle
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from utils import config_checks
from utils.config import Config
from utils.config_files import (
    metadata_layer,
    parse_overrides,
    read_metadata,
    read_yaml_layers,
    refuse_functions,
    restore_words,
)
from utils.errors import UserError
from utils.foreign_config import translate_file

# Made once, because that takes longer than reading a file. Unpickling copies it six times as fast as a deep copy does.
_SCHEMA = pickle.dumps(OmegaConf.structured(Config))


def load_config(path: str, overrides: Sequence[str] = (), for_training: bool = False) -> Config:
    """Load a YAML file on top of the defaults, then apply the overrides.

    The key `inherit: other.yaml` names a file that is loaded first; its path is relative to the inheriting file.
    A file of HiAR, Self-Forcing, CausVid or LongLive is translated, and the translation is printed to stderr.

    Args:
        path: YAML file, or the metadata (.json) beside a generated video, which contains its configuration.
        overrides: `section.key=value` arguments; `section.key=` sets an empty string.
        for_training: refuse what training cannot honour, in our files and in theirs.

    Raises:
        UserError: for an unreadable file, an unknown key, a wrong type or an invalid value. The message names the key.
    """
    if not os.path.isfile(path):
        raise UserError(f"no config file {path}; choose a file in configs/")
    metadata = read_metadata(path)
    files = read_yaml_layers(path) if metadata is None else [metadata_layer(metadata, path)]
    translation = translate_file(path, files[-1], all_keys(), for_training) if len(files) == 1 else None
    if translation is not None:
        files = [OmegaConf.create(translation.values)]
        translation.show(path)
    config = _merge(files, overrides, path)
    if for_training:
        config_checks.check_training(config)
    return config


def all_keys() -> list[str]:  # as section.key
    return [f"{section.name}.{key.name}" for section in fields(Config) for key in fields(section.type)]  # type: ignore[arg-type]


def config_flags(path: str) -> dict[str, Any]:
    """Return the command-line flags in a file of HiAR, Self-Forcing, CausVid or LongLive; empty for other files."""
    is_yaml = os.path.isfile(path) and not path.endswith(".json")
    translation = translate_file(path, read_yaml_layers(path)[-1], all_keys()) if is_yaml else None
    return {} if translation is None else translation.flags


def override_config(config: Config, overrides: Sequence[str]) -> Config:
    """Return a copy of a configuration with `section.key=value` overrides applied.

    Raises:
        UserError: for an unknown key, a wrong type or an invalid value. The message names the key.
    """
    changed: dict[str, dict[str, Any]] = {}
    defaults = Config()
    for section in fields(Config):
        values, usual = getattr(config, section.name), getattr(defaults, section.name)
        for key in fields(usual):
            value = getattr(values, key.name)
            if repr(value) != repr(getattr(usual, key.name)):  # 1, 1.0 and true are equal, but not of one type
                changed.setdefault(section.name, {})[key.name] = value
    return _merge([OmegaConf.create(changed)], overrides, "the configuration")


def _merge(layers: list[Any], overrides: Sequence[str], source: str) -> Config:
    """Merge the layers and then the overrides into the defaults; later values win. Error messages name `source`."""
    changes = parse_overrides(overrides)
    for layer in layers:
        refuse_functions(layer, source)
    try:
        merged = OmegaConf.unsafe_merge(pickle.loads(_SCHEMA), *map(restore_words, [*layers, changes]))
        config = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, TypeError) as error:
        name = getattr(error, "full_key", "")
        key = f" (key {name})" if name else f" (among {' '.join(overrides)})" if overrides else ""
        raise UserError(f"in {source} or the overrides: {str(error).splitlines()[0]}{key}") from None
    assert isinstance(config, Config)
    config_checks.check_config(config)
    return config

"""Pairs of texts in a JSON file, such as an image and its prompt, or a video and its caption."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from utils.errors import UserError
from utils.files import read_json


def read_text_pairs(
    file: Path, kind: str, names: tuple[str, str], keys: tuple[Sequence[str], Sequence[str]]
) -> list[tuple[str, str]]:
    """Return the pairs in a JSON file: an object {first: second}, or a list of objects.

    Args:
        kind: content of the file, for error messages.
        names: of the two texts, for error messages, such as "an image".
        keys: the keys of an object that may hold the first text, and those of the second. A list stands for its first
            element.

    Raises:
        UserError: if the file is no such JSON.
    """
    content: Any = read_json(file, kind)
    if isinstance(content, dict):
        content = [{keys[0][0]: first, keys[1][0]: second} for first, second in content.items()]
    pairs = []
    for number, entry in enumerate(content if isinstance(content, list) else [content]):
        first, second = (_text_of(entry, accepted) for accepted in keys)
        if first is None or second is None:
            raise UserError(f"{file}: entry {number} needs {names[0]} and {names[1]}, both text")
        pairs.append((first, second))
    return pairs


def _text_of(entry: Any, keys: Sequence[str]) -> str | None:
    """Return the text under the first of the keys that an entry has."""
    value = next((entry[key] for key in keys if key in entry), None) if isinstance(entry, dict) else None
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, str) else None

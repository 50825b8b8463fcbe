"""Kinds of bad files, for every flag that names a file."""

from pathlib import Path

KINDS = ("missing", "folder", "empty", "binary", "words", "number", "list", "deep", "zip")
NOT_TEXT = ("missing", "folder", "empty", "binary")
"""Kinds that no reader of text accepts."""


def bad_file(folder: Path, kind: str, suffix: str = "") -> Path:
    """Write a bad file of one of `KINDS` and return its path."""
    path = folder / f"{kind}{suffix}"
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 20,
        "words": b"hello\n",
        "number": b"5",
        "list": b"[1, 2]",
        "deep": b"[" * 100_000,
        "zip": b"PK\x05\x06" + bytes(18),
    }
    if kind == "folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(contents[kind])
    return path

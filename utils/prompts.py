"""What should be generated, and under which file names: prompt files in, safe and distinct names out."""

import hashlib
import html
import os
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import ftfy

from utils.errors import UserError

_NAME_CHARACTERS = 100  # of the prompt that a file name shows, as in Self-Forcing
_NAME_BYTES = 160  # leaves room for hash, number, sample and suffix within 200 bytes; file systems stop at 255
_RESERVED = re.compile(r'[<>:"/\\|?*]+')  # what Linux, macOS or Windows refuses in a file name
_JOINERS = "\u200c\u200d"  # invisible, but emoji and several scripts are spelled with them


@dataclass(frozen=True)
class Prompt:
    """One line of a prompt file.

    Attributes:
        index: position among the prompts that were kept (blank lines are not counted), from 0.
        text: what is encoded: the extended prompt if there is one, else the line itself.
        name: the line itself, which names the output files.
    """

    index: int
    text: str
    name: str


def read_prompts(path: str | os.PathLike[str], extended_path: str | os.PathLike[str] | None = None) -> list[Prompt]:
    """Read a prompt file: UTF-8, one prompt per line, blank lines skipped.

    Args:
        path: the prompts, which also name the output files.
        extended_path: longer versions of the same prompts in the same order. They replace the text, not the name.

    Raises:
        UserError: if a file is missing, a folder, not UTF-8 or without prompts, or if the two files differ in count.
    """
    names = _read_lines(path)
    texts = names if extended_path is None else _read_lines(extended_path)
    if len(texts) != len(names):
        raise UserError(
            f"{path} has {len(names)} prompts, but {extended_path} has {len(texts)}: "
            "give one extended prompt per prompt, in the same order"
        )
    return [Prompt(index, text, name) for index, (text, name) in enumerate(zip(texts, names, strict=True))]


def clean_prompt(text: str) -> str:
    """Clean a prompt as Wan2.1 does before tokenising (`basic_clean` and `whitespace_clean` in its tokenizers.py).

    Public weights were trained on prompts cleaned like this: broken encodings repaired (ftfy), HTML entities unescaped
    twice (captions from the web are often escaped twice), runs of whitespace made one space.
    """
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()


def file_stem(prompt: Prompt, sample: int, save_with_index: bool = False) -> str:
    """Name, without suffix, for one sample of `prompt`: `{prompt[:100]}-{sample}`, or `{index}-{sample}`.

    Prompts that are a safe file name as they are keep their full text. Any other is made safe (path separators,
    reserved and control characters, leading dots and dashes, length) and gets eight digits of a hash of its full text.
    At most 200 bytes of UTF-8. Two prompts may still be equal: name the prompts of one run with `unique_stems`.
    """
    return f"{prompt.index if save_with_index else _safe(prompt.name)}-{sample}"


def unique_stems(prompts: Sequence[Prompt], num_samples: int, save_with_index: bool = False) -> list[list[str]]:
    """Names for a whole prompt file: `stems[prompt.index][sample]`, all distinct, also where case does not count.

    A prompt whose name is taken by an earlier one gets " (2)", " (3)", ... The names depend only on the prompts before
    it, so more samples, more ranks or lines added at the end never rename a video that exists. Every rank has to pass
    all prompts of the file, not only its own.
    """
    taken: set[str] = set()
    stems = []
    for prompt in prompts:
        base = str(prompt.index) if save_with_index else _safe(prompt.name)
        name, number = base, 1
        while _key(name) in taken:
            number += 1
            name = f"{base} ({number})"
        taken.add(_key(name))
        stems.append([f"{name}-{sample}" for sample in range(num_samples)])
    return stems


def _read_lines(path: str | os.PathLike[str]) -> list[str]:
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig") as file:  # -sig: a byte order mark is not part of the first prompt
            lines = [line.strip() for line in file]
    except UnicodeDecodeError as error:
        raise UserError(f"prompt file {path} is not UTF-8 (byte {error.start}): save it as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"cannot read prompt file {path}: {error.strerror}") from None
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"prompt file {path} holds no prompts: write one prompt per line")
    return lines


def _safe(name: str) -> str:
    """`name` itself if it can be a file name, else a safe rendering of it and a hash that keeps it distinct."""
    text = re.sub(r"\s+", " ", name)  # before control characters go, for tabs separate words too
    text = "".join(c for c in text if c in _JOINERS or unicodedata.category(c) not in ("Cc", "Cf", "Cs"))
    text = _RESERVED.sub("_", text).lstrip(".-_ ")  # a leading dot hides a file, a leading dash looks like an option
    text = text[:_NAME_CHARACTERS].encode()[:_NAME_BYTES].decode(errors="ignore").rstrip()
    if text == name:
        return text
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    return f"{text or 'prompt'}-{digest}"


def _key(name: str) -> str:
    """Equal for names that some file system takes for the same file."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())

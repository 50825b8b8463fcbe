"""Pairs of an image and a prompt, for image-to-video."""

import os
from pathlib import Path

from utils.errors import UserError
from utils.prompts import Prompt
from utils.text_pairs import read_text_pairs

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_IMAGE_KEYS = ("image", "image_path", "file_name")
_PROMPT_KEYS = ("prompt", "caption", "text")


def read_image_prompts(path: str | os.PathLike[str]) -> list[Prompt]:
    """Read pairs of an image and a prompt.

    Args:
        path: a JSON file, or a folder that holds one JSON file or images with a .txt beside each. The JSON is an object
            {image: prompt}, or a list of objects with the keys image (or file_name) and prompt (or caption). Images are
            relative to the JSON file, or for `NAME_26-15.json` to the folder 26-15 beside it, as in Self-Forcing.

    Raises:
        UserError: if there are no pairs, or an image, prompt or file is missing or malformed.
    """
    source = Path(path)
    if source.is_dir():
        listings = sorted(source.glob("*.json"))
        if len(listings) > 1:
            raise UserError(f"{source} holds {len(listings)} JSON files; name one of them")
        pairs = _listed(listings[0]) if listings else _beside(source)
    elif source.suffix == ".json" and source.is_file():
        pairs = _listed(source)
    else:
        raise UserError(f"--i2v {path}: name a folder of images with a .txt beside each, or a JSON file")
    if not pairs:
        raise UserError(f"{source} holds no pairs of an image and a prompt")
    for image, prompt in pairs:
        if not image.is_file():
            raise UserError(f"{source}: there is no image {image}")
        if not prompt.strip():
            raise UserError(f"{source}: the prompt of {image.name} is empty")
    texts = [" ".join(prompt.split()) for _, prompt in pairs]
    return [Prompt(i, text, text, str(image)) for i, (text, (image, _)) in enumerate(zip(texts, pairs, strict=True))]


def _beside(folder: Path) -> list[tuple[Path, str]]:
    """Return the images of a folder with the text of the .txt beside each."""
    pairs = []
    for image in sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES):
        try:
            pairs.append((image, image.with_suffix(".txt").read_text(encoding="utf-8-sig")))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the prompt of {image}: {error}; write it to {image.stem}.txt") from None
    return pairs


def _listed(file: Path) -> list[tuple[Path, str]]:
    """Return the pairs that a JSON file lists."""
    names, keys = ("an image", "a prompt"), (_IMAGE_KEYS, _PROMPT_KEYS)
    pairs = read_text_pairs(file, "list of images and prompts", names, keys)
    return [(_find_image(file, image), prompt) for image, prompt in pairs]


def _find_image(listing: Path, name: str) -> Path:
    """Return the path of a listed image: beside the JSON file, or in Self-Forcing's folder 26-15 of *_26-15.json."""
    beside, inside = listing.parent / name, listing.parent / listing.stem.rpartition("_")[2] / name
    return inside if inside.is_file() and not beside.is_file() else beside

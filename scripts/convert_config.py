"""Translate a YAML file of HiAR, Self-Forcing, CausVid or LongLive into this repository's keys.

    python scripts/convert_config.py THEIRS.yaml OURS.yaml

Without OURS.yaml, the translation is printed. A default_config.yaml beside the file is merged first, as HiAR and
Self-Forcing do. docs/migrate.md lists all keys. inference.py and train.py also read such files directly.
"""

import argparse
import shlex
import sys
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config_files import read_yaml_layers
from utils.config_loading import all_keys, load_config
from utils.errors import UserError, command
from utils.files import write_text
from utils.foreign_config import translate_file


def converted(path: Path) -> str:
    """Return the translation of a file as YAML; flags and keys without effect are comments.

    Raises:
        UserError: if the file is not one of the originals, or cannot be translated.
    """
    load_config(str(path))  # checks the values, and prints the translation
    translation = translate_file(str(path), read_yaml_layers(str(path))[-1], all_keys())
    if translation is None:
        raise UserError(f"{path} has this repository's keys already; nothing to convert")
    comments = [f"Converted from {path.name} by scripts/convert_config.py."]
    if translation.flags:
        words = [word for name, value in translation.flags.items() for word in (f"--{name}", str(value))]
        comments.append(f"Flags: {shlex.join(words)}")
    comments += [f"Inference only: {reason}" for reason in translation.not_trainable]
    if translation.no_effect:
        comments.append(f"Without effect here: {', '.join(translation.no_effect)}")
    head = "".join(f"# {comment}\n" for comment in comments)
    return head + yaml.safe_dump(translation.values, allow_unicode=True, sort_keys=False, width=120)


@command
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, metavar="THEIRS.yaml", help="file to translate")
    parser.add_argument("output", type=Path, nargs="?", metavar="OURS.yaml", help="file to write; default: print it")
    args = parser.parse_args()
    text = converted(args.input)
    if args.output is None:
        print(text, end="")
        return
    if args.output.exists():
        raise UserError(f"{args.output} exists already; choose another file")
    write_text(args.output, text)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()

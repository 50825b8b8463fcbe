"""Write docs/config.md, the list of all configuration keys, from the schema in utils/config.py.

python scripts/write_config_docs.py
"""

import argparse
import ast
import inspect
import sys
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.config import Config
from utils.errors import command
from utils.files import write_text
from utils.prompts import NEGATIVE_PROMPT

ROOT = Path(__file__).resolve().parents[1]
HEADER = """\
<!-- Generated from utils/config.py by scripts/write_config_docs.py: change the schema, then run the script. -->

# Configuration

A YAML file in `configs/` sets only the keys that differ from the defaults below. Arguments `section.key=value` override
the file, and `section.key=` sets an empty string. `inherit: other.yaml` loads another file first; its path is relative
to the file that contains the line. Unknown keys, wrong types and invalid values are errors.

```bash
python inference.py --config_path configs/shapes.yaml --prompt "a red circle" rollout.schedule=block_first video.fps=8
python train.py --config_path configs/shapes/hiar.yaml --dry-run train.max_iterations=100   # prints the configuration
```

The metadata (.json) beside a generated video holds its configuration, and can replace the YAML file.

A value may refer to another key, as in `width: ${video.height}`. Functions such as `${oc.env:HOME}` are errors: the
configuration is stored beside videos and checkpoints, printed, and sent to W&B. An untrusted file could copy a password
from your environment into all of these. Let the shell insert such a value: `data.path="$HOME/pairs"`.
"""


def field_docs(section: type) -> dict[str, str]:
    """Return the string literal after each field of a dataclass, by field name."""
    definition = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for node, following in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(node, ast.AnnAssign) and isinstance(following, ast.Expr):
            assert isinstance(node.target, ast.Name)
            docs[node.target.id] = " ".join(ast.literal_eval(following.value).split())
    return docs


def yaml_text(value: Any) -> str:
    """Return a value as it is written in YAML."""
    return '""' if value == "" else str(value).lower() if isinstance(value, bool) else str(value)


def type_text(kind: Any) -> str:
    """Return a type as text; for a Literal, its choices."""
    arguments = get_args(kind)
    if arguments and isinstance(arguments[0], type):
        return f"list of {arguments[0].__name__}"
    return ", ".join(f"`{yaml_text(choice)}`" for choice in arguments) or kind.__name__


def default_text(key: Field) -> str:
    """Return the default of a field as it is written in YAML."""
    value = key.default if key.default_factory is MISSING else key.default_factory()
    return f"`{yaml_text(value if value != NEGATIVE_PROMPT else value[:9] + '...')}`"


def config_docs() -> str:
    """Return the content of docs/config.md."""
    lines = [HEADER]
    for section in fields(Config):
        schema = section.type
        assert isinstance(schema, type)
        lines += [f"## {section.name}", "", f"{schema.__doc__}", ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        docs = field_docs(schema)
        for key in fields(schema):
            lines.append(f"| `{key.name}` | {type_text(key.type)} | {default_text(key)} | {docs[key.name]} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


@command
def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    write_text(ROOT / "docs" / "config.md", config_docs())
    print("wrote docs/config.md")


if __name__ == "__main__":
    main()

"""Weight files: reads public checkpoints of every known layout, and writes our own.

Nothing is downloaded, and no file can run code: pickles may hold only tensors and plain values.
"""

import pickle
import re
import struct
import zipfile
from pathlib import Path
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from model.weight_checks import check_weights, check_zip
from model.weight_names import DIT_NAMES, State, join_names, rename, without_wrappers
from utils.download_manifest import check_loaded
from utils.errors import UserError
from utils.files import atomic_path, output_file, read_json, write_json

TRANSFORMER_FILE = "diffusion_pytorch_model.safetensors"
HOW_TO_DOWNLOAD = "find the download with: python scripts/download_weights.py --list"
# All errors that torch.load and safetensors raised for corrupt files in tests.
_UNREADABLE = (
    *(RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError, EOFError, OSError),
    *(pickle.UnpicklingError, struct.error, zipfile.BadZipFile, SafetensorError),
)


def read_checkpoint(path: str | Path, use_ema: bool = False) -> State:
    """Return a transformer's weights from a file or folder, under diffusers' names, on the CPU and as stored.

    A file is in safetensors' or torch's format and holds a state dict under Wan's or diffusers' names. Checkpoints of
    HiAR, Self-Forcing and CausVid hold it under the key `generator`, `generator_ema` or `model`. A folder holds one
    such file, or shards with their index. Tensors are memory-mapped if the format allows it.

    Args:
        path: the file or folder. If it is a model folder, its transformer is read.
        use_ema: read `generator_ema`, the moving average of the trained weights, instead of `generator`.

    Raises:
        UserError: if the file is missing, cut off, unsafe to read, lacks these weights, or differs from its manifest.
    """
    state = read_state(Path(path), use_ema)
    names = {name: without_wrappers(name) for name in state}
    if len(set(names.values())) < len(names):
        raise UserError(f"{path} holds the same weights more than once under different prefixes; keep one of them")
    return rename({names[name]: tensor for name, tensor in state.items()}, DIT_NAMES)


def read_state(path: Path, use_ema: bool = False) -> State:
    """Return the state dict in a file or folder under its own names. Arguments and errors as in `read_checkpoint`."""
    check_loaded(path)
    content = _read(path)
    if _is_state(content) and not use_ema:
        return content
    keys = ("generator_ema",) if use_ema else ("generator", "model", "state_dict")
    state = next((content[key] for key in keys if key in content), None)
    if _is_state(state):
        return dict(state)
    held = "one unnamed set of weights" if _is_state(content) else join_names(map(str, content), 9) or "nothing"
    advice = "add --use_ema" if "generator_ema" in content else "choose another file"
    if use_ema:
        advice = "leave out --use_ema"
    raise UserError(f"{path} has no {' or '.join(keys)} weights but holds {held}; {advice}")


def read_lora(path: Path) -> State:
    """Return the low-rank factors in a file, without wrappers' prefixes: all of it, or its `generator_lora`.

    Raises:
        UserError: if the file is missing, cut off, unsafe to read, differs from its manifest, or holds anything else.
    """
    if not path.is_file():
        raise UserError(f"cannot read LoRA weights {path}: there is no such file")
    check_loaded(path)
    content = _read_file(path)
    state = content.get("generator_lora", content)
    if not _is_state(state):
        raise UserError(f"{path} holds no LoRA weights but {join_names(map(str, content), 9) or 'nothing'}")
    return {re.sub(r"^base_model\.(model\.)*", "", without_wrappers(name)): value for name, value in state.items()}


def save_weights(path: Path, content: dict[str, Any]) -> None:
    """Write weights atomically: as safetensors if `path` has this suffix, else with torch.save."""
    output_file(path)
    with atomic_path(path) as file:
        if path.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, file, metadata={"format": "pt"})
        else:
            with file.open("xb") as stream:  # given a path, torch.save would write the temporary name into the file
                torch.save(content, stream)


def save_transformer(folder: Path, state: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write a transformer's weights (diffusers' names) and its config.json in diffusers' layout.

    Raises:
        UserError: if a weight is not a finite number.
    """
    check_weights(state, folder)
    save_weights(folder / TRANSFORMER_FILE, state)
    write_json(folder / "config.json", {"_class_name": "WanTransformer3DModel", **config})


def read_model_json(path: Path) -> dict[str, Any]:
    """Return a JSON object of a model folder, such as a config.json.

    Raises:
        UserError: if the file is missing or holds no JSON object.
    """
    try:
        content = read_json(path, "model file")
    except UserError as error:
        raise UserError(f"{error}; copy or download the model folder again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; copy or download the model folder again")
    return content


def shard_names(index: Path) -> list[str]:
    """Return the file names of the shards that an index.json lists.

    Raises:
        UserError: if the index is damaged, or names a file outside its folder.
    """
    names = read_model_json(index).get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise UserError(f"{index} lists no shards of weights; copy or download the folder again")
    shards = sorted(set(names.values()))
    if outside := [name for name in shards if Path(name).name != name]:
        raise UserError(f"{index} names {outside[0]}, which is no file of its folder; get the folder from elsewhere")
    return shards


def _is_state(content: Any) -> TypeGuard[State]:
    if not isinstance(content, dict) or not content:
        return False
    return all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items())


def _read(path: Path) -> dict[str, Any]:
    """Return the content of a weights file, or of the weights file or shards in a folder."""
    if not path.is_dir():
        return _read_file(path)
    if (path / "model_index.json").is_file():
        return _read(path / "transformer")
    for index in sorted(path.glob("*.safetensors.index.json")):
        shards = shard_names(index)
        return {name: tensor for shard in shards for name, tensor in _read_file(path / shard).items()}
    files = [file for file in (path / TRANSFORMER_FILE, path / "model.safetensors") if file.is_file()]
    files = files or sorted(path.glob("*.safetensors"))
    files = files or [file for file in sorted(path.iterdir()) if file.suffix in (".pt", ".pth", ".bin")]
    if len(files) == 1:
        return _read_file(files[0])
    held = f"several weights files ({join_names(file.name for file in files)})" if files else "no *.safetensors or *.pt"
    raise UserError(f"folder {path} holds {held}; name the folder or file with the weights")


def _read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"weights {path} do not exist; check the path, or {HOW_TO_DOWNLOAD}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # Only the zip format of torch.save can be mapped; the older format is read at once.
        is_zip = zipfile.is_zipfile(path)
        if is_zip:
            check_zip(path)  # torch.load ignores the checksums
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except UserError:
        raise
    except _UNREADABLE as error:
        if code := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} is refused: reading it could run code ({code[1]}); use a file that holds only weights, "
                "preferably .safetensors"
            ) from None
        raise UserError(f"{path} is cut off or not a checkpoint; copy or download it again") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a checkpoint: it holds a {type(content).__name__}; choose another file")
    return content

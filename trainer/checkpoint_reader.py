"""A reader of training checkpoints that never runs code from the checkpoint.

torch.distributed.checkpoint stores `.metadata` as a pickle and reads it with `pickle.load`, which can run any
code. It also unpickles every entry that the metadata declares as bytes. This reader accepts only tensor entries, and
in `.metadata` only the classes that torch itself writes there.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

METADATA_FILE = ".metadata"

_METADATA_CLASSES = {
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            *("Metadata", "MetadataIndex", "StorageMeta", "ChunkStorageMetadata", "TensorStorageMetadata"),
            *("TensorProperties", "_MEM_FORMAT_ENCODING"),
        )
    ),
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f".metadata names {module}.{name}, which is not part of a checkpoint")


def read_checkpoint_metadata(checkpoint: Path) -> Metadata:
    """Return the metadata of a checkpoint folder.

    Raises:
        OSError: if the folder has no `.metadata`.
        pickle.UnpicklingError: if `.metadata` is truncated, or contains classes that no checkpoint uses.
    """
    metadata = _MetadataUnpickler(io.BytesIO((checkpoint / METADATA_FILE).read_bytes())).load()
    if not isinstance(metadata, Metadata) or not isinstance(metadata.state_dict_metadata, dict):
        raise pickle.UnpicklingError(f".metadata holds a {type(metadata).__name__}")
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f".metadata declares {name} as a pickled object")
    for info in (metadata.storage_data or {}).values():
        if Path(info.relative_path).name != info.relative_path:
            raise pickle.UnpicklingError(f".metadata refers to {info.relative_path}, a file outside the checkpoint")
    return metadata


class CheckpointReader(FileSystemReader):
    """torch's reader of checkpoint folders with `read_checkpoint_metadata` in place of `pickle.load`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_checkpoint_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

"""trainer/checkpoint_reader.py: a hostile checkpoint folder is refused, and no code from it runs."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from trainer.checkpoint_reader import CheckpointReader, read_checkpoint_metadata
from trainer.checkpoints import read_tensors
from utils.errors import UserError


class Bomb:
    """Unpickling it creates a file."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of two tensors."""
    folder = tmp_path / "00000010"
    dcp.save({"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7)}, checkpoint_id=folder, no_dist=True)
    return folder


def rewrite(checkpoint: Path, change) -> None:
    """Apply `change` to the metadata of a checkpoint."""
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    change(metadata)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_checkpoint_is_read(checkpoint):
    state = {"a": torch.zeros(2, 3), "b": torch.tensor(0)}
    dcp.load(state, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    assert torch.equal(state["a"], torch.arange(6.0).view(2, 3)) and state["b"] == 7


def test_a_checkpoint_without_information_on_its_storage_is_read(checkpoint):
    rewrite(checkpoint, lambda metadata: setattr(metadata, "storage_meta", None))
    assert read_tensors(checkpoint, "")["b"] == 7


def test_code_in_the_metadata_is_not_run(checkpoint, tmp_path):
    target = tmp_path / "executed"
    rewrite(checkpoint, lambda metadata: setattr(metadata, "planner_data", Bomb(target)))
    with pytest.raises(pickle.UnpicklingError, match="which is not part of a checkpoint"):
        read_checkpoint_metadata(checkpoint)
    with pytest.raises((pickle.UnpicklingError, CheckpointException)):
        dcp.load({"a": torch.zeros(2, 3)}, storage_reader=CheckpointReader(checkpoint), no_dist=True)
    assert not target.exists()
    pickle.loads((checkpoint / ".metadata").read_bytes())  # as torch's own reader does
    assert target.exists()


def test_an_entry_that_torch_would_unpickle_is_refused(checkpoint):
    rewrite(checkpoint, lambda metadata: metadata.state_dict_metadata.update(a=BytesStorageMetadata()))
    with pytest.raises(pickle.UnpicklingError, match="BytesStorageMetadata, which is not part of a checkpoint"):
        read_checkpoint_metadata(checkpoint)


@pytest.mark.parametrize("path", ["../00000005/__0_0.distcp", "/etc/passwd"])
def test_files_outside_the_folder_are_refused(checkpoint, path):
    def escape(metadata):
        for info in metadata.storage_data.values():
            info.relative_path = path

    rewrite(checkpoint, escape)
    with pytest.raises(pickle.UnpicklingError, match="outside the checkpoint"):
        read_checkpoint_metadata(checkpoint)


@pytest.mark.parametrize("content", [b"", b"junk", pickle.dumps({"no": "metadata"}), pickle.dumps([1, 2])])
def test_other_content_is_refused(checkpoint, content):
    (checkpoint / ".metadata").write_bytes(content)
    with pytest.raises((pickle.UnpicklingError, EOFError)):
        read_checkpoint_metadata(checkpoint)


def test_resuming_from_a_hostile_checkpoint_is_one_error(checkpoint, tmp_path):
    target = tmp_path / "executed"
    rewrite(checkpoint, lambda metadata: setattr(metadata, "planner_data", Bomb(target)))
    with pytest.raises(UserError, match="which is not part of a checkpoint"):
        read_tensors(checkpoint, "a")
    assert not target.exists()

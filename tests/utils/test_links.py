"""utils/files.py: nothing is written through a symbolic link planted at its name, and no pipe or device is replaced."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.plots import save_timeline_plot
from model.weight_files import save_weights
from pipeline.latent_files import LatentsWriter
from trainer.datasets.clips import write_shard
from trainer.datasets.ode_pairs import write_ode_pair
from trainer.logging import MetricsLog
from utils import files
from utils.config import Config
from utils.contact_sheet import save_contact_sheet
from utils.errors import UserError
from utils.files import open_own_file, partial_path, writable_folder, write_json, write_text
from utils.locks import lock_file, lock_folder
from utils.video import VideoWriter


@pytest.fixture
def target(tmp_path) -> Path:
    """The file that a planted link points to; it must not change."""
    file = tmp_path / "target"
    file.write_text("valuable")
    return file


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def write_latents(path: Path) -> None:
    with LatentsWriter(path, 1) as writer:
        writer.write(torch.zeros(1, 16, 2, 2))


def write_video(path: Path) -> None:
    with VideoWriter(path, fps=4) as video:
        video.write(np.zeros((2, 16, 16, 3), dtype=np.uint8))


WRITERS = {
    "text.txt": lambda path: write_text(path, "new"),
    "text.json": lambda path: write_json(path, {}),
    "latents.safetensors": write_latents,
    "video.mp4": write_video,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_link_at_the_final_name_is_replaced_and_not_followed(folder, target, name):
    (folder / name).symlink_to(target)
    WRITERS[name](folder / name)
    assert target.read_text() == "valuable" and not (folder / name).is_symlink()
    assert [file.name for file in folder.iterdir()] == [name]


def test_partial_names_cannot_be_guessed(tmp_path):
    names = {partial_path(tmp_path / "a.mp4").name for _ in range(100)}
    assert len(names) == 100
    longest = max(len(f"..{name}.{name}") - len("..a..a.mp4.mp4") for name in names)
    assert longest <= 52, "a video's nested partial name must fit in 255 bytes next to a stem of 195 bytes"


@pytest.mark.parametrize("name", ["text.txt", "text.json", "latents.safetensors"])
@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_a_guessed_partial_name_is_not_followed(folder, target, monkeypatch, name, dangling):
    monkeypatch.setattr(files.secrets, "randbelow", lambda limit: 0)
    partial_path(folder / name).symlink_to(folder / "absent" if dangling else target)
    with pytest.raises(FileExistsError):
        WRITERS[name](folder / name)
    assert target.read_text() == "valuable" and not (folder / "absent").exists()


@pytest.mark.parametrize("dangling", [False, True])
def test_a_link_at_the_lock_is_an_error(folder, target, dangling):
    linked = folder / "absent" if dangling else target
    (folder / ".lock").symlink_to(linked)
    with pytest.raises(UserError, match=r"\.lock is a symbolic link.*delete the link"), lock_folder(folder, "in"):
        pass
    assert target.read_text() == "valuable" and not (folder / "absent").exists()


@pytest.mark.parametrize("mode", ["w", "wb", "a"])
def test_open_own_file_refuses_links_and_opens_the_rest(folder, target, mode):
    (folder / "link").symlink_to(target)
    with pytest.raises(UserError, match="is a symbolic link"):
        open_own_file(folder / "link", mode)
    with pytest.raises(FileNotFoundError):
        open_own_file(folder / "absent" / "file", mode)
    open_own_file(folder / "file", mode).close()
    (folder / "usual").touch()
    assert (folder / "file").stat().st_mode == (folder / "usual").stat().st_mode
    assert target.read_text() == "valuable"


def test_links_at_the_metrics_are_not_followed(folder, target):
    config, metrics = Config(), folder / "metrics.jsonl"
    config.train.log_every = 1
    metrics.symlink_to(folder / "absent")
    with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link"):
        MetricsLog(folder, config, 0).write(1, {"loss": 1.0})
    assert not (folder / "absent").exists()
    metrics.unlink()
    target.write_text("")
    log = MetricsLog(folder, config, 0)
    metrics.symlink_to(target)  # planted while the run is under way
    with pytest.raises(UserError, match=r"metrics\.jsonl is a symbolic link"):
        log.write(1, {"loss": 1.0})
    assert target.read_text() == ""


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),  # bind() limits the path to 107 characters
    "link to a device": lambda path: path.symlink_to("/dev/full"),
    "link to a pipe": lambda path: (os.mkfifo(path.parent.parent / "pipe"), path.symlink_to("../pipe")),
}
FRAMES = np.zeros((2, 16, 16, 3), dtype=np.uint8)
ALL_WRITERS: dict[str, Callable[[Path], object]] = WRITERS | {
    "weights.pt": lambda path: save_weights(path, {"w": torch.zeros(1)}),
    "weights.safetensors": lambda path: save_weights(path, {"w": torch.zeros(1)}),
    "00000.pt": lambda path: write_ode_pair(path, "a", torch.zeros(2, 1, 4, 2, 2)),
    "clips.safetensors": lambda path: write_shard(path, torch.zeros(1, 1, 4, 2, 2), ["a"]),
    "sheet.png": lambda path: save_contact_sheet(path, [("a", FRAMES)]),
    "timeline.png": lambda path: save_timeline_plot(path, [("rank 0", [("send", 0.0, 1.0)])]),
    "file opened to write": lambda path: open_own_file(path, "wb"),
    "file opened to append": lambda path: open_own_file(path, "a"),
    "lock": lambda path: lock_file(path, "writing").__enter__(),
    "metrics.jsonl": lambda path: MetricsLog(path.parent, Config(), 0).write(1, {"loss": 1.0}),
}


@pytest.mark.parametrize("kind", SPECIAL_FILES)
@pytest.mark.parametrize("name", ALL_WRITERS)
def test_pipes_and_devices_are_refused_and_stay(folder, name, kind):
    SPECIAL_FILES[kind](folder / name)
    mode, target = (folder / name).lstat().st_mode, (folder / name).stat().st_mode
    with pytest.raises(UserError, match=f"{name} is a symbolic link|cannot write .*{name}: it is no ordinary file"):
        ALL_WRITERS[name](folder / name)
    assert ((folder / name).lstat().st_mode, (folder / name).stat().st_mode) == (mode, target)
    assert [file.name for file in folder.iterdir()] == [name]


def test_a_pipe_with_a_reader_is_refused_too(folder):
    os.mkfifo(folder / "pipe")
    reader = os.open(folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(UserError, match="it is no ordinary file"):
        open_own_file(folder / "pipe", "a")
    assert os.read(reader, 9) == b""
    os.close(reader)


def test_the_check_for_a_writable_folder_follows_no_link(folder, target, monkeypatch):
    before = target.stat().st_mtime_ns
    monkeypatch.setattr(files.os, "getpid", lambda: 7)
    (folder / ".write-probe.7").symlink_to(target)
    writable_folder(folder)
    assert target.stat().st_mtime_ns == before and (folder / ".write-probe.7").is_symlink()

"""scripts/download_mixkit.py: archives of a data set on a local stand-in for the hub become a folder of videos."""

import io
import json
import tarfile

import pytest
from commands import run_main
from hub_server import Hub

from scripts import download_mixkit


def archive(**files: bytes) -> bytes:
    """Return a tar archive. `a__b_mp4` stands for a/b.mp4."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as opened:
        for name, content in files.items():
            member = tarfile.TarInfo(name.replace("__", "/").replace("_mp4", ".mp4"))
            member.size = len(content)
            opened.addfile(member, io.BytesIO(content))
    return stream.getvalue()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub("lab/videos", "dataset")
    hub.redirect_huggingface(monkeypatch)
    yield hub
    hub.close()


def download(folder, *words):
    return run_main(download_mixkit.main, "--local_dir", folder, "--repo_id", "lab/videos", *words)


def test_archives_are_downloaded_locked_and_unpacked(hub, tmp_path):
    hub.commit(all_mixkit__1_tar=archive(Air__a_mp4=b"one", b_mp4=b"two"), all_mixkit__2_tar=archive(Air__c_mp4=b"3"))
    hub.commit(README_md=b"x")  # the newest revision holds no archives
    result = download(tmp_path / "mixkit")
    assert result.code == 2 and "has no file all_mixkit/*.tar" in result.err
    first = next(sha for sha, files in hub.revisions.items() if len(files) == 2)
    result = download(tmp_path / "mixkit", "--revision", first)
    assert result.code == 0 and "3 files in" in result.out, result.err
    videos = tmp_path / "mixkit/videos"
    content = {path.relative_to(videos).as_posix(): path.read_bytes() for path in videos.rglob("*.mp4")}
    assert content == {"Air/a.mp4": b"one", "Air/c.mp4": b"3", "b.mp4": b"two"}
    manifest = json.loads((tmp_path / "mixkit.manifest.json").read_text())
    assert manifest["revision"] == first and set(manifest["files"]) == {"all_mixkit/1.tar", "all_mixkit/2.tar"}

    (videos / "b.mp4").write_bytes(b"t")  # an interrupted copy
    times = {path: path.stat().st_mtime_ns for path in videos.rglob("*.mp4")}
    num_requests = len(hub.requests)
    assert download(tmp_path / "mixkit").code == 0 and len(hub.requests) == num_requests
    assert (videos / "b.mp4").read_bytes() == b"two"
    assert all((path.stat().st_mtime_ns == time) == (path.name != "b.mp4") for path, time in times.items())


@pytest.mark.parametrize("content", [b"no archive", archive(a_mp4=bytes(3000))[:2000], archive(**{"../x": b"outside"})])
def test_damaged_archives_are_one_line(hub, tmp_path, content):
    hub.commit(all_mixkit__1_tar=content)
    result = download(tmp_path / "mixkit")
    assert result.code == 2 and "1.tar is damaged" in result.err and result.err.count("error:") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name == "x"] == []

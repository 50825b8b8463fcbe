"""Downloads CausVid's public training videos: the Mixkit clips of Open-Sora-Plan v1.1.0, packed in tar archives."""

import shutil
import tarfile
from pathlib import Path

from tqdm import tqdm

from model.downloads import Download, fetch_weights
from utils.errors import UserError
from utils.files import atomic_path, writable_folder

REPO = "LanguageBind/Open-Sora-Plan-v1.1.0"
FOLDER = "all_mixkit"


def download_videos(
    local_folder: Path, repo: str = REPO, folder: str = FOLDER, revision: str | None = None
) -> tuple[Path, int]:
    """Download the archives `folder`/*.tar of a data set, unpack them, and return the folder and number of files.

    The manifest beside `local_folder` holds the revision and the hashes of the archives. Unpacked files are kept.

    Raises:
        UserError: without network, if there are no archives, or if one is damaged.
    """
    item = Download(repo, local_folder.name, "see its page", None, (f"{folder}/*.tar",), "dataset")
    archives = sorted((fetch_weights(item, local_folder.parent, revision) / folder).glob("*.tar"))
    videos = writable_folder(local_folder / "videos")
    return videos, sum(_unpack(archive, videos) for archive in tqdm(archives, unit="archive"))


def _unpack(archive: Path, target: Path) -> int:
    """Unpack the files of an archive that `target` does not have yet; return the number of files in the archive."""
    count = 0
    try:
        with tarfile.open(archive) as opened:
            for member in opened:
                if not member.isfile():
                    continue
                member = tarfile.data_filter(member, str(target))  # refuses paths outside of the folder
                path, content = target / member.name, opened.extractfile(member)
                assert content is not None
                count += 1
                if path.is_file() and path.stat().st_size == member.size:
                    continue
                path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_path(path) as partial, partial.open("xb") as file:
                    shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}); delete it and run the same command again") from None
    return count

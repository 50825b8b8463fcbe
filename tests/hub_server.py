"""A local stand-in for the Hugging Face Hub: the pages that huggingface_hub requests, from a dict of revisions."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub.constants
import pytest

from model import downloads

LFS_SUFFIXES = (".safetensors", ".pt", ".pth", ".tar")


class Hub:
    """Serves one repository. Close it after use.

    Attributes:
        revisions: the files of each commit, by name.
        branches: the commit of each branch or tag.
        requests: paths of all requests so far.
    """

    def __init__(self, repo: str, repo_type: str = "model"):
        self.repo, self.repo_type = repo, repo_type
        self.revisions: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.requests: list[str] = []
        self.wrong_content: dict[str, bytes] = {}  # sent in place of the true content
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.requests.append(self.path)
                code, headers, body = hub._answer(self.path.partition("?")[0])
                self.send_response(code)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def redirect_huggingface(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make huggingface_hub request its pages from this server."""
        url = self.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", self.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(downloads, "HfApi", lambda: huggingface_hub.HfApi(endpoint=self.url))

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, **files: bytes) -> str:
        """Add a commit to the branch main and return its hash. `a__b_json` stands for a/b.json."""
        named = {name.replace("__", "/")[::-1].replace("_", ".", 1)[::-1]: content for name, content in files.items()}
        sha = hashlib.sha1(repr(sorted(named.items())).encode()).hexdigest()
        self.revisions[sha] = named
        self.branches["main"] = sha
        return sha

    def _answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        api, pages = f"/api/models/{self.repo}", f"/{self.repo}/resolve/"
        if self.repo_type == "dataset":
            api, pages = f"/api/datasets/{self.repo}", f"/datasets{pages}"
        if path == api or path.startswith((f"{api}/revision/", f"{api}/tree/")):
            name = path.removeprefix(api).rpartition("/")[2] or "main"
            sha = self.branches.get(name, name)
            if sha not in self.revisions:
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            listing = [self._entry(name, content) for name, content in self.revisions[sha].items()]
            answer = listing if "/tree/" in path else {"id": self.repo, "sha": sha, "siblings": listing}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        if path.startswith(pages):
            sha, _, name = path.removeprefix(pages).partition("/")
            if name in self.revisions.get(sha, {}):
                content = self.revisions[sha][name]
                headers = {"ETag": f'"{self._entry(name, content)["oid"]}"', "X-Repo-Commit": sha}
                return 200, headers, self.wrong_content.get(name, content)
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        return 404, {"X-Error-Code": "RepoNotFound"}, b""

    def _entry(self, name: str, content: bytes) -> dict[str, Any]:
        sha256 = hashlib.sha256(content).hexdigest()
        entry = {"type": "file", "rfilename": name, "path": name, "size": len(content), "blobId": sha256[:40]}
        if not name.endswith(LFS_SUFFIXES):
            return entry | {"oid": sha256[:40]}
        lfs = {"sha256": sha256, "oid": sha256, "size": len(content), "pointerSize": 100}
        return entry | {"oid": sha256, "lfs": lfs}

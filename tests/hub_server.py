"""A hub on this machine that answers as huggingface.co does, as far as its clients ask to fetch models and data sets.

with Hub({"org/name": Repository(folder)}) as hub:
    subprocess.run([...], env=hub.environment(tmp_path / "cache"))
"""

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """A model, or a data set, with a folder for each commit."""

    main: Path
    tags: dict[str, Path] = field(default_factory=dict)
    gated: bool = False
    dataset: bool = False

    def commits(self) -> dict[str, Path]:
        """Hash -> folder."""
        return {sha(folder): folder for folder in [self.main, *self.tags.values()]}

    def at(self, revision: str) -> tuple[str, Path] | None:
        """Hash and folder of a branch, a tag or a hash."""
        folder = {"main": self.main, **self.tags, **self.commits()}.get(revision)
        return (sha(folder), folder) if folder else None


def sha(folder: Path) -> str:
    """The hash of the commit that a folder stands for."""
    return hashlib.sha1(str(folder).encode()).hexdigest()


class Hub:
    """Serves repositories by their ids while it is open; `asked` are the requests so far."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories, self.asked = repositories, list[str]()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                """Say nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, cache: Path, **more: str) -> dict[str, str]:
        """For a process that has this as its hub, and its cache in a folder."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        return kept | {"HF_ENDPOINT": self.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"} | more

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        if length := int(request.headers.get("Content-Length", 0)):
            request.rfile.read(length)
        parts = path.strip("/").split("/")
        api, parts = parts[0] == "api", parts[1:] if parts[0] == "api" else parts
        dataset = parts[0] == "datasets"
        parts = parts[1:] if parts[0] in ("datasets", "models") else parts
        name = "/".join(parts[:2])
        repository = self.repositories.get(name)
        if request.headers.get("Authorization") == "Bearer wrong":
            _refuse(request, 401, "Invalid credentials in Authorization header")
        elif repository is None or repository.dataset != dataset:
            _refuse(request, 404 if "Authorization" in request.headers else 401, "RepoNotFound")
        elif api:
            self._about(request, name, repository, parts[2:])
        elif repository.gated:
            _refuse(request, 403 if "Authorization" in request.headers else 401, "GatedRepo")
        elif (found := repository.at(parts[3])) is None:
            _refuse(request, 404, "RevisionNotFound")
        elif not (file := found[1].joinpath(*parts[4:])).is_file():
            _refuse(request, 404, "EntryNotFound", found[0])
        else:
            _send(request, file.read_bytes(), found[0])

    def _about(self, request: BaseHTTPRequestHandler, name: str, repository: Repository, parts: list[str]) -> None:
        """What the API says of a repository: its refs, its files, or all about a revision."""
        if parts[:1] == ["refs"]:
            refs = [
                {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha(f)} for tag, f in repository.tags.items()
            ]
            main = {"name": "main", "ref": "refs/heads/main", "targetCommit": sha(repository.main)}
            _send(request, json.dumps({"branches": [main], "tags": refs, "converts": []}).encode())
            return
        revision = parts[1] if parts[:1] in (["revision"], ["tree"]) else "main"
        if (found := repository.at(revision)) is None:
            _refuse(request, 404, "RevisionNotFound")
            return
        commit, folder = found
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if parts[:1] == ["tree"]:
            below = folder.joinpath(*parts[2:])
            if not below.exists():
                _refuse(request, 404, "EntryNotFound", commit)
                return
            entries: Any = [
                {
                    "type": "file",
                    "path": str(f.relative_to(folder)),
                    "size": f.stat().st_size,
                    "oid": etag(f.read_bytes()),
                }
                for f in files
                if f.is_relative_to(below)
            ]
        else:
            siblings = [{"rfilename": str(f.relative_to(folder)), "size": f.stat().st_size} for f in files]
            entries = {"id": name, "sha": commit, "siblings": siblings, "tags": [], "private": False, "downloads": 0}
            entries |= {"gated": "manual" if repository.gated else False}
        _send(request, json.dumps(entries).encode(), commit)


def etag(content: bytes) -> str:
    """What a file is known by."""
    return hashlib.sha1(content).hexdigest()


def _send(request: BaseHTTPRequestHandler, content: bytes, commit: str = "") -> None:
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.send_header("ETag", f'"{etag(content)}"')
    request.send_header("X-Repo-Commit", commit)
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(content)


def _refuse(request: BaseHTTPRequestHandler, status: int, code: str, commit: str = "") -> None:
    request.send_response(status)
    request.send_header("X-Error-Code", code)
    request.send_header("X-Error-Message", code)
    request.send_header("X-Repo-Commit", commit)
    request.send_header("Content-Length", "0")
    request.end_headers()

"""A Hugging Face hub on the loopback interface, for what its real clients ask of it.

Repositories are directories: ``<root>/{models,datasets}/<owner>/<name>/<commit>/…``.
"""

from __future__ import annotations

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

BRANCHES = {"main": "a" * 40, "v2": "b" * 40}
"""Commits of the branches that every repository may have."""

GATED = "org/gated"
"""A repository whose terms nobody has accepted."""


class Refused(Exception):
    """What the hub answers instead: a status and the code that its clients read."""

    def __init__(self, status: int, code: str) -> None:
        super().__init__(code)
        self.status, self.code = status, code


class _Handler(http.server.BaseHTTPRequestHandler):
    root: Path
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(f"{self.command} {unquote(self.path)}")
        length = int(self.headers.get("Content-Length", 0))
        posted = self.rfile.read(length).decode()
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        try:
            if parts[0] == "api":
                self._send_json(self._described(parts[1], "/".join(parts[2:4]), parts[4:], posted))
            else:
                kind = "datasets" if parts[0] == "datasets" else "models"
                parts = parts[1:] if kind == "datasets" else parts
                self._send_file(kind, "/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        except Refused as refused:
            self._send(refused.status, b"", {"X-Error-Code": refused.code})

    do_HEAD = do_POST = do_GET

    def _commit(self, kind: str, repo: str, revision: str) -> Path:
        if repo == GATED:
            raise Refused(403, "GatedRepo")
        if not (self.root / kind / repo).is_dir():
            raise Refused(404, "RepoNotFound")
        directory = self.root / kind / repo / BRANCHES.get(revision, revision)
        if not directory.is_dir():
            raise Refused(404, "RevisionNotFound")
        return directory

    def _described(self, kind: str, repo: str, rest: list[str], posted: str) -> Any:
        what, revision = rest[0] if rest else "revision", rest[1] if len(rest) > 1 else "main"
        directory = self._commit(kind, repo, revision)
        if what == "revision":
            files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
            names = [{"rfilename": path.relative_to(directory).as_posix()} for path in files]
            return {"id": repo, "sha": directory.name, "siblings": names, "tags": []}
        if what == "paths-info":
            asked = json.loads(posted)["paths"] if posted[0] == "{" else parse_qs(posted)["paths"]
            found = [directory / name for name in asked]
            return [_entry(directory, path) for path in found if path.exists()]
        if what != "tree":
            raise Refused(404, "EntryNotFound")
        inside = directory / "/".join(rest[2:])
        if not inside.is_dir():
            raise Refused(404, "EntryNotFound")
        everything = "recursive=true" in self.path.lower()
        listed = inside.rglob("*") if everything else inside.iterdir()
        return [_entry(directory, path) for path in sorted(listed)]

    def _send_file(self, kind: str, repo: str, revision: str, name: str) -> None:
        directory = self._commit(kind, repo, revision)
        if not (directory / name).is_file():
            raise Refused(404, "EntryNotFound")
        data = (directory / name).read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        headers = {"ETag": f'"{tag}"', "X-Repo-Commit": directory.name, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None:
            self._send(200, data, headers)
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        part = data[int(first) : int(last) + 1 if last else None]
        end = int(first) + len(part) - 1
        self._send(206, part, {**headers, "Content-Range": f"bytes {first}-{end}/{len(data)}"})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def _entry(directory: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(directory).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}
    oid = hashlib.sha1(path.read_bytes()).hexdigest()
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}


class Hub:
    """A running hub.

    Attributes:
        root: its repositories.
        url: its address, for ``HF_ENDPOINT``.
        asked: method and path of every request so far.
    """

    def __init__(self, root: Path) -> None:
        self.root, self.asked = root, []
        handler = type("Handler", (_Handler,), {"root": root, "asked": self.asked})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def repository(self, kind: str, name: str, branch: str = "main") -> Path:
        """The directory to put a repository's files into."""
        path = self.root / kind / name / BRANCHES[branch]
        path.mkdir(parents=True, exist_ok=True)
        return path


@contextmanager
def running_hub(root: Path) -> Iterator[Hub]:
    """A hub that answers while it lasts."""
    hub = Hub(root)
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        thread.join()

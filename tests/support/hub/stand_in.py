"""A server that answers as the Hugging Face Hub and ModelScope do, for repositories that tests put into it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "89abcdef0123456789abcdef0123456789abcdef"
TOKEN = "hf_stand_in"


@dataclass
class Repo:
    """One repository: files by commit, and branches. `gate` is "" (open), "terms" or "private"."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "master": COMMIT})
    gate: str = ""
    claimed: dict[str, int] = field(default_factory=dict)  # sizes that the listing says in place of the true ones


class Hub:
    """Repositories by name, what was asked of them, and how answers go wrong."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.asked: list[str] = []  # METHOD PATH [RANGE]
        self.cut_once: dict[str, int] = {}  # file: bytes after which its first download breaks off
        self.stalled: dict[str, int] = {}  # file: bytes after which its download waits for `go_on`
        self.go_on = threading.Event()
        self.reached = threading.Event()  # a stalled download has got so far
        self.status = 200  # of every answer about a repository
        self.url = ""

    def add(self, name: str, files: dict[str, bytes], **more: Any) -> Repo:
        repo = self.repos[name] = Repo({COMMIT: files}, **more)
        return repo

    def downloads(self) -> list[str]:
        """Return the files whose content was asked for, in order."""
        found = [re.match(r"GET /.+/resolve/[^/]+/(\S+)|GET /api/v1/.*FilePath=(\S+)", each) for each in self.asked]
        return [match[1] or match[2] for match in found if match]


@contextmanager
def running_hub() -> Iterator[Hub]:
    """Run a hub on a free port of this machine."""
    hub = Hub()

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        ranged = self.headers.get("Range")
        self.hub.asked.append(" ".join(filter(None, [self.command, unquote(self.path), ranged])))
        url = urlsplit(self.path)
        path, query = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.hub.status != 200:
            self._json({"error": "stand-in"}, self.hub.status)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._info(match[1], match[2] or "main")
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(.+)", path):
            self._tree(match[1], match[2])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(match[1], match[2], match[3])
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo/files", path):
            self._scope_files(match[1], query)
        elif match := re.fullmatch(r"/api/v1/models/([^/]+/[^/]+)/repo", path):
            self._scope_file(match[1], query)
        elif match := re.match(r"/(?:api|openapi)/v1/models/([^/]+/[^/]+)", path):
            known = match[1] in self.hub.repos
            self._json({"Code": 200 if known else 404, "Success": known, "Data": {"Id": 1}}, 200 if known else 404)
        else:
            self._json({"error": "not a path of the stand-in"}, 404)

    def _found(self, name: str, revision: str, content: bool = False) -> tuple[str, dict[str, bytes]] | None:
        """Return commit and files of a revision, None after an answer that says why not."""
        repo, signed = self.hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.gate == "private" and not signed):
            self._refuse(401, "RepoNotFound")
        elif repo.gate == "terms" and content and not signed:
            self._refuse(403, "GatedRepo")
        elif (commit := repo.branches.get(revision, revision)) not in repo.commits:
            self._refuse(404, "RevisionNotFound")
        else:
            return commit, repo.commits[commit]
        return None

    def _sizes(self, name: str, files: dict[str, bytes]) -> dict[str, int]:
        return {file: self.hub.repos[name].claimed.get(file, len(data)) for file, data in files.items()}

    def _info(self, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            sizes = self._sizes(name, found[1])
            siblings = [{"rfilename": file, "size": size, "blobId": "0" * 40} for file, size in sizes.items()]
            self._json({"id": name, "modelId": name, "sha": found[0], "siblings": siblings, "private": False})

    def _tree(self, name: str, revision: str) -> None:
        if found := self._found(name, revision):
            sizes = self._sizes(name, found[1])
            tree = [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in sizes.items()]
            self._json(tree)

    def _file(self, name: str, revision: str, file: str) -> None:
        found = self._found(name, revision, content=True)
        if found is None:
            return
        if file not in found[1]:
            self._refuse(404, "EntryNotFound")
            return
        data = found[1][file]
        self._data(file, data, {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": found[0]})

    def _scope_files(self, name: str, query: dict[str, str]) -> None:
        repo = self.hub.repos.get(name)
        commit = repo and repo.branches.get(query["Revision"], query["Revision"])
        if repo is None or commit not in repo.commits:
            self._json({"Code": 10010205001, "Message": "not found", "Success": False}, 404)
            return
        files = [
            {"Path": file, "Name": file, "Size": len(data), "Type": "blob", "Sha256": hashlib.sha256(data).hexdigest()}
            for file, data in repo.commits[commit].items()
        ]
        self._json({"Code": 200, "Success": True, "Data": {"Files": files, "LatestCommitter": {}}})

    def _scope_file(self, name: str, query: dict[str, str]) -> None:
        repo = self.hub.repos[name]
        data = repo.commits[repo.branches.get(query["Revision"], query["Revision"])][query["FilePath"]]
        self._data(query["FilePath"], data, {})

    def _data(self, file: str, data: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(match[1]) if match else 0
        part = data[start : int(match[2]) + 1 if match and match[2] else None]
        self.send_response(206 if match else 200)
        for key, value in headers.items():
            self.send_header(key, value)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if (cut := self.hub.cut_once.pop(file, None)) is not None:
            self.wfile.write(part[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        elif (held := self.hub.stalled.get(file)) is not None:
            self.wfile.write(part[:held])
            self.wfile.flush()
            self.hub.reached.set()
            self.hub.go_on.wait()
            with contextlib.suppress(OSError):  # the client has left
                self.wfile.write(part[held:])
        else:
            self.wfile.write(part)

    def _refuse(self, status: int, code: str) -> None:
        self._json({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        for key, text in (headers or {}).items():
            self.send_header(key, text)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

"""A hub of one's own on 127.0.0.1: the few routes of the Hugging Face Hub that finding and fetching a model needs."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from attrs import Factory, define, frozen


@frozen
class Seen:
    """One request: method, path, its Range header, and how many bytes of content went out."""

    method: str
    path: str
    range: str | None
    sent: int
    token: str | None


@define
class Hub:
    """Repositories: name → revision (branch, tag or commit) → (commit, folder). `token` is needed for names in `gated`."""

    revisions: dict[str, dict[str, tuple[str, Path]]] = Factory(dict)
    gated: set[str] = Factory(set)
    private: set[str] = Factory(set)
    token: str = "hf_secret"
    knows_ranges: bool = True
    is_down: bool = False
    tells_sizes: bool = True
    pause_seconds: float = 0.0  # before each 64 KiB of a tensor file that is asked for whole
    seen: list[Seen] = Factory(list)
    url: str = ""

    def add(self, name: str, folder: Path, *revisions: str) -> str:
        """Publish a folder under some revisions; returns its commit."""
        commit = hashlib.sha1(f"{name}{folder}".encode()).hexdigest()
        for revision in (*revisions, commit):
            self.revisions.setdefault(name, {})[revision] = (commit, folder)
        return commit

    def sent(self, suffix: str) -> int:
        """Bytes that went out of files whose names end like that."""
        return sum(request.sent for request in self.seen if request.path.endswith(suffix))


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = urlsplit(self.path).path  # still quoted: a revision may hold slashes
        about = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        name, revision = (unquote(part or "main") for part in (about or file or re.fullmatch("(.*)()", path)).group(1, 2))
        known = self.hub.revisions.get(name)
        is_trusted = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if self.hub.is_down:
            return self.answer(503, b"down for maintenance")
        if known is None or (name in self.hub.private and not is_trusted):
            return self.answer(401, b"Repository not found", {"X-Error-Code": "RepoNotFound"})
        if name in self.hub.gated and not is_trusted and file:
            return self.answer(403, b"gated", {"X-Error-Code": "GatedRepo"})
        if revision not in known:
            return self.answer(404, b"no such revision", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = known[revision]
        if file is None:
            return self.answer(200, json.dumps(describe(name, commit, folder)).encode(), {"Content-Type": "application/json"})
        target = folder / unquote(file[3])
        if not target.is_file():
            return self.answer(404, b"no such file", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self.answer_file(target.read_bytes(), commit)

    def answer_file(self, content: bytes, commit: str) -> None:
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if wanted is None or not self.hub.knows_ranges:
            return self.answer(200, content, headers)
        begin, end = int(wanted[1]), min(int(wanted[2] or len(content) - 1), len(content) - 1)
        if begin >= len(content):
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if self.hub.tells_sizes:
            headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self.answer(206, content[begin : end + 1], headers)

    def answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        if self.hub.tells_sizes or status != 206:
            self.send_header("Content-Length", str(len(content)))
        else:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        sent = 0
        if self.command != "HEAD":
            for begin in range(0, len(content), 1 << 16):
                if self.headers.get("Range") is None and len(content) > 1 << 20:
                    time.sleep(self.hub.pause_seconds)
                try:
                    self.wfile.write(content[begin : begin + (1 << 16)])
                except OSError:  # the client has what it wanted
                    break
                sent += len(content[begin : begin + (1 << 16)])
        token = self.headers.get("Authorization")
        self.hub.seen.append(Seen(self.command, unquote(urlsplit(self.path).path), self.headers.get("Range"), sent, token))


def describe(name: str, commit: str, folder: Path) -> dict[str, Any]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    siblings = [{"rfilename": str(path.relative_to(folder)), "size": path.stat().st_size} for path in files]
    return {
        "_id": "0",
        "id": name,
        "modelId": name,
        "sha": commit,
        "private": False,
        "tags": [],
        "downloads": 0,
        "siblings": siblings,
    }


def loopback_is_up() -> bool:
    """Whether this machine can talk to itself; not so in a network namespace whose loopback interface was never switched on."""
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        return client.connect_ex(server.getsockname()) == 0


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that runs while the block does; what it holds may be changed meanwhile."""
    if not loopback_is_up():
        pytest.skip("the loopback interface is down, so there can be no local hub to talk to")
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Answer", (_Answer,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

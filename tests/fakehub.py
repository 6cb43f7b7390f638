"""A server that speaks as much of the hub's protocol as fetching models takes."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories as `files[repo][name] = data`, and what goes wrong with them.

    `gated`: repositories that want a token. `cut`: bytes after which the connection ends, for each
    answer in turn. `corrupt`: files of which other data is sent than the hub says. `hold`: bytes
    after which the first answer waits for `go_on`; `waiting` is set then. `cdn`: another server,
    which has the data of the files; this one only says so.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.cut: list[int] = []
        self.corrupt: set[str] = set()
        self.hold: int | None = None
        self.waiting, self.go_on = threading.Event(), threading.Event()
        self.cdn = ""
        self.sent = 0
        self.ranges: list[str] = []
        self.tokens: set[str | None] = set()
        self.url = ""

    def siblings(self, repo: str) -> list[dict[str, object]]:
        return [
            {
                "rfilename": name,
                "size": len(data),
                "lfs": {"sha256": sha256(data), "size": len(data), "pointerSize": 134},
            }
            for name, data in self.files[repo].items()
        ]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@contextmanager
def serving() -> Iterator[FakeHub]:
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/.+)?", path)
        resolve = re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        found = api or resolve
        if found is None:  # as what huggingface_hub asks once a day for its own purposes
            return self._refuse(404, "")
        self.hub.tokens.add(self.headers.get("Authorization"))
        repo = found[1]
        if repo not in self.hub.files:
            return self._refuse(404, "RepoNotFound")
        if repo in self.hub.gated and resolve and not self.headers.get("Authorization"):
            return self._refuse(401, "GatedRepo")
        if api:
            told = {"id": repo, "sha": COMMIT, "siblings": self.hub.siblings(repo)}
            return self._send(json.dumps(told).encode(), {"Content-Type": "application/json"})
        assert resolve is not None
        if self.hub.cdn and body:
            return self._send(b"", {"Location": self.hub.cdn + self.path}, 302)
        data = self.hub.files[repo].get(resolve[2])
        if data is None:
            return self._refuse(404, "EntryNotFound")
        return self._file(data, resolve[2], body)

    def _refuse(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def _file(self, data: bytes, name: str, body: bool) -> None:
        headers = {
            "ETag": f'"{sha256(data)}"',
            "X-Linked-ETag": f'"{sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        if not body:
            return self._send(data, headers, body=False)
        status, start, end = 200, 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked:
            self.hub.ranges.append(asked[0])
            status, start = 206, int(asked[1])
            end = min(int(asked[2]) + 1 if asked[2] else end, end)
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        if name in self.hub.corrupt:
            data = bytes(byte ^ 1 for byte in data)
        return self._send(data[start:end], headers, status)

    def _send(
        self, data: bytes, headers: dict[str, str], status: int = 200, body: bool = True
    ) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if not body or self.command == "HEAD":
            return
        if "ETag" in headers and self.hub.hold is not None:
            data = self._wait(data)
        if "ETag" in headers and self.hub.cut:
            limit = self.hub.cut.pop(0)
            if limit < len(data):
                data = data[:limit]
                self.close_connection = True
        try:
            self.wfile.write(data)
        except OSError:  # the client is gone
            self.close_connection = True
        else:
            self.hub.sent += len(data)

    def _wait(self, data: bytes) -> bytes:
        hold, self.hub.hold = self.hub.hold, None
        self.wfile.write(data[:hold])
        self.wfile.flush()
        self.hub.waiting.set()
        self.hub.go_on.wait()
        return data[hold:]

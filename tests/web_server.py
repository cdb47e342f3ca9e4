"""A real web server with faults, for tests of remote reading; it also lists like S3.

with WebServer({"/a/x.tar": data}) as server:
    server.fail("stall", times=2)
    storage.open(server.url("/a/x.tar"))
    server.requests  # what it was asked
"""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit


@dataclass(frozen=True)
class Request:
    method: str
    path: str  # decoded
    query: str
    range: tuple[int, int] | None  # first byte, end


class WebServer:
    """Serves `files` ({path: bytes}) on this machine.

    tags: {path: etag}, else a hash of the content; "" sends none. fail(kind, times): the next requests of a file
    fail so; times=None: all. Kinds: a status ("503"), "silent" (never answers), "stall" (half the body, then
    nothing), "reset" (half the body, then a reset), "short" (half the body, then the end), "long" (a
    Content-Length above the body), "few" (a consistent answer with half the range), "ignore" (200 with
    everything), "shifted" (another range).
    """

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = dict(files)
        self.tags: dict[str, str] = {}
        self.requests: list[Request] = []
        self.retry_after: str | None = None
        self.delay_s = 0.0
        self.lock = threading.Lock()
        self._faults: list[list[Any]] = []
        self._closing = threading.Event()

        class Handler(_Handler):
            server_ = self

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> WebServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def url(self, path: str) -> str:
        return self.origin + path

    def fail(self, kind: str, times: int | None = 1) -> None:
        with self.lock:
            self._faults.append([kind, times])

    def heal(self) -> None:
        with self.lock:
            self._faults.clear()

    def next_fault(self) -> str:
        with self.lock:
            while self._faults:
                fault = self._faults[0]
                if fault[1] is None:
                    return str(fault[0])
                if fault[1] > 0:
                    fault[1] -= 1
                    return str(fault[0])
                self._faults.pop(0)
        return ""

    def sleep(self, seconds: float) -> None:
        self._closing.wait(seconds)

    def ranges(self) -> list[tuple[int, int] | None]:
        return [request.range for request in self.requests]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_: WebServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        server = self.server_
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        asked = self.headers.get("Range")
        span = None
        if asked:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            span = (int(first), int(last) + 1)
        with server.lock:
            server.requests.append(Request(self.command, path, parts.query, span))
        query = parse_qs(parts.query)
        if "list-type" in query:
            self._list(path, query)
            return
        fault = server.next_fault()
        if server.delay_s:
            server.sleep(server.delay_s)
        if fault == "silent":
            server.sleep(60)
            self.close_connection = True
            return
        data = server.files.get(path)
        if fault.isdecimal() or data is None:
            self.send_response(int(fault) if fault.isdecimal() else 404)
            if server.retry_after is not None:
                self.send_header("Retry-After", server.retry_after)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        tag = server.tags.get(path, f'"{hashlib.sha256(data).hexdigest()[:16]}"')
        if span is None or fault == "ignore":
            self.send_response(200)
            payload = data
        elif span[0] >= len(data):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(data)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        else:
            start, end = span[0], min(span[1], len(data))
            if fault == "shifted":
                start, end = start + 1, end + 1
            if fault == "few":
                end = start + (end - start) // 2
            payload = data[start:end]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        if tag:
            self.send_header("ETag", tag)
        length = len(payload) + (10 if fault == "long" else 0)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        if not body:
            return
        if fault in ("stall", "reset", "short"):
            self.wfile.write(payload[: len(payload) // 2])
            self.wfile.flush()
            self.close_connection = True
            if fault == "stall":
                server.sleep(60)
            if fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            return
        self.wfile.write(payload)
        if fault == "long":
            self.wfile.flush()
            self.close_connection = True

    def _list(self, path: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        root = path.rstrip("/") + "/"
        keys = sorted(name[len(root) :] for name in self.server_.files if name.startswith(root + prefix))
        items = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.server_.files[root + key])}</Size>"
            '<ETag>"x"</ETag><LastModified>2024-01-01T00:00:00.000Z</LastModified></Contents>'
            for key in keys
        )
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>b</Name><Prefix>{prefix}</Prefix>'
            f"<KeyCount>{len(keys)}</KeyCount><IsTruncated>false</IsTruncated>{items}</ListBucketResult>"
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

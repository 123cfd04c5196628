"""A web server on 127.0.0.1 that misbehaves as each test scripts it, and keeps a record of what it was asked."""

import contextlib
import gzip
import http.server
import os
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

XML = b'<?xml version="1.0" encoding="utf-8"?><Error><Code>NoSuchBucket</Code></Error>'
HTML = b"\n  <!DOCTYPE html><html><body>Sign in to the network</body></html>"


@dataclass
class Asked:
    """One request: its path, where its Range began (None without one), its headers, the bytes of body it was sent."""

    path: str
    start: int | None
    headers: dict
    sent: int = 0


class Server:
    """`files` by path ("/124M/vocab.bpe"); `script[path]` is what happens to the next requests, one behaviour each.

    Once a path's script is over, `always[path]` happens to it, and where there is none the file is served right.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.script: dict[str, list[Behaviour]] = defaultdict(list)
        self.always: dict[str, Behaviour] = {}
        self.requests: list[Asked] = []
        self.released = threading.Event()  # lets go of the sockets that stall
        self._lock = threading.Lock()

    def __enter__(self):
        outer = self

        class Bound(Handler):
            owner = outer

        self._http = _Quiet(("127.0.0.1", 0), Bound)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.released.set()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()

    def receive(self, asked: Asked) -> "Behaviour":
        """Take down a request, before anything of the answer is sent, and return what happens to it."""
        with self._lock:
            self.requests.append(asked)
            queue = self.script[asked.path]
            return queue.pop(0) if queue else self.always.get(asked.path, right)

    def sent(self, path: str) -> int:
        """Bytes of body sent for a path, all requests together."""
        return sum(asked.sent for asked in self.requests if asked.path == path)

    def starts(self, path: str) -> list[int | None]:
        """Where the Range of each request for a path began."""
        return [asked.start for asked in self.requests if asked.path == path]


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the handlers
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Clients that hang up are what the tests are about."""


class Handler(http.server.BaseHTTPRequestHandler):
    owner: Server
    protocol_version = "HTTP/1.1"
    timeout = 10

    def do_GET(self):
        self.close_connection = True
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.start = int(match[1]) if match else None
        body = self.owner.files.get(self.path)
        self.asked = Asked(self.path, self.start, dict(self.headers))
        behaviour = self.owner.receive(self.asked)
        with contextlib.suppress(OSError):
            (status(404) if body is None else behaviour)(self, body)

    def log_message(self, *args):
        """Say nothing."""

    def head(self, code: int, length: int | None, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def right_head(self, body: bytes) -> bytes:
        """Answer as a good server does; return the body to send."""
        if self.start is None:
            self.head(200, len(body), Content_Type="application/octet-stream")
            return body
        if self.start >= len(body):
            self.head(416, 0, Content_Range=f"bytes */{len(body)}")
            return b""
        rest = body[self.start :]
        self.head(206, len(rest), Content_Range=f"bytes {self.start}-{len(body) - 1}/{len(body)}")
        return rest

    def send(self, data: bytes) -> None:
        self.asked.sent += len(data)  # before the client can have seen it
        self.wfile.write(data)


Behaviour = Callable[[Handler, bytes], None]
"""What the server does with one request for a file of these bytes."""


def right(handler: Handler, body: bytes) -> None:
    handler.send(handler.right_head(body))


def status(code: int, **headers: str) -> Behaviour:
    """Another status, with a body that is not the file."""

    def behave(handler, body):
        handler.head(code, len(XML), **headers)
        handler.wfile.write(XML)

    return behave


def page(content: bytes = XML, content_type: str = "application/xml", code: int = 200) -> Behaviour:
    """A page with a status that says all is well."""

    def behave(handler, body):
        handler.head(code, len(content), Content_Type=content_type)
        handler.send(content)

    return behave


def cut(n: int) -> Behaviour:
    """Close the connection after n bytes of the body."""

    def behave(handler, body):
        handler.send(handler.right_head(body)[:n])

    return behave


def reset(n: int) -> Behaviour:
    """Reset the connection after n bytes of the body."""

    def behave(handler, body):
        handler.send(handler.right_head(body)[:n])
        handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(handler.connection.detach())

    return behave


def hang_up(handler: Handler, body: bytes) -> None:
    """Close the connection without a word."""


def stall(n: int | None) -> Behaviour:
    """Send n bytes of the body and then nothing, with the connection open; None: not even a status."""

    def behave(handler, body):
        if n is not None:
            handler.send(handler.right_head(body)[:n])
        handler.owner.released.wait()

    return behave


def slow(chunk: int, seconds: float, until: int | None = None) -> Behaviour:
    """Send the body a chunk at a time; what lies beyond `until` bytes all at once."""

    def behave(handler, body):
        rest = handler.right_head(body)
        until_ = len(rest) if until is None else until
        for at in range(0, until_, chunk):
            handler.send(rest[at : min(at + chunk, until_)])
            time.sleep(seconds)
        handler.send(rest[until_:])

    return behave


def wrong_length(delta: int) -> Behaviour:
    """Say that the file is longer, or shorter, than it is."""

    def behave(handler, body):
        handler.head(200, len(body) + delta)
        handler.send(body)

    return behave


def ignores_range(n: int | None = None) -> Behaviour:
    """Send the file from the start, whatever was asked for; its first n bytes alone."""

    def behave(handler, body):
        handler.start = None
        handler.send(handler.right_head(body)[:n])

    return behave


def wrong_range(first: int = 0, total: int | None = None, says_length: bool = True) -> Behaviour:
    """Answer a Range with another one; a request without a Range is answered right."""

    def behave(handler, body):
        if handler.start is None:
            return right(handler, body)
        rest, size = body[first:], total or len(body)
        length = len(rest) if says_length else None
        handler.head(206, length, Content_Range=f"bytes {first}-{len(body) - 1}/{size}")
        handler.send(rest)

    return behave


def refuses_range(handler: Handler, body: bytes) -> None:
    """416 to any Range, which also a server without that part of the file answers."""
    if handler.start is None:
        return right(handler, body)
    handler.head(416, 0, Content_Range=f"bytes */{len(body)}")


def no_length(extra: bytes = b"") -> Behaviour:
    """No Content-Length: the end of the connection is the end of the body."""

    def behave(handler, body):
        handler.head(200, None)
        handler.send(body + extra)

    return behave


def chunked(n: int | None = None) -> Behaviour:
    """Chunked encoding; with n, cut there before the last chunk."""

    def behave(handler, body):
        handler.head(200, None, Transfer_Encoding="chunked")
        for piece in (body[: len(body) // 3], body[len(body) // 3 :]):
            room = len(piece) if n is None else max(n - handler.asked.sent, 0)
            if not piece:
                continue
            handler.wfile.write(f"{len(piece):x}\r\n".encode())
            handler.send(piece[:room])
            if room < len(piece):
                return
            handler.wfile.write(b"\r\n")
        if n is None:
            handler.wfile.write(b"0\r\n\r\n")

    return behave


def gzipped(handler: Handler, body: bytes) -> None:
    packed = gzip.compress(body)
    handler.head(200, len(packed), Content_Encoding="gzip")
    handler.send(packed)


def garbage(handler: Handler, body: bytes) -> None:
    """Other bytes, as many."""
    flipped = bytes(byte ^ 0x55 for byte in body)
    handler.send(handler.right_head(flipped))

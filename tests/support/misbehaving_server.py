"""A web server on 127.0.0.1 that fails as each test scripts it, and records the requests."""

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
    """One request: its path, the start of its Range (or None), its headers, and the number of body bytes sent."""

    path: str
    start: int | None
    headers: dict
    sent: int = 0


class Server:
    """`files` by path ("/124M/vocab.bpe"). `script[path]` lists the behaviors for the next requests, one for each.

    After a path's script has ended, `always[path]` is used. Without it, the right file is sent.
    """

    def __init__(self, files: dict[str, bytes]):
        self.files = files
        self.script: dict[str, list[Behaviour]] = defaultdict(list)
        self.always: dict[str, Behaviour] = {}
        self.requests: list[Asked] = []
        self.released = threading.Event()  # releases the sockets that stall
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
        """Record a request before any byte of the answer is sent, and return its behavior."""
        with self._lock:
            self.requests.append(asked)
            queue = self.script[asked.path]
            return queue.pop(0) if queue else self.always.get(asked.path, right)

    def sent(self, path: str) -> int:
        """The number of body bytes sent for a path in all requests."""
        return sum(asked.sent for asked in self.requests if asked.path == path)

    def starts(self, path: str) -> list[int | None]:
        """The start of the Range of each request for a path."""
        return [asked.start for asked in self.requests if asked.path == path]


class _Quiet(http.server.ThreadingHTTPServer):
    daemon_threads = False  # so that closing waits for the handlers
    request_queue_size = 64

    def handle_error(self, request, client_address):
        """Print nothing: the tests expect clients that hang up."""


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
        """Print nothing."""

    def head(self, code: int, length: int | None, **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.send_header("Connection", "close")
        self.end_headers()

    def right_head(self, body: bytes) -> bytes:
        """Answer correctly. Return the body to send."""
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
        self.asked.sent += len(data)  # counted before the client can see it
        self.wfile.write(data)


Behaviour = Callable[[Handler, bytes], None]
"""The server's behavior for one request for a file with these bytes."""


def right(handler: Handler, body: bytes) -> None:
    handler.send(handler.right_head(body))


def status(code: int, **headers: str) -> Behaviour:
    """Another status, with a body that is not the file."""

    def behave(handler, body):
        handler.head(code, len(XML), **headers)
        handler.wfile.write(XML)

    return behave


def page(content: bytes = XML, content_type: str = "application/xml", code: int = 200) -> Behaviour:
    """A page with a success status."""

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
    """Close the connection without an answer."""


def stall(n: int | None) -> Behaviour:
    """Send n bytes of the body and then nothing, with the connection open. None: do not even send a status."""

    def behave(handler, body):
        if n is not None:
            handler.send(handler.right_head(body)[:n])
        handler.owner.released.wait()

    return behave


def slow(chunk: int, seconds: float, until: int | None = None) -> Behaviour:
    """Send the body in chunks. Send the bytes after `until` all at once."""

    def behave(handler, body):
        rest = handler.right_head(body)
        until_ = len(rest) if until is None else until
        for at in range(0, until_, chunk):
            handler.send(rest[at : min(at + chunk, until_)])
            time.sleep(seconds)
        handler.send(rest[until_:])

    return behave


def wrong_length(delta: int) -> Behaviour:
    """Give a length for the file that is too long or too short."""

    def behave(handler, body):
        handler.head(200, len(body) + delta)
        handler.send(body)

    return behave


def ignores_range(n: int | None = None) -> Behaviour:
    """Ignore the Range and send the file from the start, only its first n bytes."""

    def behave(handler, body):
        handler.start = None
        handler.send(handler.right_head(body)[:n])

    return behave


def wrong_range(first: int = 0, total: int | None = None, says_length: bool = True) -> Behaviour:
    """Answer a Range with another one. Answer a request without a Range correctly."""

    def behave(handler, body):
        if handler.start is None:
            return right(handler, body)
        rest, size = body[first:], total or len(body)
        length = len(rest) if says_length else None
        handler.head(206, length, Content_Range=f"bytes {first}-{len(body) - 1}/{size}")
        handler.send(rest)

    return behave


def refuses_range(handler: Handler, body: bytes) -> None:
    """Answer 416 to any Range, like a server without that part of the file."""
    if handler.start is None:
        return right(handler, body)
    handler.head(416, 0, Content_Range=f"bytes */{len(body)}")


def no_length(extra: bytes = b"") -> Behaviour:
    """Send no Content-Length. The body ends with the connection."""

    def behave(handler, body):
        handler.head(200, None)
        handler.send(body + extra)

    return behave


def chunked(n: int | None = None) -> Behaviour:
    """Chunked encoding. With n, the body is cut there, before the last chunk."""

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
    """The same number of other bytes."""
    flipped = bytes(byte ^ 0x55 for byte in body)
    handler.send(handler.right_head(flipped))

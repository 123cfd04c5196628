"""Fetch one file from one web address. Resume a `.part` file, retry if it may help, refuse answers that are not a file.

This module handles only HTTP and disks. It does not depend on GPT-2.
"""

from __future__ import annotations

import email.utils
import errno
import http.client
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal

if TYPE_CHECKING:
    from http.client import HTTPResponse

Report = Callable[[str, int, int | None], None]
"""Called with a file's name, the number of bytes that have arrived, and the total number or None."""

CHUNK = 1 << 20
LONGEST_PAUSE = 60.0  # seconds between attempts, at most, for any backoff and Retry-After
LARGEST_UNKNOWN = 1 << 26  # bytes: the limit for files of unknown size, which are all small
RETRIED = (408, 425, 429)  # HTTP status codes; also 500 to 599
MARKUP_TYPES = ("text/html", "text/xml", "application/xml", "application/xhtml+xml")
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*<(?:\?xml|!doctype|html|error)", re.IGNORECASE)


class Refused(Exception):
    """The answer is not the file, and another attempt would not change that."""


class Failed(Exception):
    """An attempt failed, and another may succeed. `retry_after`: the seconds that the server asks to wait."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class RangeWrong(Failed):
    """The server answered a request for the rest of a file without the requested range."""


class RangeBeyond(Failed):
    """The server says that the file ends before the bytes asked for."""


class Stopped(Exception):
    """The caller asked to stop. Nothing is written or removed afterwards, because another process may use the files."""


def transfer(
    url: str,
    part: Path,
    size: int | None,
    *,
    timeout: float,
    attempts: int,
    backoff: float,
    stop: threading.Event,
    report: Report,
) -> None:
    """Fetch `url` into `part`. If `part` already has bytes, the transfer continues after them.

    Args:
      url: the address of the file.
      part: the file to write.
      size: the file's exact size in bytes. None accepts the size that the server gives.
      timeout: seconds without an answer or another byte after which an attempt fails.
      attempts: the number of consecutive attempts that may bring no new bytes.
      backoff: seconds to wait before the second attempt, doubled each time.
      stop: the caller sets it to end the transfer within one chunk.
      report: called when bytes arrive.

    Raises:
      Refused: the address does not hold the file.
      Failed: the last attempt failed. The message says how.
      Stopped: `stop` was set.
      OSError: the disk is full, or `part` cannot be written. The bytes that arrived are kept.
    """
    furthest, fruitless, resume = length(part), 0, True
    while True:
        try:
            return _attempt(url, part, size, resume, timeout, stop, report)
        except Failed as failure:
            if stop.is_set():
                raise Stopped from None
            if isinstance(failure, RangeBeyond):
                part.unlink(missing_ok=True)
            resume = resume and not isinstance(failure, RangeWrong)
            here = length(part)
            fruitless = 0 if here > furthest else fruitless + 1
            furthest = max(here, furthest)
            if fruitless >= attempts:
                raise Failed(f"{failure} ({fruitless} attempts)" if fruitless > 1 else str(failure)) from failure
            doubled = 2 ** min(max(fruitless - 1, 0), 16)
            wait = backoff * doubled * random.uniform(0.5, 1)  # so that clients do not retry all at the same time
            _pause(stop, min(max(wait, failure.retry_after), LONGEST_PAUSE))


def _attempt(
    url: str, part: Path, size: int | None, resume: bool, timeout: float, stop: threading.Event, report: Report
) -> None:
    """Send one request, and write the answer."""
    if stop.is_set():
        raise Stopped
    here = length(part)
    if size is not None and here > size:
        part.unlink()
        here = 0
    if here and here == size:  # complete: the caller checks the content
        return
    asked = here if resume else 0
    with _open(url, asked, timeout) as response:
        start, total = _accepted(response, asked, size)
        _receive(response, part, start, total, timeout, stop, report)


def _open(url: str, asked: int, timeout: float) -> HTTPResponse:
    """Request the bytes from `asked` on. Errors become Failed or Refused."""
    import ssl
    import urllib.error
    import urllib.request

    headers = {"User-Agent": "gpt2-jax", "Accept-Encoding": "identity"}
    if asked:
        headers["Range"] = f"bytes={asked}-"
    try:
        return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        status = f"{error.code} {error.reason}".strip()
        if error.code == 416 and asked:
            raise RangeBeyond(f"{status} for the bytes from {asked} on") from error
        if error.code in RETRIED or 500 <= error.code < 600:
            raise Failed(status, _seconds(error.headers.get("Retry-After"))) from error
        raise Refused(status) from error
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, TimeoutError):
            raise Failed(f"no answer within {timeout:g} s") from error
        kind = Refused if isinstance(cause, ssl.SSLCertVerificationError) else Failed
        raise kind(_described(cause)) from error
    except UnicodeError as error:  # an invalid host name
        raise Refused(f"not a web address ({error})") from error


def _accepted(response: HTTPResponse, asked: int, size: int | None) -> tuple[int, int | None]:
    """Check an answer before its body is read. Return the position of the body in the file and the file's length."""
    headers = response.headers
    if (kind := headers.get_content_type()) in MARKUP_TYPES:
        raise Refused(f"answered with a page ({kind}) instead of the file")
    if (encoding := headers.get("Content-Encoding", "").strip().lower()) not in ("", "identity"):
        raise Refused(f"answered with Content-Encoding {encoding}, which was not asked for")
    start, total = 0, response.length
    if response.status == 206:
        start, total = _range(headers.get("Content-Range", ""), asked, size)
    elif response.status != 200:
        raise Refused(f"answered {response.status} {response.reason}".strip())
    if size is None:
        if total is None and not response.chunked:
            raise Refused("does not say how long the file is")
        if total == 0 or (total or 0) > LARGEST_UNKNOWN:
            raise Refused(f"has a file of {total} bytes, which is not a valid size")
    elif total is not None and total != size:
        raise Refused(f"has a file of {total} bytes instead of {size}")
    return start, size if total is None else total


def _range(content_range: str, asked: int, size: int | None) -> tuple[int, int]:
    """Check that a partial answer has the requested range. Return its first byte and the length of the file."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip())
    if not asked or match is None or int(match[1]) != asked:
        raise RangeWrong(f"was asked for the bytes from {asked} on, but answered with Content-Range {content_range!r}")
    if match[3] != "*":
        return asked, int(match[3])
    return asked, size or int(match[2]) + 1


def _receive(
    response: HTTPResponse,
    part: Path,
    start: int,
    total: int | None,
    timeout: float,
    stop: threading.Event,
    report: Report,
) -> None:
    """Write the body to `part` from byte `start` on, as it arrives."""
    at, left = start, response.length
    chunk = _read(response, left, timeout, at, total)
    if stop.is_set():
        raise Stopped
    if not start and is_markup(chunk):  # checked before the old part is overwritten
        raise Refused("answered with a page (HTML or XML) instead of the file")
    with _writable(part, "ab" if start else "wb") as file:
        report(part.stem, at, total)
        while chunk:
            if stop.is_set():
                raise Stopped
            if at + len(chunk) > (LARGEST_UNKNOWN if total is None else total):
                part.unlink()
                raise Refused(f"sends more than the {total or LARGEST_UNKNOWN} bytes of the file")
            _write(file, chunk, part)
            at += len(chunk)
            report(part.stem, at, total)
            left = None if left is None else left - len(chunk)
            chunk = _read(response, left, timeout, at, total)
    if total is not None and at < total:
        raise Failed(f"the body was cut at byte {at} of {total}")


def _read(response: HTTPResponse, left: int | None, timeout: float, at: int, total: int | None) -> bytes:
    """Return the bytes that have arrived: at least one, or none at the end. No buffer can lose them."""
    where = f"at byte {at}" + ("" if total is None else f" of {total}")
    try:
        return b"" if left == 0 else response.read1(CHUNK if left is None else min(CHUNK, left))
    except TimeoutError as error:
        raise Failed(f"stalled {where}: no data for {timeout:g} s") from error
    except http.client.IncompleteRead as error:
        raise Failed(f"the body was cut {where}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{_described(error)} {where}") from error


def _writable(part: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    try:
        return part.open(mode, buffering=0)  # no buffer: a kill loses no bytes that arrived
    except OSError as error:
        raise disk_error(error, part) from error


def _write(file: BinaryIO, chunk: bytes, part: Path) -> None:
    """Write a whole chunk. On a nearly full disk, one call may write only a part of it."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise disk_error(error, part) from error


def disk_error(error: OSError, path: Path) -> OSError:
    """Return an error with a clear message about writing `path`, and with the same errno."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(f"no room left on the disk while writing {path}", error.errno)
    clear = type(error)(f"cannot write {path}: {error.strerror or error}")
    clear.errno = error.errno
    return clear


def no_room(sentence: str, number: int = errno.ENOSPC) -> OSError:
    """Return the error for a full disk. Callers recognize it by its errno."""
    clear = OSError(f"{sentence}: free some space there, or choose a folder on another disk; received bytes are kept")
    clear.errno = number
    return clear


def is_markup(head: bytes) -> bool:
    """Return whether a file's first bytes are an HTML or XML page in UTF-8 or UTF-16."""
    return _MARKUP.match(head[:4096].replace(b"\0", b"")) is not None


def length(path: Path) -> int:
    """Return a file's size in bytes, 0 if it does not exist."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _seconds(retry_after: str | None) -> float:
    """Return the seconds of a Retry-After header, a number or a date. Return 0 if it is missing or invalid."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _described(error: object) -> str:
    """Return an exception's message, or the name of its type if it has none."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _pause(stop: threading.Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise Stopped

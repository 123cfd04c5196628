"""One file from one web address: resumed where a `.part` ends, retried while that may help, refused when it is no file.

Knows HTTP and disks, and nothing of GPT-2.
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
"""Called with a file's name, the bytes of it that are here, and all of its bytes where known."""

CHUNK = 1 << 20
LONGEST_PAUSE = 60.0  # seconds: between attempts, whatever backoff and a server's Retry-After say
LARGEST_UNKNOWN = 1 << 26  # bytes: the files whose size is not known beforehand are small ones
RETRIED = (408, 425, 429)  # and 500 to 599
MARKUP_TYPES = ("text/html", "text/xml", "application/xml", "application/xhtml+xml")
_MARKUP = re.compile(rb"(?:\xef\xbb\xbf|\xff\xfe|\xfe\xff)?\s*<(?:\?xml|!doctype|html|error)", re.IGNORECASE)


class Refused(Exception):
    """What the address gives is not the file, and asking again would not change that."""


class Failed(Exception):
    """What another attempt may mend; `retry_after` is how many seconds the server wants to be left alone."""

    def __init__(self, message: str, retry_after: float = 0.0):
        super().__init__(message)
        self.retry_after = retry_after


class RangeWrong(Failed):
    """The server answered a request for the rest of a file with something else."""


class RangeBeyond(Failed):
    """The server says that the file ends before the bytes asked for."""


class Stopped(Exception):
    """The caller asked to stop: nothing is written or removed any more, as somebody else may be at it by then."""


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
    """Bring what `url` holds into `part`, going on after the bytes that are there.

    Args:
      size: the file's exact size in bytes; None takes the server's word for it.
      attempts: how many in a row may bring nothing new; one that does is followed by another.
      stop: set by the caller, ends the transfer within one chunk.

    Raises:
      Refused: the address does not hold the file.
      Failed: the last of the attempts, with what happened.
      Stopped: `stop` was set.
      OSError: the disk is full, or `part` cannot be written; what has arrived stays there.
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
            wait = backoff * doubled * random.uniform(0.5, 1)  # not all clients of one server at the same moment
            _pause(stop, min(max(wait, failure.retry_after), LONGEST_PAUSE))


def _attempt(
    url: str, part: Path, size: int | None, resume: bool, timeout: float, stop: threading.Event, report: Report
) -> None:
    """Ask once, and write what comes."""
    if stop.is_set():
        raise Stopped
    here = length(part)
    if size is not None and here > size:
        part.unlink()
        here = 0
    if here and here == size:  # all had arrived: the caller looks at what it is
        return
    asked = here if resume else 0
    with _open(url, asked, timeout) as response:
        start, total = _accepted(response, asked, size)
        _receive(response, part, start, total, timeout, stop, report)


def _open(url: str, asked: int, timeout: float) -> HTTPResponse:
    """Send the request for the bytes from `asked` on; what goes wrong is Failed or Refused."""
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
    except UnicodeError as error:  # a host name that cannot be one
        raise Refused(f"not a web address ({error})") from error


def _accepted(response: HTTPResponse, asked: int, size: int | None) -> tuple[int, int | None]:
    """Check an answer before its body: return where the body begins in the file, and how long the file is."""
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
            raise Refused(f"has a file of {total} bytes, which it cannot be")
    elif total is not None and total != size:
        raise Refused(f"has a file of {total} bytes instead of {size}")
    return start, size if total is None else total


def _range(content_range: str, asked: int, size: int | None) -> tuple[int, int]:
    """Check that a partial answer is what was asked for; return its first byte and the length of the file."""
    match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+|\*)", content_range.strip())
    if not asked or match is None or int(match[1]) != asked:
        raise RangeWrong(f"asked for the bytes from {asked} on, it answered with Content-Range {content_range!r}")
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
    """Write a body into `part` from byte `start` on, as it comes."""
    at, left = start, response.length
    chunk = _read(response, left, timeout, at, total)
    if stop.is_set():
        raise Stopped
    if not start and is_markup(chunk):  # before what is there is thrown away for it
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
    """Return what has come, at least one byte unless the body is over: nothing that arrived is lost in a buffer."""
    where = f"at byte {at}" + ("" if total is None else f" of {total}")
    try:
        return b"" if left == 0 else response.read1(CHUNK if left is None else min(CHUNK, left))
    except TimeoutError as error:
        raise Failed(f"stalled {where}: nothing came for {timeout:g} s") from error
    except http.client.IncompleteRead as error:
        raise Failed(f"the body was cut {where}") from error
    except (OSError, http.client.HTTPException) as error:
        raise Failed(f"{_described(error)} {where}") from error


def _writable(part: Path, mode: Literal["ab", "wb"]) -> BinaryIO:
    try:
        return part.open(mode, buffering=0)  # no buffer: a kill loses nothing that arrived
    except OSError as error:
        raise disk_error(error, part) from error


def _write(file: BinaryIO, chunk: bytes, part: Path) -> None:
    """Write all of a chunk; a disk that is nearly full takes some of it first."""
    view = memoryview(chunk)
    try:
        while view:
            view = view[file.write(view) :]
    except OSError as error:
        raise disk_error(error, part) from error


def disk_error(error: OSError, path: Path) -> OSError:
    """Return one with a sentence for what happened when writing `path`, and the same errno."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return no_room(f"no room left on the disk while writing {path}", error.errno)
    told = type(error)(f"cannot write {path}: {error.strerror or error}")
    told.errno = error.errno
    return told


def no_room(sentence: str, number: int = errno.ENOSPC) -> OSError:
    """Return the error for a disk that is full: callers tell it by its errno."""
    told = OSError(f"{sentence}: free some space there, or choose a folder on another disk; what has arrived is kept")
    told.errno = number
    return told


def is_markup(head: bytes) -> bool:
    """Say whether a file's first bytes are those of an HTML or XML page, in UTF-8 or UTF-16."""
    return _MARKUP.match(head[:4096].replace(b"\0", b"")) is not None


def length(path: Path) -> int:
    """Return a file's size in bytes, 0 where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _seconds(retry_after: str | None) -> float:
    """Return the seconds that a Retry-After header asks for: a number or a date; 0 for none or nonsense."""
    if retry_after is None:
        return 0.0
    if re.fullmatch(r"\d{1,9}", retry_after.strip()):
        return float(retry_after)
    try:
        return max(email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except (ValueError, OverflowError):
        return 0.0


def _described(error: object) -> str:
    """Return what an exception says of itself, or else its name."""
    return str(getattr(error, "strerror", None) or error) or type(error).__name__


def _pause(stop: threading.Event, seconds: float) -> None:
    if stop.wait(seconds):
        raise Stopped

"""Where else a run shows its numbers: TensorBoard, and Weights & Biases.

Both are written by the thread that trains. tensorboardX's own writer has a thread with a queue: if the disk is full,
the thread dies, the queue fills, and the run waits for ever; and a kill loses what is in the queue.
"""

from __future__ import annotations

import importlib
import socket
import struct
import time
from pathlib import Path
from typing import Any, Protocol

from gpt2_jax.training.records import append


class Board(Protocol):
    """Something that shows numbers and texts by step."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Show a finite number."""
        ...

    def add_text(self, name: str, text: str, step: int) -> None:
        """Show a text."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class TensorBoard:
    """A file of TensorBoard events. An event is in the file when the call returns.

    Args:
      folder: the folder for the file.
      first_step: optimizer steps done before. TensorBoard discards what earlier files have of later steps.
    """

    def __init__(self, folder: Path, first_step: int):
        folder.mkdir(parents=True, exist_ok=True)
        # The name has the time in seconds. A run resumed within the same second must not overwrite its first file.
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.from-{first_step}"
        self._path = folder / name
        self._file = self._path.open("ab", buffering=0)
        messages: Any = importlib.import_module("tensorboardX.proto.event_pb2")  # which has no types
        self._event, start = messages.Event, messages.SessionLog(status=messages.SessionLog.START)
        self._write(self._event(file_version="brain.Event:2"))
        self._write(self._event(step=first_step + 1 if first_step else 0, session_log=start))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        from tensorboardX import summary

        self._write(self._event(step=step, summary=summary.scalar(name, value)))

    def add_text(self, name: str, text: str, step: int) -> None:
        """Add a text."""
        from tensorboardX import summary

        self._write(self._event(step=step, summary=summary.text(name, text)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Any) -> None:
        """Write a record: length, checksum, message, checksum (TFRecord). A full disk is an OSError."""
        from tensorboardX.record_writer import masked_crc32c

        event.wall_time = time.time()
        message = event.SerializeToString()
        length = struct.pack("<Q", len(message))
        record = length + struct.pack("<I", masked_crc32c(length)) + message + struct.pack("<I", masked_crc32c(message))
        append(self._file, record, self._path)

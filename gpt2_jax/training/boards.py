"""Where else a run shows its numbers: TensorBoard, and Weights & Biases.

TensorBoard's file is written by the thread that trains. tensorboardX's own writer has a thread with a queue:
if the disk is full, the thread dies, the queue fills, and the run waits for ever. A kill loses what is in the queue.
"""

from __future__ import annotations

import importlib
import socket
import struct
import time
import uuid
from pathlib import Path
from typing import Any, Protocol

from gpt2_jax.checkpoints.integrity import one_line
from gpt2_jax.training.records import append

WANDB_ID = "wandb-id.txt"  # in the run's folder


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


class Wandb:
    """A run of Weights & Biases. A resumed run goes on with the same one, whose id is in RUN/wandb-id.txt.

    A run that went back to an earlier step begins a new one: the service drops what repeats a step.

    Args:
      project: the name of the project.
      run_dir: the run's folder.
      settings: what the service shows as the config of the run.

    Raises:
      ValueError: the package wandb is not installed.
      OSError: it cannot start, for example without a login.
    """

    def __init__(self, project: str, run_dir: Path, settings: dict[str, Any]):
        wandb, path = import_wandb(), run_dir / WANDB_ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
        names = {"project": project, "name": run_dir.resolve().name, "id": path.read_text(encoding="utf-8")}
        try:
            self._run = wandb.init(**names, dir=str(run_dir), resume="allow", config=settings)
        except Exception as error:  # of its own types
            raise OSError(f"Weights & Biases cannot start: {one_line(error)}") from error

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        self._run.log({name: value}, step=step)

    def add_text(self, name: str, text: str, step: int) -> None:
        """Add a text."""
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        """Wait until everything is sent."""
        self._run.finish()


def import_wandb() -> Any:
    """Return the module wandb.

    Raises:
      ValueError: it is not installed.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError("monitor.wandb needs the package wandb: pip install wandb") from error

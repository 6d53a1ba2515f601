"""The audit on disk: one JSON object a line, durable before the change that it tells of."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from flyball.core.errors import InvalidInput
from flyball.tuner.audit import AuditUnwritable, Event

_TRIAL_BYTES = 4096  # written and cut off again to see whether the disk has room


class AuditFile:
    """Appends events to a file and waits until the disk has them (a `tuner.audit.Audit`).

    What could not be written whole is cut off again. A torn last line, left by a power cut, is cut off on opening.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            self._size = _whole_lines(self._fd)
        except OSError as error:
            raise InvalidInput(f"cannot write the audit {path} ({error}); give a file that can be written") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def append(self, events: Sequence[Event]) -> None:
        """Write and fsync all of them, or none."""
        data = b"".join(_line(event) for event in events)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._fd, view) :]
            os.fsync(self._fd)
        except OSError as error:
            self._cut()
            raise AuditUnwritable(f"cannot write the audit {self.path}: {error}") from None
        self._size += len(data)

    def healthy(self) -> bool:
        """Whether the disk takes a little more: tried, not guessed."""
        try:
            whole = os.write(self._fd, b" " * _TRIAL_BYTES) == _TRIAL_BYTES
            os.fsync(self._fd)
        except OSError:
            return False
        finally:
            self._cut()
        return whole

    def _cut(self) -> None:
        try:
            os.ftruncate(self._fd, self._size)
        except OSError:  # the torn line is cut off when the file is opened again
            return

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


class QueuedAudit:
    """Hands events to a thread that writes them, for decisions that may not wait for a disk.

    Up to `capacity` events may wait; a full queue, or a disk that failed, refuses the next. What waits when the process
    dies is lost: use the file itself where every event must outlive it.
    """

    def __init__(self, audit: AuditFile, capacity: int = 4096) -> None:
        self._audit = audit
        self._capacity = capacity
        self._waiting: deque[Event] = deque()
        self._more = threading.Condition()
        self._error: str | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._write, name="audit", daemon=True)
        self._thread.start()

    def append(self, events: Sequence[Event]) -> None:
        """Queue all of them or none."""
        with self._more:
            if self._error is not None:
                raise AuditUnwritable(self._error)
            if len(self._waiting) + len(events) > self._capacity:
                raise AuditUnwritable(f"the audit's queue is full: {len(self._waiting)} events wait for the disk")
            self._waiting.extend(events)
            self._more.notify()

    def healthy(self) -> bool:
        """Whether there is room, and the disk writes again after a failure."""
        with self._more:
            if self._error is not None and self._audit.healthy():
                self._error = None
                self._more.notify()
            return self._error is None and len(self._waiting) < self._capacity // 2

    def close(self) -> None:
        """Write what waits, then end the thread and close the file."""
        with self._more:
            self._closing = True
            self._more.notify()
        self._thread.join()
        self._audit.close()

    def _write(self) -> None:
        while True:
            with self._more:
                self._more.wait_for(lambda: self._closing or (self._waiting and self._error is None))
                batch = list(self._waiting)
                if self._closing and (not batch or self._error is not None):
                    return
            try:
                self._audit.append(batch)
            except AuditUnwritable as error:
                with self._more:
                    self._error = str(error)
                continue
            with self._more:
                for _ in batch:
                    self._waiting.popleft()


def read_audit(path: Path) -> list[list[Event]]:
    """The runs of an audit file, in order; a torn last line is left out."""
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InvalidInput(f"cannot read the audit {path} ({error}); give the file that `flyball hold` wrote") from None
    runs: list[list[Event]] = []
    for number, line in enumerate(lines[:-1], start=1):  # after the last newline comes nothing, or a torn line
        try:
            event = Event.read(json.loads(line))
        except ValueError as error:
            raise InvalidInput(f"{path}, line {number}: {error}") from None
        if event.kind == "start" or not runs:
            runs.append([])
        runs[-1].append(event)
    return runs


def _line(event: Event) -> bytes:
    return json.dumps(event.record(), separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _whole_lines(fd: int) -> int:
    """Cut a torn last line off; returns the size left."""
    size = os.lseek(fd, 0, os.SEEK_END)
    end = size
    while end > 0:
        start = max(0, end - 65536)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(fd, end)
    return end

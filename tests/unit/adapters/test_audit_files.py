"""The audit on disk: whole lines or none, durable before the change, readable after any end."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flyball.adapters.audit_files import AuditFile, QueuedAudit, read_audit
from flyball.core.clock import VirtualClock
from flyball.core.errors import InvalidInput
from flyball.core.knobs import Knob, Space
from flyball.tuner.audit import AuditUnwritable, Event
from flyball.tuner.guard import Guard
from flyball.tuner.guard_baseline import Judgement
from flyball.tuner.guard_limits import PRESETS
from flyball.tuner.guard_replay import first_difference, replay

SPACE = Space((Knob(name="wait_ms", kind="float", default=100.0, low=0.0, high=500.0),))


def event(seq: int) -> Event:
    """Some event."""
    return Event("start" if seq == 1 else "proposal", "r", seq, float(seq), 0.0, 1, {"why": "x" * 100})


@contextmanager
def disk_full_beyond(size: int) -> Iterator[None]:
    """The kernel lets no file grow beyond this size: writes fail as on a full disk."""
    import signal

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_what_was_appended_is_read_again(tmp_path: Path) -> None:
    """Run by run, in order, also from a file that is opened again."""
    path = tmp_path / "sub" / "audit.jsonl"
    for _ in range(2):
        with AuditFile(path) as audit:
            audit.append([event(1), event(2)])
            audit.append([event(3)])
    assert [[e.seq for e in run] for run in read_audit(path)] == [[1, 2, 3], [1, 2, 3]]


def test_a_torn_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    """A power cut in the middle of a line costs that line only."""
    path = tmp_path / "audit.jsonl"
    with AuditFile(path) as audit:
        audit.append([event(1), event(2)])
    path.write_bytes(path.read_bytes()[:-30])
    assert [e.seq for e in read_audit(path)[0]] == [1]
    with AuditFile(path) as audit:
        audit.append([event(2)])
    assert [e.seq for e in read_audit(path)[0]] == [1, 2]


def test_a_full_disk_keeps_whole_events_only(tmp_path: Path) -> None:
    """An append that does not fit is cut off again, and the file grows on once there is room."""
    path = tmp_path / "audit.jsonl"
    with AuditFile(path) as audit:
        audit.append([event(1)])
        size = path.stat().st_size
        with disk_full_beyond(size + 50):
            with pytest.raises(AuditUnwritable, match="cannot write"):
                audit.append([event(2)])
            assert not audit.healthy()
        assert path.stat().st_size == size
        assert audit.healthy()
        audit.append([event(2)])
    assert [e.seq for e in read_audit(path)[0]] == [1, 2]


def test_a_guard_on_a_full_disk_changes_nothing_and_loses_nothing(tmp_path: Path) -> None:
    """Refused while the disk is full; afterwards the file tells everything, and decides the same again."""
    path, clock, engine = tmp_path / "audit.jsonl", VirtualClock(), {}
    with AuditFile(path) as audit:
        guard = Guard(
            SPACE, SPACE.defaults(), apply=engine.update, limits=PRESETS["balanced"], audit=audit, clock=clock
        )
        with disk_full_beyond(path.stat().st_size + 10):
            for _ in range(5):
                clock.advance(1)
                decision = guard.propose({"wait_ms": 110.0})
                assert decision.refusal is not None
                assert decision.refusal.rule == "audit"
                guard.observe(Judgement(gain=1.0))
        assert engine == {}
        assert guard.generation == 1
        clock.advance(1)
        assert guard.propose({"wait_ms": 110.0}).accepted
    recorded = read_audit(path)[0]
    assert [e.seq for e in recorded] == list(range(1, len(recorded) + 1))
    assert first_difference(recorded, replay(recorded)) is None


def test_a_full_queue_refuses(tmp_path: Path) -> None:
    """More events than may wait are refused whole; closing writes what waits."""
    path = tmp_path / "audit.jsonl"
    queued = QueuedAudit(AuditFile(path), capacity=8)
    with pytest.raises(AuditUnwritable, match="queue is full"):
        queued.append([event(i) for i in range(1, 20)])
    queued.append([event(1), event(2)])
    queued.close()
    assert [e.seq for e in read_audit(path)[0]] == [1, 2]


def test_what_is_no_audit_is_named(tmp_path: Path) -> None:
    """File and line of what cannot be read."""
    path = tmp_path / "other.jsonl"
    path.write_text('{"kind": "start"}\n')
    with pytest.raises(InvalidInput, match=r"other.jsonl, line 1"):
        read_audit(path)
    with pytest.raises(InvalidInput, match="cannot read"):
        read_audit(tmp_path / "none.jsonl")

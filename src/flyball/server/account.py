"""What one HTTP request came to: gathered while it is served, told once at its end, to the log and to the tracer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from flyball.engine.request import RequestReport


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerRecord:
    """How one answer went."""

    completion_tokens: int
    finish_reason: str
    ttft_s: float | None
    report: RequestReport | None  # None: the server ended it before the engine did


@dataclass(slots=True, kw_only=True)
class Account:
    """One HTTP request."""

    request_id: str
    method: str
    path: str
    client: str
    traceparent: str | None  # W3C trace context, from the client
    arrival_s: float
    status: int | None = None  # None: the client left before anything was sent
    ended_s: float = 0.0
    left: bool = False  # the client went away before its answer was complete
    error: str | None = None  # told in the stream, after the status was sent
    prompt_tokens: int = 0
    cached_tokens: int = 0
    answers: list[AnswerRecord] = field(default_factory=list)

    def line(self) -> dict[str, object]:
        """The access log's fields; milliseconds, since people read them."""
        told: dict[str, object] = {
            "request_id": self.request_id,
            "client": self.client,
            "method": self.method,
            "path": self.path,
            "status": 499 if self.left else self.status,  # nginx's code for a client that left
            "duration_ms": _ms(self.ended_s - self.arrival_s),
        }
        if self.error is not None:
            told["error"] = self.error
        if not self.answers:
            return told
        reports = [one.report for one in self.answers if one.report is not None]
        queued = [r.first_scheduled_s - r.arrival_s for r in reports if r.first_scheduled_s is not None]
        first = [one.ttft_s for one in self.answers if one.ttft_s is not None]
        return {
            **told,
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "completion_tokens": sum(one.completion_tokens for one in self.answers),
            "finish_reason": ",".join(dict.fromkeys(one.finish_reason for one in self.answers)),
            "queue_ms": _ms(max(queued)) if queued else None,
            "ttft_ms": _ms(min(first)) if first else None,
            "preemptions": sum(r.num_preemptions for r in reports),
            "batch_size": max((r.batch_size_seen for r in reports), default=None),
        }


Watcher = Callable[[Account], None]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)

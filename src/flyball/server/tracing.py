"""OpenTelemetry spans of each request: one for the request and, for each answer, queue, prefill and decode.

Spans are made when the request has ended, from the times that were taken anyway: a server that does not trace pays
nothing, one that does pays nothing while tokens flow. Needs the extra `tracing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from flyball.core.clock import Clock
from flyball.server.account import Account, AnswerRecord, Watcher


def otlp_provider(endpoint: str, model: str) -> TracerProvider:
    """Sends spans over OTLP/HTTP, in batches, from a thread of its own; to be shut down at the end."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return provider([BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))], model)


def provider(processors: Sequence[SpanProcessor], model: str) -> TracerProvider:
    """Gives spans to these processors."""
    made = TracerProvider(resource=Resource.create({"service.name": "flyball", "gen_ai.request.model": model}))
    for processor in processors:
        made.add_span_processor(processor)
    return made


def spans(provider: TracerProvider, clock: Clock) -> Watcher:
    """A watcher that records each request that generated something."""
    tracer = provider.get_tracer("flyball.server")

    def record(account: Account) -> None:
        if not account.answers:
            return
        offset_s = clock.wall_s() - clock.now_s()  # the accounts' clock has an origin of its own

        def ns(at_s: float) -> int:
            return int((at_s + offset_s) * 1e9)

        parent = TraceContextTextMapPropagator().extract({"traceparent": account.traceparent or ""})
        root = tracer.start_span(
            f"{account.method} {account.path}",
            context=parent,
            kind=SpanKind.SERVER,
            start_time=ns(account.arrival_s),
            attributes={
                "http.request.method": account.method,
                "url.path": account.path,
                "http.response.status_code": 499 if account.left else account.status or 0,
                "flyball.request_id": account.request_id,
                "gen_ai.usage.input_tokens": account.prompt_tokens,
                "gen_ai.usage.output_tokens": sum(one.completion_tokens for one in account.answers),
                "gen_ai.response.finish_reasons": [one.finish_reason for one in account.answers],
            },
        )
        if account.error is not None:
            root.set_status(Status(StatusCode.ERROR, account.error))
        for answer in account.answers:
            _phases(tracer, root, answer, ns)
        root.end(end_time=ns(account.ended_s))

    return record


def _phases(tracer: Tracer, root: Span, answer: AnswerRecord, ns: Callable[[float], int]) -> None:
    """Queue, prefill and decode of one answer, as far as it came."""
    report = answer.report
    if report is None:
        return
    marks = (report.arrival_s, report.first_scheduled_s, report.first_token_s, report.finished_s)
    context = trace.set_span_in_context(root)
    for name, start_s, end_s in zip(("queue", "prefill", "decode"), marks, marks[1:], strict=False):
        if start_s is None:
            return
        span = tracer.start_span(
            name,
            context=context,
            start_time=ns(start_s),
            attributes={
                "gen_ai.usage.output_tokens": answer.completion_tokens,
                "flyball.cached_tokens": report.num_cached_tokens,
                "flyball.preemptions": report.num_preemptions,
            },
        )
        span.end(end_time=ns(report.finished_s if end_s is None else end_s))

"""A fleet's state out of a real Prometheus server that scrapes replicas speaking the engines' dialects."""

from __future__ import annotations

import http.server
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flyball.adapters.fleet_metrics import DIALECTS
from flyball.adapters.prometheus import KnownReplica, PrometheusClient, PrometheusSource, ServerQuery
from flyball.adapters.prometheus_process import prometheus
from flyball.core.errors import ObservationFailed
from flyball.core.observation import FleetState

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="the program prometheus is not installed"),
]


def exposition(engine: str, scrape: int) -> str:
    """Ten requests a scrape, of 100 tokens in and 40 out, a gap of 12 ms, in an engine's own names."""
    names = DIALECTS[engine]

    def first(name: str) -> str:
        return name.split("|", maxsplit=1)[0]

    lines = [
        f"{first(names.running)} 7", f"{first(names.waiting)} 2", f"{first(names.kv_used)} 0.25",
        f"{first(names.completed)} {10 * scrape}", f"{first(names.prompt_tokens)} {1000 * scrape}",
        f"{first(names.generated_tokens)} {400 * scrape}",
        f"{first(names.itl)}_sum {0.012 * 390 * scrape}", f"{first(names.itl)}_count {390 * scrape}",
        f"{first(names.ttft)}_sum {0.08 * 10 * scrape}", f"{first(names.ttft)}_count {10 * scrape}",
        f'{first(names.ttft)}_bucket{{le="0.1"}} {9 * scrape}',
        f'{first(names.ttft)}_bucket{{le="+Inf"}} {10 * scrape}',
    ]  # fmt: skip
    if names.kv_info:
        lines.append(f'{names.kv_info}{{num_gpu_blocks="1000",block_size="16"}} 1')
    if names.kv_tokens:
        lines.append(f"{names.kv_tokens} 16000")
    return "\n".join([*lines, f"gateway_arrivals_total {12 * scrape}"]) + "\n"


@contextmanager
def replica(text: Callable[[int], str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Something to scrape: its address, and a way to end it."""
    scrapes = 0

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            nonlocal scrapes
            scrapes += 1
            body = text(scrapes).encode()
            self.send_response(200)
            self.send_header("content-type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    ended = threading.Event()

    def end() -> None:
        if not ended.is_set():
            ended.set()
            server.shutdown()
            server.server_close()
            thread.join()

    try:
        yield f"127.0.0.1:{server.server_address[1]}", end
    finally:
        end()


class OneMore:
    """An inventory with a replica that Prometheus has never heard of."""

    def __init__(self, address: str) -> None:
        self._address = address

    def replicas(self, server: str) -> list[KnownReplica]:
        """The one scraped, and one that is not."""
        return [
            KnownReplica(name=f"{server}-0", accelerator="A", phase="ready", age_s=60.0, instance=self._address),
            KnownReplica(name=f"{server}-1", accelerator="A", phase="ready", age_s=60.0, instance="127.0.0.1:1"),
        ]

    def wanted(self, server: str) -> dict[str, int]:
        """Two."""
        return {"A": 2}


def until(source: PrometheusSource, ready: Callable[[FleetState], bool]) -> FleetState:
    """Look until it is so, for a minute at most."""
    late_s = time.monotonic() + 60
    while True:
        state = source.observe(3.0)
        if ready(state) or time.monotonic() > late_s:
            return state
        time.sleep(0.25)


@pytest.mark.parametrize("engine", ["vllm", "sglang", "flyball"])
def test_every_dialect_is_read(engine: str, tmp_path: Path) -> None:
    """Gauges, lengths, latencies, cache and arrivals come out right; a replica not scraped is silent, not zero."""
    targets = tmp_path / "targets.json"
    with replica(lambda scrape: exposition(engine, scrape)) as (address, end):
        targets.write_text(json.dumps([{"targets": [address], "labels": {"server": "chat"}}]))
        with prometheus(tmp_path, scrape_s=0.3, targets=targets) as url, PrometheusClient(url) as client:
            query = ServerQuery(
                engine=engine, matchers={"server": "chat"}, arrivals="sum(increase(gateway_arrivals_total[{window}]))"
            )
            source = PrometheusSource(client, {"chat": query}, OneMore(address), stale_s=2.0)
            view = until(source, lambda s: s.servers["chat"].completed >= 50).servers["chat"]
            seen, silent = view.replicas
            assert (seen.reported, silent.reported) == (True, False)
            assert (seen.running, seen.waiting, seen.kv_used, seen.kv_capacity_tokens) == (7, 2, 0.25, 16000)
            assert view.input_tokens == pytest.approx(100, rel=0.05)
            assert view.output_tokens == pytest.approx(40, rel=0.05)
            assert seen.itl_s == pytest.approx(0.012)
            assert seen.ttft_s == pytest.approx(0.08)
            assert view.arrivals == pytest.approx(1.2 * view.completed, rel=0.05)
            assert view.wanted == {"A": 2}
            end()
            gone = until(source, lambda s: not s.servers["chat"].replicas[0].reported)
            assert not gone.servers["chat"].replicas[0].reported
    with PrometheusClient(url) as client, pytest.raises(ObservationFailed, match="does not answer"):
        PrometheusSource(client, {"chat": ServerQuery()}).observe(3.0)

"""A Prometheus server of our own on this machine, for a fleet of local processes and for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from flyball.adapters.engines.process import ChildProcess, await_ready, free_port
from flyball.core.clock import SystemClock
from flyball.core.errors import MissingExtra

_READY_S = 60.0


def prometheus_config(
    *, scrape_s: float, targets: Path | None, static: Sequence[str], rules: Sequence[Path] = ()
) -> str:
    """A configuration (JSON, which is YAML): a file of targets that may change, and fixed addresses."""
    jobs: list[dict[str, object]] = []
    if targets is not None:
        found = {"files": [str(targets)], "refresh_interval": f"{max(round(scrape_s * 1000), 100)}ms"}
        jobs.append({"job_name": "engines", "file_sd_configs": [found]})
    if static:
        jobs.append({"job_name": "gateways", "static_configs": [{"targets": list(static)}]})
    interval = f"{max(round(scrape_s * 1000), 100)}ms"
    every = {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    return json.dumps({"global": every, "rule_files": [str(r) for r in rules], "scrape_configs": jobs}, indent=1)


@contextmanager
def prometheus(
    folder: Path,
    *,
    scrape_s: float = 1.0,
    targets: Path | None = None,
    static: Sequence[str] = (),
    rules: Sequence[Path] = (),
) -> Iterator[str]:
    """Run a server on loopback while the block runs; yields its address.

    Raises MissingExtra where the program is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise MissingExtra("the program prometheus is not installed; install it (Debian: apt-get install prometheus)")
    config = folder / "prometheus.yml"
    config.write_text(prometheus_config(scrape_s=scrape_s, targets=targets, static=static, rules=rules))
    port = free_port()
    command = [
        program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'prometheus-data'}",
        f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ready() -> bool:
        try:
            return httpx.get(f"{url}/-/ready", timeout=1.0, trust_env=False).status_code == 200
        except httpx.HTTPError:
            return False

    child = ChildProcess(command, log=folder / "prometheus.log")
    try:
        await_ready(child, ready=ready, timeout_s=_READY_S, clock=SystemClock())
        yield url
    finally:
        child.stop()

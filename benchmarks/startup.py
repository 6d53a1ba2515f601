"""How long from the start of the process to the first token, and how much memory, against vLLM serving the same model?

Both serve the bundled model over HTTP on 2 threads. The clock runs from the start of the server's process to the first
streamed token of a completion that is asked for again and again until it is answered; memory is what the process and
its children then hold, shared pages counted once. The servers take turns; nothing else is sent to them.

    python benchmarks/startup.py [--rounds 3] [--rivals vllm]
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

import _peers
from _figures import figure
from flyball.engine.bundled import bundled_model_path

NAME = "bundled"
PROMPT = "The quick brown fox"


class Server(NamedTuple):
    """A command that serves on a port (its last word is added), and what it needs in its environment."""

    command: list[str]
    variables: Mapping[str, str]
    log: Path


class Start(NamedTuple):
    """One start: seconds of wall and of CPU to the first token, and bytes held then."""

    seconds: float
    cpu_seconds: float
    resident: int


def servers(
    rivals: list[str], threads: int, cache: Path, say: Callable[[str], None], model: Path | None = None
) -> dict[str, Server]:
    """The command line of each contender; one that cannot be installed is said to be left out."""
    model = model or bundled_model_path()
    cache.mkdir(parents=True, exist_ok=True)
    ours = [
        str(Path(sys.executable).with_name("flyball")),
        "serve",
        str(model),
        "--name",
        NAME,
        "--threads",
        str(threads),
    ]
    found = {"flyball": Server([*ours, "--port"], {}, cache / "flyball.serve.log")}
    known = _peers.recipes(threads)
    for name in rivals:
        try:
            python = _peers.prepare(known[name], cache, say)
        except _peers.PeerUnavailable as reason:
            say(f"{name} is left out: {reason}")
            continue
        command = [
            str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
            "--served-model-name", NAME, "--distributed-executor-backend", "uni", "--host", "127.0.0.1", "--port",
        ]  # fmt: skip
        found[name] = Server(command, known[name].variables, cache / f"{name}.serve.log")
    return found


@contextlib.contextmanager
def started(server: Server) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server's process and its port; ended on the way out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with server.log.open("w") as log:
        process = subprocess.Popen(
            [*server.command, str(port)], env=_peers.environment(server.variables), text=True,
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process, port
    finally:
        _peers.stop(process)


def first_token(port: int) -> bool:
    """Whether a streamed completion came as far as its first token."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 1, "temperature": 0, "stream": True, "ignore_eos": True}
    try:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        return answer.status == http.HTTPStatus.OK and b'"choices"' in answer.readline()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def await_first_token(server: Server, process: subprocess.Popen[str], port: int, timeout_s: float) -> None:
    """Ask again and again until a token comes; raises PeerUnavailable where none does."""
    begun = time.perf_counter()
    while not first_token(port):
        if process.poll() is not None or time.perf_counter() - begun > timeout_s:
            raise _peers.PeerUnavailable(f"no token in {time.perf_counter() - begun:.0f} s; see {server.log}")
        time.sleep(0.02)


def start(server: Server, timeout_s: float) -> Start:
    """Start the server, wait for its first token, and stop it."""
    begun = time.perf_counter()
    with started(server) as (process, port):
        await_first_token(server, process, port, timeout_s)
        seconds = time.perf_counter() - begun
        return Start(seconds, _peers.cpu_seconds(process.pid), _peers.resident_bytes(process.pid))


def main() -> None:
    """Start every server in turns, then print the table and the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rivals", default="vllm", help="vllm, vllm_inprocess or both, with a comma")
    parser.add_argument("--timeout-s", type=float, default=600.0)
    parser.add_argument("--peers-folder", type=Path, default=_peers.CACHE, help="where peers are installed")
    args = parser.parse_args()
    rivals = [name for name in args.rivals.split(",") if name]
    if unknown := set(rivals) - {"vllm", "vllm_inprocess"}:
        parser.error(f"unknown rivals {sorted(unknown)}; there are vllm and vllm_inprocess")
    say = Console(stderr=True, soft_wrap=True).print
    contenders = servers(rivals, args.threads, args.peers_folder, say)
    starts: dict[str, list[Start]] = {name: [] for name in contenders}
    for number in range(args.rounds):
        for name in list(starts):
            try:
                seen = start(contenders[name], args.timeout_s)
            except _peers.PeerUnavailable as reason:
                if name == "flyball":
                    raise
                say(f"{name} is left out: {reason}")
                del starts[name]
                continue
            starts[name].append(seen)
            held = f"{seen.resident / 2**20:.0f} MiB"
            say(f"start {number + 1}: {name} {seen.seconds:.1f} s, {seen.cpu_seconds:.1f} CPU s, {held}")
    report(starts)


def report(starts: dict[str, list[Start]]) -> None:
    """The table and the JSON lines; `ratio` is ours over the best rival's, so below 1 is better."""
    medians = {name: Start(*map(statistics.median, zip(*seen, strict=True))) for name, seen in starts.items()}
    table = Table(title="Process start to first token over HTTP, bundled model (medians)")
    for column in ("server", "s", "CPU s", "MiB resident"):
        table.add_column(column, justify="right")
    for name, m in medians.items():
        table.add_row(name, f"{m.seconds:.1f}", f"{m.cpu_seconds:.1f}", f"{m.resident / 2**20:.0f}")
    Console().print(table)
    rows = (
        ("seconds", "startup_s", "s"),
        ("cpu_seconds", "startup_cpu_s", "s"),
        ("resident", "startup_resident_bytes", "B"),
    )
    for field, row, unit in rows:
        values = {name: getattr(m, field) for name, m in medians.items()}
        best = min((name for name in values if name != "flyball"), key=values.__getitem__, default=None)
        for name, value in values.items():
            ours = name == "flyball"
            seen = [getattr(one, field) for one in starts[name]]
            figure(
                row if ours else f"{row}_{name}", value, unit, rival=values[best] if ours and best else None,
                spread=(min(seen), max(seen)), rival_name=best if ours else None, starts=len(seen),
            )  # fmt: skip


if __name__ == "__main__":
    main()

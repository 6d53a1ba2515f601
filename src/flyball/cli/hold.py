"""`flyball hold`: keep a live server in tune with its traffic, behind guardrails, and answer for every change."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import socket
    from types import FrameType

    from fastapi import FastAPI

    from flyball.adapters.engines.flyball_http import FlyballTarget
    from flyball.adapters.hold_windows import ServerWindows
    from flyball.core.clock import Clock
    from flyball.core.knobs import Configuration, Knob, Space
    from flyball.tuner.constraints import Constraint
    from flyball.tuner.hold import Holder

app = typer.Typer(name="hold", help="Keep a live server in tune with its traffic, behind guardrails.")

KNOBS = ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold")  # held unless others are named
CONTROL = "http://127.0.0.1:8010"

Control = Annotated[str, typer.Option(help="Address of the holder's own API.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar="FLYBALL_ADMIN_KEY", help="Key of the holder's API, if it was given one.")
]


@app.callback(invoke_without_command=True)
def run(  # noqa: PLR0915  # it wires what others made, once
    context: typer.Context,
    url: Annotated[str, typer.Option(help="Address of the server to hold.")] = "http://127.0.0.1:8000",
    slo: Annotated[list[str] | None, typer.Option(help="A promise such as 'p95_ttft<500ms'.")] = None,
    maximize: Annotated[str, typer.Option(help="goodput, throughput, output_tps or attainment.")] = "attainment",
    knob: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME or NAME=LOW..HIGH to be held; default: {', '.join(KNOBS)}."),
    ] = None,
    mode: Annotated[str, typer.Option(help="shadow (changes nothing), canary (the first replica) or full.")] = "full",
    preset: Annotated[str, typer.Option(help="conservative, balanced or aggressive.")] = "balanced",
    guard: Annotated[str | None, typer.Option(help="JSON of guard limits in place of --preset, or @FILE.")] = None,
    proposer: Annotated[str, typer.Option(help="auto, local, bayes, tpe, nelder-mead or bandit.")] = "auto",
    window: Annotated[float, typer.Option(help="Seconds of a window.", min=0.1)] = 10.0,
    windows: Annotated[int, typer.Option(help="Windows that judge one configuration.", min=1)] = 1,
    settle: Annotated[float, typer.Option(help="Seconds after a change that are not judged.", min=0.0)] = 2.0,
    room: Annotated[float, typer.Option(help="Share of its limit that each promise must have to spare at rest.")] = 0.1,
    explore_every: Annotated[
        int | None,
        typer.Option(
            help="Windows from one small trial to the next at rest; 0: none, 1: never rest. Default: 25, "
            "or 0 for attainment.",
            min=0,
        ),
    ] = None,
    approve: Annotated[bool, typer.Option("--approve", help="Wait for a person before each change.")] = False,
    audit: Annotated[Path, typer.Option(help="Every decision, one JSON object a line.")] = Path("flyball-hold.jsonl"),
    duration: Annotated[float | None, typer.Option(help="End after so many seconds; default: when told.")] = None,
    replica: Annotated[
        list[str] | None, typer.Option(help="Further replicas, changed after the first, one at a time.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address of the holder's API; beyond this machine only with a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port; 0 picks a free one and prints it.", min=0)] = 8010,
    admin_key: AdminKey = None,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Admin key of the server.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the proposals.", min=0)] = 0,
) -> None:
    """Hold a live server until told to stop; `flyball hold status` and the other commands speak to it meanwhile."""
    if context.invoked_subcommand is not None:
        return
    from contextlib import ExitStack

    from flyball.cli import require

    require("tune", "httpx")
    require("engine", "fastapi", "uvicorn", "prometheus_client")
    from flyball.adapters.audit_files import AuditFile
    from flyball.adapters.engines.flyball_http import FlyballTarget
    from flyball.adapters.hold_windows import ServerWindows
    from flyball.core.clock import SystemClock
    from flyball.core.errors import InvalidInput
    from flyball.core.slo import SloBound
    from flyball.server.hold import Approvals, create_app
    from flyball.server.process import is_loopback, listen, url_of
    from flyball.tuner.constraints import Constraint
    from flyball.tuner.enough import Enough
    from flyball.tuner.guard import Guard
    from flyball.tuner.guard_limits import from_config
    from flyball.tuner.guard_limits import preset as named_preset
    from flyball.tuner.hold import Holder, Replicas
    from flyball.tuner.hold_reading import Reading, judge
    from flyball.tuner.objective import Objective, Score
    from flyball.tuner.online.tuner import OnlineTuner

    if not is_loopback(host) and not admin_key:
        raise InvalidInput(f"listening on {host} lets others in; give --admin-key, or stay on 127.0.0.1")
    objective = Objective.parse(maximize)
    bounds = tuple(SloBound.parse(text) for text in slo or ())
    if explore_every is None:
        explore_every = 0 if objective.metric == "attainment" else Enough().explore_every
    enough = Enough(room=room, explore_every=explore_every)
    clock = SystemClock()
    with ExitStack() as stack:
        told = stack.enter_context(_told_to_end())
        listener = stack.enter_context(listen(host, port))
        targets = [stack.enter_context(FlyballTarget(u, api_key=api_key)) for u in (url, *(replica or ()))]
        in_force = targets[0].configuration()
        space = _space(targets[0], knob or (), in_force)
        start = {k.name: in_force[k.name] for k in space}
        limits = from_config(_text(guard), space) if guard else named_preset(preset)
        log = stack.enter_context(AuditFile(audit))
        server = ServerWindows(url, clock, api_key=api_key)
        stack.callback(server.close)
        replicas = Replicas([t.apply for t in targets], in_force)
        gate = Guard(
            space, start, apply=lambda v: replicas.set(v, canary=mode == "canary"), limits=limits, audit=log,
            clock=clock, run=f"{clock.wall_s():.0f}",
        )  # fmt: skip
        relations = [Constraint(text) for text in targets[0].constraints()]
        names = [str(b) for b in bounds]

        def score(reading: Reading) -> Score:
            return judge(reading, objective, bounds)

        tuner = OnlineTuner(
            space, direction="maximize" if objective.maximise else "minimize", seed=seed, proposer=proposer,
            constraints=names, start=start, relations=[partial(_holds, c, in_force) for c in relations],
        )  # fmt: skip
        approvals = Approvals() if approve else None
        holder = Holder(
            tuner=tuner, guard=gate, judge=score, generation=server.generation, clock=clock, mode=mode,  # type: ignore[arg-type]  # checked at birth
            settle_s=settle, windows=windows, approve=approvals, enough=enough,
        )  # fmt: skip
        stack.enter_context(_served(create_app(holder, admin_key=admin_key, approvals=approvals), listener))
        typer.echo(f"flyball: holding {url} ({', '.join(start)}), API on {url_of(listener)}, audit {audit}")
        typer.echo(f"flyball: {tuner.choice.proposer}: {tuner.choice.reason}")
        try:
            _loop(holder, server, clock, told, window_s=window, duration_s=duration)
        finally:
            if gate.trying and holder.run in ("running", "paused"):
                done = gate.rollback("the holder ends")
                typer.echo(f"flyball: the last known good is {'in force' if done else 'NOT in force; see the audit'}")
        if told.signal is not None:
            raise typer.Exit(128 + told.signal)  # as shells expect of a process that a signal ended


class _Told(threading.Event):
    """Set once a signal asks for the end; a second one ends at once."""

    signal: int | None = None

    def __call__(self, number: int, _frame: FrameType | None) -> None:
        if self.is_set():
            raise KeyboardInterrupt
        self.signal = number
        self.set()


@contextmanager
def _told_to_end() -> Iterator[_Told]:
    """Let Ctrl-C, SIGTERM and SIGHUP end us between two decisions, not within a change."""
    told = _Told()
    before = {s: signal.signal(s, told) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _loop(
    holder: Holder, server: ServerWindows, clock: Clock, told: _Told, *, window_s: float, duration_s: float | None
) -> None:
    """One step a window, until told to end or the time is over; a look that fails decides nothing.

    After a change the next window begins when it has settled.
    """
    from flyball.core.errors import EngineFailed

    told.wait(holder.settle_s)
    server.skip()
    ends_s = None if duration_s is None else clock.now_s() + duration_s
    while ends_s is None or clock.now_s() < ends_s:
        if told.wait(window_s) or holder.run not in ("running", "paused"):
            return
        try:
            decision = holder.step(server.read())
        except EngineFailed as error:
            typer.echo(f"flyball: no window, so nothing changes: {error}", err=True)
            continue
        value = "" if decision.score is None else f" {decision.score.value:.4g}"
        typer.echo(f"{decision.number} {decision.action}{value} {json.dumps(dict(decision.values))} {decision.why}")
        if decision.action in ("apply", "rollback"):
            told.wait(holder.settle_s)
            server.skip()


@contextmanager
def _served(api: FastAPI, listener: socket.socket) -> Iterator[None]:
    """The holder's API, in a thread of its own while the block runs."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(api, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="hold-api", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(timeout=5)


def _holds(relation: Constraint, in_force: Configuration, values: Configuration) -> bool:
    return relation.holds({**in_force, **values})


def _text(given: str) -> str:
    from flyball.core.errors import InvalidInput

    if not given.startswith("@"):
        return given
    try:
        return Path(given[1:]).read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidInput(f"cannot read the guard settings {given[1:]} ({error}); give a JSON file") from None


def _space(target: FlyballTarget, named: Sequence[str], in_force: Configuration) -> Space:
    """The knobs to be held, narrowed to what was asked for; the value in force stays within."""
    from flyball.core.errors import InvalidInput
    from flyball.core.knobs import Space

    known, held = target.space(), []
    for text in named or [name for name in KNOBS if name in target.space()]:
        name, _, ends = text.partition("=")
        knob = replace(known[name], default=in_force[name])
        if not knob.live:
            raise InvalidInput(f"{name} needs a restart; name live knobs only")
        held.append(_narrowed(knob, ends) if ends else knob)
    return Space(tuple(held))


def _narrowed(knob: Knob, ends: str) -> Knob:
    from flyball.core.errors import InvalidInput

    low, dots, high = ends.partition("..")
    try:
        bounds = (float(low) if low else knob.low, float(high) if high else knob.high)
    except ValueError:
        dots, bounds = "", (knob.low, knob.high)
    if not dots or knob.kind not in ("int", "float"):
        raise InvalidInput(f"cannot read the knob {knob.name}={ends}; write NAME=LOW..HIGH, or NAME alone")
    return replace(knob, low=bounds[0], high=bounds[1])


def _ask(method: str, control: str, path: str, admin_key: str | None) -> dict[str, Any]:
    import httpx

    from flyball.core.errors import EngineFailed, InvalidInput

    headers = {"Authorization": f"Bearer {admin_key}"} if admin_key else {}
    try:
        reply = httpx.request(method, f"{control.rstrip('/')}{path}", headers=headers, timeout=30.0, trust_env=False)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise EngineFailed(f"no holder answers at {control} ({error}); start one with `flyball hold`") from None
    body: dict[str, Any] = reply.json()
    if reply.status_code >= 400:
        raise InvalidInput(str(body.get("error", {}).get("message", body)))
    return body


def _command(name: str, doc: str) -> None:
    def do(control: Control = CONTROL, admin_key: AdminKey = None) -> None:
        typer.echo(_ask("POST", control, f"/v1/hold/{name}", admin_key)["done"])

    app.command(name, help=doc)(do)


for _name, _doc in (
    ("pause", "Propose nothing until resume."),
    ("resume", "Go on; leaves safe mode."),
    ("stop", "End; what is in force stays."),
    ("rollback", "Put the last known good in force."),
    ("kill", "End at once; what was in force at the start is put back."),
    ("safe", "Enter safe mode until resume."),
):
    _command(_name, _doc)


@app.command("status")
def status(control: Control = CONTROL, admin_key: AdminKey = None) -> None:
    """What the holder does, as JSON."""
    print(json.dumps(_ask("GET", control, "/v1/hold", admin_key), indent=1))


@app.command("approve")
def approve(control: Control = CONTROL, admin_key: AdminKey = None) -> None:
    """Let the change that waits be made."""
    print(json.dumps(_ask("POST", control, "/v1/hold/approval/approve", admin_key)))


@app.command("refuse")
def refuse(control: Control = CONTROL, admin_key: AdminKey = None) -> None:
    """Have the change that waits dropped."""
    print(json.dumps(_ask("POST", control, "/v1/hold/approval/refuse", admin_key)))


@app.command("explain")
def explain(
    number: Annotated[int, typer.Argument(help="Of a decision; with --audit, of a proposal.")],
    audit: Annotated[Path | None, typer.Option(help="Read an audit file in place of a running holder.")] = None,
    control: Control = CONTROL,
    admin_key: AdminKey = None,
) -> None:
    """Why a decision was taken: what was seen, wished and done."""
    if audit is None:
        print(json.dumps(_ask("GET", control, f"/v1/hold/explain/{number}", admin_key), indent=1))
        return
    from flyball.adapters.audit_files import read_audit
    from flyball.core.errors import InvalidInput

    events = [e for e in (read_audit(audit) or [[]])[-1] if e.data.get("proposal") == number]
    if not events:
        raise InvalidInput(f'{audit} holds no proposal {number} in its last run; look for "proposal" in its lines')
    for event in events:
        print(json.dumps(event.record()))


@app.command("replay")
def replay(audit: Annotated[Path, typer.Argument(help="Audit file of `flyball hold`.")]) -> None:
    """Decide every run of an audit again, and say whether the decisions are the same."""
    from flyball.adapters.audit_files import read_audit
    from flyball.tuner.guard_replay import first_difference
    from flyball.tuner.guard_replay import replay as decide_again

    different = 0
    for events in read_audit(audit):
        difference = first_difference(events, decide_again(events))
        different += difference is not None
        typer.echo(f"run {events[0].run}: {len(events)} events, {difference or 'the same decisions'}")
    if different:
        raise typer.Exit(1)

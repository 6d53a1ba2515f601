"""`flyball serve`: one model behind an OpenAI-compatible server with live knobs."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

from flyball.cli.engine_options import (
    BlockSize,
    DraftModel,
    Dtype,
    KvCacheMib,
    MaxModelLen,
    MaxNumBatchedTokens,
    MaxNumSeqs,
    MedusaHeads,
    Model,
    Quantization,
    QuantizeHead,
    SpecMethod,
    Threads,
    engine_config,
    given,
)

if TYPE_CHECKING:
    from flyball.server.account import Watcher

BUNDLED_NAME = "flyball-tiny"  # its folder is called by its part, "target"


def run(
    context: typer.Context,
    model: Model = None,
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine only with a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one and prints it.", min=0)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="Name clients ask for; default: the folder's, flyball-tiny if bundled.")
    ] = None,
    dtype: Dtype = "auto",
    max_num_seqs: MaxNumSeqs = 64,
    max_num_batched_tokens: MaxNumBatchedTokens = 2048,
    max_model_len: MaxModelLen = None,
    kv_cache_mib: KvCacheMib = 512,
    block_size: BlockSize = 16,
    threads: Threads = None,
    quantization: Quantization = None,
    quantize_head: QuantizeHead = False,
    spec_method: SpecMethod = "off",
    draft_model: DraftModel = None,
    medusa_heads: MedusaHeads = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            help="Key that clients must send as a bearer token; may be given several times, and each key then has a "
            "prefix cache of its own. In the environment keys are separated by spaces.",
            envvar="FLYBALL_API_KEY",
        ),
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(help="Key of the admin routes; default: the API keys.", envvar="FLYBALL_ADMIN_KEY"),
    ] = None,
    max_body_mib: Annotated[int, typer.Option(help="Largest request body in MiB.", min=1)] = 16,
    grace_s: Annotated[
        float, typer.Option(help="Seconds that requests under way may take once the server is told to stop.", min=0)
    ] = 30.0,
    access_log: Annotated[
        Literal["off", "json", "text"], typer.Option(help="One line a request, with its numbers, on standard error.")
    ] = "off",
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send OpenTelemetry spans there, such as http://localhost:4318/v1/traces; needs the extra tracing."
        ),
    ] = None,
) -> None:
    """Serve a model over HTTP: OpenAI's routes, Prometheus metrics, and knobs that change while it runs."""
    from flyball.cli import require
    from flyball.core.errors import EngineFailed, InvalidInput

    require("engine", "torch", "transformers", "tokenizers", "fastapi", "uvicorn", "prometheus_client", "orjson")
    if otlp_endpoint:
        require("tracing", "opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")
    signal.signal(signal.SIGTERM, _exit)

    from flyball.server.process import is_loopback, listen, serve, url_of

    if not is_loopback(host) and not api_key:
        raise InvalidInput(
            f"listening on {host} lets others in; give --api-key (or set FLYBALL_API_KEY), or stay on 127.0.0.1"
        )
    config = engine_config(
        model,
        dtype=dtype,
        block_size=block_size,
        kv_cache_mib=kv_cache_mib,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        threads=threads,
        quantization=quantization,
        quantize_head=quantize_head,
        spec_method=spec_method,
        draft_model=draft_model,
        medusa_heads=medusa_heads,
    )
    with listen(host, port) as listener:  # before torch and the model are loaded, which takes a while
        from flyball.engine.async_engine import AsyncEngine
        from flyball.server.app import Limits, create_app
        from flyball.server.auth import Keys
        from flyball.server.gate import Gate

        shown = name or (BUNDLED_NAME if model is None else None)
        engine = AsyncEngine(config, model_name=shown, given=given(context))

        def ready() -> None:
            blocks = engine.config.num_blocks
            typer.echo(
                f"flyball: serving {engine.model_name} on {url_of(listener)} "
                f"(max_model_len {engine.max_model_len}, {blocks} KV blocks)"
            )

        with _watchers(access_log, otlp_endpoint, engine.model_name) as watchers:
            gate = Gate()
            keys = Keys(users=tuple(api_key or ()), admin=admin_key)
            limits = Limits(max_body_bytes=max_body_mib * 2**20)
            app = create_app(engine, keys=keys, gate=gate, limits=limits, watchers=watchers)
            try:
                serve(app, engine, listener, gate=gate, on_ready=ready, grace_s=grace_s)
            except EngineFailed as error:  # no mistake of the user's, hence not 2
                typer.echo(f"flyball: {error}", err=True)
                raise typer.Exit(1) from error


@contextlib.contextmanager
def _watchers(log: Literal["off", "json", "text"], otlp_endpoint: str | None, model: str) -> Iterator[list[Watcher]]:
    """Who is told of each request; what they hold back is sent at the end."""
    watchers: list[Watcher] = []
    with contextlib.ExitStack() as ends:
        if log != "off":
            from flyball.server.access_log import access_log

            watchers.append(access_log(sys.stderr, as_json=log == "json"))
        if otlp_endpoint:
            from flyball.core.clock import SystemClock
            from flyball.server.tracing import otlp_provider, spans

            provider = otlp_provider(otlp_endpoint, model)
            ends.callback(provider.shutdown)
            watchers.append(spans(provider, SystemClock()))
        yield watchers


def _exit(_signal: int, _frame: FrameType | None) -> NoReturn:
    """SIGTERM is a way to stop, not a failure."""
    raise SystemExit(0)

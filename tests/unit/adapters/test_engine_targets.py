"""Engines as targets, over stub processes that speak their command lines and APIs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from conformance.target import TargetConformance
from flyball.adapters.engines.spawned import SpawnedTarget
from flyball.adapters.engines.targets import TargetOptions, make_target
from flyball.adapters.engines.triton import TritonTarget
from flyball.adapters.loadgen import HttpLoad
from flyball.core.errors import EngineFailed, InvalidInput, InvalidKnob
from flyball.core.ports import EngineTarget
from flyball.core.slo import Slo
from flyball.core.workload import RequestSpec, Workload
from flyball.tuner.space import Lattice
from helpers.stub_engines import install

PBTXT = """
name: "echo"
backend: "python"
max_batch_size: 8
input [ { name: "text_input" data_type: TYPE_STRING dims: [ 1 ] } ]
output [ { name: "text_output" data_type: TYPE_STRING dims: [ -1 ] } ]
instance_group [ { count: 2 kind: KIND_CPU } ]
parameters { key: "batch_scheduler_policy" value { string_value: "max_utilization" } }
parameters { key: "tokenizer_dir" value { string_value: "/a {b" } }
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the stubs' executables, a checkpoint's config, and a Triton repository."""
    folder = install(tmp_path_factory.mktemp("engines"))
    (folder / "model").mkdir()
    config = {"num_attention_heads": 4, "max_position_embeddings": 1024, "vocab_size": 2048}
    (folder / "model" / "config.json").write_text(json.dumps(config))
    (folder / "repository" / "echo" / "1").mkdir(parents=True)
    (folder / "repository" / "echo" / "config.pbtxt").write_text(PBTXT)
    return folder


def options(environment: Path, engine: str, **more: object) -> TargetOptions:
    """What the command line would give."""
    model = environment / ("repository/echo" if engine == "triton" else "model")
    basis = TargetOptions(engine=engine, model=str(model), program=str(environment), ready_timeout_s=60)
    return replace(basis, **more)  # type: ignore[arg-type]


class SpawnedConformance(TargetConformance):
    """The contract of every target, with one process for all tests of an engine: each begins at the defaults."""

    engine = ""

    @pytest.fixture(scope="class")
    @classmethod
    def shared(cls, environment: Path) -> Iterator[EngineTarget]:
        """Runs for the whole class."""
        with make_target(options(environment, cls.engine)) as target:
            yield target

    @pytest.fixture
    def target(self, shared: EngineTarget) -> EngineTarget:
        """At its defaults."""
        shared.apply(shared.space().defaults())
        return shared

    def test_the_default_is_legal_and_the_search_ranges_fit(self, target: EngineTarget) -> None:
        """A study can be made of what the target tells: ranges within bounds, rules that name its knobs."""
        ranges, space = target.search_ranges(), target.space()
        assert set(ranges) == {knob.name for knob in space}
        live = type(space)(tuple(replace(knob, live=True) for knob in space))
        lattice = Lattice.of(live, ranges, target.constraints())
        assert lattice.size > 100
        assert lattice.legal(lattice.point(lattice.default) or next(lattice.points()))

    def test_the_command_says_what_is_away_from_the_default(self, target: EngineTarget) -> None:
        """The launch line to paste names a changed parameter, and a default one not."""
        knob = next(knob for knob in target.space() if knob.kind == "int" and knob.name != "max_batch_size")
        assert knob.high is not None
        changed = target.command({knob.name: int(knob.high)})
        plain = target.command({})
        assert str(int(knob.high)) in changed
        assert str(int(knob.high)) not in plain

    def test_a_broken_rule_is_refused_before_a_restart(self, target: EngineTarget) -> None:
        """A relation that the engine is known to insist on costs no start; the engine runs on as it was."""
        before = dict(target.configuration())
        with pytest.raises(InvalidKnob, match=f"{self.engine} refuses what breaks"):
            target.apply(self.illegal)
        assert dict(target.configuration()) == before
        assert target.metrics() is not None

    illegal: ClassVar[dict[str, int | bool]]

    def test_answers_are_counted_by_the_engines_own_names(self, target: EngineTarget) -> None:
        """A request shows in the readings under our names."""
        before = target.metrics()
        ask(target, tokens=3)
        after = target.metrics()
        assert after["requests_done"] == before["requests_done"] + 1
        if "ttft_s_count" in after:
            assert after["ttft_s_count"] == before["ttft_s_count"] + 1


def ask(target: EngineTarget, tokens: int = 1) -> httpx.Response:
    """One completion."""
    if target.identity().name == "triton":
        path, body = "/v2/models/echo/generate_stream", {"text_input": "a b", "max_tokens": tokens}
    else:
        path, body = "/v1/completions", {"model": "m", "prompt": [5, 6], "max_tokens": tokens}
    return httpx.post(target.url + path, json=body, trust_env=False)


@pytest.mark.slow
class TestVllm(SpawnedConformance):
    """vLLM 0.33."""

    engine = "vllm"
    illegal: ClassVar = {"enable_chunked_prefill": False, "max_num_batched_tokens": 512}


@pytest.mark.slow
class TestSglang(SpawnedConformance):
    """SGLang 0.5.23."""

    engine = "sglang"
    illegal: ClassVar = {"pp_size": 2}


@pytest.mark.slow
class TestTensorrtLlm(SpawnedConformance):
    """TensorRT-LLM 1.2."""

    engine = "tensorrt_llm"
    illegal: ClassVar = {"max_batch_size": 4096, "max_num_tokens": 64}


class TestTriton(SpawnedConformance):
    """Triton 2.60: one server, reloaded."""

    engine = "triton"
    illegal: ClassVar = {"dynamic_batching": True, "preferred_batch_size": 64}

    def test_the_users_repository_is_left_as_it_was(self, environment: Path, target: EngineTarget) -> None:
        """The server reads our copy of config.pbtxt, in which what is not ours is kept."""
        target.apply({"dynamic_batching": True, "max_queue_delay_microseconds": 100, "max_batch_size": 16})
        assert (environment / "repository" / "echo" / "config.pbtxt").read_text() == PBTXT
        loaded = httpx.get(f"{target.url}/v2/models/echo/config", trust_env=False).json()["text"]
        for kept in ('name: "text_input"', "KIND_CPU", '"/a {b"', "max_batch_size: 16", "count: 2", '"max_utilization"',
                     "max_queue_delay_microseconds: 100"):  # fmt: skip
            assert kept in loaded

    def test_defaults_are_those_of_the_models_file(self, target: EngineTarget) -> None:
        """What the user's config.pbtxt says is the reference of a study."""
        defaults = target.space().defaults()
        assert (defaults["max_batch_size"], defaults["instance_count"]) == (8, 2)
        assert defaults["batch_scheduler_policy"] == "max_utilization"
        assert defaults["dynamic_batching"] is False

    def test_a_model_that_does_not_load_leaves_the_one_before(self, target: EngineTarget) -> None:
        """A refused reload is classified, and the configuration of before serves on."""
        with pytest.raises(EngineFailed, match="did not load the model") as failed:
            target.apply({"instance_count": 16})
        assert failed.value.kind == "out of memory"
        assert target.configuration()["instance_count"] == 2
        assert ask(target).status_code == 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "arguments", "kind", "evidence"),
    [
        ("vllm", ("--bogus", "1"), "refused", "unrecognized arguments: --bogus"),
        ("vllm", ("--max-num-batched-tokens", "64"), "refused", "greater than or equal to max_num_seqs"),
        ("vllm", ("--block-size", "8"), "refused", "No common block size for 8"),
        ("vllm", ("--gpu-memory-utilization", "0.1"), "out of memory", "No available memory for the cache blocks"),
        ("sglang", ("--pp-size", "2"), "refused", "not compatible with overlap"),
        ("sglang", ("--mem-fraction-static", "0.97"), "out of memory", "CUDA out of memory"),
        ("tensorrt_llm", ("--bogus", "1"), "refused", "No such option: --bogus"),
        ("triton", ("--bogus=1",), "refused", "unrecognized option"),
    ],
)
def test_a_failed_start_says_what_kind_it_was(
    environment: Path, engine: str, arguments: tuple[str, ...], kind: str, evidence: str
) -> None:
    """The kind and the line of the log that gave it away, in one sentence; nothing is left running."""
    with make_target(options(environment, engine, arguments=arguments)) as target:
        with pytest.raises(EngineFailed, match="did not start") as failed:
            target.apply({})
        assert failed.value.kind == kind
        assert evidence in failed.value.evidence
        assert dict(target.configuration()) == target.space().defaults()


@pytest.mark.parametrize(("fault", "kind"), [("killed", "out of memory"), ("hang", "timeout")])
def test_a_start_that_never_ends_well_is_named(environment: Path, fault: str, kind: str) -> None:
    """Killed by the kernel while it loads, or never ready."""
    wanted = options(
        environment, "vllm", variables={"STUB_FAULT": fault}, ready_timeout_s=60 if fault == "killed" else 0.5
    )
    with make_target(wanted) as target:
        with pytest.raises(EngineFailed, match=rf"vllm did not start \({kind}\)") as failed:
            target.apply({})
        assert failed.value.kind == kind


@pytest.mark.parametrize(("fault", "kind"), [("crash", "crash"), ("oom", "out of memory")])
def test_a_crash_under_load_is_told_once_and_the_next_start_works(environment: Path, fault: str, kind: str) -> None:
    """The window in which an engine died belongs to nobody; afterwards the target starts again."""
    with make_target(options(environment, "vllm", variables={"STUB_FAULT": fault})) as target:
        target.apply({})
        with pytest.raises(httpx.HTTPError):
            ask(target)
        until(lambda: raises(target.configuration))
        assert target.configuration() == target.space().defaults()
        generation = target.apply({})
        assert generation == target.apply({})
        assert httpx.get(f"{target.url}/health", trust_env=False).status_code == 200
        with pytest.raises(httpx.HTTPError):
            ask(target)
        with pytest.raises(EngineFailed) as failed:
            until(lambda: target.configuration() is None)
        assert failed.value.kind == kind


def raises(call: Callable[[], object]) -> bool:
    """Whether the engine's failure was told."""
    try:
        call()
    except EngineFailed:
        return True
    return False


def gone(pid: int) -> bool:
    """Whether a process has ended; a zombie has."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def until(true: Callable[[], bool]) -> None:
    """Wait for what other processes do; the test's timeout is the limit."""
    while not true():
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_kill_9_of_the_tuner_leaves_no_engine_behind(environment: Path, tmp_path: Path) -> None:
    """Neither the engine nor its workers in sessions of their own outlive a tuner that had no chance to end them."""
    note, ready = tmp_path / "child", tmp_path / "ready"
    wanted = options(environment, "vllm", variables={"STUB_CHILD": str(note)})
    script = textwrap.dedent(f"""
        import time
        from pathlib import Path
        from flyball.adapters.engines.targets import TargetOptions, make_target
        target = make_target({wanted!r})
        target.apply({{}})
        Path({str(ready)!r}).write_text(str(target._child.pid))
        time.sleep(600)
    """)
    process = subprocess.Popen([sys.executable, "-c", script])
    until(lambda: process.poll() is not None or (ready.exists() and bool(ready.read_text())))
    pids = [int(ready.read_text()), int(note.read_text())]
    assert not any(map(gone, pids))
    process.send_signal(signal.SIGKILL)
    process.wait()
    until(lambda: all(map(gone, pids)))


def test_any_server_can_be_measured_and_not_set(environment: Path) -> None:
    """A server whose engine is not named has no knobs, and says so."""
    with make_target(options(environment, "sglang")) as engine:
        engine.apply({})
        with make_target(TargetOptions(engine="openai", url=engine.url + "/v1")) as target:
            assert target.apply({}) == target.apply({})
            assert list(target.space()) == []
            with pytest.raises(InvalidKnob, match=r"only measured, so max_num_seqs cannot be set"):
                target.apply({"max_num_seqs": 1})
            assert "sglang_num_running_reqs" in target.metrics()
            assert target.command({}).startswith("flyball bench --url")


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        (TargetOptions(engine="nemo"), "unknown engine 'nemo'; this version tunes flyball, vllm"),
        (TargetOptions(engine="vllm"), "vllm needs a model"),
        (TargetOptions(engine="vllm", model="m", url="http://x"), "changes only by a restart"),
        (TargetOptions(engine="vllm", model="m", program="/nowhere"), "/nowhere is neither the vllm executable"),
        (TargetOptions(engine="sglang", model="m"), "no `sglang` is installed here, so sglang cannot be started"),
        (TargetOptions(engine="triton", model="m", program=sys.executable), r"cannot read m/config.pbtxt"),
        (TargetOptions(engine="vllm", model="/no/such", program=sys.executable), "there is no folder /no/such"),
        (TargetOptions(engine="openai"), "give its address with --url"),
        (TargetOptions(engine="flyball"), "give --url"),
    ],
    ids=[
        "unknown",
        "no model",
        "restart",
        "no program",
        "not installed",
        "no config",
        "no folder",
        "no address",
        "no server",
    ],
)
def test_what_is_missing_is_one_sentence(wanted: TargetOptions, said: str) -> None:
    """Nothing is started for a mistake in the options."""
    with pytest.raises(InvalidInput, match=said):
        make_target(wanted)


@pytest.mark.parametrize("engine", ["vllm", "triton"])
def test_the_load_generator_speaks_each_engines_protocol(environment: Path, engine: str) -> None:
    """Every request completes with the tokens it asked for, and the engine counts as many as the client."""
    workload = Workload(
        requests=tuple(RequestSpec(arrival_s=i / 50, input_tokens=4, output_tokens=3) for i in range(5)), source="five"
    )
    with make_target(options(environment, engine)) as target:
        generation = target.apply({})
        assert isinstance(target, SpawnedTarget | TritonTarget)
        facts = target.facts()
        load = HttpLoad(url=facts.url, model=facts.model, vocab_size=facts.vocab_size, protocol=facts.protocol)
        window = load.run(workload, Slo(), generation)
        assert [trace.output_tokens for trace in window.completed] == [3] * 5, load.failures
        assert target.metrics()["requests_done"] == 5

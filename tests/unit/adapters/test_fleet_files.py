"""Fleet specs on disk: three forms read alike, mistakes named, plans written as others read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from flyball.adapters.fleet_files import allocation_solution, read_fleet
from flyball.adapters.profile_files import read_profiles, write_profiles
from flyball.core.errors import InvalidInput
from flyball.core.fleet import FleetSpec, LatencyProfile, ServerSpec, Targets
from flyball.planner.plan import plan

DATA = Path(__file__).parents[2] / "data" / "inferno"
EXAMPLE = Path(__file__).parents[3] / "examples" / "fleet.yaml"


def minimal() -> dict[str, Any]:
    """A SystemData body of one server."""
    return {
        "system": {
            "acceleratorData": {"accelerators": [{"name": "A", "type": "T", "multiplicity": 2, "cost": 40}]},
            "modelData": {
                "models": [
                    {
                        "name": "m", "acc": "A", "accCount": 1, "maxBatchSize": 16, "atTokens": 128,
                        "perfParms": {"alpha": 10, "beta": 0.05, "gamma": 0.0001},
                    }
                ]
            },
            "serviceClassData": {
                "serviceClasses": [
                    {"name": "c", "priority": 1, "modelTargets": [{"model": "m", "slo-itl": 40, "slo-ttft": 1000}]}
                ]
            },
            "serverData": {
                "servers": [
                    {
                        "name": "s", "class": "c", "model": "m",
                        "currentAlloc": {"load": {"arrivalRate": 120, "avgInTokens": 128, "avgOutTokens": 128}},
                    }
                ]
            },
            "optimizerData": {"optimizer": {"unlimited": True}},
            "capacityData": {"count": [{"type": "T", "count": 8}]},
        }
    }  # fmt: skip


@pytest.fixture
def save(tmp_path: Path) -> Callable[[Any], Path]:
    """Write a body as a SystemData file."""

    def write(body: Any) -> Path:
        path = tmp_path / "system.json"
        path.write_text(body if isinstance(body, str) else json.dumps(body))
        return path

    return write


def recased(value: Any, change: Callable[[str], str]) -> Any:
    """The same body with other keys."""
    if isinstance(value, dict):
        return {change(key): recased(item, change) for key, item in value.items()}
    return [recased(item, change) for item in value] if isinstance(value, list) else value


def test_a_folder_is_read_like_one_file() -> None:
    """The six files of the small set and their one body give the same fleet, in seconds and requests a second."""
    folder, file = read_fleet(DATA / "small"), read_fleet(DATA / "small" / "system-data.json")
    assert (folder.saturation_policy, file.saturation_policy) == ("RoundRobin", "PriorityRoundRobin")  # as published
    assert replace(folder, saturation_policy=file.saturation_policy) == file
    assert (len(folder.accelerators), len(folder.profiles), len(folder.servers)) == (6, 30, 15)
    server = folder.servers[0]
    assert (server.name, server.demand.arrival_rps, server.demand.input_tokens) == ("Premium-llama_13b", 1.0, 128)
    assert folder.service_classes[0].targets["llama_13b"] == Targets(ttft_s=1.0, itl_s=0.08)
    assert folder.capacity == {"L4": 1024, "A100": 768, "AIU2": 1024, "G2": 512}
    assert not folder.unlimited


@pytest.mark.parametrize("change", [str.upper, str.lower, str.title, lambda key: key[:1].upper() + key[1:]])
def test_keys_are_read_in_any_case(save: Callable[[Any], Path], change: Callable[[str], str]) -> None:
    """As Go reads them."""
    assert read_fleet(save(recased(minimal(), change))) == read_fleet(save(minimal()))


def test_unknown_keys_are_ignored_and_missing_ones_are_zero(save: Callable[[Any], Path]) -> None:
    """As Go reads them, null included; a count of cards that is missing is one."""
    body = minimal()
    body["system"]["acceleratorData"]["accelerators"][0] = {"name": "A", "power": {"idle": 1}, "type": None}
    body["system"]["serverData"]["servers"][0]["maxQueueSize"] = None
    body["extra"] = 1
    spec = read_fleet(save(body))
    assert (spec.accelerators[0].type, spec.accelerators[0].units, spec.accelerators[0].cost_per_h) == ("A", 1, 0)
    assert spec.servers[0].max_queue == 0


def test_a_priority_out_of_range_is_the_lowest(save: Callable[[Any], Path]) -> None:
    """As the Go optimizer takes it."""
    body = minimal()
    body["system"]["serviceClassData"]["serviceClasses"][0]["priority"] = -3
    assert read_fleet(save(body)).service_classes[0].priority == 100


@pytest.mark.parametrize(
    ("where", "value", "complaint"),
    [
        (("serverData", "servers", 0, "currentAlloc", "load", "arrivalRate"), -5,
         "serverData.servers[0].currentAlloc.load.arrivalRate is -5; give a number of at least 0"),
        (("serverData", "servers", 0, "currentAlloc", "load", "avgInTokens"), "many",
         "serverData.servers[0].currentAlloc.load.avgInTokens is 'many'; give a number of at least 0"),
        (("serverData", "servers", 0, "keepAccelerator"), 1,
         "serverData.servers[0].keepAccelerator is 1; give true or false"),
        (("serverData", "servers", 0, "minNumReplicas"), 1.5,
         "serverData.servers[0].minNumReplicas is 1.5; give a whole number of at least 0"),
        (("serverData", "servers", 0, "name"), "",
         "serverData.servers[0].name is ''; give a text that is not empty"),
        (("serverData", "servers", 0), 7, "serverData.servers[0] is 7; give a mapping of fields"),
        (("serverData", "servers"), {}, "serverData.servers is {}; give a list"),
        (("serverData", "servers"), [], "serverData lists no servers; add at least one to plan for"),
        (("modelData", "models", 0, "perfParms", "alpha"), True,
         "modelData.models[0].perfParms.alpha is True; give a number of at least 0"),
        (("acceleratorData",), [], "acceleratorData is []; give a mapping of fields"),
    ],
)  # fmt: skip
def test_a_malformed_value_is_named(
    save: Callable[[Any], Path], where: tuple[str | int, ...], value: Any, complaint: str
) -> None:
    """The complaint gives the path of the field, what it holds and what it should."""
    body = minimal()
    place: Any = body["system"]
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    path = save(body)
    with pytest.raises(InvalidInput) as raised:
        read_fleet(path)
    assert str(raised.value) == f"{path}.system.{complaint}"


def test_a_name_given_twice_is_refused(save: Callable[[Any], Path]) -> None:
    """Which of two servers of one name is meant cannot be known."""
    body = minimal()
    body["system"]["serverData"]["servers"] *= 2
    with pytest.raises(InvalidInput, match="server 's' is given twice; keep one of them"):
        read_fleet(save(body))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not valid JSON"),
        ('{"system": {"x": NaN}}', "is not valid JSON .NaN is not a JSON number"),
        ("[" * 100_000, "is not valid JSON"),
        ("[]", "is .*; give a mapping of fields"),
        ('{"a": 1}', "has neither 'system' .* nor 'servers'"),
    ],
)
def test_what_is_no_spec_is_refused(save: Callable[[Any], Path], text: str, complaint: str) -> None:
    """Broken, hostile or foreign files end in a sentence."""
    with pytest.raises(InvalidInput, match=complaint):
        read_fleet(save(text))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file, a missing part of a folder, bytes that are no text."""
    with pytest.raises(InvalidInput, match=r"cannot read .*none.json: No such file .*; give a file that exists"):
        read_fleet(tmp_path / "none.json")
    with pytest.raises(InvalidInput, match=r"has no server-data.json; add it, or give one SystemData file"):
        read_fleet(tmp_path)
    (tmp_path / "x.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match="is not a text file"):
        read_fleet(tmp_path / "x.json")


def test_our_yaml_is_read() -> None:
    """The example says what the fields mean, in the units their names and texts state."""
    spec = read_fleet(EXAMPLE)
    assert [s.name for s in spec.servers] == ["assistant", "analyst", "summaries", "night-jobs"]
    assert spec.service_classes[0].targets["chat-70b"] == Targets(ttft_s=1.5, itl_s=0.06)
    assert (spec.accelerators[2].type, spec.accelerators[2].units) == ("A100", 2)
    assert spec.profiles[1].alpha_s == pytest.approx(0.0105)
    assert spec.servers[0].max_queue == 128


@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        (
            "alpha_ms: 38",
            "alfa_ms: 38",
            r"profiles\[0\].alfa_ms is not a known field; use model, accelerator, alpha_ms",
        ),
        ("alpha_ms: 38, ", "", r"profiles\[0\].alpha_ms is missing; give a number of at least 0"),
        ("cost_per_h: 0.80", "cost_per_h: .inf", r"accelerators\[0\].cost_per_h is inf; give a number of at least 0"),
        ("mean_ttft<500ms", "p95_tpot<500ms", "has 'p95_tpot<500ms'; a plan holds percentiles of ttft, itl and"),
        ("mean_ttft<500ms", "fast", "cannot read the SLO 'fast'; write it like"),
        ("priority: 10", "priority: 0", "priority is 0; give a number of at least 1"),
        ("accelerators:", "accelerators: [", "is not valid YAML"),
    ],
)
def test_our_yaml_is_strict(tmp_path: Path, old: str, new: str, complaint: str) -> None:
    """A misspelt field must not pass for one left out."""
    path = tmp_path / "fleet.yaml"
    text = EXAMPLE.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(InvalidInput, match=complaint):
        read_fleet(path)


def test_a_plan_is_written_as_an_allocation_solution(save: Callable[[Any], Path]) -> None:
    """Milliseconds, requests per minute and the spec's own cost unit; the served throughput shows what is lost."""
    spec = read_fleet(save(minimal()))
    solution = allocation_solution(spec, plan(spec))
    allocation = solution["allocations"]["s"]
    assert allocation.keys() == {"accelerator", "numReplicas", "maxBatch", "cost", "itlAverage", "ttftAverage", "load"}
    assert (allocation["accelerator"], allocation["cost"]) == ("A", 40 * allocation["numReplicas"])
    assert allocation["maxBatch"] == 16
    assert 10 < allocation["itlAverage"] < 40 < 1000
    load = allocation["load"]
    assert (load["arrivalRate"], load["avgInTokens"], load["avgOutTokens"]) == (pytest.approx(120), 128, 128)
    assert 0.9 * 120 < load["throughput"] <= 120
    assert solution["totalCost"] == allocation["cost"]
    assert "unserved" not in solution
    json.dumps(solution, allow_nan=False)


def profile(**changes: Any) -> LatencyProfile:
    """A fitted profile for the example fleet."""
    given = {"model": "chat-8b", "accelerator": "L4", "alpha_s": 0.02, "beta_s": 1e-4, "gamma_s": 0.0, "max_batch": 32}
    return LatencyProfile(**given | {"queue_model": "v3-engine", "condition_number": 12.5, "generation": "g"} | changes)


def test_profiles_come_back_as_written(tmp_path: Path) -> None:
    """Every field survives the file."""
    profiles = (profile(), profile(accelerator="A100", condition_number=None))
    write_profiles(tmp_path / "p.json", profiles)
    assert read_profiles(tmp_path / "p.json") == profiles


def test_a_foreign_profile_file_is_refused(tmp_path: Path) -> None:
    """Another JSON file is not taken for an empty list of profiles."""
    (tmp_path / "p.json").write_text("{}")
    with pytest.raises(
        InvalidInput, match=r"is not a flyball\.profile/1 file; give one that `flyball fit --out` wrote"
    ):
        read_profiles(tmp_path / "p.json")
    with pytest.raises(InvalidInput, match="cannot write"):
        write_profiles(tmp_path / "none" / "p.json", [profile()])


def test_a_measured_profile_takes_the_place_of_the_stated_one() -> None:
    """It brings its parameters and batch, and leaves the number of accelerators a replica takes as stated."""
    spec = read_fleet(EXAMPLE)
    merged = spec.with_profile(profile())
    assert merged.profiles[0] == profile()
    assert merged.profiles[1:] == spec.profiles[1:]
    assert len(spec.with_profile(profile(model="chat-70b")).profiles) == 4  # one that the spec had no numbers for


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"accelerator": "H9"}, "does not fit the spec, whose accelerators are 2xA100, A100, L4; add or rename one"),
        ({"model": "gpt"}, "does not fit the spec, whose models are chat-70b, chat-8b; add or rename one"),
    ],
)
def test_a_profile_of_something_else_is_refused(changes: dict[str, str], complaint: str) -> None:
    """A profile that would be used by nobody is a mistake in a name."""
    with pytest.raises(InvalidInput, match=complaint):
        read_fleet(EXAMPLE).with_profile(profile(**changes))


def test_a_server_needs_sensible_numbers() -> None:
    """The words themselves refuse what no file should hold."""
    with pytest.raises(InvalidInput, match="server s: max_queue is -1; give a finite number of at least 0"):
        ServerSpec(name="s", service_class="c", model="m", max_queue=-1)
    with pytest.raises(InvalidInput, match="target itl_s is 0; give a number above 0, or leave it out"):
        Targets(itl_s=0)
    with pytest.raises(InvalidInput, match="accelerator 'A' is given twice"):
        FleetSpec(accelerators=read_accelerators(), profiles=(), service_classes=(), servers=())


def read_accelerators() -> tuple[Any, ...]:
    """Two of one name."""
    from flyball.core.fleet import Accelerator

    return (Accelerator(name="A", type="T"), Accelerator(name="A", type="U"))

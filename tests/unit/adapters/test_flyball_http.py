"""A Flyball server as a tuning target."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from aiohttp import web

from conformance.target import TargetConformance
from flyball.adapters.engines.flyball_http import CONSTRAINTS, FlyballTarget, search_ranges
from flyball.core.errors import EngineFailed, InvalidKnob
from flyball.tuner.space import Lattice
from helpers.tunable_server import SPACE, TunableServer, running


@pytest.fixture
def server() -> Iterator[TunableServer]:
    """A server with live knobs."""
    with running(TunableServer()) as server:
        yield server


class TestFlyballTarget(TargetConformance):
    """The target keeps the contract of every target."""

    @pytest.fixture
    def target(self, server: TunableServer) -> Iterator[FlyballTarget]:
        """A target over a server at its defaults."""
        with FlyballTarget(server.url + "/v1/") as target:
            yield target


def test_a_refused_relation_carries_the_servers_own_words(server: TunableServer) -> None:
    """What the engine says about a relation between knobs reaches the user, and nothing was changed."""
    with FlyballTarget(server.url) as target:
        with pytest.raises(InvalidKnob, match="max_num_seqs is over max_num_batched_tokens"):
            target.apply({"max_num_seqs": 64, "max_num_batched_tokens": 8})
        assert server.applied == []


def test_nobody_there_is_one_clear_sentence(server: TunableServer) -> None:
    """A server that is not there, that has no knobs, or that wants a key: each says what to do."""
    with pytest.raises(EngineFailed, match=r"no server answers at http://127\.0\.0\.1:9 .*flyball serve"):
        FlyballTarget("http://127.0.0.1:9")
    server.api_key = "secret"
    with pytest.raises(EngineFailed, match=r"refuses the key \(no valid key\); give the admin key"):
        FlyballTarget(server.url)
    with FlyballTarget(server.url, api_key="secret") as target:
        assert target.configuration() == SPACE.defaults()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (web.HTTPNotFound(), "has no /v1/config"),
        (web.HTTPInternalServerError(text="boom"), "GET .* answered 500: boom"),
        (web.Response(text="hello"), "something else than a configuration"),
    ],
    ids=["not found", "broken", "not json"],
)
def test_other_servers_are_told_apart(answer: web.Response | web.HTTPException, said: str) -> None:
    """A server that is no Flyball, or a broken one, is named as such."""

    class Other(TunableServer):
        async def _config(self, request: web.Request) -> web.Response:
            if isinstance(answer, web.HTTPException):
                raise answer
            return answer

    with running(Other()) as server, pytest.raises(EngineFailed, match=said):
        FlyballTarget(server.url)


def test_an_engine_that_goes_away_is_reported_at_once() -> None:
    """A target whose server ended says so instead of waiting."""
    with running(TunableServer()) as server:
        target = FlyballTarget(server.url)
    with target, pytest.raises(EngineFailed, match="no server answers"):
        target.apply({"max_num_seqs": 4})


def test_the_ranges_worth_searching_are_legal_on_a_server() -> None:
    """The narrowed axes lie within the server's bounds, the default stays among them, and constraints can be read."""
    lattice = Lattice.of(SPACE, search_ranges(SPACE), [c for c in CONSTRAINTS if "long" not in c])
    levels = {axis.knob.name: axis.levels for axis in lattice.axes}
    assert levels["max_num_batched_tokens"] == (32, 48, 64, 96, 128, 192, 256)
    assert levels["max_wait_ms"] == (0.0, 2.0, 5.0, 10.0, 20.0, 50.0)
    assert lattice.point(lattice.default) is not None

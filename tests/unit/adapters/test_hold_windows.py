"""Windows of a live server from two scrapes of its counters."""

from __future__ import annotations

import pytest

from flyball.adapters.hold_windows import ServerWindows, between, parse
from flyball.core.clock import VirtualClock
from flyball.core.errors import EngineFailed


def text(version: int, answers: int, fast: int, slow: int) -> str:
    """What a server's `/metrics` shows after so many answers."""
    return f"""# TYPE engine_runtime_config_version gauge
engine_runtime_config_version {version}
# TYPE engine_request_success_total counter
engine_request_success_total{{finished_reason="stop"}} {answers}
engine_request_success_total{{finished_reason="timeout"}} 1
# TYPE engine_prompt_tokens counter
engine_prompt_tokens_total{{source="computed"}} {100 * answers}
engine_prompt_tokens_total{{source="cached"}} {10 * answers}
# TYPE engine_generation_tokens counter
engine_generation_tokens_total {20 * answers}
# TYPE engine_time_to_first_token_seconds histogram
engine_time_to_first_token_seconds_bucket{{le="0.1"}} {fast}
engine_time_to_first_token_seconds_bucket{{le="0.5"}} {fast + slow}
engine_time_to_first_token_seconds_bucket{{le="+Inf"}} {fast + slow}
engine_time_to_first_token_seconds_count {fast + slow}
engine_time_to_first_token_seconds_sum {0.05 * fast + 0.3 * slow}
"""


def test_a_window_is_what_happened_between_two_looks() -> None:
    """Rates, lengths and latencies of the answers in between, whatever came before."""
    reading = between(parse(text(3, 100, 50, 50), 10.0), parse(text(3, 140, 80, 60), 20.0))
    assert reading.generation == "3"
    assert reading.finished == 40
    assert reading.failed == 0
    assert reading.context == pytest.approx((4.0, 110.0, 20.0))
    ttft = reading.latencies["ttft"]
    assert ttft.count == 40
    assert ttft.mean == pytest.approx((0.05 * 30 + 0.3 * 10) / 40)
    assert ttft.share_within(0.1) == pytest.approx(0.75)


def test_a_window_across_a_change_belongs_to_nothing() -> None:
    """It has no generation."""
    assert between(parse(text(3, 1, 1, 0), 0.0), parse(text(4, 2, 2, 0), 1.0)).generation == ""


def test_a_server_that_restarted_counts_from_zero() -> None:
    """Counters that fell do not give negative windows."""
    reading = between(parse(text(3, 100, 50, 50), 0.0), parse(text(3, 7, 5, 2), 10.0))
    assert reading.finished == 7
    assert reading.latencies["ttft"].count == 7


def test_a_server_that_is_away_is_named() -> None:
    """With what to do."""
    with pytest.raises(EngineFailed, match="flyball serve"):
        ServerWindows("http://127.0.0.1:9", VirtualClock())

"""What a trial tells the latency law: the knobs that the law knows, and a window's figures as an operating point."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration
from flyball.performance.fit import OPEN_QUEUE, OperatingPoint, flaw
from flyball.performance.queueing import DEFAULT_STEP_TOKENS

LAW = "v3-engine"
# What the engines call the two knobs that the law knows, the first that a configuration has being meant.
BATCH_KNOBS = ("max_num_seqs", "max_running_requests", "max_batch_size")
STEP_KNOBS = ("max_num_batched_tokens", "chunked_prefill_size", "max_num_tokens")


def limit(values: Configuration, names: Sequence[str]) -> int | None:
    """The first of these knobs that a configuration sets to a number of at least 1; None if none is."""
    for name in names:
        value = values.get(name)
        if isinstance(value, int | float) and not isinstance(value, bool) and value >= 1:
            return int(value)
    return None


def operating_point(values: Configuration, metrics: Mapping[str, float]) -> OperatingPoint | str:
    """What a trial's figures (`study.summary`) tell the law, or why they tell it nothing."""
    batch = limit(values, BATCH_KNOBS)
    wanted = ("arrival_rps", "mean_input_tokens", "mean_output_tokens", "mean_ttft", "mean_itl")
    if missing := [name for name in wanted if name not in metrics]:
        return f"{missing[0]} was not measured"
    if batch is None:
        return "no limit of its batch is known"
    lag_s = metrics.get("mean_lag_s", 0.0)
    try:
        point = OperatingPoint(
            arrival_rps=metrics["arrival_rps"],
            input_tokens=metrics["mean_input_tokens"],
            output_tokens=metrics["mean_output_tokens"],
            max_batch=batch,
            max_queue=OPEN_QUEUE,
            max_step_tokens=limit(values, STEP_KNOBS) or DEFAULT_STEP_TOKENS,
            ttft_s=metrics["mean_ttft"] - lag_s,  # from when it was sent: a late client is not the engine's
            itl_s=metrics["mean_itl"],
        )
    except InvalidInput as error:
        return str(error)
    wrong = flaw(
        point,
        requests=int(metrics["requests"]),
        failed=int(metrics["failed"]),
        lag_s=lag_s,
        concurrency=metrics["mean_concurrency"],
    )
    return wrong or point

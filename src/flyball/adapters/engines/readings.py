"""What an engine says of itself in Prometheus' text format, by our names.

A counter or gauge is the sum over its label sets. A histogram `ttft_s` becomes `ttft_s_sum` and `ttft_s_count`, from
which `between` makes the mean of a window. Names with a colon are found with an underscore too, which is what some
servers turn it into.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping

from flyball.core.metrics import MetricsWindow

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)")


def parse(text: str) -> dict[str, float]:
    """Every sample name with the sum of its values over all label sets; lines that are none are skipped."""
    sums: defaultdict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if (found := _SAMPLE.match(line)) and not line.startswith("#"):
            try:
                sums[found[1].replace(":", "_")] += float(found[2])
            except ValueError:
                continue
    return dict(sums)


def translated(text: str, names: Mapping[str, str]) -> dict[str, float]:
    """The samples that have a name of ours; one that the engine does not tell is left out, never a zero.

    >>> translated('vllm:num_requests_running{engine="0"} 3', {"running": "vllm:num_requests_running", "waiting": "x"})
    {'running': 3.0}
    """
    samples = parse(text)
    found = {}
    for ours, theirs in names.items():
        plain = theirs.replace(":", "_")
        for suffix in ("", "_sum", "_count"):
            if plain + suffix in samples:
                found[ours + suffix] = samples[plain + suffix]
    return found


def between(before: Mapping[str, float], after: Mapping[str, float]) -> dict[str, float]:
    """Means of the histograms over what happened between two readings of one process, by name without suffix.

    >>> between({"ttft_s_sum": 1.0, "ttft_s_count": 2.0}, {"ttft_s_sum": 4.0, "ttft_s_count": 5.0})
    {'ttft_s': 1.0}
    """
    means = {}
    for name in after:
        base = name.removesuffix("_count")
        if base == name:
            continue
        count = after[name] - before.get(name, 0.0)
        total = after[f"{base}_sum"] - before.get(f"{base}_sum", 0.0)
        if count > 0 and math.isfinite(total):
            means[base] = total / count
    return means


TOLERANCE, SLACK_S = 0.2, 0.01  # what the way between client and engine may add: a share, and a hundredth of a second


def disagreement(window: MetricsWindow, before: Mapping[str, float], after: Mapping[str, float]) -> str | None:
    """How an engine's own mean TTFT contradicts its client's over the same requests, or None if it does not.

    The engine counts from a request's arrival there, so it sees less than the client does; much less means that time is
    lost on the way (or in the client), more that the two speak of different requests.
    """
    engine_s = between(before, after).get("ttft_s")
    sent = [t.token_times_s[0] - t.sent_s for t in window.completed]
    if engine_s is None or not sent:
        return None
    client_s = sum(sent) / len(sent)
    if client_s > engine_s * (1 + TOLERANCE) + SLACK_S or engine_s > client_s * (1 + TOLERANCE) + SLACK_S:
        return (
            f"mean TTFT is {client_s * 1e3:.1f} ms for the client and {engine_s * 1e3:.1f} ms by the engine's own count"
        )
    return None

"""The loop that every peer's worker runs: JSON lines in and out, the peer's own chatter to standard error.

Line 1 in: `{"model", "threads", "max_seqs", "max_len", "weights"}`, the last the format to keep weights in. Out:
`{"ready", "load_s", "version"}`. Then, as often as wanted, in: `{"prompts": [[token, ...], ...], "output": n}`, out:
`{"seconds", "tokens": [[token, ...], ...]}`. End of input ends the worker. It needs the standard library alone, as it
runs under the peer's own Python.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Run = Callable[[list[list[int]], int], list[list[int]]]  # prompts, output tokens each -> the tokens made
Load = Callable[[dict[str, Any]], tuple[Run, str]]  # settings -> how to run, and the peer's version


def serve(load: Load) -> None:
    """Load the checkpoint, then answer every line until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the peer prints must not mix with the answers

    def answer(**line: object) -> None:
        answers.write(json.dumps(line) + "\n")
        answers.flush()

    settings = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    run, version = load(settings)
    answer(ready=True, load_s=time.perf_counter() - started, version=version)
    for line in sys.stdin:
        work = json.loads(line)
        started = time.perf_counter()
        made = run(work["prompts"], work["output"])
        answer(seconds=time.perf_counter() - started, tokens=made)

"""Ax behind JSON lines: knobs and a seed first, then `ask` and `tell`; runs in an environment of its own."""

from __future__ import annotations

import json
import logging
import sys
import time

import torch
from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig

logging.disable(logging.CRITICAL)
torch.set_num_threads(1)


def parameter(knob: dict) -> ChoiceParameterConfig | RangeParameterConfig:
    """A knob in Ax's words."""
    if knob["kind"] == "bool":
        return ChoiceParameterConfig(name=knob["name"], parameter_type="bool", values=[False, True])
    if knob["kind"] == "choice":
        return ChoiceParameterConfig(name=knob["name"], parameter_type="str", values=knob["choices"], is_ordered=False)
    kind, whole = (int, "int") if knob["kind"] == "int" else (float, "float")
    return RangeParameterConfig(
        name=knob["name"], parameter_type=whole, bounds=(kind(knob["low"]), kind(knob["high"])),
        scaling="log" if knob["log"] else "linear",
    )  # fmt: skip


def main() -> None:
    """Serve one run; a failure is told as the worst value seen, with an outcome constraint broken."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    first = json.loads(sys.stdin.readline())
    client = Client(random_seed=first["seed"])
    client.configure_experiment(parameters=[parameter(knob) for knob in first["knobs"]])
    client.configure_optimization(objective="worth", outcome_constraints=["served >= 0.5"])
    print("{}", file=stdout, flush=True)
    asked: dict[str, int] = {}
    for line in sys.stdin:
        message = json.loads(line)
        answer = {}
        if "ask" in message:
            began = time.process_time()
            ((index, values),) = client.get_next_trials(max_trials=1).items()
            answer = {"values": values, "cpu_s": time.process_time() - began}
            asked[json.dumps(values, sort_keys=True)] = index
        else:
            key = json.dumps(message["tell"], sort_keys=True)
            index = asked.pop(key) if key in asked else client.attach_trial(message["tell"])
            client.complete_trial(index, {"worth": message["value"], "served": float(not message["failed"])})
        print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    main()

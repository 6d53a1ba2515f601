"""HEBO behind JSON lines: knobs and a seed first, then `ask` and `tell`; runs in an environment of its own."""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import pandas as pd
import torch
from hebo.design_space.design_space import DesignSpace
from hebo.optimizers.hebo import HEBO

torch.set_num_threads(1)


def parameter(knob: dict) -> dict:
    """A knob in HEBO's words."""
    if knob["kind"] == "bool":
        return {"name": knob["name"], "type": "bool"}
    if knob["kind"] == "choice":
        return {"name": knob["name"], "type": "cat", "categories": knob["choices"]}
    kind = {("int", True): "pow_int", ("int", False): "int", ("float", True): "pow", ("float", False): "num"}
    return {"name": knob["name"], "type": kind[knob["kind"], knob["log"]], "lb": knob["low"], "ub": knob["high"]}


def main() -> None:
    """Serve one run."""
    stdout, sys.stdout = sys.stdout, sys.stderr
    first = json.loads(sys.stdin.readline())
    np.random.seed(first["seed"])  # noqa: NPY002  # HEBO draws from the global generator
    torch.manual_seed(first["seed"])
    space = DesignSpace().parse([parameter(knob) for knob in first["knobs"]])
    optimizer = HEBO(space, scramble_seed=first["seed"])
    print("{}", file=stdout, flush=True)
    kinds = {knob["name"]: knob["kind"] for knob in first["knobs"]}
    read = {"bool": bool, "int": int, "float": float, "choice": str}
    for line in sys.stdin:
        message = json.loads(line)
        answer = {}
        if "ask" in message:
            began = time.process_time()
            row = optimizer.suggest(1).iloc[0]
            answer = {"values": {n: read[k](row[n]) for n, k in kinds.items()}, "cpu_s": time.process_time() - began}
        else:
            frame = pd.DataFrame([message["tell"]])[list(kinds)]
            optimizer.observe(frame, np.array([[-message["value"]]]))
        print(json.dumps(answer), file=stdout, flush=True)


if __name__ == "__main__":
    main()

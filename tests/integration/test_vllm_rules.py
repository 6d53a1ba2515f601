"""Flyball's rules for vLLM against vLLM's own validator, where it is installed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from flyball.adapters.engines.catalogue import load
from flyball.tuner.constraints import Constraint

ASK = """
import json, sys
from vllm.config.scheduler import SchedulerConfig
def legal(values):
    try:
        SchedulerConfig(is_encoder_decoder=False, **values)
    except ValueError:
        return False
    return True
print(json.dumps([legal(values) for values in json.load(sys.stdin)]))
"""


@pytest.mark.sweep
@pytest.mark.timeout(300)
def test_the_rules_agree_with_vllms_scheduler_config(rng: np.random.Generator) -> None:
    """Of 2000 configurations, drawn so that about half are illegal, both refuse the same ones."""
    program = os.environ.get("FLYBALL_VLLM") or shutil.which("vllm")
    if program is None:
        pytest.skip("no vLLM here; FLYBALL_VLLM may name its executable or environment")
    python = Path(program) / "bin" / "python" if Path(program).is_dir() else Path(program).with_name("python")
    catalogue = load("vllm", platform="cpu")
    rules = [Constraint(text) for text in catalogue.constraints()]
    drawn = [
        {
            "max_model_len": int(rng.choice([128, 512, 1024])),
            "max_num_batched_tokens": int(2 ** rng.uniform(4, 12)),
            "max_num_seqs": int(2 ** rng.uniform(0, 10)),
            "enable_chunked_prefill": bool(rng.random() < 0.7),
            "long_prefill_token_threshold": int(rng.choice([0, 64, 128, 512, 2048])),
        }
        for _ in range(2000)
    ]
    ours = [all(rule.holds(catalogue.space.defaults() | values) for rule in rules) for values in drawn]
    done = subprocess.run([str(python), "-c", ASK], input=json.dumps(drawn), capture_output=True, text=True, check=True)
    theirs = json.loads(done.stdout.strip().splitlines()[-1])
    assert 0.2 < sum(theirs) / len(theirs) < 0.8
    different = [v for v, a, b in zip(drawn, ours, theirs, strict=True) if a != b]
    assert not different, different[:3]

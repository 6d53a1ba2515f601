"""Problems of request-size buckets on disk, in Melange's JSON, and their plans.

`gpu_info` maps an accelerator to its `cost` per hour and `tputs`, requests/s of each bucket; `workload_distribution`
gives each bucket's share of `total_request_rate` (requests/s); `slice_factor` cuts a bucket's load into slices. Beyond
theirs: without a `slice_factor` loads are divided at will, and `most` of an accelerator limits how many there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flyball.adapters.fields import Fields
from flyball.core.errors import InvalidInput
from flyball.numerics.markov import Floats
from flyball.planner.buckets import BucketPlan, Buckets


def is_buckets(fields: Fields) -> bool:
    """Whether this is such a problem."""
    return "gpu_info" in fields


def buckets_from(fields: Fields) -> Buckets:
    """The problem in a mapping."""
    gpus = dict(fields.inside("gpu_info").entries())
    if not gpus:
        raise InvalidInput(f"{fields.path}.gpu_info names no accelerator; give at least one")
    shares = _table(fields, "workload_distribution")
    tables = [_table(gpu, "tputs") for gpu in gpus.values()]
    for (name, _), table in zip(gpus.items(), tables, strict=True):
        if table.shape != shares.shape:
            raise InvalidInput(
                f"{fields.path}: tputs of {name} has {table.shape} buckets and workload_distribution {shares.shape}; "
                "give both the same"
            )
    return Buckets(
        accelerators=tuple(gpus),
        cost_per_h=np.array([gpu.number("cost", None) for gpu in gpus.values()]),
        throughput_rps=np.array(tables),
        rate_rps=shares * fields.number("total_request_rate", None),
        slices=fields.whole("slice_factor", low=1) if "slice_factor" in fields else None,
        most={name: gpu.whole("most") for name, gpu in gpus.items() if "most" in gpu},
    )


def _table(fields: Fields, key: str) -> Floats:
    rows = fields.items(key)
    where = f"{fields.path}.{key}"
    if not rows or not all(isinstance(row, list) and row and len(row) == len(rows[0]) for row in rows):
        raise InvalidInput(f"{where} is not a table; give a list of equally long lists of numbers")
    for row in rows:
        for value in row:
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e300:
                raise InvalidInput(f"{where} has {value!r}; give numbers of at least 0")
    return np.array(rows, dtype=np.float64)


def bucket_solution(problem: Buckets, plan: BucketPlan) -> dict[str, Any]:
    """A plan as JSON: accelerators to rent, and for each bucket the share of its load that each takes."""
    routing = []
    for i, o in np.argwhere(problem.rate_rps > 0).tolist():
        shares = zip(problem.accelerators, plan.share[:, i, o].tolist(), strict=True)
        routing.append(
            {
                "bucket": [i, o],
                "rate": float(problem.rate_rps[i, o]),
                "share": {name: share for name, share in shares if share > 0},
            }
        )
    unserved = [{"bucket": list(cell), "reason": reason} for cell, reason in plan.unserved.items()]
    return {
        "accelerators": dict(plan.counts),
        "cost": plan.cost_per_h,
        "bound": plan.bound,
        "gap": plan.gap,
        "utilization": dict(plan.utilization),
        "routing": routing,
        **({"unserved": unserved} if unserved else {}),
    }

"""How many requests a replica's KV cache holds at once.

A request that is served holds its prompt and what it has answered so far. Seen at any moment, an answer is met with a
probability proportional to its length and somewhere within it, so with lengths m of mean E m it holds on average
E m² / (2 E m) of it (renewal theory: the age of the answer in progress), and the sum over B requests varies little
about B times the mean. The batch is the largest whose sum stays within the cache in 99 moments of 100, as a normal law
has it.

symbol   shape   meaning
n, m     [C]     mean tokens in and out; a request holds n of its prompt and the age of its answer
h, s     [C]     mean and standard deviation of the tokens that a request in service holds
B        [C]     largest batch with B h + z s √B <= cache
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from flyball.numerics.markov import Floats, Ints

_Z = 2.326  # 99 % of a normal law


def held_tokens(
    input_tokens: ArrayLike, output_tokens: ArrayLike, *, input_cv: ArrayLike = 0.0, output_cv: ArrayLike = 0.0
) -> tuple[Floats, Floats]:
    """Mean and standard deviation of what a request in service holds; lengths are gamma distributed.

    >>> mean, deviation = held_tokens(100, 300)
    >>> print(f"{mean:.0f} {deviation:.0f}")  # 100 + 300 / 2; evenly spread over the answer
    250 87
    """
    n, m = (np.asarray(v, dtype=np.float64) for v in (input_tokens, output_tokens))
    a, b = (np.nan_to_num(np.asarray(v, dtype=np.float64)) ** 2 for v in (input_cv, output_cv))
    age, age_squared = m * (1 + b) / 2, m * m * (1 + b) * (1 + 2 * b) / 3
    return n + age, np.sqrt(n * n * a + age_squared - age * age)


def memory_batch(
    kv_tokens: ArrayLike,
    input_tokens: ArrayLike,
    output_tokens: ArrayLike,
    *,
    input_cv: ArrayLike = 0.0,
    output_cv: ArrayLike = 0.0,
) -> Ints:
    """Largest batch that a cache of so many tokens holds; 0 where not even one whole request of mean length fits.

    >>> int(memory_batch(32768, 100, 300))
    122
    """
    mean, deviation = held_tokens(input_tokens, output_tokens, input_cv=input_cv, output_cv=output_cv)
    cache = np.asarray(kv_tokens, dtype=np.float64)
    root = (-_Z * deviation + np.sqrt((_Z * deviation) ** 2 + 4 * mean * cache)) / (2 * mean)
    whole = np.asarray(input_tokens, dtype=np.float64) + np.asarray(output_tokens, dtype=np.float64)
    batch = np.where(whole <= cache, np.maximum(np.floor(root * root), 1.0), 0.0)
    return np.asarray(batch, dtype=np.int64)

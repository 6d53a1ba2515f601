"""Known constraints as people write them."""

from __future__ import annotations

import pytest

from flyball.core.errors import InvalidInput
from flyball.tuner.constraints import Constraint


@pytest.mark.parametrize(
    ("text", "values", "holds"),
    [
        ("a <= b", {"a": 4, "b": 4}, True),
        ("a <= b", {"a": 5, "b": 4}, False),
        ("a * 2 + 1 < b // 3", {"a": 1, "b": 12}, True),
        ("1 <= a <= 4", {"a": 5}, False),
        ("not on or a >= 1", {"on": True, "a": 0}, False),
        ("not on or a >= 1", {"on": False, "a": 0}, True),
        ("mode == 'fast' or a > -1", {"mode": "slow", "a": -2}, False),
        ("a % 2 == 0 and b != 3", {"a": 4, "b": 2}, True),
    ],
)
def test_a_relation_reads_as_in_python(text: str, values: dict[str, object], holds: bool) -> None:
    """Arithmetic, chains of comparisons, truth and strings mean what they mean in Python."""
    assert Constraint(text).holds(values) is holds  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a <=", "cannot read the constraint 'a <='"),
        ("__import__('os').system('true')", "uses Call"),
        ("a.b > 1", "uses Attribute"),
        ("[x for x in a]", "uses ListComp"),
    ],
)
def test_anything_else_is_refused(text: str, said: str) -> None:
    """What is not a relation between knobs never runs."""
    with pytest.raises(InvalidInput, match=said):
        Constraint(text)


def test_a_knob_that_does_not_exist_is_named() -> None:
    """A typing mistake is found before the study starts."""
    with pytest.raises(InvalidInput, match="names max_seqs; known knobs: max_num_seqs"):
        Constraint("max_seqs < 4").check_names(["max_num_seqs"])


def test_arithmetic_that_cannot_be_done_says_where() -> None:
    """A division by zero shows the configuration."""
    with pytest.raises(InvalidInput, match=r"cannot be evaluated at \{'a': 0\}"):
        Constraint("1 / a > 2").holds({"a": 0})

"""Known constraints: relations between knobs that are written down, so that no trial is spent on finding them out.

An expression over knob names with the operators of Python: `max_num_seqs <= max_num_batched_tokens`,
`not speculation or draft_tokens >= 1` (which reads: speculation implies at least one draft token).
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flyball.core.errors import InvalidInput
from flyball.core.knobs import Configuration, Value

_OPERATORS: dict[type[ast.AST], Callable[..., Any]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
    ast.LtE: operator.le, ast.Lt: operator.lt, ast.GtE: operator.ge, ast.Gt: operator.gt,
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Not: np.logical_not, ast.USub: operator.neg,
}  # fmt: skip
_STRUCTURE = (ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name, ast.Constant,
              ast.Load)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Constraint:
    """A relation between knobs that every configuration must satisfy.

    >>> Constraint("seqs <= tokens").holds({"seqs": 8, "tokens": 4})
    False
    >>> Constraint("not speculate or 1 <= draft <= 4").holds({"speculate": False, "draft": 0})
    True
    """

    text: str
    names: frozenset[str] = field(init=False, repr=False, compare=False)
    _tree: ast.expr = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            tree = ast.parse(self.text, mode="eval")
        except SyntaxError:
            raise InvalidInput(
                f"cannot read the constraint {self.text!r}; write it like max_num_seqs <= max_num_batched_tokens"
            ) from None
        for node in ast.walk(tree):
            if not isinstance(node, _STRUCTURE) and type(node) not in _OPERATORS:
                raise InvalidInput(
                    f"the constraint {self.text!r} uses {type(node).__name__}; use knob names, numbers, arithmetic, "
                    "comparisons, and, or, not"
                )
        object.__setattr__(self, "names", frozenset(n.id for n in ast.walk(tree) if isinstance(n, ast.Name)))
        object.__setattr__(self, "_tree", tree.body)

    def __str__(self) -> str:
        return self.text

    def holds_all(self, columns: Mapping[str, NDArray[Any] | Value]) -> NDArray[np.bool_]:
        """Which of many configurations, given as a column of values a knob, satisfy the relation; division by 0 fails.

        >>> Constraint("seqs <= tokens").holds_all({"seqs": np.array([2, 8]), "tokens": 4}).tolist()
        [True, False]
        """
        with np.errstate(all="ignore"):
            try:
                return np.asarray(_evaluate(self._tree, columns), dtype=np.bool_)
            except (ZeroDivisionError, TypeError) as error:
                raise InvalidInput(
                    f"the constraint {self.text!r} cannot be evaluated: {error}; mend its arithmetic"
                ) from None

    def check_names(self, known: Collection[str]) -> None:
        """Raise InvalidInput if the constraint speaks of a knob that does not exist."""
        if unknown := sorted(self.names - set(known)):
            raise InvalidInput(
                f"the constraint {self.text!r} names {', '.join(unknown)}; known knobs: {', '.join(known)}"
            )

    def holds(self, values: Configuration) -> bool:
        """Whether a configuration, which gives every knob named here, satisfies the relation."""
        try:
            return bool(_evaluate(self._tree, values))
        except (ZeroDivisionError, TypeError) as error:
            raise InvalidInput(
                f"the constraint {self.text!r} cannot be evaluated at {dict(values)}: {error}; mend its arithmetic"
            ) from None


def _evaluate(node: ast.expr, values: Mapping[str, Any]) -> Any:  # noqa: ANN401  # numbers, strings or truth, as Python has it
    match node:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return values[name]
        case ast.BoolOp(op=ast.And(), values=parts):
            return _fold((_evaluate(part, values) for part in parts), every=True)
        case ast.BoolOp(values=parts):
            return _fold((_evaluate(part, values) for part in parts), every=False)
        case ast.UnaryOp(op=op, operand=operand):
            return _OPERATORS[type(op)](_evaluate(operand, values))
        case ast.BinOp(left=left, op=op, right=right):
            return _OPERATORS[type(op)](_evaluate(left, values), _evaluate(right, values))
        case ast.Compare(left=left, ops=ops, comparators=comparators):
            seen = [_evaluate(part, values) for part in (left, *comparators)]
            links = zip(ops, seen, seen[1:], strict=False)
            return _fold((_OPERATORS[type(op)](a, b) for op, a, b in links), every=True)
    raise AssertionError(f"{type(node).__name__} was let through by the check at birth")


def _fold(parts: Iterator[Any], *, every: bool) -> Any:  # noqa: ANN401  # a truth, or a column of them
    """`and` (every) or `or`: of single truths no further than needed, of columns element by element."""
    result: Any = every
    for part in parts:
        if isinstance(part, np.ndarray) or isinstance(result, np.ndarray):
            result = np.logical_and(result, part) if every else np.logical_or(result, part)
        elif bool(part) is not every:
            return not every
    return result

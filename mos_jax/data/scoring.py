"""How reasoning_gym answers are judged.

reasoning_gym asks a dataset class to override `score_answer` when there is no single right answer,
so a class that does not is compared exactly. Many classes override it only to normalise one answer
or to give consolation marks; those whose full mark goes to one normalised text alone are listed
here and compared exactly too. All others are judged by their own scorer.
"""

from __future__ import annotations

import ast
import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from mos_jax.data.examples import Scoring


def _stripped(text: str) -> str:
    return text.strip()


def _lowered(text: str) -> str:
    return text.strip().lower()


def _spaced(text: str) -> str:
    return " ".join(text.split())


def _unspaced(text: str) -> str:
    return re.sub(r"\s", "", text).lower()


_EXACT: Mapping[str, Callable[[str], str]] = {
    "ab": _stripped,
    "binary_matrix": _stripped,
    "circuit_logic": _stripped,
    "color_cube_rotation": _lowered,
    "dice": _lowered,
    "family_relationships": _lowered,
    # Its own scorer compares bool(answer) with bool("False"), so any text gets the full mark.
    "game_of_life_halting": _lowered,
    "needle_haystack": _unspaced,
    "path_star": _spaced,
    "self_reference": _stripped,
    "spiral_matrix": _stripped,
    "string_insertion": _stripped,
    "zebra_puzzles": _lowered,
}

# These scorers run the answer as Python, and an answer is whatever a model wrote.
_RUNS_EXPRESSION = frozenset(
    {
        "countdown",
        "intermediate_integration",
        "polynomial_multiplication",
        "puzzle24",
        "simple_integration",
    }
)
_RUNS_LITERAL = frozenset({"n_queens"})

_FUNCTIONS = frozenset(
    "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi".split()
)
_LONGEST_EXPRESSION = 1000
_LARGEST_EXPONENT = 100

# What a scorer may raise on text that is not of the form it expects.
_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


def scoring_of(name: str, overridden: bool) -> Scoring:
    """Returns how a task is judged.

    Args:
        name: the task's name in reasoning_gym.
        overridden: whether its class has a `score_answer` of its own.
    """
    return "scorer" if overridden and name not in _EXACT else "exact"


def exact_score(name: str, expected: str, answer: str) -> float:
    """Returns 1.0 if `answer` equals `expected` under the task's normalisation, else 0.0."""
    normalise = _EXACT.get(name, _stripped)
    return float(normalise(answer) == normalise(expected))


def is_plain_expression(text: str) -> bool:
    """Whether `text` is arithmetic that is safe and quick to evaluate.

    Numbers, names of at most two letters, + - * / **, and calls of common functions. Exponents
    are at most 100 and hold no product or power; at most two powers are nested in one another.
    """
    if len(text) > _LONGEST_EXPRESSION:
        return False
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return _is_plain(tree.body)


def _is_plain(node: ast.expr, nested_powers: int = 2) -> bool:
    match node:
        case ast.Constant(value=int() | float()):
            return True
        case ast.Name(id=name):
            return name in _FUNCTIONS or (len(name) <= 2 and name.isalnum())
        case ast.UnaryOp(op=ast.UAdd() | ast.USub(), operand=operand):
            return _is_plain(operand, nested_powers)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() | ast.Mult() | ast.Div(), right=right):
            return _is_plain(left, nested_powers) and _is_plain(right, nested_powers)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            return (
                nested_powers > 0
                and _is_plain(left, nested_powers - 1)
                and _is_small_exponent(right)
            )
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            return name in _FUNCTIONS and all(_is_plain(arg, nested_powers) for arg in args)
    return False


def _is_small_exponent(node: ast.expr) -> bool:
    """Whether `node` is plain, holds no product or power, and no number over the limit."""
    for part in ast.walk(node):
        if isinstance(part, ast.Pow | ast.Mult):
            return False
        if isinstance(part, ast.Constant) and not (
            isinstance(part.value, int | float) and abs(part.value) <= _LARGEST_EXPONENT
        ):
            return False
    return _is_plain(node)


def _is_literal_or_unreadable(text: str) -> bool:
    """Whether running `text` as Python can do nothing but build a literal or fail to parse."""
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return True
    except (RecursionError, MemoryError):
        return False
    try:
        ast.literal_eval(tree)
    except (ValueError, TypeError):
        return False
    return True


def own_score(
    name: str,
    scorer: Callable[[str, dict[str, Any]], float],
    entry: Mapping[str, Any],
    answer: str,
) -> float:
    """Returns what the task's own scorer makes of `answer`, from 0.0 to 1.0.

    An answer that the scorer cannot read is worth 0.0, and so is one that it would run as Python
    without being plain arithmetic or a literal. `entry` is left unchanged.
    """
    if name in _RUNS_EXPRESSION and not is_plain_expression(answer):
        return 0.0
    if name in _RUNS_LITERAL and not _is_literal_or_unreadable(answer):
        return 0.0
    try:
        score = float(scorer(answer, copy.deepcopy(dict(entry))))
    except _UNREADABLE:
        return 0.0
    return 0.0 if math.isnan(score) else min(1.0, max(0.0, score))

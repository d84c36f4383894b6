"""Answers that reasoning-gym's scorers evaluate as Python code, and how that code is kept from being any code.

A scorer calls `eval` or sympy's `parse_expr`, which is `eval` too, on what the policy wrote. Whoever can run code there
can report any reward. So before a scorer sees an answer:

    lists         its `eval` becomes `ast.literal_eval`: what is no literal raises, as what is no Python did
    arithmetic    only numbers, operators and parentheses pass
    expressions   also the names of functions and constants below, single letters, and the names in the problem's answer
                  but `Integral`: an integral that is not worked out is the question, and a scorer finds it right

The last two leave no way to a string, an attribute, an item or a statement, and none of the names leads to one. What
they do not stop is an expression that takes for ever (`9**9**9`): the time limit of the verifier pool does.
"""

import ast
import re
import sys
from typing import Any

LISTS = frozenset({"binary_matrix", "n_queens", "spiral_matrix", "string_insertion"})
ARITHMETIC = frozenset({"countdown", "puzzle24"})
EXPRESSIONS = frozenset({"intermediate_integration", "polynomial_multiplication", "simple_integration"})

EVALUATED = LISTS | ARITHMETIC | EXPRESSIONS

_NAME = re.compile(r"[A-Za-z_]\w*")
_NUMBER = r"(?:\d+(?:\.\d*)?|\.\d+)"
# A dot belongs to a number, so `x.name` is refused; so is a name that touches a number (`1if`, `2e`), but for 1e5. The
# possessive `*+` takes nothing back: the time is linear in the length of a hostile answer.
_SUM = re.compile(rf"(?:{_NUMBER}|[-+*/^()\s])*+", re.ASCII)
_FORMULA = re.compile(rf"(?:{_NUMBER}(?:[eE][-+]?\d+)?(?![A-Za-z_.])|{_NAME.pattern}|[-+*/^(),\s])*+", re.ASCII)
_KNOWN = frozenset(
    {
        "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc",
        "sinh", "cosh", "tanh", "coth", "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt",
        "Abs", "abs", "sign", "erf", "erfi", "Ei", "li", "Si", "Ci", "pi", "oo", "Rational", "Integer",
    }
)  # fmt: skip


def is_plain(family: str, answer: str, own_answer: str) -> bool:
    """Whether the scorer of a family may see an answer. own_answer: the problem's, whose names are harmless."""
    if family in ARITHMETIC:
        return _SUM.fullmatch(answer) is not None
    if family in EXPRESSIONS:
        allowed = _KNOWN.union(_NAME.findall(own_answer)) - {"Integral"}  # some problems' own answers are no better
        names = _NAME.findall(answer)
        return _FORMULA.fullmatch(answer) is not None and all(len(name) == 1 or name in allowed for name in names)
    return True


def read_literals_only(family: str, dataset: Any) -> None:
    """Take `eval` from the module of a scorer that reads lists."""
    if family in LISTS:
        vars(sys.modules[type(dataset).__module__])["eval"] = ast.literal_eval

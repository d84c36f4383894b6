"""The exceptions whose text is written for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The text is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2. Anything that a user can cause (a file, a
    key, a value, a missing device) raises this; every other exception is a bug and keeps its traceback.
    """


class ActorsFailed(UserError):
    """Actors that had started died or took too long, time after time: their logs tell why, so a run keeps its folder
    even if it ended before its first step."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name closest to a mistyped one; for `lr` also a nested `rl.lr`."""
    return max(known, key=lambda candidate: _closeness(name, candidate))


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`: offers the nearest one, or all of them if none is near."""
    known = sorted(known)
    near = nearest(name, known)
    hint = f"did you mean `{near}`?" if _closeness(name, near) >= 0.5 else f"use {', '.join(known)}"
    return UserError(f"unknown {what} `{name}`: {hint}")


def _closeness(name: str, candidate: str) -> float:
    last = candidate.rpartition(".")[2]
    return max(_similarity(name, candidate), 0.99 * _similarity(name.rpartition(".")[2], last))


def _similarity(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()

"""The one exception whose text is written for the user."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input. The text is one line: what is wrong, where, and how to mend it.

    The command line prints it without a traceback and exits with code 2. Anything that a user can cause (a file, a
    key, a value, a missing device) raises this; every other exception is a bug and keeps its traceback.
    """


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among `known`: offers the nearest one, or all of them if none is near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return UserError(
        f"unknown {what} `{name}`: " + (f"did you mean `{near[0]}`?" if near else f"use {', '.join(known)}")
    )

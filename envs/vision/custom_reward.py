"""Rewards that a user writes: found by `module:function`, and what comes of one that does not work."""

import importlib
from collections.abc import Callable
from typing import Any

from models.errors import UserError


class RewardFailed(UserError):
    """A reward that raised, hung, or returned something else than numbers: the model and the run are well."""


def import_reward(path: str) -> Callable[..., Any]:
    """The function of `module:function`. Raises UserError if there is none, or if its module raises."""
    module, _, attribute = path.partition(":")
    try:
        reward = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"reward {path}: cannot be imported as module:function ({error}); is its folder on PYTHONPATH?"
        ) from None
    except (Exception, SystemExit) as error:  # the module is the user's and may raise anything
        raise UserError(f"reward {path}: its module cannot be imported ({_line(error)}); mend it") from error
    if not callable(reward):
        raise UserError(f"reward {path}: is a {type(reward).__name__}, not a function")
    return reward


def failure(name: str, error: Exception) -> RewardFailed:
    """What to raise when the reward `name` raised an error."""
    return RewardFailed(f"reward {name}: raised {_line(error)}")


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())

"""What changed between two configurations in a recipe's form.

For folders in which later commands go on, perhaps by a later version: a setting that it added is no change as long as
it keeps its default.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launch.config import leaves, read_recipe
from models.errors import UserError


def refuse_changes(stored: Path, now: Mapping[str, Any], defaults: Mapping[str, Any], what: str) -> None:
    """Raises UserError if the configuration in the file `stored` is not `now`, with what differs; `what` lies there."""
    if found := changes(read_recipe(str(stored), None), now, defaults):
        listed = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise UserError(f"{stored.parent} holds {what} with other settings ({listed}): choose another --name")


def changes(before: Mapping[str, Any], now: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[str]:
    """A phrase for each setting that differs. One that `before` lacks had the default of today."""
    old, found = dict(leaves(defaults)) | dict(leaves(before)), []
    new = dict(leaves(now))
    for key, value in new.items():
        if key not in old:
            found.append(f"{key} is new")
        elif old[key] != value:
            found.append(f"{key} was {old[key]}, not {value}")
    return found + [f"{key} was {value}, and is no setting now" for key, value in leaves(before) if key not in new]

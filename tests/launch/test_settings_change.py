from pathlib import Path

import pytest

from launch.settings_change import changes, refuse_changes
from models.errors import UserError

DEFAULTS = {"lr": 0.1, "net": {"width": 8, "depth": 2}}


def test_a_setting_is_compared_with_what_it_was_or_else_with_its_default() -> None:
    before = {"lr": 0.2, "net": {"width": 8}}  # written when there was no depth
    assert not changes(before, {"lr": 0.2, "net": {"width": 8, "depth": 2}}, DEFAULTS)
    assert changes(before, {"lr": 0.2, "net": {"width": 8, "depth": 3}}, DEFAULTS) == ["net.depth was 2, not 3"]
    assert changes(before, {"lr": 0.1, "net": {"width": 8, "depth": 2}}, DEFAULTS) == ["lr was 0.2, not 0.1"]


def test_settings_that_came_or_went_without_a_default_are_changes() -> None:
    now = {"lr": 0.1, "net": {"width": 8, "depth": 2}}
    assert changes(now, now | {"space": {"lr": 1}}, DEFAULTS) == ["space.lr is new"]
    assert changes(now | {"gone": 1}, now, DEFAULTS) == ["gone was 1, and is no setting now"]


def test_the_refusal_names_the_folder_and_at_most_three_settings(tmp_path: Path) -> None:
    stored = tmp_path / "recipe.yaml"
    stored.write_text("a: 1\nb: 1\nc: 1\nd: 1\n")
    with pytest.raises(UserError, match=f"{tmp_path} holds runs .*a was 1, not 2, b .*, c .*not 2 and 1 more"):
        refuse_changes(stored, dict.fromkeys("abcd", 2), {}, "runs")
    stored.write_text("[a")
    with pytest.raises(UserError, match="cannot read the recipe"):
        refuse_changes(stored, {}, {}, "runs")

import re

import pytest

from launch.console import RunConsole


def test_without_a_terminal_there_are_lines_and_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole("r")
    metrics = {f"train/m{i}": i + 0.123456 for i in range(8)}
    console.step(1, metrics, total=2)
    console.step(2, {"heldout/pass@1/rl": 1.0}, total=None)
    console.close()
    first, second = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 1/2 \| m0 0\.1235 \| m1 1\.123 \| .* \| m5 5\.123 \| \d+\.\d s", first)
    assert re.fullmatch(r"step 2 \| pass@1/rl 1 \| \d+\.\d s", second)


def test_on_a_terminal_a_bar_stays_below_the_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = RunConsole("myrun", started_from=2)
    for step in (3, 4):
        console.step(step, {"train/loss": 0.5}, total=8)
    console.close()
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", capsys.readouterr().out)
    assert len(re.findall(r"step \d/8 \| loss 0\.5", text)) == 2
    assert re.search(r"myrun\s.*4/8", text)


def test_what_looks_like_markup_or_emoji_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console = RunConsole("r")
    console.table("runs", ["run", "value"], [["[bold]x[/bold]", "[red]:100:"]])
    console.print("mine.py:100: [bold]x")
    out = capsys.readouterr().out
    assert out.startswith("runs\n")
    assert "[bold]x[/bold]" in out
    assert "[red]:100:" in out
    assert out.endswith("mine.py:100: [bold]x\n")

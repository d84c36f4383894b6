from pathlib import Path

import pytest

from launch import doctor


def examine(monkeypatch: pytest.MonkeyPatch, check: str, plugin: str = "registered") -> int:
    monkeypatch.setattr(doctor, "_ENGINE_CHECK", check)
    monkeypatch.setattr(doctor, "_plugin", lambda: plugin)
    monkeypatch.setattr(doctor, "ENGINE_LIMIT_S", 10 if "sleep" not in check else 0.3)
    return doctor.report(Path("not/there/yet"))


def test_a_sound_installation(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        examine(monkeypatch, "import os; print('noise'); print('engine', os.environ['VLLM_ENABLE_V1_MULTIPROCESSING'])")
        == 0
    )
    out = capsys.readouterr().out
    for finding in ("python", "torch", "ray", "GiB free at", "engine 0", "registered"):
        assert finding in out


@pytest.mark.parametrize(
    ("check", "finding"),
    [
        ("raise RuntimeError('no kernels')", "RuntimeError: no kernels"),
        ("import os; os._exit(9)", "exit code 9, and no word"),
        ("import time; time.sleep(60)", "no answer within 0.3 s"),
    ],
)
def test_a_broken_engine_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], check: str, finding: str
) -> None:
    assert examine(monkeypatch, check) == 1
    assert finding in capsys.readouterr().out


def test_a_missing_plugin_is_a_finding(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert examine(monkeypatch, "print('fine')", plugin="") == 1
    assert "pip install -e ." in capsys.readouterr().out

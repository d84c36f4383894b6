"""The installed `longstride`, which unlike `python -m launch` does not import from the current folder by itself."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SCRIPT = (sys.executable, "-P", "-c", "import sys; from launch.cli import main; sys.exit(main())")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
MINE = """
import gymnasium

gymnasium.register("Lander-v0", entry_point="gymnasium.envs.classic_control.cartpole:CartPoleEnv", max_episode_steps=9)
"""


def test_an_environment_in_the_current_folder_is_found(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "envs").mkdir()  # not ours
    command = [*SCRIPT, "train", "a2c", "--env", "mine:Lander-v0", "--steps", "200", "--eval-episodes", "2"]
    done = subprocess.run(
        [*command, "--backend", "local"], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "eval/length_mean" in done.stdout


def test_actors_find_it_behind_our_own_packages() -> None:
    code = "from launch.cli import main; main(['runs']); from launch.ray_backend import _import_path; "
    done = subprocess.run(
        [sys.executable, "-P", "-c", code + "print(_import_path())"],
        cwd=ROOT / "docs", env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    paths = done.stdout.splitlines()[-1].split(os.pathsep)
    assert paths.index(str(ROOT)) < paths.index(str(ROOT / "docs"))


SLOW = """
import os, signal, time

os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def test_an_interrupt_during_imports_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    job = "jobs.JOBS['slow'] = jobs.Job('slow:Config', 'slow:train'); sys.exit(main(['train', 'slow']))"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; from launch import jobs; from launch.cli import main; {job}"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "longstride: interrupted\n")

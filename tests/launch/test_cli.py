"""The command line, in this process and on the local backend."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from launch import cli, jobs
from launch.checkpoint import CheckpointStore
from launch.run_directory import RunDirectory
from models.errors import UserError

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run a command in an empty folder; return exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        code = cli.main(arguments)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


TRAIN = ("train", "demo", "--backend", "local", "--name")


def summary(name: str) -> dict:
    return json.loads(Path("runs", name, "summary.json").read_text())


def test_training_leaves_the_run_directory_of_the_design(command: Command) -> None:
    code, out, err = command(*TRAIN, "r", "--steps", "4", "--seed", "3")
    assert (code, err) == (0, "")
    assert {path.name for path in Path("runs/r").iterdir()} == {
        ".lock", "config.yaml", "metrics.jsonl", "tb", "checkpoints", "rollouts", "logs", "summary.json",
    }  # fmt: skip
    figures = summary("r")
    assert (figures["job"], figures["status"], figures["seed"], figures["steps"]) == ("demo", "finished", 3, 4)
    assert figures["wall_s"] > 0
    assert set(figures["metrics"]) == {"train/loss", "run/actor_restarts", "eval/weight"}
    assert len(re.findall(r"^step \d/4 \| loss .* s$", out, re.MULTILINE)) == 4
    assert out.rstrip().endswith("runs/r/summary.json")
    assert "eval/weight" in out
    config = yaml.safe_load(Path("runs/r/config.yaml").read_text())
    assert (config["job"], config["name"], config["steps"], config["optimizer"]) == (
        "demo", "r", 4, {"lr": 0.1, "amsgrad": False},
    )  # fmt: skip
    rows = [json.loads(line) for line in Path("runs/r/rollouts/2-train.jsonl").read_text().splitlines()]
    assert len(rows) == 4
    assert Path("runs/latest").resolve() == Path("runs/r").resolve()


def test_runs_without_a_name_do_not_collide(command: Command) -> None:
    for _ in range(2):
        assert command("train", "demo", "--backend", "local", "--steps", "1")[0] == 0
    assert len(RunDirectory.all(Path("runs"))) == 2


def test_the_same_seed_gives_the_same_run(command: Command) -> None:
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        command(*TRAIN, name, "--seed", seed)
    assert summary("a")["metrics"] == summary("b")["metrics"]
    assert summary("a")["metrics"] != summary("c")["metrics"]


def test_help_names_the_jobs(command: Command) -> None:
    for arguments in (("--help",), ("train", "--help")):
        code, out, err = command(*arguments)
        assert (code, err) == (0, "")
        assert "longstride train JOB" in out
        assert re.search("^jobs: .*demo", out, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("trian",), "unknown command 'trian': did you mean train?"),
        (("train",), "usage: longstride train JOB"),
        (("train", "demmo"), "unknown job 'demmo': did you mean demo?"),
        (("train", "demo", "--stepps", "3"), "train demo: unknown flag --stepps: did you mean --steps?"),
        (("train", "demo", "--steps", "three"), "train demo: --steps: invalid literal"),
        (("train", "demo", "--recipe", "quick"), "--recipe quick: neither a file nor the name of a recipe"),
        (("train", "demo", "--runs-dir", "file/runs"), "cannot create the run directory"),
        (("train", "demo", "--runs-dir", "file"), "cannot create the run directory"),
        (("train", "demo", "--seeds", "abc"), "train demo: --seeds: invalid literal"),
        (("train", "demo", "--recipe"), "train demo: Missing value for argument '--recipe'"),
        (("evaluate", "x", "--runs-dir"), "evaluate: Missing value for argument '--runs-dir'"),
        (("train", "demo", "--name", "a/b"), "--name 'a/b' cannot name a run"),
        (("train", "demo", "--device", "cuda"), "--device cuda: torch sees no CUDA GPU"),
        (("train", "absent"), "this job needs the module nowhere.config"),
        (("resume", "nothing"), "no run 'nothing' under runs: there is no run yet"),
        (("evaluate", "nothing"), "no run 'nothing' under runs"),
        (("resume",), "usage: longstride resume RUN"),
        (("runs", "--run-dir", "x"), "runs: unknown flag --run-dir: did you mean --runs-dir?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    command: Command, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setitem(jobs.JOBS, "absent", jobs.Job("nowhere.config:Config", "nowhere.job:train"))
    Path("file").touch()
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"longstride: {message}")
    assert err.count("\n") == 1
    assert not list(Path().rglob("config.yaml"))


def test_a_refused_run_leaves_latest_as_it_was(command: Command) -> None:
    refused = (*TRAIN, "refused", "--fail-at", "1")
    assert command(*refused)[0] == 2
    assert not list(Path("runs").iterdir())
    command(*TRAIN, "r", "--steps", "1")
    assert command(*refused)[0] == 2
    assert Path("runs/latest").readlink() == Path("r")
    assert not Path("runs/refused").exists()


def test_bad_recipes_are_named(command: Command) -> None:
    Path("r.yaml").write_text("job: demo\noptimizer: {lrr: 1}\n")
    code, _, err = command("train", "demo", "--recipe", "r.yaml")
    assert code == 2
    assert err == "longstride: recipe r.yaml: unknown key optimizer.lrr: did you mean optimizer.lr?\n"


def test_a_run_directory_that_exists_is_refused(command: Command) -> None:
    command(*TRAIN, "r", "--steps", "1")
    before = Path("runs/r/metrics.jsonl").read_text()
    code, _, err = command(*TRAIN, "r", "--steps", "1")
    assert code == 2
    assert err.startswith("longstride: runs/r exists already")
    assert Path("runs/r/metrics.jsonl").read_text() == before


@pytest.mark.parametrize("rest", [("train", "demo", "--seeds", "2"), ("sweep", "demo", "--space", "space.yaml")])
def test_seeds_and_sweeps_keep_out_of_runs_and_of_other_folders(command: Command, rest: tuple[str, ...]) -> None:
    Path("space.yaml").write_text("optimizer.lr: {low: 0.1, high: 0.2}\n")
    command(*TRAIN, "r", "--steps", "1")
    before = history("..")
    for name, message in (
        ("r", "runs/r exists already and holds a run: continue it with `longstride resume runs/r`"),
        ("latest", "--name 'latest' cannot name a run"),
        ("../outside", "--name '../outside' cannot name a run"),
    ):
        code, _, err = command(*rest, "--backend", "local", "--steps", "1", "--name", name)
        assert code == 2
        assert err.startswith(f"longstride: {message}")
        assert history("..") == before


def test_dry_run_prints_config_and_plan_and_writes_nothing(command: Command) -> None:
    Path("r.yaml").write_text("workers: 3\noptimizer: {lr: 0.5}\n")
    code, out, _ = command("train", "demo", "--recipe", "r.yaml", "--dry-run", "--optimizer.lr", "0.25")
    assert code == 0
    config = yaml.safe_load(out.partition("placement")[0])
    assert (config["workers"], config["optimizer"]["lr"]) == (3, 0.25)
    assert re.search(r"sampler\W+3\W+1\W+0\W+0\.50", out)
    assert re.search(r"total\W+3\W+0\W+1\.50", out)
    assert not Path("runs").exists()


def test_dry_run_refuses_what_the_run_would_refuse(command: Command) -> None:
    command(*TRAIN, "r", "--steps", "1")
    for arguments, message in (
        (("demo", "--name", "r"), "runs/r exists already"),
        (("demo", "--name", "a/b"), "--name 'a/b' cannot name a run"),
        (("a2c", "--env", "Nope-v0"), "unknown environment `Nope-v0`"),
        (("ddpg", "--env", "CartPole-v1"), "CartPole-v1 has discrete actions, and this agent needs continuous ones"),
        (("offpac", "--sde-steps", "4"), "--sde-steps 4 is for continuous actions"),
        (("detr", "--data.coco.folder", "nowhere"), "nowhere/annotations/instances_"),
        (("detr-rl",), "--model is missing"),
        (("detr-rl", "--reward", "math:nothing"), "reward math:nothing"),
        (("ddpo", "--reward", "beauty"), "unknown reward `beauty`"),
        (("ddpo", "--prompts", "nowhere.txt"), "--prompts nowhere.txt: cannot be read"),
        (("ddpo", "--model", "nowhere"), "nowhere: no model there"),
        (("diffusion", "--data.coco.folder", "nowhere"), "nowhere/annotations/instances_"),
        (("diffusion", "--detector", "nowhere"), f"{Path.cwd()}/nowhere: no such DETR"),
    ):
        code, out, err = command("train", *arguments, "--dry-run")
        assert (code, out) == (2, "")
        assert err.startswith(f"longstride: {message}")
    for job in ("a2c", "offpac", "ddpg"):
        code, out, _ = command("train", job, "--dry-run")
        assert code == 0
        assert out.rstrip().endswith(f"no placement plan: the job {job} has none")


def test_a_resolved_config_is_a_recipe(command: Command) -> None:
    command(*TRAIN, "first", "--steps", "3", "--tags", "x", "--optimizer.amsgrad", "--target", "0.5")
    code, _, _ = command("train", "demo", "--recipe", "runs/first/config.yaml", "--name", "second")
    assert code == 0
    configs = [yaml.safe_load(Path("runs", name, "config.yaml").read_text()) for name in ("first", "second")]
    assert configs[0] | {"name": "second"} == configs[1]


def test_a_failing_job_says_so_and_can_be_resumed(command: Command) -> None:
    code, _, err = command(*TRAIN, "r", "--steps", "5", "--fail-at", "3")
    assert code == 2
    assert err == "longstride: step 3: the data are bad; use better ones\n"
    assert (summary("r")["status"], summary("r")["steps"]) == ("failed", 2)
    path = Path("runs/r/config.yaml")
    path.write_text(path.read_text().replace("fail_at: 3", "fail_at: 0"))
    code, out, _ = command("resume", "r")
    assert code == 0
    assert re.findall(r"^step (\d)/5", out, re.MULTILINE) == ["3", "4", "5"]
    assert summary("r")["status"] == "finished"
    code, _, err = command("resume", "r")
    assert code == 2
    assert "is finished already" in err


def test_a_bug_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(config: object, run: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("tests.launch.demo_job.train", broken)
    with pytest.raises(ZeroDivisionError):
        command(*TRAIN, "r")
    assert summary("r")["status"] == "failed"
    RunDirectory(Path("runs/r")).lock()  # let go of


def test_evaluation_of_a_run_and_of_a_checkpoint(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    command(*TRAIN, "r", "--steps", "6", "--keep-checkpoints", "6")
    before = history("r")
    code, out, _ = command("evaluate", "latest")
    assert code == 0
    assert "heldout/weight" in out
    assert out.rstrip().endswith("runs/r/evaluations.jsonl")
    code, _, _ = command("evaluate", "runs/r/checkpoints/step-00000002", "--workers", "1")
    assert code == 0
    lines = [json.loads(line) for line in Path("runs/r/evaluations.jsonl").read_text().splitlines()]
    assert [(line["step"], line["heldout/step"], line["flags"]) for line in lines] == [
        (6, 6, []),
        (2, 2, ["--workers", "1"]),
    ]
    assert lines[0]["time"] < lines[1]["time"]
    Path("runs/r/evaluations.jsonl").unlink()
    with monkeypatch.context() as patched:
        for folder, target in (("runs/r", "checkpoints/step-00000002"), ("checkpoints", "step-00000002")):
            patched.chdir(folder)
            assert command("evaluate", target)[0] == 0
    Path("runs/r/evaluations.jsonl").unlink()
    assert history("r") == before, "nothing else was written"

    Path("runs/r/checkpoints/step-00000002/state.json").unlink()
    code, _, err = command("evaluate", "runs/r/checkpoints/step-00000002")
    assert code == 2
    assert "state.json is missing" in err
    code, _, err = command("evaluate", "r", "--wrokers", "1")
    assert code == 2
    assert "did you mean --workers?" in err


def test_the_table_of_runs(command: Command) -> None:
    command(*TRAIN, "good", "--steps", "3")
    command(*TRAIN, "bad", "--steps", "3", "--fail-at", "2")
    killed = RunDirectory.create(Path("runs"), "killed", {"job": "demo"})
    killed.write_summary({"job": "demo", "status": "running", "steps": 7, "metrics": {}})
    one_of_many = RunDirectory.create(Path("runs/many"), "seed-3", {"job": "demo"})
    heldout = {"train/x": 1.0, "heldout/pass@1/base": 0.1, "heldout/pass@1/rl": 0.5, "heldout/pass@1/rl/sums": 0.9}
    one_of_many.write_summary({"status": "interrupted", "steps": 2, "metrics": heldout})
    one_of_many.point_latest()
    code, out, _ = command("runs")
    assert code == 0
    rows = [[cell.strip() for cell in line.split("│")[1:6]] for line in out.splitlines() if "demo" in line]
    assert rows == [
        ["good", "demo", "finished", "3", f"eval/weight {summary('good')['metrics']['eval/weight']:.4g}"],
        ["bad", "demo", "failed", "1", f"train/loss {summary('bad')['metrics']['train/loss']:.4g}"],
        ["killed", "demo", "killed", "7", ""],
        ["many/seed-3", "demo", "interrupted", "2", "heldout/pass@1/rl 0.5"],
    ]


def test_a_damaged_run_is_a_row_that_says_so(command: Command) -> None:
    def run(name: str) -> RunDirectory:
        directory = RunDirectory.create(Path("runs"), name, {"job": "demo"})
        directory.write_summary({"status": "finished", "steps": 7, "metrics": {"eval/a": 1.0}})
        return directory

    run("empty").config.write_text("")
    run("latin").config.write_bytes(b"job: \xff")
    run("list").summary.write_text("[]")
    run("bytes").summary.write_bytes(b"\xff")
    run("nulls").summary.write_text('{"metrics": {"a": null}}')
    run("good")
    code, out, err = command("runs")
    assert (code, err) == (0, "")
    rows = [[cell.strip() for cell in line.split("│")[1:4]] for line in out.splitlines()]
    damaged = ["empty", "latin", "list", "bytes", "nulls"]
    assert [row for row in rows if row[:1] > [""]] == [[n, "", "damaged"] for n in damaged] + [
        ["good", "demo", "finished"]
    ]
    assert "does not name its job" in re.sub(r"\W+", " ", out)


def test_a_summary_that_holds_none_stops_no_resume(command: Command) -> None:
    command(*TRAIN, "r", "--steps", "3")
    Path("runs/r/summary.json").write_text("[]")
    assert command("resume", "r")[0] == 0
    assert summary("r")["status"] == "finished"


def test_a_damaged_newest_checkpoint_is_stepped_over(command: Command) -> None:
    command(*TRAIN, "r", "--steps", "4", "--fail-at", "4")
    newest = CheckpointStore(Path("runs/r/checkpoints"), keep=1).newest()
    assert newest is not None
    assert newest.step == 3
    (newest.path / "tensors.safetensors").write_bytes(b"")
    path = Path("runs/r/config.yaml")
    path.write_text(path.read_text().replace("fail_at: 4", "fail_at: 0"))
    code, out, _ = command("resume", "r")
    assert code == 0
    assert "skipping the damaged checkpoint" in out
    assert re.findall(r"^step (\d)/4", out, re.MULTILINE) == ["3", "4"]
    steps = [json.loads(line)["step"] for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def history(name: str) -> dict[str, bytes]:
    """Every file of the run but its lock."""
    return {str(path): path.read_bytes() for path in Path("runs", name).rglob("[!.]*") if path.is_file()}


@pytest.mark.parametrize("loss", ["damaged", "deleted", "folder deleted", "summary deleted too"])
def test_a_run_that_lost_its_checkpoints_is_not_started_over(command: Command, loss: str) -> None:
    command(*TRAIN, "r", "--steps", "4", "--fail-at", "4")
    for checkpoint in Path("runs/r/checkpoints").glob("step-*"):
        if loss == "damaged":
            (checkpoint / "tensors.safetensors").write_bytes(b"")
        else:
            shutil.rmtree(checkpoint)
    if loss == "folder deleted":
        Path("runs/r/checkpoints").rmdir()
    if loss == "summary deleted too":
        Path("runs/r/summary.json").unlink()
    before = history("r")
    code, _, err = command("resume", "r")
    assert code == 2
    assert re.search("has no checkpoint( that is whole)?: put back", err)
    assert "nothing was changed" in err
    assert err.count("\n") == 1
    assert history("r") == before
    RunDirectory(Path("runs/r")).lock()  # let go of


def test_a_run_stopped_before_its_first_checkpoint_starts_over(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise UserError("not now")

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointStore, "save", refuse)
        assert command(*TRAIN, "r", "--steps", "2")[0] == 2
    assert summary("r")["checkpoint"] is None
    code, out, _ = command("resume", "r")
    assert code == 0
    assert "was stopped before its first checkpoint: it starts over, its metrics so far are dropped" in out
    steps = [json.loads(line)["step"] for line in Path("runs/r/metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2]
    assert summary("r")["checkpoint"] == 2

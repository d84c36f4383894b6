"""The whole reasoning job in one process: figures, folders, resume bit for bit, and bad input."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from launch.cli import main
from llm_rl import reason, rollout, session
from models.language.checkpoint import load_pretrained, to_checkpoint
from models.language.peft_folder import load_adapter

SMALL = shlex.split("""
  --problems 'gym:chain_sum?min_terms=2&max_terms=3&min_digits=1&max_digits=1' --count 60 --backend local --engine torch
  --policy.hidden-size 32 --policy.layer-types linear_attention full_attention --policy.num-experts 4
  --policy.num-attention-heads 2 --policy.num-key-value-heads 1 --policy.head-dim 16
  --policy.moe-intermediate-size 32 --policy.vocab-size 300 --policy.max-position-embeddings 128
  --sft.steps 6 --sft.count 60 --sft.batch-size 8 --rl.iterations 4 --rl.problems-per-iteration 4 --rl.samples 2
  --rl.minibatches 2 --rl.max-tokens 12 --eval.count 6 --eval.samples 2 --save-every 1 --rollout.workers 1
  --learner.threads 1
""")


def train(runs_dir: Path, name: str, *flags: str) -> int:
    return main(["train", "reason", *SMALL, "--runs-dir", str(runs_dir), "--name", name, *flags])


@pytest.fixture(scope="module", autouse=True)
def _signal() -> Iterator[None]:
    """Policies this small are never right, and a group whose rewards are equal moves nothing."""
    plain = reason.advantages
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reason, "advantages", lambda rewards, name: plain([i % 2 for i in range(len(rewards))], name))
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs_dir = tmp_path_factory.mktemp("runs")
    assert train(runs_dir, "straight") == 0
    return runs_dir / "straight"


def test_summary_holds_the_three_figures(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert (summary["job"], summary["status"], summary["steps"]) == ("reason", "finished", 10)
    for tag in ("base", "sft", "rl"):
        for figure in ("pass@1", "greedy", "mean_tokens"):
            assert f"heldout/{figure}/{tag}" in summary["metrics"]
    assert summary["metrics"]["train/mismatch_kl"] < 1e-6


def test_every_completion_is_kept_with_its_reward(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "rollouts" / "7-train.jsonl").read_text().splitlines()]
    assert len(rows) == 4 * 2
    assert {"prompt", "answer", "completion", "reward", "reason", "version"} <= rows[0].keys()
    held_out = [json.loads(line) for line in (finished / "rollouts" / "10-heldout-rl.jsonl").read_text().splitlines()]
    assert not {row["prompt"] for row in rows} & {row["prompt"] for row in held_out}


def test_the_final_folder_is_the_trained_policy(finished: Path) -> None:
    initial = load_file(finished / "policy" / "init" / "model.safetensors")
    final = load_file(finished / "policy" / "final" / "model.safetensors")
    assert initial.keys() == final.keys()
    assert any(not torch.equal(initial[name], final[name]) for name in final)
    assert (finished / "policy" / "final" / "tokenizer.json").exists()
    load_pretrained(finished / "policy" / "final")


class Unplugged(Exception):
    pass


def break_at(monkeypatch: pytest.MonkeyPatch, method: str, call: int) -> None:
    """Let the learner's call number `call` of this method fail."""
    original = session.Session.learn
    calls = 0

    def learn(self: session.Session, name: str, *args: object, **settings: bool) -> object:
        nonlocal calls
        calls += name == method
        if name == method and calls == call:
            raise Unplugged
        return original(self, name, *args, **settings)

    monkeypatch.setattr(session.Session, "learn", learn)


@pytest.mark.parametrize("method", ["sft_step", "iterate"])
def test_resume_repeats_the_uninterrupted_run_bit_for_bit(
    finished: Path, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_at(monkeypatch, method, 4)
    with pytest.raises(Unplugged):
        train(tmp_path, "broken")
    monkeypatch.undo()
    assert main(["resume", "broken", "--runs-dir", str(tmp_path)]) == 0

    for folder in ("policy/final", max(p.name for p in (finished / "checkpoints").iterdir())):
        ours, theirs = tmp_path / "broken", finished
        if folder.startswith("step"):
            ours, theirs = ours / "checkpoints", theirs / "checkpoints"
        for file in sorted((theirs / folder).glob("*.safetensors")):
            assert (ours / folder / file.name).read_bytes() == file.read_bytes(), file
    steps = [json.loads(line)["step"] for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)


LORA = shlex.split("--rl.lora.rank 4 --rl.lora.targets all-linear experts.gate_up_proj --rl.lora.b-lr-ratio 4")


@pytest.mark.parametrize("serve", ["merged", "adapter"])
def test_lora_rl_changes_the_policy_and_saves_a_merged_folder(finished: Path, serve: str, tmp_path: Path) -> None:
    base = finished / "policy" / "init"
    flags = ["--model", str(base), *LORA, "--sft.steps", "0", "--rl.iterations", "2", "--rl.lr", "1e-2"]
    assert train(tmp_path, "lora", *flags, "--rl.lora.serve", serve) == 0
    metrics = json.loads((tmp_path / "lora" / "summary.json").read_text())["metrics"]
    assert metrics["train/mismatch_max"] < 1e-5  # of the second iteration: the workers have the adapter of the first
    initial = load_file(base / "model.safetensors")
    final = load_file(tmp_path / "lora" / "policy" / "final" / "model.safetensors")
    changed = {name for name in final if not torch.equal(initial[name], final[name])}
    assert {name.rpartition("_proj")[0].rpartition(".")[2] for name in changed} == {*"qkvgo", "gate", "up"}

    model = load_pretrained(base)
    load_adapter(model, tmp_path / "lora" / "policy" / "adapter")
    for name, tensor in to_checkpoint(model):
        torch.testing.assert_close(tensor, final[name], atol=1e-6, rtol=0)


def test_adapters_of_fine_tuning_are_folded_before_rl_and_survive_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = [
        "--sft.lora.rank",
        "4",
        "--sft.lora.init",
        "pissa",
        "--rl.lora.rank",
        "2",
        "--rl.lora.use-dora",
        "--rl.iterations",
        "2",
    ]
    assert train(tmp_path, "straight", *flags) == 0
    for method, call in (("fold_lora", 1), ("iterate", 2)):
        break_at(monkeypatch, method, call)
        name = f"broken-{method}"
        with pytest.raises(Unplugged):
            train(tmp_path, name, *flags)
        monkeypatch.undo()
        assert main(["resume", name, "--runs-dir", str(tmp_path)]) == 0
        ours, theirs = (tmp_path / run / "policy" / "final" / "model.safetensors" for run in (name, "straight"))
        assert ours.read_bytes() == theirs.read_bytes()


def test_router_replay_with_a_deepseek_router(tmp_path: Path) -> None:
    flags = ["--rl.router-replay", "--policy.scoring-func", "sigmoid", "--policy.router-selection-bias"]
    flags += ["--policy.shared-expert-intermediate-size", "32", "--policy.no-shared-expert-gate"]
    flags += ["--policy.n-group", "2", "--policy.routed-scaling-factor", "1.5", "--sft.steps", "25"]
    assert train(tmp_path, "replay", *flags, "--rl.iterations", "2") == 0
    lines = [json.loads(line) for line in (tmp_path / "replay" / "metrics.jsonl").read_text().splitlines()]
    for phase in ("sft/loss", "train/loss"):
        row = next(line for line in lines if phase in line)
        assert {"moe/max_violation", "moe/load_entropy", "moe/dropped_share"} <= row.keys()
    config = json.loads((tmp_path / "replay" / "policy" / "final" / "config.json").read_text())
    assert (config["scoring_func"], config["n_group"], config["router_selection_bias"]) == ("sigmoid", 2, True)
    final = load_file(tmp_path / "replay" / "policy" / "final" / "model.safetensors")
    assert final["model.layers.0.mlp.gate.e_score_correction_bias"].abs().max() > 0.005


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--rl.lora.serve adapter --sft.steps 0", "there is no adapter; set --rl.lora.rank"),
        ("--rl.lora.serve adapter --rl.lora.rank 4", "fine-tune with `train sft` first"),
        ("--rl.lora.rank 4 --rl.lora.b-lr-ratio 0", "must be positive"),
        ("--rl.lora.rank 20 --rl.lora.init pissa", "k_proj of shape (16, 32) has 16: use a rank of at most 16"),
        ("--rl.lora.rank 4 --rl.lora.targets query_proj", "unknown lora target `query_proj`: did you mean `q_proj`"),
    ],
)
def test_bad_adapter_settings(flags: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path, "bad", "--sft.steps", "1", *shlex.split(flags)) == 2
    assert message in capsys.readouterr().err


def test_own_problems_and_own_model(finished: Path, tmp_path: Path) -> None:
    problems = tmp_path / "own.jsonl"
    rows = [{"prompt": f"What is {a} + {b}?", "answer": str(a + b)} for a in range(6) for b in range(5)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--problems", str(problems), "--model", str(finished / "policy" / "final"), "--sft.steps", "0"]
    assert train(tmp_path, "own", *flags) == 0
    summary = json.loads((tmp_path / "own" / "summary.json").read_text())
    assert "heldout/pass@1/rl" in summary["metrics"]
    assert "heldout/pass@1/sft" not in summary["metrics"]


def test_every_end_token_of_the_config_ends_an_answer_and_is_no_part_of_it(finished: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(finished / "policy" / "final", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    digits = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(list("0123456789"))
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [config["eos_token_id"], *digits]}))
    assert train(tmp_path, "ends", "--model", str(folder), "--sft.steps", "0", "--rl.iterations", "1") == 0
    rows = [json.loads(line) for file in (tmp_path / "ends/rollouts").iterdir() for line in file.open()]
    said = [row["completion"] for row in rows if row["finish"] == "stop"]
    assert said
    assert not any(re.search(r"\d", text) for text in said)


def test_each_problem_is_asked_with_its_own_prompt_where_files_share_ids(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file, sums in (("train.jsonl", range(8)), ("test.jsonl", range(10, 18))):
        rows = [{"prompt": f"What is {n} + {n}?", "answer": str(2 * n), "id": str(n % 10)} for n in sums]
        (tmp_path / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempt, asked = session.Session.attempt, list[list[list[int]]]()
    wanted = list[list[list[int]]]()

    def spy(self: session.Session, problems: list, *rest: Any) -> list:
        wanted.append([self.dialogue.prompt(p.prompt) for p in problems])
        return attempt(self, problems, *rest)

    def collect(workers: Any, prompts: list[list[int]], *rest: Any) -> list:
        asked.append(prompts)
        return rollout.collect(workers, prompts, *rest)

    monkeypatch.setattr(session.Session, "attempt", spy)
    monkeypatch.setattr(session, "collect", collect)
    flags = ["--problems", str(tmp_path / "train.jsonl"), "--eval.problems", str(tmp_path / "test.jsonl")]
    flags += ["--model", str(finished / "policy" / "final"), "--sft.steps", "0", "--rl.iterations", "1"]
    assert train(tmp_path, "shared", *flags) == 0
    assert len(asked) == 5  # two evaluations of greedy and sampled answers, one iteration
    assert asked == wanted
    metrics = json.loads((tmp_path / "shared" / "summary.json").read_text())["metrics"]
    assert f"heldout/pass@1/rl/{tmp_path / 'test.jsonl'}" in metrics
    assert f"sampler/level/{tmp_path / 'train.jsonl'}" in metrics


def test_a_run_on_a_file_with_ids_resumes_and_one_on_another_file_does_not(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problems = tmp_path / "own.jsonl"
    rows = [{"prompt": f"{n}?", "answer": str(n), "id": f"n-{n}", "difficulty": n % 4} for n in range(20)]
    problems.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--problems", str(problems), "--model", str(finished / "policy" / "final"), "--sft.steps", "0"]
    assert train(tmp_path, "straight", *flags) == 0
    break_at(monkeypatch, "iterate", 3)
    with pytest.raises(Unplugged):
        train(tmp_path, "broken", *flags)
    monkeypatch.undo()
    whole = problems.read_text()
    problems.write_text("".join(whole.splitlines(keepends=True)[:15]))
    assert main(["resume", "broken", "--runs-dir", str(tmp_path)]) == 2
    assert "the checkpoint knows 16 problems" in capsys.readouterr().err
    problems.write_text(whole)
    assert main(["resume", "broken", "--runs-dir", str(tmp_path)]) == 0
    ours, theirs = (tmp_path / run / "policy" / "final" / "model.safetensors" for run in ("broken", "straight"))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path, "nan", "--rl.lr", "1e30", "--rl.iterations", "9") == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert "not finite" in error
    assert re.search(r"step ([7-9]|1\d):", error)
    assert list((tmp_path / "nan" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "nan" / "summary.json").read_text())["status"] == "failed"


BAD = {
    "one sample": (["--rl.samples", "1"], "--rl.samples 1"),
    "long prompt": (["--policy.max-position-embeddings", "20"], "context of 20"),
    "no model": (["--model", "nowhere"], "nowhere"),
    "no family": (["--problems", "gym:chain_summ"], "chain_sum"),
    "no problems": (["--problems", "missing.jsonl"], "missing.jsonl"),
    "heads": (["--policy.num-key-value-heads", "3"], "num_key_value_heads"),
    "greedy rl": (["--rl.temperature", "0"], "--rl.temperature"),
    "replay without experts": (["--rl.router-replay", "--policy.intermediate-size", "64"], "no mixture of experts"),
    "replay with vllm": (["--rl.router-replay", "--engine", "vllm"], "--engine torch"),
    "groups": (["--policy.n-group", "3"], "n_group (3) does not divide num_experts (4)"),
    "no checkpoints": (["--save-every", "0"], "--save-every 0: it must be at least 1"),
    "no evaluation": (["--eval.samples", "0"], "--eval.samples 0: it must be at least 1"),
    "no time": (["--rollout.timeout-s", "0"], "--rollout.timeout-s 0.0: it must be positive"),
    "too many minibatches": (["--rl.minibatches", "9"], "--rl.minibatches"),
    "beta": (["--learner.beta2", "1.5"], "--learner.beta2 1.5: it must be at least 0 and below 1"),
    "decay": (["--learner.weight-decay", "-1"], "--learner.weight-decay -1.0: it must be at least 0"),
    "iterations": (["--rl.iterations", "-1"], "--rl.iterations -1: it must be at least 0"),
    "steps": (["--sft.steps", "-3"], "--sft.steps -3: it must be at least 0"),
    "every": (["--eval.every", "-1"], "--eval.every -1: it must be at least 0"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_bad_input_is_one_line_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    flags, expected = BAD[case]
    assert train(tmp_path, "bad", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1
    assert expected in error
    assert not (tmp_path / "bad").exists()  # nothing was trained, and the name is free again


@pytest.mark.parametrize("flag", ["--eval.samples 0", "--rl.max-tokens 0", "--rl.temperature -1"])
def test_an_evaluation_refuses_what_it_cannot_do(flag: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(finished), *flag.split()]) == 2
    assert f"{flag.split()[0]} {flag.split()[1]}" in capsys.readouterr().err


def test_fine_tuning_names_its_own_limit_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--problems", "gym:chain_sum", "--count", "20", "--eval.count", "2", "--backend", "local"]
    flags += ["--policy.max-position-embeddings", "20", "--engine", "torch", "--runs-dir", str(tmp_path)]
    assert main(["train", "sft", *flags, "--sft.count", "20"]) == 2
    assert "or lower --max-tokens" in capsys.readouterr().err


@pytest.mark.parametrize("job", ["reason", "sft"])
def test_a_dry_run_refuses_what_a_run_refuses(
    job: str, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = SMALL if job == "reason" else [*SMALL[: SMALL.index("--rl.iterations")], "--max-tokens", "12"]
    common = ["train", job, *own, "--dry-run", "--name", "dry"]
    cases = [
        (["--model", "/nope"], "/nope"),
        (["--problems", "gym:nope"], "gym"),
        (["--eval.every", "-1"], "--eval.every"),
        (["--policy.max-position-embeddings", "10"], "context of 10"),
        (["--sft.lora.rank", "20", "--sft.lora.init", "pissa"], "use a rank of at most 16"),
    ]
    for flags, expected in cases:
        assert main([*common, *flags]) == 2
        out, err = capsys.readouterr()
        assert expected in err
        assert len(err.strip().splitlines()) == 1
        assert not out
    assert main(common) == 0
    assert main([*common, "--model", str(finished / "policy" / "final")]) == 0
    assert not list(tmp_path.iterdir())


def test_a_run_that_does_not_begin_leaves_no_verifier_behind(finished: Path, tmp_path: Path) -> None:
    folder = copy_of(finished, tmp_path / "model")
    (folder / "model.safetensors").write_bytes(b"")
    before = {*psutil.Process().children()}
    assert train(tmp_path, "dry", "--dry-run") == 0
    assert {*psutil.Process().children()} <= before
    assert train(tmp_path, "cut", "--model", str(folder)) == 2
    assert {*psutil.Process().children()} <= before


def copy_of(finished: Path, folder: Path) -> Path:
    folder.mkdir()
    for file in (finished / "policy" / "final").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_a_tokenizer_of_another_model_and_a_template_without_system_prompts(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copy_of(finished, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        + tokenizer.chat_template
    )
    tokenizer.save_pretrained(folder)
    assert train(tmp_path, "system", "--model", str(folder), "--system-prompt", "Think.") == 2
    assert "System role not supported): leave --system-prompt out" in capsys.readouterr().err
    tokenizer.add_tokens([f"<extra {i}>" for i in range(99)])
    tokenizer.save_pretrained(folder)
    assert train(tmp_path, "vocabulary", "--model", str(folder)) == 2
    assert "the tokenizer has a token '<extra 98>'" in capsys.readouterr().err
    assert not (tmp_path / "system").exists()
    assert not (tmp_path / "vocabulary").exists()


def test_a_truncated_model_folder_is_named(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for file in (finished / "policy" / "final").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert train(tmp_path, "cut", "--model", str(folder)) == 2
    assert "model.safetensors" in capsys.readouterr().err

    tensors = load_file(finished / "policy" / "final" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, folder / "model.safetensors")
    assert train(tmp_path, "missing", "--model", str(folder)) == 2
    assert "norm.weight" in capsys.readouterr().err


def test_plan_names_every_actor() -> None:
    from llm_rl.config import ReasonConfig

    assert not any(row[3] for row in reason.plan(ReasonConfig(), "cpu"))
    assert [row[3] > 0 for row in reason.plan(ReasonConfig(), "cuda")] == [True, True, False]
    assert [row[0] for row in reason.plan(ReasonConfig(), "cpu")] == ["learner", "rollout (vllm)", "verifier"]


def test_scenes_to_write_prompts_for(tmp_path: Path) -> None:
    flags = shlex.split("""--problems scene:prompt?max_objects=1 --scene.drawer renderer --rl.iterations 1
        --rl.max-tokens 8 --policy.max-position-embeddings 512 --eval.count 3""")
    assert train(tmp_path, "scenes", *flags) == 0
    metrics = json.loads((tmp_path / "scenes" / "summary.json").read_text())["metrics"]
    assert {"heldout/reward/rl", "heldout/pass@1/rl/scene:prompt"} <= metrics.keys()
    assert (tmp_path / "scenes" / "images" / "7-heldout-rl.png").is_file()

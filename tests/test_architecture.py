"""Arrows point down: launch → {agents, llm_rl} → envs → models. ray lives in launch/, vllm in llm_rl/vllm_engine/."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BELOW = {
    "launch": {"agents", "llm_rl", "envs", "models"},
    "agents": {"envs", "models"},
    "llm_rl": {"envs", "models"},
    "envs": {"models"},
    "models": set(),
}
HOME_OF = {"ray": "launch", "vllm": "llm_rl/vllm_engine"}


def imports(source: str) -> Iterator[tuple[str, bool]]:
    """Yield each imported module and whether only type checkers see the import."""

    def visit(node: ast.AST, for_types: bool) -> Iterator[tuple[str, bool]]:
        match node:
            case ast.Import():
                yield from ((alias.name, for_types) for alias in node.names)
            case ast.ImportFrom(level=0, module=str(module)):
                yield module, for_types
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                for child in node.body:
                    yield from visit(child, True)
                for child in node.orelse:
                    yield from visit(child, for_types)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]):
                yield module, for_types
            case _:
                for child in ast.iter_child_nodes(node):
                    yield from visit(child, for_types)

    yield from visit(ast.parse(source), False)


def violations(path: str, source: str) -> list[str]:
    layer = path.partition("/")[0]
    found = []
    for module, for_types in imports(source):
        top = module.partition(".")[0]
        if for_types and module == "launch.run":
            continue
        if top in BELOW and top != layer and top not in BELOW[layer]:
            found.append(f"{path} imports {module}")
        if top in HOME_OF and not path.startswith(HOME_OF[top] + "/"):
            found.append(f"{path} imports {module}")
    return found


FILES = sorted(path for layer in BELOW for path in (ROOT / layer).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_down(file: Path) -> None:
    assert violations(file.relative_to(ROOT).as_posix(), file.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/x.py", "import envs.control"),
        ("envs/x.py", "from agents.a2c import train"),
        ("agents/x.py", "def f():\n    from llm_rl import reason"),
        ("llm_rl/x.py", "import agents"),
        ("llm_rl/x.py", "from launch.run import Run"),
        ("llm_rl/x.py", "if TYPE_CHECKING:\n    from launch.cluster import start"),
        ("llm_rl/x.py", "import ray"),
        ("llm_rl/rollout.py", "from vllm import LLM"),
        ("launch/x.py", "import vllm"),
        ("llm_rl/x.py", "importlib.import_module('vllm.lora')"),
    ],
)
def test_the_check_sees_what_it_forbids(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("launch/x.py", "import ray\nfrom llm_rl.config import ReasonConfig"),
        ("llm_rl/vllm_engine/engine.py", "import vllm"),
        ("agents/x.py", "if TYPE_CHECKING:\n    from launch.run import Run"),
        ("envs/x.py", "import models.errors\nimport raystation"),
    ],
)
def test_the_check_allows_the_rest(path: str, source: str) -> None:
    assert violations(path, source) == []

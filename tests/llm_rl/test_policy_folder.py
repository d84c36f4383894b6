"""Policies made from scratch: the shape and the scheme that the recipe asks for, down to the learner's rates."""

from pathlib import Path

import pytest

from envs.reasoning.problem import Problem
from llm_rl.config import LearnerConfig, PolicyConfig
from llm_rl.learner import Learner
from llm_rl.policy_folder import make_policy
from models.errors import UserError
from models.language.checkpoint import read_config

PROBLEMS = [Problem(id=str(i), prompt=f"{i} + {i}?", answer=str(2 * i), verifier="exact") for i in range(20)]
SCHEME = {
    "norm_type": "layer_norm", "norm_placement": "post", "attention_scaling": "inverse", "log_n_from": 32,
    "initializer": "xavier", "parametrization": "mup", "base_hidden_size": 32,
}  # fmt: skip


def test_the_scheme_of_the_recipe_reaches_the_learner(tmp_path: Path) -> None:
    make_policy(PolicyConfig(**SCHEME), PROBLEMS, tmp_path, seed=0)
    config = read_config(tmp_path)
    assert {name: getattr(config, name) for name in SCHEME} == SCHEME
    learner = Learner(tmp_path, LearnerConfig(), "cpu")
    rates = learner.optimizer.lr_multipliers
    assert rates["layers.0.self_attn.q_proj.weight"] == 32 / 128
    assert rates["embed_tokens.weight"] == 1.0


def test_a_scheme_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="initializer 'fixup' is for layers without norms"):
        make_policy(PolicyConfig(initializer="fixup"), PROBLEMS, tmp_path, seed=0)

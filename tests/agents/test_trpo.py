import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn.utils import parameters_to_vector

from agents.on_policy import Batch
from agents.trpo import TRPOConfig, conjugate_gradient, fisher_vector_product, flat_gradient, trust_region_step
from models.control.policies import CategoricalPolicy, GaussianPolicy, Policy
from tests.agents.runs import train

CONFIG = TRPOConfig()


def discrete() -> Policy:
    return CategoricalPolicy(3, 4, (6,), "tanh")


def continuous() -> Policy:
    return GaussianPolicy(3, 2, (6,), "tanh", log_std=-0.5)


@pytest.fixture(params=[discrete, continuous])
def policy(request: pytest.FixtureRequest) -> Policy:
    torch.manual_seed(0)
    made: Policy = request.param()
    with torch.no_grad():
        made.net[-1].weight.mul_(50)  # not the nearly constant policy of the beginning
    return made


def steps_of(policy: Policy, count: int = 200) -> Batch:
    observations = torch.randn(count, 3)
    with torch.no_grad():
        pi = policy(observations)
        actions = pi.sample(torch.Generator().manual_seed(1))
        return Batch(observations, actions, pi.log_prob(actions), torch.randn(count), torch.zeros(count))


def flat(policy: Policy) -> torch.Tensor:
    return parameters_to_vector(policy.parameters()).detach().clone()


def kl_as_function_of_parameters(policy: Policy, observations: torch.Tensor):
    """θ ↦ mean KL(π_now ‖ π_θ), by torch's own distributions."""
    names, shapes = zip(*[(name, p.shape) for name, p in policy.named_parameters()])

    def distribution(theta: torch.Tensor) -> torch.distributions.Distribution:
        parts = theta.split([shape.numel() for shape in shapes])
        pi = torch.func.functional_call(
            policy, {n: part.view(s) for n, part, s in zip(names, parts, shapes)}, (observations,)
        )
        if isinstance(policy, CategoricalPolicy):
            return torch.distributions.Categorical(logits=pi.log_probs)
        return torch.distributions.Independent(torch.distributions.Normal(pi.mean, pi.log_std.exp()), 1)

    now = distribution(flat(policy))
    return lambda theta: torch.distributions.kl_divergence(now, distribution(theta)).mean()


def test_fisher_vector_products_are_those_of_the_hessian_of_the_kl(policy: Policy) -> None:
    observations = torch.randn(50, 3)
    hessian = torch.autograd.functional.hessian(kl_as_function_of_parameters(policy, observations), flat(policy))
    product = fisher_vector_product(policy, observations, damping=0.3)
    for _ in range(3):
        vector = torch.randn(len(hessian))
        torch.testing.assert_close(product(vector), hessian @ vector + 0.3 * vector, atol=1e-4, rtol=1e-4)


def test_conjugate_gradient_solves_the_system() -> None:
    torch.manual_seed(0)
    root = torch.randn(30, 30, dtype=torch.float64)
    matrix, b = root @ root.T + torch.eye(30), torch.randn(30, dtype=torch.float64)
    solution = conjugate_gradient(lambda v: matrix @ v, b, steps=60)
    torch.testing.assert_close(solution, torch.linalg.solve(matrix, b), atol=1e-5, rtol=1e-5)
    assert (conjugate_gradient(lambda v: matrix @ v, torch.zeros(30, dtype=torch.float64), steps=5) == 0).all()


def test_conjugate_gradient_takes_as_many_products_as_it_may() -> None:
    calls = []

    def product(v: torch.Tensor) -> torch.Tensor:
        calls.append(v)
        return torch.arange(1.0, 31) * v

    conjugate_gradient(product, torch.randn(30), steps=4)
    assert len(calls) == 4
    calls.clear()
    conjugate_gradient(product, torch.tensor([1.0] + [0.0] * 29), steps=4)  # an eigenvector: one is enough
    assert len(calls) == 1


@pytest.mark.parametrize("max_kl", [0.001, 0.02, 0.3])
def test_the_step_improves_within_the_trust_region(policy: Policy, max_kl: float) -> None:
    steps, before = steps_of(policy), flat(policy)
    kl = kl_as_function_of_parameters(policy, steps.observations)
    metrics = trust_region_step(policy, steps, replace(CONFIG, max_kl=max_kl))
    assert metrics["train/line_search_failed"] == 0
    assert metrics["train/improvement"] > 0
    assert 0 < metrics["train/kl"] <= max_kl
    assert kl(flat(policy)).item() == pytest.approx(metrics["train/kl"], rel=1e-3, abs=1e-6)
    assert kl(flat(policy)).item() > 0.2 * max_kl  # and it goes most of the way
    assert not torch.equal(flat(policy), before)


def test_the_step_is_along_the_natural_gradient(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the trust region is small enough for the quadratic model to be exact."""
    policy.double()
    monkeypatch.setattr(torch, "randn", partial(torch.randn, dtype=torch.float64))
    steps = steps_of(policy)
    before = flat(policy)
    hessian = torch.autograd.functional.hessian(kl_as_function_of_parameters(policy, steps.observations), before)
    fisher = hessian + 0.1 * torch.eye(len(before))
    pi = policy(steps.observations)
    surrogate = ((pi.log_prob(steps.actions) - pi.detach().log_prob(steps.actions)).exp() * steps.advantages).mean()
    natural = torch.linalg.solve(fisher, flat_gradient(surrogate, policy))
    expected = natural * (2 * 1e-8 / (natural @ fisher @ natural)).sqrt()
    trust_region_step(policy, steps, replace(CONFIG, max_kl=1e-8, cg_steps=200))
    torch.testing.assert_close(flat(policy) - before, expected, atol=1e-8, rtol=1e-3)


def test_a_failed_line_search_leaves_the_policy_bit_for_bit(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, before = steps_of(policy), flat(policy)
    monkeypatch.setattr("agents.trpo.conjugate_gradient", lambda product, b, count: -b)  # downhill
    metrics = trust_region_step(policy, steps, CONFIG)
    assert metrics["train/line_search_failed"] == 1
    assert (metrics["train/kl"], metrics["train/improvement"]) == (0, 0)
    assert torch.equal(flat(policy), before)


@pytest.mark.parametrize("advantage", [0.0, float("nan")])
def test_where_there_is_nothing_to_gain_the_policy_stays(policy: Policy, advantage: float) -> None:
    steps, before = steps_of(policy), flat(policy)
    metrics = trust_region_step(policy, replace(steps, advantages=torch.full((200,), advantage)), CONFIG)
    assert metrics["train/line_search_failed"] == 1
    assert torch.equal(flat(policy), before)


def test_it_learns_to_reach(tmp_path: Path) -> None:
    """A policy that does not move gets -0.8."""
    env = "tests.envs.control.environments:Reaching"
    config = TRPOConfig(env=env, steps=20_000, eval_every=20_000, log_std_init=-1.0, max_kl=0.05)
    assert train("trpo", config, tmp_path, "run")["eval/return_mean"] > -0.1


def test_a_linear_schedule_shrinks_the_trust_region_to_nothing(tmp_path: Path) -> None:
    env = "tests.envs.control.environments:Reaching"
    config = TRPOConfig(env=env, steps=4000, eval_every=4000, log_every=1, max_kl=0.05, kl_schedule="linear")
    train("trpo", config, tmp_path, "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    begun = [0, *(row["step"] for row in rows[:-1])]
    limits = [0.05 * (1 - step / 4000) for step in begun]
    assert limits[-1] < 0.02
    assert all(row["train/kl"] <= limit for row, limit in zip(rows, limits, strict=True))
    assert rows[0]["train/kl"] > limits[-1]  # which the first round's step could not have passed later

"""One gradient step of DDPG, TD3 and SAC against that of Stable-Baselines3, from the same weights on the same batch.

SB3 takes the actor's gradient after the critic's step, we take both at the weights before. So the critics are compared
after an ordinary step, and the actors after one in which the critics' learning rate is 0.
"""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
import pytest
import stable_baselines3
import torch
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from torch import nn

from agents.ddpg import DDPG, DDPGConfig
from agents.replay import ReplayBuffer, Transitions
from agents.replay_training import ReplayConfig
from agents.sac import SAC, SACConfig
from agents.td3 import TD3, TD3Config

B, D, A = 32, 3, 1  # Pendulum-v1
HIDDEN = (24, 16)
SETTINGS: dict[str, Any] = {"env": "Pendulum-v1", "hidden": HIDDEN, "lr": 1e-3, "batch_size": B, "tau": 0.1}
CASES = {
    "ddpg": (DDPG, DDPGConfig(**SETTINGS), {}),
    "td3": (TD3, TD3Config(**SETTINGS, target_noise=0.0), {"target_policy_noise": 0.0}),
    "sac": (SAC, SACConfig(**SETTINGS, initial_alpha=0.7), {"ent_coef": "auto_0.7"}),
}


def batch() -> Transitions:
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(B, 2 * D + A + 2)).astype(np.float32)
    rows[:, D : D + A] = rng.uniform(-1, 1, (B, A))
    rows[:, D + A + 1] = 0.99 * (rng.random(B) < 0.7)
    replay = ReplayBuffer(B, D, A)
    replay.add(rows)
    return replay.take(torch.arange(B))


def peer(name: str, settings: dict[str, Any], critic_lr: float) -> Any:
    made = getattr(stable_baselines3, name.upper())(
        "MlpPolicy",
        gymnasium.make("Pendulum-v1"),
        learning_rate=1e-3,
        batch_size=B,
        buffer_size=10,
        tau=0.1,
        policy_kwargs={"net_arch": list(HIDDEN)},
        device="cpu",
        **settings,
    )
    made.set_logger(Logger(None, []))
    made._update_learning_rate = lambda optimizers: None
    made.critic.optimizer.param_groups[0]["lr"] = critic_lr
    samples = batch()
    made.replay_buffer.sample = lambda *args, **kwargs: ReplayBufferSamples(
        samples.observations_BD,
        samples.actions_BA,
        samples.next_observations_BD,
        (samples.discounts_B == 0).float()[:, None],
        samples.rewards_B[:, None],
    )
    return made


def copy_weights(ours: nn.Module, theirs: nn.Module) -> None:
    with torch.no_grad():
        for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
            a.copy_(b)


def assert_same(ours: nn.Module, theirs: list[torch.Tensor]) -> None:
    for a, b in zip(ours.parameters(), theirs, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), atol=2e-6, rtol=1e-5)


def actor_parameters(name: str, actor: Any) -> list[torch.Tensor]:
    if name != "sac":
        return list(actor.parameters())
    # SB3 has a layer each for mean and log std; ours is the two stacked.
    weight, bias = (torch.cat([getattr(actor.mu, x), getattr(actor.log_std, x)]) for x in ("weight", "bias"))
    return [*actor.latent_pi.parameters(), weight, bias]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("compare", ["critic", "actor"])
def test_a_gradient_step_is_that_of_stable_baselines3(name: str, compare: str, monkeypatch: Any) -> None:
    cls, config, settings = CASES[name]
    critic_lr = 1e-3 if compare == "critic" else 0.0
    theirs = peer(name, settings, critic_lr)
    ours: Any = cls(config, seed=0)
    ours.optimizers["critic" if name == "ddpg" else "critics"].param_groups[0]["lr"] = critic_lr
    critic = ours.critic if name == "ddpg" else ours.critics
    target_critic = ours.target_critic if name == "ddpg" else ours.target_critics
    with torch.no_grad():
        for a, b in zip(ours.actor.parameters(), actor_parameters(name, theirs.actor), strict=True):
            a.copy_(b)
    copy_weights(critic, theirs.critic)
    for parameter in theirs.critic_target.parameters():
        parameter.data += 0.05  # targets that are not the networks themselves
    copy_weights(target_critic, theirs.critic_target)
    if name != "sac":
        for parameter in theirs.actor_target.parameters():
            parameter.data -= 0.05
        copy_weights(ours.target_actor, theirs.actor_target)

    noise = list(torch.randn((2, B, A), generator=torch.Generator().manual_seed(3)))
    monkeypatch.setattr(torch.distributions.normal, "_standard_normal", lambda *args, **kwargs: noise.pop(0))
    steps = (1, 2) if name == "td3" else (1,)  # TD3's first step is of the critics alone
    theirs.train(len(steps), B)
    for step in steps:
        ours.gradient_steps = step
        ours.update(batch(), torch.randn(ours.drawn, B, A, generator=torch.Generator().manual_seed(3)))
    if compare == "critic":
        assert_same(critic, list(theirs.critic.parameters()))
        assert_same(target_critic, list(theirs.critic_target.parameters()))
    else:
        assert_same(ours.actor, actor_parameters(name, theirs.actor))
        if name == "sac":
            torch.testing.assert_close(ours.temperature.log_alpha.data, theirs.log_ent_coef.data[0])
        else:
            assert_same(ours.target_actor, list(theirs.actor_target.parameters()))


@pytest.mark.parametrize("name", CASES)
def test_two_threads_compute_what_one_does(name: str) -> None:
    cls, config, _ = CASES[name]
    states = []
    for threads in (1, 2):
        settings: ReplayConfig = replace(config, learner_threads=threads)
        algorithm: Any = cls(settings, seed=0)
        generator = torch.Generator().manual_seed(0)
        for algorithm.gradient_steps in range(1, 7):
            algorithm.update(batch(), torch.randn(algorithm.drawn, B, A, generator=generator))
        states.append([p for network in algorithm.networks.values() for p in network.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*states))


def test_td3_smooths_its_targets() -> None:
    """With noise on the target actions the critics' step differs, and the noise is clipped."""
    found = []
    for noise, clip in [(0.0, 0.5), (0.2, 0.5), (1e6, 1e-9)]:
        td3 = TD3(replace(CASES["td3"][1], target_noise=noise, target_noise_clip=clip), seed=0)
        td3.gradient_steps = 1
        td3.update(batch(), torch.randn(1, B, A, generator=torch.Generator().manual_seed(0)))
        found.append(torch.cat([p.detach().ravel() for p in td3.critics.parameters()]))
    assert not torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])

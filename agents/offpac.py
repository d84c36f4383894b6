"""Off-policy actor-critic with importance sampling (Degris et al., arXiv 1205.4839), collected asynchronously.

    workers   play fragments one after another and never wait; each has `calls_ahead` calls in line
    learner   takes whatever fragment is ready ──▶ one update from it, `replays` updates from older ones
                └──▶ to its worker: the next call, with the newest weights

Fragments are kept as the environment gave them and normalised, if asked for, by the statistics of the update.

What a fragment was played by (μ, some updates ago) is not what learns from it (π), so its steps count by
ρ = π(a|s) / μ(a|s), with the log-probabilities that the worker kept:

    critic   one step on (V(s) - v_s)²
    actor    one step along  A_s ∇log π(a|s) + ent_coef ∇entropy,   A_s = ρ_s (r + γ v_{s+1} - V(s))

correction   vtrace   v_s of agents/vtrace.py, ratios cut off at `rho_bar` and `c_bar`: little variance, some bias
             plain    ratios as they are, products of them over the fragment (per-decision importance sampling): no
                      bias in v_s, and a variance that grows with the distance between π and μ

How far behind a fragment is: `train/policy_lag`, in new fragments learnt from since its call was issued, of which each
makes 1 + `replays` gradient steps. It is less than twice the calls in line, `workers x calls_ahead`: so many are
issued before it, and so many issued later may overtake it (`Pipeline`). Those learnt from again are up to
`kept_fragments` older.
"""

from collections import deque
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch

from agents import evaluation
from agents.clock import Clock
from agents.evaluation import catch_up, evaluate_and_save
from agents.moments import Moments
from agents.on_policy import Learner, OnPolicyConfig, adam, descend, initial_weights, make_policy
from agents.pipeline import Pipeline
from agents.rollout import Fragment, Snapshot
from agents.vtrace import vtrace
from models.control.networks import ValueFunction
from models.seeding import derive_seed

if TYPE_CHECKING:
    from launch.run import Run


@dataclass(frozen=True)
class OffPACConfig(OnPolicyConfig):
    n_steps: int = 16
    """Steps of each environment to one fragment."""
    gae_lambda: float = 1.0
    """λ of V-trace: what c_i is multiplied by."""
    correction: Literal["vtrace", "plain"] = "vtrace"
    """Importance sampling with ratios that are cut off, or as they are."""
    rho_bar: float = 1.0
    c_bar: float = 1.0
    replays: int = 1
    """Updates from older fragments to one update from a new one."""
    kept_fragments: int = 64
    calls_ahead: int = 2
    """Calls in line at each worker: with 2 it plays one while the other's fragment travels and is learnt from."""
    lr: float = 3e-4
    """Learning rate of the actor (Adam)."""
    critic_lr: float = 4e-3
    ent_coef: float = 0.01
    max_grad_norm: float = 0.5
    """Of the actor's gradient, and of the critic's."""

    may_be_zero: ClassVar[frozenset[str]] = OnPolicyConfig.may_be_zero | {"ent_coef", "gae_lambda", "replays"}
    at_most_one: ClassVar[frozenset[str]] = OnPolicyConfig.at_most_one | {"gae_lambda"}


def train(config: OffPACConfig, run: "Run") -> None:
    """The `offpac` job. With one worker a resumed run repeats an uninterrupted one bit for bit; with more, the order in
    which their fragments arrive is theirs."""
    torch.set_num_threads(1)  # the networks are too small to be shared among threads
    learner = OffPAC(config, run.seed)
    workers = learner.start_workers(run)
    state = run.restore()
    if state is not None:
        learner.load_state(state)
        catch_up(config, run, workers, learner, state, learner.state)
    pipeline = Pipeline(workers, "collect", config.worker_timeout_s, ahead=len(workers) * config.calls_ahead)
    clock = Clock(learner, workers, "env_steps")
    while learner.env_steps < config.steps:
        next_evaluation = min(config.steps, (learner.env_steps // config.eval_every + 1) * config.eval_every)
        with clock.waiting():
            for ahead in range(config.calls_ahead):
                for worker in range(len(workers)):
                    pipeline.issue(worker, *learner.next_call(restart=ahead == 0))
        metrics: dict[str, float] = {}
        while pipeline:  # no call is under way at a checkpoint
            with clock.waiting():
                worker, fragment = pipeline.next()
            before = learner.env_steps
            metrics |= learner.learn(fragment)
            if learner.env_steps < next_evaluation:
                with clock.waiting():
                    pipeline.issue(worker, *learner.next_call(restart=False))
            if pipeline and learner.env_steps // config.log_every > before // config.log_every:
                run.log(learner.env_steps, metrics | clock.rates(), config.steps)
                clock.restart()
        evaluate_and_save(config, run, workers, learner, metrics | clock.rates(), learner.state)
        clock.restart()


def evaluate(config: OffPACConfig, run: "Run") -> None:
    evaluation.evaluate(config, run, OffPAC(config, run.seed))


class OffPAC(Learner):
    config: OffPACConfig

    def __init__(self, config: OffPACConfig, seed: int) -> None:
        super().__init__(config, seed)
        with initial_weights(seed):
            policy = make_policy(config, self.spaces)
            self.critic = ValueFunction(self.spaces.observation_size, config.hidden, config.activation)
        self.networks = {"policy": policy, "critic": self.critic}
        self.optimizers = {"adam": adam((policy, config.lr), (self.critic, config.critic_lr))}
        self.calls = 0  # of the workers so far
        self.kept: deque[Fragment] = deque(maxlen=config.kept_fragments)  # as they came, not normalised

    def next_call(self, restart: bool) -> tuple[Snapshot, int, int, bool]:
        """The arguments of `RolloutWorker.collect`."""
        self.calls += 1
        return self.snapshot(), self.config.n_steps, self.calls, restart

    def learn(self, fragment: Fragment) -> dict[str, float]:
        metrics = super().learn(fragment)
        if fragment.valid.any():
            self.kept.append(fragment)
        return metrics

    def update(self, fragment: Fragment) -> dict[str, float]:
        metrics = self.update_on(fragment) | {"train/policy_lag": float(self.round - fragment.versions.mean())}
        rng = np.random.default_rng(derive_seed(self.seed, "replays", self.round))
        for older in rng.integers(len(self.kept), size=self.config.replays) if self.kept else ():
            again = self.update_on(self.normalized(self.kept[older]))
            metrics["train/replay_rho_cut"] = again["train/rho_cut"]
        return metrics

    def update_on(self, fragment: Fragment) -> dict[str, float]:
        config, valid = self.config, torch.from_numpy(fragment.valid)
        observations_TND = torch.from_numpy(fragment.observations)
        pi = self.policy(observations_TND[:-1])
        log_probs_TN = pi.log_prob(torch.from_numpy(fragment.actions))
        log_ratios_TN = log_probs_TN.detach().numpy() - fragment.log_probs
        values_TN = self.critic(observations_TND)
        cut = (config.rho_bar, config.c_bar) if config.correction == "vtrace" else (np.inf, np.inf)
        flags = fragment.terminated, fragment.truncated
        found = vtrace(
            log_ratios_TN, fragment.rewards, values_TN.detach().numpy(), *flags, config.gamma, config.gae_lambda, *cut
        )
        value_loss = (values_TN[:-1] - torch.from_numpy(found.values))[valid].square().mean()

        # Scaled but not centred: a constant baseline has mean zero only if it, too, is multiplied by ρ.
        advantages = torch.from_numpy(found.advantages)[valid]
        advantages = advantages / (advantages.square().mean().sqrt() + 1e-8)
        policy_loss = -(advantages * log_probs_TN[valid]).mean()
        entropy = pi.entropy()[valid].mean()
        loss = policy_loss - config.ent_coef * entropy + value_loss  # the networks share nothing
        descend(self.optimizers["adam"], loss, config.max_grad_norm)
        return {
            "train/policy_loss": policy_loss.item(),
            "train/value_loss": value_loss.item(),
            "train/entropy": entropy.item(),
            "train/rho_cut": float((np.exp(log_ratios_TN) > cut[0])[fragment.valid].mean()),
        }

    def state(self) -> dict[str, Any]:
        arrays = [f.name for f in fields(Fragment) if not f.name.endswith("_moments")]
        kept = [{name: getattr(fragment, name) for name in arrays} for fragment in self.kept]
        return super().state() | {"calls": self.calls, "kept": kept, "kept_as_played": True}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.calls = state["calls"]
        if (self.config.normalize_observations or self.config.normalize_rewards) and "kept_as_played" not in state:
            return  # of an older version, normalised by the statistics of then: they are left behind
        for arrays in state["kept"]:  # their moments were counted when they came
            self.kept.append(Fragment(**arrays, observation_moments=Moments.none(0), return_moments=Moments.none(1)))

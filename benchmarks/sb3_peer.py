"""One run of Stable-Baselines3 or sb3-contrib with RL Zoo's hyperparameters: the peer of control_peer.py.

    python -m benchmarks.sb3_peer --algo trpo --env HalfCheetah-v5 --steps 1000000 --threshold 1500 --seed 0

Prints one JSON line: steps per second of the training loop, seconds from the start of the process until the mean
return of the last 100 training episodes first reached the threshold, and the mean return of 20 deterministic episodes.
"""

import dataclasses
import json
import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import psutil
import torch
import tyro


def linear(initial: float) -> Callable[[float], float]:
    return lambda remaining: remaining * initial


SDE = {"use_sde": True, "sde_sample_freq": 4}
SMALL_SDE = {"use_sde": True, "policy_kwargs": {"log_std_init": -2, "ortho_init": False}}
TRPO_MUJOCO = {
    "n_envs": 2,
    "normalize": True,
    "batch_size": 128,
    "n_steps": 1024,
    "cg_max_steps": 25,
    "cg_damping": 0.1,
    "n_critic_updates": 20,
    "learning_rate": 1e-3,
}
A2C_MUJOCO = {"n_envs": 1, "normalize": True}
NET_400_300 = {"learning_rate": 1e-3, "policy_kwargs": {"net_arch": [400, 300]}}
DDPG_ZOO = {"n_envs": 1, "batch_size": 256, "learning_starts": 10_000, "noise_std": 0.1, **NET_400_300}
DDPG_CLASSIC = {**DDPG_ZOO, "gamma": 0.98, "buffer_size": 200_000}

# n_envs, normalize (VecNormalize of observations and rewards), noise_std (Gaussian) and ou_noise_std are RL Zoo's; the
# rest are arguments of the algorithm.
# What RL Zoo does not tune for an environment runs with the library's defaults.
ZOO: dict[tuple[str, str], dict[str, Any]] = {
    ("a2c", "CartPole-v1"): {"n_envs": 8, "ent_coef": 0.0},
    ("a2c", "Acrobot-v1"): {"n_envs": 16, "normalize": True, "ent_coef": 0.0},
    ("a2c", "LunarLander-v3"): {
        "n_envs": 8, "gamma": 0.995, "n_steps": 5, "learning_rate": linear(8.3e-4), "ent_coef": 1e-5,
    },
    ("a2c", "Pendulum-v1"): {
        "n_envs": 8, "normalize": True, "ent_coef": 0.0, "n_steps": 8, "gae_lambda": 0.9, "vf_coef": 0.4, "gamma": 0.9,
        "learning_rate": linear(7e-4), **SMALL_SDE,
    },
    ("a2c", "MountainCarContinuous-v0"): {
        "n_envs": 4, "normalize": True, "n_steps": 100, "ent_coef": 0.0, "use_sde": True, "sde_sample_freq": 16,
        "policy_kwargs": {"log_std_init": 0.0, "ortho_init": False},
    },
    ("a2c", "Swimmer-v5"): {**A2C_MUJOCO, "gamma": 0.9999},
    ("trpo", "CartPole-v1"): {
        "n_envs": 2, "n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "learning_rate": 1e-3,
        "n_critic_updates": 20,
    },
    ("trpo", "Acrobot-v1"): {"n_envs": 2, "normalize": True, "n_steps": 1024},
    ("trpo", "LunarLander-v3"): {
        "n_envs": 2, "n_steps": 512, "cg_damping": 0.01, "gae_lambda": 0.98, "learning_rate": 1e-3,
        "n_critic_updates": 15,
    },
    ("trpo", "Pendulum-v1"): {"n_envs": 2, "n_steps": 1024, "gamma": 0.9, "n_critic_updates": 15, **SDE},
    ("trpo", "MountainCarContinuous-v0"): {"n_envs": 2, "normalize": True, **SDE},
    ("trpo", "HalfCheetah-v5"): {**TRPO_MUJOCO, "target_kl": 0.04},
    ("trpo", "Swimmer-v5"): {**TRPO_MUJOCO, "gamma": 0.9999},
    ("ppo", "CartPole-v1"): {
        "n_envs": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
        "ent_coef": 0.0, "learning_rate": linear(1e-3), "clip_range": linear(0.2),
    },
    ("ppo", "Pendulum-v1"): {"n_envs": 4, "n_steps": 1024, "gamma": 0.9, "learning_rate": 1e-3, **SDE},
    **{("trpo", f"{name}-v5"): TRPO_MUJOCO for name in ("Hopper", "Walker2d", "Reacher", "Ant")},
    **{(algo, "Pendulum-v1"): DDPG_CLASSIC for algo in ("ddpg", "td3")},
    ("sac", "Pendulum-v1"): {"n_envs": 1, "learning_rate": 1e-3},
    ("ddpg", "LunarLanderContinuous-v3"): DDPG_CLASSIC,
    ("ddpg", "MountainCarContinuous-v0"): {"n_envs": 1, "ou_noise_std": 0.5, **NET_400_300},
    ("ddpg", "Swimmer-v5"): {**DDPG_ZOO, "gamma": 0.9999},
    **{("ddpg", f"{name}-v5"): DDPG_ZOO for name in ("HalfCheetah", "Hopper", "Walker2d", "Reacher")},
    **{("a2c", f"{name}-v5"): A2C_MUJOCO for name in ("HalfCheetah", "Hopper", "Walker2d", "Reacher", "Ant")},
}  # fmt: skip


@dataclasses.dataclass
class Config:
    algo: str
    env: str
    steps: int
    threshold: float
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    threads: int = 1
    recorded: bool = False
    """DDPG on a GPU, its gradient step as a CUDA graph: where scores would take days (benchmarks/sb3_recorded.py)."""
    long_evaluation: int = 0
    """So many deterministic episodes more."""


def main(config: Config) -> None:
    if config.recorded and (config.algo, config.device) != ("ddpg", "cuda"):
        raise SystemExit("--recorded is for --algo ddpg --device cuda")
    torch.set_num_threads(config.threads)
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.noise import NormalActionNoise, OrnsteinUhlenbeckActionNoise
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    process_began = psutil.Process().create_time()
    settings = dict(ZOO[config.algo, config.env])
    env: VecEnv = make_vec_env(config.env, n_envs=settings.pop("n_envs"), seed=config.seed)
    if settings.pop("normalize", False):
        env = VecNormalize(env, gamma=settings.get("gamma", 0.99))
    for name, noise in (("noise_std", NormalActionNoise), ("ou_noise_std", OrnsteinUhlenbeckActionNoise)):
        if name in settings:
            size = env.action_space.shape[0]
            settings["action_noise"] = noise(np.zeros(size), settings.pop(name) * np.ones(size))
    if config.recorded:
        from benchmarks.sb3_recorded import RecordedDDPG as algorithm
    else:
        package = sb3_contrib if config.algo == "trpo" else stable_baselines3
        algorithm = getattr(package, config.algo.upper())
    model = algorithm("MlpPolicy", env, seed=config.seed, device=config.device, **settings)

    class Watch(BaseCallback):
        reached: float | None = None
        reached_steps: int | None = None

        def _on_step(self) -> bool:
            episodes = self.model.ep_info_buffer
            if self.reached is None and episodes and np.mean([e["r"] for e in episodes]) >= config.threshold:
                self.reached, self.reached_steps = time.time() - process_began, self.model.num_timesteps
            return True

    watch = Watch()
    begin = time.perf_counter()
    model.learn(config.steps, callback=watch)
    seconds = time.perf_counter() - begin
    if isinstance(env, VecNormalize):
        env.training, env.norm_reward = False, False
    score, _ = evaluate_policy(model, env, n_eval_episodes=20, deterministic=True)
    longer = {}
    if config.long_evaluation:
        returns, _ = evaluate_policy(model, env, n_eval_episodes=config.long_evaluation, deterministic=True)
        figures = {"episodes": config.long_evaluation, "return_mean": round(float(np.mean(returns)), 3)}
        longer = {"long_evaluation": figures}
    print(
        json.dumps(
            {
                "seed": config.seed,
                "device": config.device,
                "threads": config.threads,
                "recorded": config.recorded,
                "steps": model.num_timesteps,
                "return_mean": round(float(np.mean(score)), 2),
                "steps_per_s": round(model.num_timesteps / seconds, 1),
                "steps_to_threshold": watch.reached_steps,
                "seconds_to_threshold": round(watch.reached, 2) if watch.reached is not None else None,
                **longer,
            }
        ),
        flush=True,
    )


if __name__ == "__main__":
    main(tyro.cli(Config))

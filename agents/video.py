"""An episode to look at, as an animated GIF."""

import io
from collections.abc import Iterator

import numpy as np

from agents.rollout import RolloutConfig, Snapshot, play
from envs.control.vector_env import ControlEnv
from models.errors import UserError

FRAMES_PER_S = 25  # at most; what a browser shows without stutter
LARGEST_SIDE = 400  # pixels


def film_episode(config: RolloutConfig, snapshot: Snapshot, seed: int, slice_s: float) -> Iterator[bytes | None]:
    """Play one episode greedily. Yields None after each `slice_s` seconds, then the file. Raises UserError if it cannot
    be drawn."""
    env = FilmedEnv(config.env)
    try:
        yield from play(env, config, snapshot, np.array([1]), seed, greedy=True, slice_s=slice_s)
    finally:
        env.close()
    yield animated_gif(env.frames, env.frames_per_s)


class FilmedEnv(ControlEnv):
    """One environment that keeps a picture of every step."""

    def __init__(self, env_id: str) -> None:
        super().__init__(env_id, 1, render_mode="rgb_array")
        self.frames: list[np.ndarray] = []
        self.frames_per_s = float(self.env.metadata.get("render_fps", FRAMES_PER_S))

    def reset(self, seed: int) -> np.ndarray:
        observations = super().reset(seed)
        self.frames.append(self.render())
        return observations

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        found = super().step(actions)
        self.frames.append(self.render())
        return found


def animated_gif(frames: list[np.ndarray], frames_per_s: float) -> bytes:
    """frames: (H, W, 3) uint8. Fast films lose frames, so that the speed stays the environment's."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("a video needs the package pillow: pip install 'longstride[control]'") from error
    every = max(1, round(frames_per_s / FRAMES_PER_S))
    pictures = [Image.fromarray(frame) for frame in frames[::every]]
    for picture in pictures:
        picture.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    file, duration = io.BytesIO(), round(1000 * every / frames_per_s)
    pictures[0].save(file, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return file.getvalue()

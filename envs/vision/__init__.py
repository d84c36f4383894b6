"""Vision tasks: captioned scenes, COCO data and its scores, environments around vision models."""

import gymnasium

gymnasium.register("Denoise-v0", vector_entry_point="envs.vision.denoise:DenoiseVectorEnv")

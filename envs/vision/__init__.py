"""Vision models as environments with rewards. `envs.vision:Detect-v0` imports this module and finds them."""

import gymnasium

# Importing again, as a worker that reloads modules may, must not warn of registering twice.
if "Detect-v0" not in gymnasium.registry:
    for name, continuous in (("Detect-v0", False), ("DetectContinuous-v0", True)):
        gymnasium.register(
            name,
            entry_point="envs.vision.detect:DetectEnv",
            vector_entry_point="envs.vision.detect:DetectVectorEnv",
            kwargs={"continuous": continuous},
        )
    gymnasium.register("Denoise-v0", vector_entry_point="envs.vision.denoise:DenoiseVectorEnv")

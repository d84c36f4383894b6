"""Vision tasks: captioned scenes, COCO data and its scores, environments around vision models."""

import gymnasium


def register() -> None:
    """Make the environments known to gymnasium: `envs.vision:Detect-v0` imports this module and finds them."""
    for name, continuous in (("Detect-v0", False), ("DetectContinuous-v0", True)):
        if name not in gymnasium.registry:
            gymnasium.register(
                name,
                entry_point="envs.vision.detect:DetectEnv",
                vector_entry_point="envs.vision.detect:DetectVectorEnv",
                kwargs={"continuous": continuous},
            )


register()

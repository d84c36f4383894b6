"""Environment variables that must stand before an actor's process imports torch or vLLM."""


def actor_environment(device: str) -> dict[str, str]:
    """vLLM's variables mean nothing to actors that do not use it, so there is one set for all."""
    variables = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine runs in the actor, not in a child of it
    if device == "cpu":
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # actors that each pin their threads pin the same cores
        variables["TORCH_COMPILE_DISABLE"] = "1"  # inductor costs 25 s at start and gains nothing at these sizes
    return variables

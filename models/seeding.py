"""Every random number in longstride descends from the run's seed through `derive_seed`."""

import hashlib


def derive_seed(seed: int, *path: str | int) -> int:
    """Return a 63-bit seed for one use of randomness, e.g. `derive_seed(run.seed, "rollout", step, worker)`.

    Seeds of different paths are independent, and the seed of a path does not depend on what else drew random numbers
    before it. This is what lets a resumed run repeat an uninterrupted one without saving generator states.
    """
    text = "/".join([str(seed), *map(str, path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

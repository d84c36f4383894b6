"""Checks that misbehave as the completion asks them to; loaded by the workers of the pool under test."""

import ctypes
import os
import subprocess
import sys
import time

from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.verify import register


@register("hostile")
def hostile(problem: Problem, completion: str) -> Verdict:
    deed, _, argument = completion.partition(" ")
    if deed == "sleep":
        time.sleep(float(argument))
    elif deed == "spin":  # in C code that holds the interpreter lock and looks at no signal
        _ = 7**7**9
    elif deed == "exit":
        os._exit(int(argument))
    elif deed == "segfault":
        ctypes.string_at(0)
    elif deed == "raise":
        raise RuntimeError(argument)
    elif deed == "eat":
        _ = b"x" * (int(argument) * 1024 * 1024)
    elif deed == "print":
        print(argument, flush=True)  # must not end up in the pool's protocol
    elif deed == "offspring":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        with open(argument, "w") as file:
            file.write(f"{os.getpid()} {child.pid}")
        time.sleep(600)
    elif deed == "nan":
        return Verdict(float("nan"), "correct")
    return Verdict(1.0, "correct") if completion.endswith(problem.answer) else Verdict(0.0, "wrong")

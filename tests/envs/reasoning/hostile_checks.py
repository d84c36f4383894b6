"""Checks that misbehave as the completion asks them to; loaded by the workers of the pool under test."""

import contextlib
import ctypes
import logging
import os
import subprocess
import sys
import time

from envs.reasoning.problem import Problem, Verdict
from envs.reasoning.verify import CHECKS, register


def tell(pipe: str, text: str) -> None:
    """A named pipe: a check cannot write to a file."""
    with open(pipe, "w") as file:
        file.write(text)


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
    elif deed == "complain":
        logging.getLogger("math_verify").warning("no time for %s", completion)
    elif deed == "offspring":
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        tell(argument, f"{os.getpid()} {child.pid}")
        time.sleep(600)
    elif deed == "daemon":  # as above, but out of the process group, and the item ends
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        tell(argument, f"{os.getpid()} {child.pid}")
    elif deed == "leave":  # the process group that is killed when time is up
        os.setsid()
        tell(argument, f"{os.getpid()}")
        time.sleep(600)
    elif deed == "bribe":  # every check of the interpreter
        CHECKS.update(dict.fromkeys(CHECKS, lambda problem, completion: Verdict(1.0, "correct")))
    elif deed == "write":
        with open(argument, "w") as file:
            file.write("x")
    elif deed == "gibberish":  # in the place of a verdict
        for descriptor in range(3, 64):
            with contextlib.suppress(OSError):
                os.write(descriptor, argument.encode())
        os._exit(0)
    elif deed == "home":
        return Verdict(0.0, os.environ.get("HOME", "homeless"))
    elif deed == "nan":
        return Verdict(float("nan"), "correct")
    return Verdict(1.0, "correct") if completion.endswith(problem.answer) else Verdict(0.0, "wrong")

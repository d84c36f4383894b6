"""Noise levels σ_t = √((1 − ᾱ_t)/ᾱ_t) of a pass, for solvers that think of x̂ = x_0 + σ ε (Karras et al. 2022)."""

import numpy as np


def sigmas_at(alpha_bar: list[float], times: list[float]) -> list[float]:
    """σ at timesteps that may lie between those of training, followed by the 0 that the pass ends at."""
    table = ((1 - np.array(alpha_bar)) / np.array(alpha_bar)) ** 0.5
    return [*np.interp(times, np.arange(len(table)), table).tolist(), 0.0]

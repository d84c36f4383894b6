"""n-step transitions: several rewards before the value takes over, so that values travel back sooner.

A transition that begins at step t of an episode which ends with step e reaches over m = min(n, e - t + 1) steps:

    R = Σ_{k<m} γ^k r_{t+k},   discount = γ^m, or 0 if the m-th step ended the episode by itself,   next state s_{t+m}

so that the target R + discount · Q̄(s_{t+m}, ·) has the form of the one-step target (Barth-Maron et al., arXiv
1804.08617, §3). The rewards after the first are those of the actions that were played; nothing corrects for a policy
that has changed since, and SAC's entropy counts in the last step alone.

Shapes: T steps of a fragment, N environments, W numbers a row (agents/replay.py), S = n - 1 + T.
"""

import numpy as np


class NStep:
    """The rows of one worker's environments, n steps long.

    A row is complete n - 1 steps after it began. The last n - 1 steps of a fragment are therefore kept, and begin the
    rows of the next one.
    """

    def __init__(self, n: int, gamma: float, reward_column: int) -> None:
        self.n, self.gamma, self.reward = n, gamma, reward_column
        self.restart()

    def restart(self) -> None:
        """New episodes begin; rows that are not complete are lost."""
        self.kept: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None

    def __call__(self, rows_TNW: np.ndarray, done_TN: np.ndarray, valid_TN: np.ndarray) -> np.ndarray:
        """One-step rows to n-step rows (K, W), in the order in which they began.

        done: the step ended its episode, for whatever reason. valid: it was a step, no autoreset dummy.
        """
        r = self.reward
        if self.kept:
            parts = zip(self.kept, (rows_TNW, done_TN, valid_TN))
            rows_SNW, done_SN, valid_SN = (np.concatenate(pair) for pair in parts)
        else:
            rows_SNW, done_SN, valid_SN = rows_TNW, done_TN, valid_TN
        whole = max(0, len(rows_SNW) - (self.n - 1))  # rows that are complete
        self.kept = tuple(part[whole:].copy() for part in (rows_SNW, done_SN, valid_SN))
        joined = rows_SNW[:whole].copy()
        discount = joined[..., r + 1]  # views: what is written here is written there
        going_on = ~done_SN[:whole]
        for k in range(1, self.n):
            later = rows_SNW[k : k + whole]
            joined[..., r] += np.where(going_on, np.float32(self.gamma**k) * later[..., r], 0)
            joined[..., r + 2 :] = np.where(going_on[..., None], later[..., r + 2 :], joined[..., r + 2 :])
            discount[:] = np.where(going_on, np.float32(self.gamma**k) * later[..., r + 1], discount)
            going_on &= ~done_SN[k : k + whole]
        return joined[valid_SN[:whole]]

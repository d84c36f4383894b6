import numpy as np

from agents.evaluation import Evaluation


def test_metrics() -> None:
    found = Evaluation(np.array([1.0, 3.0]), np.array([10, 20])).metrics("eval/sampled")
    assert found["eval/sampled/return_mean"] == 2
    assert found["eval/sampled/return_std"] == 1
    assert found["eval/sampled/length_mean"] == 15
    assert (found["eval/sampled/return_ci95_low"], found["eval/sampled/return_ci95_high"]) == (1, 3)

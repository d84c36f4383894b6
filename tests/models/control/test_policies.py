import numpy as np
import pytest
import torch

from models.control.networks import ValueFunction
from models.control.numpy_policies import NumpyMLP
from models.control.policies import CategoricalPolicy, GaussianPolicy


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("kind", [CategoricalPolicy, GaussianPolicy])
def test_the_numpy_policy_is_the_torch_policy(kind, activation) -> None:
    torch.manual_seed(1)
    policy = kind(5, 3, (16, 8), activation)
    with torch.no_grad():
        policy.net[-1].weight.mul_(100)
        if kind is GaussianPolicy:
            policy.log_std.normal_()
    twin = policy.numpy_policy(policy.flat_weights())
    observations = np.random.default_rng(0).normal(size=(4, 10, 5)).astype(np.float32)
    pi = policy(torch.from_numpy(observations))
    outputs = np.stack([twin(x) for x in observations])
    mode = pi.log_probs.argmax(-1) if kind is CategoricalPolicy else pi.mean
    np.testing.assert_allclose(twin.greedy(outputs), mode.detach(), atol=1e-5)
    actions = twin.act(outputs, twin.noise(np.random.default_rng(0), outputs.shape))
    expected = pi.log_prob(torch.from_numpy(actions)).detach().numpy()
    found = twin.log_probs(outputs, actions)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert found.dtype == np.float32


def test_weights_for_other_layers_are_refused() -> None:
    weights = CategoricalPolicy(5, 3, (16, 8), "tanh").flat_weights()
    with pytest.raises(ValueError, match="weights for layers"):
        NumpyMLP([5, 16, 3], "tanh", weights)


def test_actions_are_drawn_with_the_probabilities_of_the_policy() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.array([0.7, 0.2, 0.1], np.float32)
    logits = np.tile(np.log(probabilities), (100_000, 1)) + 3
    discrete = CategoricalPolicy(1, 3, (), "tanh")
    twin = discrete.numpy_policy(discrete.flat_weights())
    actions = twin.act(logits, twin.noise(rng, logits.shape))
    np.testing.assert_allclose(np.bincount(actions) / 100_000, probabilities, atol=0.01)
    continuous = GaussianPolicy(1, 1, (), "tanh", log_std=1.0)
    twin = continuous.numpy_policy(continuous.flat_weights())
    actions = twin.act(np.full((100_000, 1), 5.0), twin.noise(rng, (100_000, 1)))
    assert actions.mean() == pytest.approx(5, abs=0.05)
    assert actions.std() == pytest.approx(np.e, abs=0.05)


def test_the_first_policy_is_nearly_uniform_and_weights_are_orthogonal() -> None:
    torch.manual_seed(0)
    observations = torch.randn(5, 7, 4)
    policy = CategoricalPolicy(4, 3, (32, 16), "tanh")
    log_probs = policy(observations).log_probs
    torch.testing.assert_close(log_probs.exp(), torch.full((5, 7, 3), 1 / 3), atol=0.01, rtol=0)
    second = policy.net[2].weight
    torch.testing.assert_close(second @ second.T, 2 * torch.eye(16), atol=1e-5, rtol=0)
    gaussian = GaussianPolicy(4, 3, (32, 16), "tanh", log_std=-1.0)(observations)
    assert gaussian.mean.abs().max() < 0.1
    assert (gaussian.log_std == -1).all()
    assert ValueFunction(4, (32, 16), "relu")(observations).shape == (5, 7)

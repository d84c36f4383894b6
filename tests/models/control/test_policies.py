from functools import partial

import numpy as np
import pytest
import torch
from stable_baselines3.common.distributions import StateDependentNoiseDistribution

from models.control.networks import ValueFunction
from models.control.numpy_policies import NumpyMLP
from models.control.policies import CategoricalPolicy, GaussianPolicy, StateDependentGaussianPolicy

state_dependent = partial(StateDependentGaussianPolicy, log_std=-1.0, hold=3)


@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("kind", [CategoricalPolicy, GaussianPolicy, state_dependent])
def test_the_numpy_policy_is_the_torch_policy(kind, activation) -> None:
    torch.manual_seed(1)
    policy = kind(5, 3, (16, 8), activation)
    with torch.no_grad():
        policy.net[-1].weight.mul_(100)
        if kind is not CategoricalPolicy:
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


def test_state_dependent_noise_is_that_of_stable_baselines3() -> None:
    """Log-probabilities, entropy and their gradients, which do not reach the features by way of the variance."""
    torch.manual_seed(0)
    policy = state_dependent(5, 2, (16, 8), "tanh")
    torch.nn.init.normal_(policy.log_std)
    theirs = StateDependentNoiseDistribution(2, full_std=True, learn_features=False)
    theirs.proba_distribution_net(latent_dim=8)
    observations, actions, weights = torch.randn(30, 5), torch.randn(30, 2), torch.randn(2, 30)
    features = policy.net[:-1](observations)
    theirs.proba_distribution(policy.net[-1](features), policy.log_std, features)
    pi = policy(observations)
    torch.testing.assert_close(pi.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(pi.entropy(), theirs.entropy())
    gradients = [
        torch.autograd.grad(
            (weights * torch.stack([d.log_prob(actions), d.entropy()])).sum(), list(policy.parameters())
        )
        for d in (pi, theirs)
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_state_dependent_noise_is_held_and_has_the_spread_of_the_distribution() -> None:
    torch.manual_seed(0)
    policy = state_dependent(5, 2, (16, 8), "tanh")
    torch.nn.init.normal_(policy.log_std)
    twin = policy.numpy_policy(policy.flat_weights())
    observations = np.random.default_rng(0).normal(size=(1, 5)).astype(np.float32)
    outputs = np.broadcast_to(twin(observations), (30_000, 4, 10))
    noise = twin.noise(np.random.default_rng(0), outputs.shape)
    assert noise.shape == (30_000, 4, 8, 2)
    actions = twin.act(outputs, noise)
    for step in (1, 2):
        np.testing.assert_array_equal(actions[step::3], actions[::3])
    assert (actions[3::3] != actions[:-3:3]).all()
    assert len(set(actions[0, :, 0].tolist())) == 4  # each environment has noise of its own
    pi = policy(torch.from_numpy(observations))
    np.testing.assert_allclose(actions.mean((0, 1)), pi.mean[0].detach(), atol=0.05)
    np.testing.assert_allclose(actions.std((0, 1)), pi.log_std[0].exp().detach(), rtol=0.02)
    assert len(twin.noise(np.random.default_rng(0), (7, 4, 10))) == 7  # which 3 does not divide


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

import torch

from models.control.actor_critic import ActorCritic


def test_the_first_policy_is_nearly_uniform_and_weights_are_orthogonal() -> None:
    torch.manual_seed(0)
    net = ActorCritic(observation_size=4, actions=3, hidden=(32, 16))
    observations = torch.randn(5, 7, 4)
    log_probs, values = net.log_probs(observations), net.values(observations)
    assert log_probs.shape == (5, 7, 3)
    assert values.shape == (5, 7)
    torch.testing.assert_close(log_probs.exp(), torch.full((5, 7, 3), 1 / 3), atol=0.01, rtol=0)
    second = net.actor[2].weight
    torch.testing.assert_close(second @ second.T, 2 * torch.eye(16), atol=1e-5, rtol=0)


def test_actor_and_critic_share_nothing() -> None:
    net = ActorCritic(observation_size=4, actions=2, hidden=(8,))
    net.values(torch.randn(3, 4)).sum().backward()
    assert all(parameter.grad is None for parameter in net.actor.parameters())
    assert all(parameter.grad is not None for parameter in net.critic.parameters())

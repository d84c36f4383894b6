import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from models.control.q_networks import DeterministicActor, QCritic, SquashedGaussian, follow


def test_the_squashed_gaussian_is_that_of_torch_distributions() -> None:
    torch.manual_seed(0)
    actor = SquashedGaussian(5, 3, (16,), "relu")
    observations, noise = torch.randn(40, 5), torch.randn(40, 3)
    actions, log_probs = actor(observations, noise)
    mean, log_std = actor.layers(observations).chunk(2, -1)
    oracle = TransformedDistribution(Independent(Normal(mean, log_std.exp()), 1), [TanhTransform()])
    torch.testing.assert_close(actions, torch.tanh(mean + log_std.exp() * noise))
    torch.testing.assert_close(log_probs, oracle.log_prob(actions), atol=1e-4, rtol=1e-4)


def test_the_density_stays_finite_where_tanh_rounds_to_one() -> None:
    actor = SquashedGaussian(1, 1, (), "relu")
    with torch.no_grad():
        actor.layers[0].bias.copy_(torch.tensor([30.0, -5.0]))
    actions, log_probs = actor(torch.zeros(1, 1, requires_grad=True), torch.zeros(1, 1))
    assert actions.item() == 1.0
    # log N at its mean, less log(1 - tanh²(30)) = log 4 - 60 (and tanh's other tail is nothing here)
    expected = 5 - 0.5 * torch.log(torch.tensor(2 * torch.pi)) - (torch.log(torch.tensor(4.0)) - 60)
    torch.testing.assert_close(log_probs[0], expected, atol=1e-4, rtol=1e-5)
    log_probs.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in actor.parameters())


def test_critics_share_nothing() -> None:
    torch.manual_seed(0)
    critics = QCritic(3, 2, (8,), "relu", count=2)
    inputs = torch.randn(7, 5)
    values = critics(inputs)
    assert values.shape == (2, 7)
    assert not torch.allclose(values[0], values[1])
    values[0].sum().backward()
    assert all(not p.grad.any() for p in critics.members[1].parameters())


def test_targets_follow() -> None:
    target, source = DeterministicActor(3, 2, (4,), "tanh"), DeterministicActor(3, 2, (4,), "tanh")
    before = [p.detach().clone() for p in target.parameters()]
    follow(target, source, 0.25)
    for old, new, goal in zip(before, target.parameters(), source.parameters(), strict=True):
        torch.testing.assert_close(new, old + 0.25 * (goal - old))
    follow(target, source, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(target.parameters(), source.parameters(), strict=True))


def test_layer_norm_bounds_what_a_critic_says_of_actions_far_away() -> None:
    torch.manual_seed(0)
    far_BX = torch.cat([torch.zeros(64, 3), 1e4 * torch.randn(64, 2)], -1)
    plain, normed = (QCritic(3, 2, (64, 64), "relu", layer_norm) for layer_norm in (False, True))
    assert plain(far_BX).abs().max() > 100
    assert normed(far_BX).abs().max() < 10
    linears = [module for module in normed.modules() if isinstance(module, torch.nn.Linear)]
    assert [linear.weight.shape for linear in linears] == [(64, 5), (64, 64), (1, 64)]

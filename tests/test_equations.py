"""Each equation against an independent definition."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import each_continuous, each_with, random_ends

import ppo_continuous as ppo


@each_with("gae")
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (0.9, 0.0), (0.9, 1.0), (1.0, 1.0)])
def test_gae_eq16_ppo_eq11_is_the_double_sum(script, gamma, lam):
    steps, envs = 23, 4
    rewards, values, next_values = torch.randn(3, steps, envs, dtype=torch.float64).unbind()
    terminated, truncated = random_ends(steps, envs)
    assert (terminated & truncated).any() and (terminated ^ truncated).any()
    done = terminated | truncated
    expected = torch.zeros(steps, envs, dtype=torch.float64)
    for t, n in itertools.product(range(steps), range(envs)):
        for k in range(t, steps):
            bootstrap = 0.0 if terminated[k, n] else gamma * next_values[k, n]
            delta = rewards[k, n] + bootstrap - values[k, n]
            expected[t, n] += (gamma * lam) ** (k - t) * delta
            if done[k, n]:
                break
    adv = script.gae(rewards, values, next_values, terminated, done, gamma, lam)
    torch.testing.assert_close(adv, expected)


@each_with("gae")
def test_gae_eq17_eq18_lambda_zero_is_td_and_one_is_monte_carlo(script):
    rewards, values = torch.randn(2, 6, 1, dtype=torch.float64).unbind()
    gamma, last = 0.9, 0.7
    next_values = torch.cat([values[1:], torch.tensor([[last]], dtype=torch.float64)])
    never = torch.zeros(6, 1, dtype=torch.bool)
    td = rewards + gamma * next_values - values
    adv = script.gae(rewards, values, next_values, never, never, gamma, 0.0)
    torch.testing.assert_close(adv, td)
    returns = []
    for t in range(6):
        tail = sum(gamma ** (k - t) * rewards[k] for k in range(t, 6))
        returns.append(tail + gamma ** (6 - t) * last)
    adv = script.gae(rewards, values, next_values, never, never, gamma, 1.0)
    torch.testing.assert_close(adv, torch.stack(returns) - values)


@each_with("gae")
def test_gae_of_one_step(script):
    rewards, values, next_values = torch.randn(3, 1, 5).unbind()
    never = torch.zeros(1, 5, dtype=torch.bool)
    adv = script.gae(rewards, values, next_values, never, never, 0.9, 0.5)
    torch.testing.assert_close(adv, rewards + 0.9 * next_values - values)


@each_with("gae")
def test_gae_does_not_leak_over_an_episode_end(script):
    rewards, values, next_values = torch.zeros(3, 4, 1).unbind()
    terminated = torch.tensor([[False], [True], [False], [False]])
    before = script.gae(rewards, values, next_values, terminated, terminated, 0.99, 0.95)
    rewards[2], values[2], next_values[1] = 1e6, 1e6, 1e6  # the next episode, and V of its start
    after = script.gae(rewards, values, next_values, terminated, terminated, 0.99, 0.95)
    assert torch.equal(before[:2], after[:2])


@pytest.mark.parametrize(
    "ratio, adv, value, clipped",
    [
        (1.1, 2.0, 2.2, False),
        (1.1, -2.0, -2.2, False),
        (0.7, 2.0, 1.4, False),
        (0.7, -2.0, -1.6, True),
        (1.3, 2.0, 2.4, True),
        (1.3, -2.0, -2.6, False),
    ],
)
def test_ppo_eq7_clipped_surrogate_six_cases(ratio, adv, value, clipped):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    objective = ppo.clipped_surrogate(ratio, torch.tensor([adv], dtype=torch.float64), 0.2)
    (gradient,) = torch.autograd.grad(objective, ratio)
    assert objective.item() == pytest.approx(value)
    assert gradient.item() == (0.0 if clipped else pytest.approx(adv))


@each_continuous
def test_ppo_eq6_importance_surrogate(script):
    ratio, adv = torch.randn(2, 50, dtype=torch.float64).unbind()
    expected = np.mean(ratio.numpy() * adv.numpy())
    assert script.importance_surrogate(ratio, adv).item() == pytest.approx(expected)


def test_ppo_eq8_kl_penalized_surrogate_takes_samples_or_their_mean():
    ratio, adv, kl = torch.randn(3, 50, dtype=torch.float64).unbind()
    expected = np.mean(ratio.numpy() * adv.numpy() - 0.3 * kl.numpy())
    for given in (kl, kl.mean()):
        value = ppo.kl_penalized_surrogate(ratio, adv, given, 0.3)
        assert value.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    "kl, factor",
    [(0.0066, 0.5), (0.0067, 1), (0.01, 1), (0.0149, 1), (0.0151, 2), (0.0, 0.5)],
)
def test_ppo_section4_adapt_kl_coef(kl, factor):
    assert ppo.adapt_kl_coef(0.4, kl, 0.01) == pytest.approx(0.4 * factor)


@each_with("value_loss")
def test_ppo_eq9_value_loss_has_no_half(script):
    assert script.value_loss(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 2.0])).item() == 2.0


@each_with("clipped_value_loss")
def test_engstrom_item1_clipped_value_loss(script):
    values = 3 * torch.randn(200, dtype=torch.float64)
    old, returns = torch.randn(2, 200, dtype=torch.float64).unbind()
    terms = []
    for v, o, r in zip(values.tolist(), old.tolist(), returns.tolist(), strict=True):
        clipped = min(max(v, o - 0.2), o + 0.2)
        terms.append(max((v - r) ** 2, (clipped - r) ** 2))
    loss = script.clipped_value_loss(values, old, returns, 0.2)
    assert loss.item() == pytest.approx(np.mean(terms))
    assert loss > script.value_loss(values, returns)


@each_with("gaussian_logp")
@pytest.mark.parametrize("shape", [(4,), (9, 4)], ids=["one σ for all states", "σ by state"])
def test_gaussian_logp_entropy_and_kl_are_those_of_torch_distributions(script, shape):
    mean_old, mean, actions = torch.randn(3, 9, 4, dtype=torch.float64).unbind()
    log_std_old, log_std = torch.randn(2, *shape, dtype=torch.float64).unbind()
    normal, independent = torch.distributions.Normal, torch.distributions.Independent
    old = independent(normal(mean_old, log_std_old.exp()), 1)
    new = independent(normal(mean, log_std.exp()), 1)
    torch.testing.assert_close(script.gaussian_logp(mean, log_std, actions), new.log_prob(actions))
    torch.testing.assert_close(script.gaussian_entropy(log_std).expand(9), new.entropy())
    kl = script.gaussian_kl(mean_old, log_std_old, mean, log_std)
    torch.testing.assert_close(kl, torch.distributions.kl_divergence(old, new))
    reverse = torch.distributions.kl_divergence(new, old)
    assert not torch.allclose(kl, reverse)  # the direction matters


@each_continuous
def test_engstrom_item2_rolling_discounted_sums_over_two_rollouts(script):
    rewards, (done, _) = torch.randn(20, 3, dtype=torch.float64), random_ends(20, 3)
    expected, total = [], np.zeros(3)
    for reward, end in zip(rewards.numpy(), done.numpy(), strict=True):
        total = 0.9 * total + reward
        expected.append(total)
        total = np.where(end, 0.0, total)
    carry = torch.zeros(3, dtype=torch.float64)
    first, carry = script.rolling_discounted_sums(rewards[:7], done[:7], carry, 0.9)
    second, _ = script.rolling_discounted_sums(rewards[7:], done[7:], carry, 0.9)
    torch.testing.assert_close(torch.cat([first, second]), torch.from_numpy(np.stack(expected)))


@each_with("clip_global_norm")
@pytest.mark.parametrize("max_norm", [0.5, 1e3, math.inf])
def test_engstrom_item9_clip_global_norm(script, max_norm):
    grads = (torch.randn(5, 3), torch.randn(7))
    params = [torch.zeros_like(g).requires_grad_() for g in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, max_norm)
    clipped, norm_before = script.clip_global_norm(grads, max_norm)
    torch.testing.assert_close(norm_before, norm)
    torch.testing.assert_close(clipped, torch.cat([p.grad.flatten() for p in params]))


def test_equations_refuse_shapes_that_would_broadcast():
    flat, column = torch.zeros(4), torch.zeros(4, 1)
    for call in (
        lambda: ppo.clipped_surrogate(flat, column, 0.2),
        lambda: ppo.importance_surrogate(flat, column),
        lambda: ppo.kl_penalized_surrogate(column, flat, flat, 0.2),
        lambda: ppo.value_loss(flat, column),
        lambda: ppo.clipped_value_loss(flat, flat, column, 0.2),
        lambda: ppo.gaussian_logp(column, flat, flat),
        lambda: ppo.gaussian_kl(column, flat, flat, flat),
        lambda: ppo.gae(column, flat, flat, flat.bool(), flat.bool(), 0.9, 0.9),
    ):
        with pytest.raises(AssertionError):
            call()


@each_continuous
def test_kingma_algorithm_1_adam(script):
    torch.manual_seed(0)
    ours = [torch.randn(3, 4), torch.randn(5)]
    theirs = [torch.nn.Parameter(x.clone()) for x in ours]
    adam = script.Adam(17, eps=1e-3)
    stock = torch.optim.Adam(theirs, eps=1e-3)
    for step in range(300):
        lr = 0.1 * 0.99**step
        adam.lr.fill_(lr)
        stock.param_groups[0]["lr"] = lr
        grad = torch.randn(17) * 10 ** torch.randn(17)
        for param, part in zip(theirs, grad.split([12, 5]), strict=True):
            param.grad = part.view_as(param)
        adam.step(ours, grad)
        stock.step()
        for x, y in zip(ours, theirs, strict=True):
            torch.testing.assert_close(x, y.detach(), rtol=1e-5, atol=1e-6)


@each_continuous
def test_the_first_step_of_adam_is_the_learning_rate_times_the_sign(script):
    weight, adam, grad = [torch.zeros(1)], script.Adam(1, eps=1e-3), torch.tensor([0.3])
    adam.lr.fill_(0.5)
    adam.step(weight, grad)
    torch.testing.assert_close(weight[0], -0.5 * grad / (grad.abs() + 1e-3), rtol=1e-4, atol=0)

"""Each equation against an independent definition."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import AcerExample as example
from conftest import (
    double,
    double_policy,
    each_script,
    each_with,
    hessian_of_mean_kl,
    random_ends,
)

import acer_discrete as acer
import ppo_continuous as ppo
import trpo_continuous as trpo


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


@each_with("clipped_surrogate")
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
def test_ppo_eq7_clipped_surrogate_six_cases(script, ratio, adv, value, clipped):
    ratio = torch.tensor([ratio], dtype=torch.float64, requires_grad=True)
    objective = script.clipped_surrogate(ratio, torch.tensor([adv], dtype=torch.float64), 0.2)
    (gradient,) = torch.autograd.grad(objective, ratio)
    assert objective.item() == pytest.approx(value)
    assert gradient.item() == (0.0 if clipped else pytest.approx(adv))


@each_with("importance_surrogate")
def test_trpo_eq14_ppo_eq6_importance_surrogate(script):
    ratio, adv = torch.randn(2, 50, dtype=torch.float64).unbind()
    expected = np.mean(ratio.numpy() * adv.numpy())
    assert script.importance_surrogate(ratio, adv).item() == pytest.approx(expected)


@each_with("importance_surrogate")
def test_the_gradient_of_the_importance_surrogate_is_the_policy_gradient(script):
    logp = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)
    adv = torch.tensor([1.0, -2.0, 0.5])
    ones = (logp - logp.detach()).exp()
    assert script.importance_surrogate(ones, adv).item() == pytest.approx(adv.mean().item())
    (slope,) = torch.autograd.grad(script.importance_surrogate(ones, adv), logp)
    torch.testing.assert_close(slope, adv / 3)
    value = script.importance_surrogate(logp.exp(), adv)
    assert value.item() == pytest.approx((logp.detach().exp() * adv).mean().item())
    (slope,) = torch.autograd.grad(value, logp)
    torch.testing.assert_close(slope, logp.detach().exp() * adv / 3)


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


@each_with("categorical_logp")
def test_categorical_logp_entropy_and_kl_are_those_of_torch_distributions(script):
    generator = torch.Generator().manual_seed(0)
    old, new = 3 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)  # (T, N, A)
    actions = torch.randint(6, (4, 5), generator=generator)
    categorical = torch.distributions.Categorical(logits=old)
    other = torch.distributions.Categorical(logits=new)
    torch.testing.assert_close(script.categorical_logp(old, actions), categorical.log_prob(actions))
    torch.testing.assert_close(script.categorical_entropy(old), categorical.entropy())
    expected = torch.distributions.kl_divergence(categorical, other)
    torch.testing.assert_close(script.categorical_kl(old, new), expected)
    assert not torch.allclose(script.categorical_kl(new, old), expected)  # the direction matters


@each_with("categorical_logp")
def test_categorical_equations_are_finite_for_logits_of_any_size(script):
    logits = torch.tensor([[0.0, 1e4, -1e4]])
    assert script.categorical_entropy(logits).item() == 0.0
    assert script.categorical_kl(logits, logits).item() == 0.0
    assert script.categorical_logp(logits, torch.tensor([2])).item() == -2e4


@each_with("floor_factor")
@pytest.mark.parametrize("floor, factor", [(0.5, 1.0), (1.0, 1.0), (2.0, 0.25), (10.0, 0.01)])
def test_floor_factor_is_the_squared_ratio_of_stds_up_to_one(script, floor, factor):
    returns = torch.tensor([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]]) * math.sqrt(5 / 4)  # std 1
    assert script.floor_factor(returns, floor).item() == pytest.approx(factor)


@each_with("rolling_discounted_sums")
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


SAME_SHAPE = {  # name: number of tensors that must have one shape, and what else it takes
    "clipped_surrogate": (2, [0.2]),
    "importance_surrogate": (2, []),
    "kl_penalized_surrogate": (2, [torch.zeros(4), 0.2]),
    "value_loss": (2, []),
    "clipped_value_loss": (3, [0.2]),
    "categorical_kl": (2, []),
    "gae": (5, [0.9, 0.9]),
    "retrace": (6, [0.9]),
    "trust_region_step": (2, [0.1]),
}


@each_script
def test_equations_refuse_shapes_that_would_broadcast(script):
    checked = 0
    for name, (count, rest) in SAME_SHAPE.items():
        for wrong in range(count if hasattr(script, name) else 0):
            tensors = [torch.zeros(4) for _ in range(count)]
            tensors[wrong] = torch.zeros(4, 1)
            if name in ("gae", "retrace"):
                tensors[-2:] = [x.bool() for x in tensors[-2:]]
            with pytest.raises(AssertionError):
                getattr(script, name)(*tensors, *rest)
                pytest.fail(f"{name} takes another shape of its argument {wrong}")
            checked += 1
    assert checked > 5


@each_with("gaussian_logp")
def test_gaussian_equations_refuse_shapes_that_would_broadcast(script):
    flat = torch.zeros(4)
    column = torch.zeros(4, 1)
    with pytest.raises(AssertionError):
        script.gaussian_logp(column, flat, flat)
    with pytest.raises(AssertionError):
        script.gaussian_kl(column, flat, flat, flat)


@each_with("categorical_logp")
def test_categorical_logp_refuses_a_column_of_actions(script):
    with pytest.raises(AssertionError):
        script.categorical_logp(torch.zeros(5, 6), torch.zeros(5, 1, dtype=torch.long))


# ---- Optimizers ----


@each_with("Adam")
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


@each_with("Adam")
def test_the_first_step_of_adam_is_the_learning_rate_times_the_sign(script):
    weight, adam, grad = [torch.zeros(1)], script.Adam(1, eps=1e-3), torch.tensor([0.3])
    adam.lr.fill_(0.5)
    adam.step(weight, grad)
    torch.testing.assert_close(weight[0], -0.5 * grad / (grad.abs() + 1e-3), rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    "make", [ppo.Adam, acer.RMSProp], ids=["Adam of PPO and TRPO", "RMSProp of ACER"]
)
def test_optimizers_take_weights_of_any_memory_layout(make):
    plain = torch.randn(4, 3, 2, 2)
    images = plain.to(memory_format=torch.channels_last)
    grad = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    for weight in (plain, images):
        optimizer = make(48)
        optimizer.lr.fill_(0.1)
        optimizer.step([weight], grad.flatten())
    assert images.stride() != plain.stride()
    assert torch.equal(images, plain)


def test_rmsprop_is_that_of_tensorflow_1():
    rmsprop = acer.RMSProp(3)
    rmsprop.lr.fill_(0.1)
    param = torch.zeros(3)
    expected = torch.zeros(3)
    v = torch.ones(3)
    for grad in torch.randn(5, 3):
        v = 0.99 * v + 0.01 * grad**2
        expected = expected - 0.1 * grad / (v + 1e-5).sqrt()
        rmsprop.step([param[:1], param[1:]], grad)
        torch.testing.assert_close(param, expected)


def test_the_first_step_of_rmsprop_is_small():
    rmsprop = acer.RMSProp(1)
    rmsprop.lr.fill_(7e-4)
    weight = torch.zeros(1)
    rmsprop.step([weight], torch.tensor([0.01]))
    assert weight.item() == pytest.approx(-7.0e-6, rel=0.01)  # PyTorch's would be -6.9e-3


# ---- Trust region of TRPO ----


def positive_definite(n, seed=0):
    """Random symmetric positive definite matrix, float64."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


@pytest.mark.parametrize("flags", [{}, {"hidden_sizes": ()}])
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_trpo_eq56_eq57_the_fisher_product_is_that_of_the_hessian_of_the_kl(flags, damping):
    policy = double_policy(trpo, **flags)
    inputs = torch.randn(200, 3, dtype=torch.float64)
    fisher = hessian_of_mean_kl(policy, inputs)
    eigenvalues = torch.linalg.eigvalsh(fisher)
    assert eigenvalues.min() > -1e-12 and eigenvalues.max() > 0.1
    product = trpo.fisher_operator(policy, inputs, damping)
    for vector in torch.randn(3, len(fisher), dtype=torch.float64):  # one operator, many products
        expected = fisher @ vector + damping * vector
        torch.testing.assert_close(product(vector), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("n", [1, 2, 7])
def test_trpo_appendix_c_conjugate_gradient_is_exact_after_n_steps(n):
    matrix = positive_definite(n)
    b = torch.randn(n, dtype=torch.float64)
    solution = torch.linalg.solve(matrix, b)
    exact = trpo.conjugate_gradient(lambda v: matrix @ v, b, n, 0.0)
    torch.testing.assert_close(exact, solution)
    early = trpo.conjugate_gradient(lambda v: matrix @ v, b, n - 1, 0.0)
    assert not torch.allclose(early, solution)


@pytest.mark.parametrize("scale", [1.0, 1e-8, 1e8])
def test_trpo_appendix_c_conjugate_gradient_stops_at_the_tolerance(scale):
    calls = []
    matrix = positive_definite(30)
    b = scale * torch.ones(30, dtype=torch.float64)

    def matvec(v):
        calls.append(1)
        return matrix @ v

    for tolerance, most in ((1e-8, 200), (1e-2, 30), (2.0, 0)):
        calls.clear()
        x = trpo.conjugate_gradient(matvec, b, 1000, tolerance)
        residual = (b - matrix @ x).square().sum() / b.square().sum()
        assert residual <= 1.1 * tolerance and len(calls) <= most
    assert not trpo.conjugate_gradient(matvec, 0 * b, 10, 1e-10).any()


def test_conjugate_gradient_stops_where_there_is_no_curvature():
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    x = trpo.conjugate_gradient(lambda v: singular @ v, torch.tensor([0.0, 1.0]), 10, 1e-10)
    assert x.tolist() == [0.0, 0.0]  # instead of dividing by zero


def test_trpo_appendix_c_max_kl_step_ends_on_the_boundary():
    matrix = positive_definite(6)
    x = torch.randn(6, dtype=torch.float64)
    step = trpo.max_kl_step(x, matrix @ x, 0.01)
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(0.01)
    assert torch.nn.functional.cosine_similarity(step, x, dim=0).item() == pytest.approx(1)
    assert not trpo.max_kl_step(0 * x, 0 * x, 0.01).any()


@pytest.mark.parametrize(
    "gains, kls, k",
    [
        ([1, 1, 1], [0.01, 0.005, 0.001], 0),  # δ itself is allowed
        ([1, 1, 1], [0.0101, 0.009, 0.001], 1),  # the KL alone rejects
        ([-1, 0, 0.1], [0.001, 0.001, 0.001], 2),  # the surrogate alone rejects. It must rise
        ([1, -1, 1], [0.02, 0.009, 0.011], None),
        ([math.nan, 1, 1], [0.001, math.nan, 0.02], None),
    ],
)
def test_trpo_appendix_c_line_search_checks_both_kl_and_surrogate(gains, kls, k):
    theta = torch.tensor([1.0, 2.0])
    step = torch.tensor([8.0, -4.0])
    tried = []

    def try_step(candidate):
        tried.append(candidate)
        return torch.tensor(gains[len(tried) - 1]), torch.tensor(kls[len(tried) - 1])

    new, accepted = trpo.line_search(try_step, theta, step, 0.01, 3, 0.5)
    for i, candidate in enumerate(tried):
        torch.testing.assert_close(candidate, theta + 0.5**i * step)
    if k is None:
        assert not accepted and torch.equal(new, theta) and len(tried) == 3
    else:
        assert accepted and torch.equal(new, tried[k]) and len(tried) == k + 1


# ---- ACER ----


def taken(x, actions):
    """x (…, A) of the actions taken (…,)."""
    return x.gather(-1, actions[..., None]).squeeze(-1)


def example_retrace(terminated=None, truncated=None, final_value=None):
    """retrace on the worked example, in which an episode may end after one of the steps."""
    ends = torch.zeros(2, 4, dtype=torch.bool)
    next_values = example.values[1:].clone()
    if terminated is not None:
        ends[0, terminated] = True
    if truncated is not None:
        ends[1, truncated] = True
        next_values[truncated] = final_value
    q_taken = taken(example.q[:4], example.actions)
    rho = taken(example.probs[:4] / (example.mu + acer.EPS), example.actions)
    inputs = (example.rewards, q_taken, next_values, rho, ends[0], ends.any(0))
    columns = [x[:, None] for x in inputs]
    return acer.retrace(*columns, gamma=0.9)[:, 0]


@pytest.mark.parametrize(
    "ends, expected",
    [
        ({}, [0.56095864, -0.62932648, -0.34586134, 2.4007579]),
        ({"terminated": 1}, [0.67157269, -0.5, -0.34586134, 2.4007579]),
        (
            {"truncated": 1, "final_value": 0.37},
            [0.95639045, -0.167, -0.34586134, 2.4007579],
        ),
        ({"terminated": 3}, [0.35851424, -0.86601814, -0.70654345, 2.0]),
    ],
)
def test_acer_eq5_retrace_worked_example(ends, expected):
    torch.testing.assert_close(example_retrace(**ends), double(expected), atol=1e-7, rtol=0)


def random_steps(seed, steps=7, envs=3):
    """Arguments of retrace without γ."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, steps, envs, generator=generator, dtype=torch.float64)
    rho = 2 * torch.rand(steps, envs, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, envs, generator=generator) < 0.2
    return *values, rho, terminated, terminated | truncated


@pytest.mark.parametrize("seed", range(5))
def test_acer_eq5_retrace_is_the_sum_over_cut_traces(seed):
    rewards, q_taken, next_values, rho, terminated, done = random_steps(seed)
    q_ret = acer.retrace(rewards, q_taken, next_values, rho, terminated, done, 0.9)
    for t, n in itertools.product(range(7), range(3)):
        total = q_taken[t, n].item()
        trace = 1.0
        for k in range(t, 7):
            if k > t:
                trace *= 0.9 * min(1.0, rho[k, n].item())
            bootstrap = 0.0 if terminated[k, n] else 0.9 * next_values[k, n].item()
            total += trace * (rewards[k, n].item() + bootstrap - q_taken[k, n].item())
            if done[k, n]:
                break
        assert q_ret[t, n].item() == pytest.approx(total, abs=1e-12)


def test_retrace_eq3_special_cases():
    rewards, q_taken, next_values, rho, terminated, _ = random_steps(0)
    q_taken[1:] = next_values[:-1]  # V(s) = Q(s, a)
    never = torch.zeros_like(terminated)

    def retrace(rho):
        return acer.retrace(rewards, q_taken, next_values, rho, never, never, 0.9)

    torch.testing.assert_close(retrace(0 * rho), rewards + 0.9 * next_values)  # one-step targets
    n_step = retrace(1 + rho)
    td_lambda = retrace(torch.full_like(rho, 0.7))
    total = next_values[-1]
    mixed = next_values[-1]
    for t in reversed(range(7)):
        total = rewards[t] + 0.9 * total  # weights of 1 or more: the n-step return
        mixed = rewards[t] + 0.9 * (0.3 * next_values[t] + 0.7 * mixed)  # of λ: the λ-return
        torch.testing.assert_close(n_step[t], total)
        torch.testing.assert_close(td_lambda[t], mixed)
    torch.testing.assert_close(retrace(5 + rho), n_step)


def test_retrace_contracts_to_q_of_the_policy_whatever_the_behaviour():
    """In a table, over all trajectories of two steps, weighted by μ.

    T Q^π = Q^π  and  ‖T Q - Q^π‖ ≤ γ ‖Q - Q^π‖.
    """
    generator = torch.Generator().manual_seed(0)
    options = {"generator": generator, "dtype": torch.float64}
    states = 4
    actions = 3
    gamma = 0.8
    transition = torch.rand(states, actions, states, **options)
    transition /= transition.sum(-1, keepdim=True)
    reward = torch.randn(states, actions, **options)
    pi, mu = torch.randn(2, states, actions, **options).softmax(-1)
    pairs = states * actions
    matrix = (transition[:, :, :, None] * pi).reshape(pairs, pairs)  # (s, a) to (s', a')
    identity = torch.eye(pairs, dtype=torch.float64)
    q_pi = torch.linalg.solve(identity - gamma * matrix, reward.flatten()).view(states, actions)

    sizes = (states, actions, states, actions, states)
    grid = torch.meshgrid(*[torch.arange(n) for n in sizes], indexing="ij")
    s1, a1, s2, a2, s3 = [x.flatten() for x in grid]  # one column for each trajectory
    never = torch.zeros(2, len(s1), dtype=torch.bool)
    rewards = torch.stack([reward[s1, a1], reward[s2, a2]])
    rho = torch.stack([(pi / mu)[s1, a1], (pi / mu)[s2, a2]])
    weight = transition[s1, a1, s2] * mu[s2, a2] * transition[s2, a2, s3]

    def operator(q):
        v = (pi * q).sum(-1)
        q_taken = torch.stack([q[s1, a1], q[s2, a2]])
        next_values = torch.stack([v[s2], v[s3]])
        q_ret = acer.retrace(rewards, q_taken, next_values, rho, never, never, gamma)
        return (weight * q_ret[0]).view(states, actions, -1).sum(-1)

    torch.testing.assert_close(operator(q_pi), q_pi)
    for _ in range(20):
        error = 3 * torch.randn(states, actions, **options)
        assert (operator(q_pi + error) - q_pi).abs().max() <= gamma * error.abs().max()


def acer_inputs(count=50, num_actions=4, seed=1):
    """Random logits and q (count, A), q_ret, actions, and mu far from π."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    logits, q = torch.randn(2, count, num_actions, **options)
    mu = (2 * torch.randn(count, num_actions, **options)).softmax(-1)
    actions = torch.randint(num_actions, (count,), generator=generator)
    q_ret = torch.randn(count, **options)
    return logits.requires_grad_(), q, q_ret, actions, mu


def by_logits(probs, g):
    """The gradient with respect to the logits of a softmax: Jᵀ g."""
    return probs * (g - (probs * g).sum(-1, keepdim=True))


@pytest.mark.parametrize("c", [0.5, 1.0, 10.0, 1e9])
@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_acer_eq9_gradient_and_its_terms_are_those_of_autograd(c, beta):
    logits, q, q_ret, actions, mu = acer_inputs()
    probs = logits.softmax(-1)
    log_pi = (probs + acer.EPS).log()
    f = probs.detach()  # all but log π is constant
    v = (f * q).sum(-1)
    rho = f / (mu + acer.EPS)
    first = taken(rho, actions).clamp(max=c) * (q_ret - v) * taken(log_pi, actions)
    beyond = (1 - c / (rho + acer.EPS)).clamp(min=0)
    second = (f * beyond * (q - v[:, None]) * log_pi).sum(-1)
    entropy = -(probs * log_pi).sum(-1)
    expected = {
        "truncated": (first, acer.truncated_gradient(f, q, q_ret, actions, mu, c)),
        "correction": (second, acer.correction_gradient(f, q, mu, c)),
        "entropy": (entropy, acer.entropy_gradient(f)),
        "all": (
            first + second + beta * entropy,
            acer.acer_gradient(f, q, q_ret, actions, mu, c, beta),
        ),
    }
    for value, g in expected.values():
        (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        torch.testing.assert_close(by_logits(f, g), gradient, atol=1e-9, rtol=1e-7)
    assert (second != 0).any() == (c < 1e9)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0, 1e6])
def test_acer_eq9_gradient_is_unbiased_for_every_truncation(monkeypatch, c):
    """With exact Q, its mean over a ~ μ is the gradient of Σ_a π(a) Q(a)."""
    monkeypatch.setattr(acer, "EPS", 0.0)
    logits, q, _, _, mu = acer_inputs(count=1)
    probs = logits.softmax(-1)
    mean = 0
    for a in range(4):
        mean += mu[0, a] * acer.acer_gradient(probs, q, q[:, a], torch.tensor([a]), mu, c, 0.0)
    (expected,) = torch.autograd.grad((probs * q).sum(), logits, retain_graph=True)
    torch.testing.assert_close(by_logits(probs, mean).detach(), expected)


def test_acer_eq9_without_truncation_is_an_importance_weighted_policy_gradient():
    probs = example.probs[:4]
    taken_only = torch.nn.functional.one_hot(example.actions, 3)
    adv = (example.q_ret - example.values[:4])[:, None]
    inputs = (probs, example.q[:4], example.q_ret, example.actions)
    unlimited = acer.acer_gradient(*inputs, example.mu, 1e12, 0.0)
    expected = taken_only * (probs / example.mu) * adv / probs
    torch.testing.assert_close(unlimited, expected, atol=1e-4, rtol=1e-4)

    on_policy = acer.acer_gradient(*inputs, probs, 1.0 + 1e-3, 0.0)
    expected = taken_only * adv / probs
    torch.testing.assert_close(on_policy, expected, atol=1e-4, rtol=1e-4)
    k = acer.kl_gradient(example.avg, probs)
    z = acer.trust_region_step(on_policy, k, 0.1)
    up = adv[:, 0] > 0  # the trust region holds no positive advantage back
    assert up.any() and not up.all() and torch.equal(z[up], on_policy[up])


def test_acer_section33_kl_gradient_is_that_of_autograd():
    avg, probs = torch.randn(2, 30, 5, dtype=torch.float64).softmax(-1)
    k = acer.kl_gradient(avg, probs)
    f = probs.clone().requires_grad_()
    kl = (avg * (avg / (f + acer.EPS)).log()).sum()  # KL(average ‖ π)
    torch.testing.assert_close(k, torch.autograd.grad(kl, f)[0])
    torch.testing.assert_close(by_logits(probs, k), probs - avg, atol=1e-4, rtol=1e-4)
    assert k.square().sum(-1).min() >= 1 - 1e-4


def test_acer_eq11_eq12_trust_region_step_is_the_projection():
    generator = torch.Generator().manual_seed(0)
    g, k = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    delta = 0.1
    z = acer.trust_region_step(g, k, delta)
    slack = (k * z).sum(-1) - delta
    multiplier = ((g - z) * k).sum(-1) / k.square().sum(-1)
    assert slack.max() < 1e-12 and multiplier.min() > -1e-12
    assert (multiplier * slack).abs().max() < 1e-12
    torch.testing.assert_close(g - z, multiplier[:, None] * k)
    assert 5 < (multiplier > 0).sum() < 35
    distance = (z - g).norm(dim=-1)
    for _ in range(200):  # no feasible point is nearer to g
        other = z + 0.3 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        feasible = (k * other).sum(-1) <= delta
        assert ((other - g).norm(dim=-1) >= distance - 1e-12)[feasible].all()


@pytest.mark.parametrize(
    "beta, row1, row2",
    [
        (0.0, [0.08878414, -0.06417616, -0.02460798], [-0.01441573, -0.09181919, 0.10623492]),
        (0.01, [0.08923257, -0.06436531, -0.02486726], [-0.01475298, -0.09130317, 0.10605615]),
    ],
)
def test_acer_policy_gradient_worked_example(beta, row1, row2):
    probs = example.probs[:4]
    inputs = (probs, example.q[:4], example_retrace(), example.actions, example.mu, 2.0)
    g = acer.acer_gradient(*inputs, beta)
    k = acer.kl_gradient(example.avg, probs)
    z = acer.trust_region_step(g, k, 0.1)
    gradient = -by_logits(probs, z) / 4  # of minus the mean over four states
    torch.testing.assert_close(gradient[1:3], double([row1, row2]), atol=1e-7, rtol=0)
    if beta == 0:
        expected = double([-0.67258737, 0.95199251, 1.47050387, -4.0935183])
        torch.testing.assert_close((k * g).sum(-1), expected, atol=1e-7, rtol=0)
        multiplier = ((g - z) * k).sum(-1) / k.square().sum(-1)
        expected = double([0, 0.12531745, 0.52247041, 0])
        torch.testing.assert_close(multiplier, expected, atol=1e-6, rtol=0)


def test_acer_terms_worked_example():
    probs = example.probs[:4]
    inputs = (probs, example.q[:4])
    first = acer.truncated_gradient(*inputs, example_retrace(), example.actions, example.mu, 2.0)
    second = acer.correction_gradient(*inputs, example.mu, 2.0)
    losses = [-(probs * g * probs.log()).sum(-1).mean().item() for g in (first, second)]
    assert losses == pytest.approx([0.39730910, 0.01816330], abs=2e-6)


def test_acer_section33_update_average_moves_in_place():
    net = torch.nn.Linear(5, 3)
    average = copy.deepcopy(net)
    with torch.no_grad():
        for param in net.parameters():
            param.add_(1.0)
    places = [p.data_ptr() for p in average.parameters()]
    for _ in range(10):
        acer.update_average(average, net, 0.99)
    assert places == [p.data_ptr() for p in average.parameters()]
    for mine, param in zip(average.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(param - mine, torch.full_like(param, 0.99**10))

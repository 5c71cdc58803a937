"""trpo_continuous.py: its equations against independent definitions, its data flow, and that it learns.

What it shares with the other scripts is tested in test_first_edition.py.
"""

import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_first_edition import SMALL, make_parts

import trpo_continuous as trpo
from trpo_continuous import Args, train

SCRIPT = Path(trpo.__file__)


def spd(n, seed=0):
    """Random symmetric positive definite matrix, float64."""
    root = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(n, dtype=torch.float64)


def make_policy(obs_dim=3, action_dim=2, **flags):
    """Policy in float64 with statistics and a last layer of ordinary size, whose KL has curvature everywhere."""
    torch.manual_seed(1)
    space = trpo.gym.spaces.Box(-1, 1, (action_dim,))
    policy = trpo.Policy((obs_dim,), space, Args(**{"hidden_sizes": (5,), **flags})).double()
    policy.obs_stats.update(2 * torch.randn(50, obs_dim, dtype=torch.float64) + 1)
    with torch.no_grad():
        for param in policy.parameters():
            param += 0.3 * torch.randn_like(param)
    return policy


def flat(params):
    return torch.nn.utils.parameters_to_vector(list(params)).detach().clone()


def make_batch(policy, size=200, seed=0):
    """Observations, actions of the policy, and advantages that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(size, policy.mean_net.layers[0].in_features, generator=generator, dtype=torch.float64)
    mean = policy(obs).detach()
    noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64)
    actions = mean + policy.log_std.detach().exp() * noise
    return obs, actions, torch.randn(size, generator=generator, dtype=torch.float64)


def mean_kl(policy, obs, mean_old, log_std_old):
    """Mean KL(old‖new) by torch.distributions."""
    old = torch.distributions.Normal(mean_old, log_std_old.exp())
    return (
        torch.distributions.kl_divergence(old, torch.distributions.Normal(policy(obs), policy.log_std.exp()))
        .sum(-1)
        .mean()
    )


# ---- Equations -------------------------------------------------------------------------------------------------------


def hessian_of_mean_kl(policy, obs):
    """Explicit Fisher matrix (P, P): the Hessian of the mean KL in the parameters, by double backward."""
    params = list(policy.parameters())
    kl = mean_kl(policy, obs, policy(obs).detach(), policy.log_std.detach().clone())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(kl, params, create_graph=True)])
    assert gradient.abs().max() < 1e-12  # at its minimum
    rows = [torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True) for g in gradient]
    return torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])


@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_trpo_eq56_eq57_fisher_vector_product_is_the_hessian_of_the_kl(damping):
    policy = make_policy()
    obs, _, _ = make_batch(policy)
    fisher = hessian_of_mean_kl(policy, obs)
    assert torch.linalg.eigvalsh(fisher).min() > -1e-12 and torch.linalg.eigvalsh(fisher).max() > 0.1
    for seed in range(3):
        vector = torch.randn(len(fisher), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        product = trpo.fisher_vector_product(policy, obs, vector, damping)
        torch.testing.assert_close(product, fisher @ vector + damping * vector, rtol=1e-9, atol=1e-11)


def test_trpo_appendix_c_conjugate_gradient_is_exact_after_n_steps():
    for n in (1, 2, 7):
        matrix, b = spd(n), torch.randn(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
        solution = torch.linalg.solve(matrix, b)
        torch.testing.assert_close(trpo.conjugate_gradient(lambda v, m=matrix: m @ v, b, n, 0.0), solution)
        early = trpo.conjugate_gradient(lambda v, m=matrix: m @ v, b, n - 1, 0.0)
        assert not torch.allclose(early, solution)


def test_trpo_appendix_c_conjugate_gradient_stops_at_the_tolerance():
    calls, matrix, b = [], spd(30), torch.ones(30, dtype=torch.float64)

    def matvec(v):
        calls.append(1)
        return matrix @ v

    x = trpo.conjugate_gradient(matvec, b, 1000, 1e-8)
    assert (b - matrix @ x).square().sum() < 2e-8 and len(calls) < 200
    assert trpo.conjugate_gradient(matvec, 0 * b, 10, 1e-10).eq(0).all()
    singular = torch.diag(torch.tensor([1.0, 0.0]))
    x = trpo.conjugate_gradient(lambda v: singular @ v, torch.tensor([0.0, 1.0]), 10, 1e-10)
    assert x.eq(0).all()  # no curvature along b: stop, instead of dividing by zero


def test_trpo_appendix_c_max_kl_step_ends_on_the_boundary():
    matrix, x = spd(6), torch.randn(6, dtype=torch.float64)
    step = trpo.max_kl_step(x, matrix @ x, 0.01)
    assert (0.5 * step @ matrix @ step).item() == pytest.approx(0.01)
    assert torch.nn.functional.cosine_similarity(step, x, dim=0).item() == pytest.approx(1)
    assert trpo.max_kl_step(0 * x, 0 * x, 0.01).eq(0).all()


@pytest.mark.parametrize(
    "gains, kls, k",
    [
        ([1, 1, 1], [0.01, 0.005, 0.001], 0),  # δ itself is allowed
        ([1, 1, 1], [0.0101, 0.009, 0.001], 1),  # the KL alone rejects
        ([-1, 0, 0.1], [0.001, 0.001, 0.001], 2),  # the surrogate alone rejects, and must strictly rise
        ([1, -1, 1], [0.02, 0.009, 0.011], None),
        ([math.nan, 1, 1], [0.001, math.nan, 0.02], None),
    ],
)
def test_trpo_appendix_c_line_search_checks_both_kl_and_surrogate(gains, kls, k):
    theta, step, tried = torch.tensor([1.0, 2.0]), torch.tensor([8.0, -4.0]), []

    def evaluate(candidate):
        tried.append(candidate)
        return torch.tensor(gains[len(tried) - 1]), torch.tensor(kls[len(tried) - 1])

    new, accepted = trpo.line_search(evaluate, theta, step, 0.01, 3, 0.5)
    for i, candidate in enumerate(tried):
        torch.testing.assert_close(candidate, theta + 0.5**i * step)
    if k is None:
        assert not accepted and torch.equal(new, theta) and len(tried) == 3
    else:
        assert accepted and torch.equal(new, tried[k]) and len(tried) == k + 1


def test_trpo_eq14_importance_surrogate_and_its_gradient():
    logp = torch.tensor([0.1, -0.2, 0.3], requires_grad=True)
    adv = torch.tensor([1.0, -2.0, 0.5])
    assert trpo.importance_surrogate(logp, logp.detach(), adv).item() == pytest.approx(adv.mean().item())
    value = trpo.importance_surrogate(logp, torch.zeros(3), adv)
    assert value.item() == pytest.approx((logp.detach().exp() * adv).mean().item())
    (slope,) = torch.autograd.grad(value, logp)
    torch.testing.assert_close(slope, logp.detach().exp() * adv / 3)


# ---- Policy step -----------------------------------------------------------------------------------------------------


def test_policy_step_improves_within_the_trust_region():
    for seed in range(5):
        policy = make_policy()
        obs, actions, adv = make_batch(policy, seed=seed)
        mean_old, log_std_old = policy(obs).detach(), policy.log_std.detach().clone()
        old = torch.distributions.Normal(mean_old, log_std_old.exp())
        stats = trpo.policy_step(policy, obs, actions, adv, None, Args(cg_iterations=20, max_kl=0.01))
        new = torch.distributions.Normal(policy(obs), policy.log_std.exp())
        ratio = (new.log_prob(actions) - old.log_prob(actions)).sum(-1).exp()
        gain = (ratio * adv).mean() - adv.mean()
        kl = torch.distributions.kl_divergence(old, new).sum(-1).mean().item()
        assert 0 < kl <= 0.01 and gain > 0 and stats["rejected"] == 0
        assert stats["approx_kl"] == pytest.approx(kl) and stats["surrogate_gain"] == pytest.approx(gain.item())
        assert kl > 0.01 * 0.8**20  # a step of a size that could be meant


def test_a_rejected_step_restores_the_parameters_bit_for_bit(monkeypatch):
    policy = make_policy()
    obs, actions, adv = make_batch(policy)
    before = flat(policy.parameters())
    original = trpo.gaussian_kl
    monkeypatch.setattr(trpo, "gaussian_kl", lambda *inputs: original(*inputs) + 1)
    stats = trpo.policy_step(policy, obs, actions, adv, None, Args())
    assert stats["rejected"] == 1 and stats["step_fraction"] == 0
    assert torch.equal(flat(policy.parameters()), before)


def test_the_constraint_is_kl_from_old_to_new():
    """Where σ shrinks, KL(old‖new) is larger than KL(new‖old): the step is measured by the first."""
    policy = make_policy(log_std_init=0.0)
    obs, actions, _ = make_batch(policy, size=10_000)
    mean_old, log_std_old = policy(obs).detach(), policy.log_std.detach().clone()
    adv = -((actions - mean_old) / log_std_old.exp()).square().sum(-1)  # small noise is good: σ must fall
    adv = adv - adv.mean()
    args = Args(max_kl=0.3, cg_iterations=30, cg_damping=1e-6, line_search_decay=0.95, line_search_steps=50)
    stats = trpo.policy_step(policy, obs, actions, adv, None, args)
    old = torch.distributions.Normal(mean_old, log_std_old.exp())
    new = torch.distributions.Normal(policy(obs), policy.log_std.exp())
    forward = torch.distributions.kl_divergence(old, new).sum(-1).mean().item()
    backward = torch.distributions.kl_divergence(new, old).sum(-1).mean().item()
    assert (policy.log_std < log_std_old).all() and forward > 1.2 * backward
    assert stats["approx_kl"] == pytest.approx(forward) and forward <= 0.3


def test_policy_step_is_the_closed_form_natural_gradient_on_a_gaussian_bandit():
    """One state, μ = θ: F = 1/σ² + c and g = Ê[Â (a - θ)] / σ², so that Δ = √(2δ / F) g / |g|, or α g / F."""
    space = trpo.gym.spaces.Box(-1, 1, (1,))
    for natural_step, damping in itertools.product((None, 0.1), (0.0, 5.0)):
        flags = {"hidden_sizes": (), "log_std_init": -1.0, "norm_obs": False, "cg_damping": damping, "max_kl": 0.01}
        args = Args(**flags, line_search=False, natural_step=natural_step)
        policy = trpo.Policy((1,), space, args).double()
        layer = policy.mean_net.layers[0]
        layer.weight.requires_grad_(False)
        policy.parameters = lambda layer=layer: iter([layer.bias])  # θ, the bias, alone
        obs, generator = torch.zeros(500, 1, dtype=torch.float64), torch.Generator().manual_seed(0)
        actions = math.exp(-1) * torch.randn(500, 1, generator=generator, dtype=torch.float64)
        adv = 3 * actions[:, 0] + 1
        g = (adv * actions[:, 0]).mean().item() / math.exp(-2)
        fisher = math.exp(2) + damping
        expected = math.sqrt(2 * 0.01 / fisher) if natural_step is None else 0.1 * g / fisher
        trpo.policy_step(policy, obs, actions, adv, None, args)
        assert layer.bias.item() == pytest.approx(expected, rel=1e-6)


def test_natural_gradient_does_not_depend_on_the_parametrization():
    """θ = W φ changes the parameters' step, but not, to first order, that of the distribution."""
    policy = make_policy(hidden_sizes=(), norm_obs=False, clip_obs=math.inf)
    obs, actions, adv = make_batch(policy, size=500)
    args = Args(cg_iterations=200, cg_tol=1e-24, cg_damping=0.0, max_kl=1e-6, line_search=False)
    scaled = copy.deepcopy(policy)
    factors = torch.tensor([1.0, 20.0, 0.05], dtype=torch.float64)
    with torch.no_grad():
        scaled.mean_net.layers[0].weight.div_(factors)  # of observations that are multiplied by the same
    before = policy(obs).detach()
    torch.testing.assert_close(scaled(obs * factors), before)
    trpo.policy_step(policy, obs, actions, adv, None, args)
    trpo.policy_step(scaled, obs * factors, actions, adv, None, args)
    change = policy(obs).detach() - before
    torch.testing.assert_close(scaled(obs * factors).detach() - before, change, rtol=1e-4, atol=1e-8)
    assert change.abs().max() > 1e-5
    assert not torch.allclose(scaled.mean_net.layers[0].weight * factors**2, policy.mean_net.layers[0].weight)


def test_fisher_subsample_estimates_curvature_on_part_of_the_batch(monkeypatch):
    policy, seen = make_policy(), []
    obs, actions, adv = make_batch(policy)
    original = trpo.fisher_operator
    monkeypatch.setattr(trpo, "fisher_operator", lambda p, o, damping: seen.append(o) or original(p, o, damping))
    trpo.policy_step(policy, obs, actions, adv, torch.Generator().manual_seed(0), Args(fisher_subsample=0.1))
    assert {len(x) for x in seen} == {20} and all(torch.equal(x, seen[0]) for x in seen)
    distance = (seen[0][:, None] - obs[None]).abs().sum(-1)
    assert distance.min(1).values.max() == 0 and len(seen[0].unique(dim=0)) == 20
    assert distance.argmin(1).max() > 100  # from all of the rollout, not its first steps


def test_family_members_take_the_step_they_are_named_for(monkeypatch):
    """Without a line search the full step is taken, even where it leaves the trust region."""
    steps = {}
    for name, flags in (("trpo", {}), ("truncated", {"line_search": False}), ("npg", {"natural_step": 0.5})):
        policy = make_policy()
        obs, actions, adv = make_batch(policy)
        before = flat(policy.parameters())
        args = Args(max_kl=2.0, line_search=name == "trpo", **{k: v for k, v in flags.items() if k != "line_search"})
        stats = trpo.policy_step(policy, obs, actions, adv, None, args)
        steps[name] = (flat(policy.parameters()) - before, stats)
    assert steps["truncated"][1]["step_fraction"] == pytest.approx(1) and steps["truncated"][1]["rejected"] == 0
    assert steps["trpo"][1]["approx_kl"] <= 2.0 < steps["truncated"][1]["approx_kl"]
    cosine = torch.nn.functional.cosine_similarity(steps["truncated"][0], steps["npg"][0], dim=0)
    assert cosine.item() == pytest.approx(1) and not torch.allclose(steps["truncated"][0], steps["npg"][0])


# ---- Update ----------------------------------------------------------------------------------------------------------


def make_iteration(**flags):
    policy, critic, rollout, rng, args = make_parts(trpo, **flags)
    adam = trpo.Adam(sum(p.numel() for p in critic.parameters()), lr=1e-2, eps=1e-8)
    return policy, critic, adam, rollout, rng, args


def test_update_steps_the_policy_first_and_fits_v_to_targets_from_before(monkeypatch):
    policy, critic, adam, rollout, rng, args = make_iteration()
    expected_adv, returns, values = trpo.advantages(policy, critic, rollout, args)
    before, order = flat(critic.parameters()), []
    original = trpo.policy_step

    def policy_step(*inputs):
        _, obs, actions, adv, *_ = inputs
        assert torch.equal(obs, rollout.obs.flatten(0, 1)) and torch.equal(actions, rollout.actions.flatten(0, 1))
        torch.testing.assert_close(adv, expected_adv.flatten())
        start = flat(policy.parameters())
        stats = original(*inputs)
        order.append("policy")
        assert torch.equal(flat(critic.parameters()), before)  # the policy's step leaves V alone
        assert not torch.equal(flat(policy.parameters()), start)
        return stats

    def spy(critic, adam, obs, targets):
        order.append("value")
        seen.append((obs.sum(-1), targets))
        losses.append(trpo.value_step(critic, adam, obs, targets))
        return losses[-1]

    seen, losses = [], []
    monkeypatch.setattr(trpo, "policy_step", policy_step)
    stats = trpo.update(policy, critic, adam, spy, rollout, rng, args)
    assert order == ["policy"] + ["value"] * args.update_epochs * args.num_minibatches
    assert not torch.equal(flat(critic.parameters()), before)
    assert stats["value_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)
    unexplained = (returns - values).var() / returns.var()
    assert stats["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    x = policy.normalize(rollout.obs).sum(-1).flatten()
    pairs = sorted(zip(x.tolist(), returns.flatten().tolist(), strict=True))
    for epoch in (seen[: args.num_minibatches], seen[args.num_minibatches :]):
        got = sorted(zip(*(torch.cat(part).tolist() for part in zip(*epoch, strict=True)), strict=True))
        np.testing.assert_allclose(got, pairs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scale, floor", [(1.0, 0.5), (1e-3, 0.5), (1e-3, 0.0)])
def test_the_trust_region_shrinks_where_little_is_to_be_gained(monkeypatch, scale, floor):
    seen, original = [], trpo.policy_step
    monkeypatch.setattr(trpo, "policy_step", lambda *x: seen.append(x[-1].max_kl) or original(*x))
    policy, critic, adam, rollout, rng, args = make_iteration(return_floor=floor, max_kl=0.01)
    with torch.no_grad():
        critic.value_net.layers[-1].weight.zero_()
    rollout = rollout._replace(rewards=scale * rollout.rewards)
    _, returns, _ = trpo.advantages(policy, critic, rollout, args)
    std = returns.std().item()
    trpo.update(policy, critic, adam, trpo.value_step, rollout, rng, args)
    small = scale < 1 and floor > 0
    assert small == (std < floor)
    assert seen[-1] == pytest.approx(0.01 * (std / floor) ** 2 if small else 0.01, rel=1e-3)


def test_value_step_descends_the_squared_error():
    _, critic, adam, rollout, _, _ = make_iteration()
    stock = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(stock.parameters(), lr=1e-2, eps=1e-8)
    for _ in range(5):
        obs, targets = torch.randn(16, 3), torch.randn(16)
        loss = trpo.value_step(critic, adam, obs, targets)
        expected = ((stock(obs) - targets) ** 2).mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(flat(critic.parameters()), flat(stock.parameters()), rtol=1e-4, atol=1e-5)


def test_compiled_value_step_equals_eager(capsys):
    _, critic, adam, _, _, args = make_iteration(compile="on")
    eager = copy.deepcopy([critic, adam])
    compiled = trpo.compile_or_eager(trpo.value_step, args, torch.device("cpu"))
    for _ in range(3):
        obs, targets = torch.randn(16, 3), torch.randn(16)
        torch.testing.assert_close(compiled(critic, adam, obs, targets), trpo.value_step(*eager, obs, targets))
        for net, net_eager in zip((critic, adam), eager, strict=True):
            torch.testing.assert_close(net.state_dict(), net_eager.state_dict(), rtol=1e-4, atol=1e-4)
    assert compiled is not trpo.value_step and "not compiled" not in capsys.readouterr().out


# ---- Train -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("annealed", [True, False])
def test_train_wires_its_parts_together(tmp_path, monkeypatch, annealed):
    rollouts, updates, original_collect, original_update = [], [], trpo.collect, trpo.update

    def collect(*inputs):
        rollouts.append(original_collect(*inputs))
        return rollouts[-1]

    def update(policy, critic, adam, step, rollout, rng, args):
        updates.append((args.max_kl, adam.lr.item(), adam.eps, rollout.rewards, policy.obs_stats.count.item()))
        return original_update(policy, critic, adam, step, rollout, rng, args)

    monkeypatch.setattr(trpo, "collect", collect)
    monkeypatch.setattr(trpo, "update", update)
    flags = {**SMALL, "env_id": "Pendulum-v1", "total_timesteps": 256, "anneal_kl": annealed, "anneal_lr": annealed}
    args = Args(**flags, run_dir=str(tmp_path / "run"))
    result = train(args)
    spent = [i / 4 if annealed else 0.0 for i in range(4)]
    assert [max_kl for max_kl, *_ in updates] == pytest.approx([args.max_kl * (1 - x**2) for x in spent])
    assert [lr for _, lr, *_ in updates] == pytest.approx([args.learning_rate * (1 - x) for x in spent])
    assert {eps for _, _, eps, _, _ in updates} == {args.adam_eps}
    assert [count for *_, count in updates] == [0, 64, 128, 192]  # statistics of π_old, until after the update
    assert trpo.load_checkpoint(result["checkpoint"])["policy"]["obs_stats.count"] == 256
    critic, start = trpo.Critic(3, args), torch.zeros(2)
    for raw, (_, _, _, rewards, _) in zip(rollouts, updates, strict=True):
        expected, start = trpo.scale_rewards(raw.rewards, raw.done, start, critic, args)
        torch.testing.assert_close(rewards, expected)
        assert not torch.allclose(rewards, raw.rewards)


def test_line_search_flags_reach_the_line_search(monkeypatch):
    policy, seen = make_policy(), []
    monkeypatch.setattr(trpo, "line_search", lambda evaluate, theta, *rest: seen.append(rest[1:]) or (theta, False))
    args = Args(max_kl=0.3, line_search_steps=7, line_search_decay=0.4)
    trpo.policy_step(policy, *make_batch(policy), None, args)
    assert seen == [(0.3, 7, 0.4)]


@pytest.mark.parametrize("final", [-2.0, None])
def test_sigma_is_learned_under_a_limit_that_falls_linearly(tmp_path, monkeypatch, final):
    acted, original_collect, original_step = [], trpo.collect, trpo.policy_step

    def collect(envs, policy, *rest):
        acted.append(policy.log_std.exp().item())
        return original_collect(envs, policy, *rest)

    def policy_step(policy, *rest):
        stats = original_step(policy, *rest)
        policy.log_std.data.fill_(-0.5 + len(acted))  # what the step has learned
        return stats

    monkeypatch.setattr(trpo, "collect", collect)
    monkeypatch.setattr(trpo, "policy_step", policy_step)
    flags = {**SMALL, "total_timesteps": 256, "log_std_init": -1.0, "log_std_final": final, "env_id": "Pendulum-v1"}
    train(Args(**flags, run_dir=str(tmp_path / "run")))
    learned = [math.exp(x) for x in (-1.0, 0.5, 1.5, 2.5)]
    limits = [math.exp(-1.0) + i / 4 * (math.exp(-2.0) - math.exp(-1.0)) for i in range(4)]
    assert acted == pytest.approx(learned if final is None else limits, rel=1e-5)


def test_rejected_steps_are_counted_over_the_run_and_the_trust_region_holds(tmp_path, monkeypatch):
    original, calls = trpo.gaussian_kl, []

    def sometimes_too_far(*inputs):
        calls.append(1)
        return original(*inputs) + (1 if len(calls) <= 11 else 0)  # all of the first iteration

    monkeypatch.setattr(trpo, "gaussian_kl", sometimes_too_far)
    args = Args(**SMALL, env_id="Pendulum-v1", total_timesteps=640, run_dir=str(tmp_path / "run"))
    train(args)
    rows = [line.split(",") for line in (tmp_path / "run" / "progress.csv").read_text().splitlines()]
    column = {name: [float(row[i] or "nan") for row in rows[1:]] for i, name in enumerate(rows[0])}
    assert column["rejected_steps"][0] == 1 and column["rejected_steps"] == sorted(column["rejected_steps"])
    for kl, limit in list(zip(column["approx_kl"], column["max_kl"], strict=True))[1:]:
        assert 0 <= kl <= limit * (1 + 1e-6)
    assert max(column["approx_kl"][1:]) > 0.5 * args.max_kl


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id CartPole-v1", "acer_discrete.py"),
        ("--max-kl 0", "--max-kl 0.0 must be positive"),
        ("--cg-iterations 0", "--cg-iterations 0 must be positive"),
        ("--cg-damping -1", "--cg-damping -1.0 must not be negative"),
        ("--fisher-subsample 0", "--fisher-subsample 0.0 must be positive"),
        ("--fisher-subsample 2", "--fisher-subsample 2.0 must lie in [0, 1]"),
        ("--line-search-decay 1.5", "--line-search-decay 1.5 must lie in [0, 1]"),
        ("--natural-step -0.1", "--natural-step -0.1 must be positive"),
        ("--gamma nan", "--gamma nan must lie in [0, 1]"),
        ("--num-minibatches 3", "--num-minibatches must divide"),
        ("--resume {foreign}", "was written by ppo_continuous.py"),
        ("--resume {checkpoint} --log-std-init -1", "--log-std-init"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    torch.save({"script": "ppo_continuous", "args": {}}, "foreign.pt")
    result = train(Args(**SMALL, env_id="Pendulum-v1", total_timesteps=64, run_dir="run"))
    before = sorted(Path().rglob("*"))
    words = flags.format(foreign="foreign.pt", checkpoint=result["checkpoint"]).split()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    capsys.readouterr()
    assert trpo.main() == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1 and sorted(Path().rglob("*")) == before


def test_evaluate_from_the_command_line(tmp_path, monkeypatch, capsys):
    result = train(Args(**SMALL, env_id="Pendulum-v1", total_timesteps=64, run_dir=str(tmp_path / "run")))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--evaluate", result["checkpoint"], "--eval-episodes", "2"])
    assert trpo.main() == 0
    assert "over 2 episodes" in capsys.readouterr().out

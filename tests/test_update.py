"""One iteration: loss, gradient step, epochs of minibatches, replay, schedules."""

import copy
import dataclasses
import math
import re
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    CONTINUOUS,
    DISCRETE,
    AcerExample,
    double,
    double_policy,
    draw_noise,
    each_continuous,
    each_script,
    each_with,
    flat_copy,
    hessian_of_mean_kl,
    make_args,
    make_networks,
)

import acer_discrete as acer
import ppo_atari
import ppo_continuous as ppo
import trpo_continuous as trpo

IMAGES = {"env_id": "Catch-v0", "hidden_sizes": (32,)}
PPO_CASES = [
    pytest.param(ppo, {}, id="ppo_continuous"),
    pytest.param(ppo_atari, {}, id="ppo_atari"),
    pytest.param(ppo_atari, IMAGES, id="ppo_atari images"),
]
each_ppo = each_with("ppo_loss")
each_ppo_case = pytest.mark.parametrize("script, changes", PPO_CASES)


def filled_args(script, **changes):
    """Small settings without None where the kind of observation gives the default."""
    args = make_args(script, **changes)
    if script in DISCRETE:
        return script.fill_defaults(args, script.observes_images(args.env_id))
    return args


def first_rollout(script, **changes):
    """Networks with statistics, a rollout of theirs, the generator and the arguments."""
    args = filled_args(script, **changes)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(0)
    envs = script.make_envs(args.env_id, args.num_envs, args.seed)
    networks = make_networks(script, envs.obs.shape[1:], envs.action_space, args)
    policy = networks[0]
    update_stats = policy.update_stats if script is ppo_atari else policy.obs_stats.update
    raw = script.collect(envs, policy, draw_noise(policy, args.num_steps, args.num_envs))
    update_stats(raw.obs.flatten(0, 1))
    raw = script.collect(envs, policy, draw_noise(policy, args.num_steps, args.num_envs, seed=1))
    running_sum = torch.zeros(args.num_envs, dtype=torch.float64)
    rollout, _ = script.prepare(raw, *networks, running_sum, args.gamma, args)
    envs.close()
    return networks, rollout, rng, args


def make_adam(script, networks, lr=1e-2):
    adam = script.Adam(sum(p.numel() for net in networks for p in net.parameters()))
    adam.lr.fill_(lr)
    return adam


def make_iteration(script, **changes):
    networks, rollout, rng, args = first_rollout(script, **changes)
    return networks, make_adam(script, networks), rollout, rng, args


def critic_of(networks):
    """The network that has V, and the layer whose output V is."""
    critic = networks[-1]
    return critic, critic.value_head[0] if hasattr(critic, "value_head") else critic.value_net[-1]


def advantages_of(script, networks, rollout, args):
    """Â, V^targ and V."""
    return script.advantages(networks[-1], rollout, args.gamma, args)[:3]


def logp_of(script, policy, batch):
    if script is ppo_atari:
        logits, _ = policy.logits_and_values(batch.inputs)
        return script.categorical_logp(logits, batch.actions)
    return script.gaussian_logp(*policy.mean_and_log_std(batch.inputs), batch.actions)


def make_batch(script, networks, rollout, args):
    """A batch whose π_old is not quite the policy."""
    policy = networks[0]
    if script is ppo_atari:
        logits = policy.logits_and_values(rollout.obs)[0].detach()
        generator = torch.Generator().manual_seed(5)
        logits = logits + 0.3 * torch.randn(logits.shape, generator=generator)
        old = [logits, script.categorical_logp(logits, rollout.actions)]
    else:
        mean, log_std = [x.detach() for x in policy.mean_and_log_std(rollout.obs)]
        mean = mean + 0.01
        log_std = (log_std - 0.1).expand_as(mean)
        old = [mean, log_std, script.gaussian_logp(mean, log_std, rollout.actions)]
    adv, returns, values = advantages_of(script, networks, rollout, args)
    fields = (rollout.obs, rollout.actions, *old, values, adv, returns)
    return script.Batch(*[x.flatten(0, 1) for x in fields])


def extra_of(script, args):
    """What the loss takes besides the batch: β, or ε of the iteration."""
    return args.clip_coef if script is ppo_atari else 1.0


def run_update(script, networks, adam, step, rollout, rng, args):
    extra = extra_of(script, args)
    return script.update(*networks, adam, step, rollout, args.gamma, extra, rng, args)


# ---- PPO ----


@pytest.mark.parametrize("iteration", [1, 2])
@each_ppo_case
def test_ratio_is_one_and_kl_zero_on_the_first_minibatch(script, changes, iteration):
    seen = []

    def compile_step(step):
        def spy(*inputs):
            policy = inputs[0]
            batch = inputs[-3]
            ratio = (logp_of(script, policy, batch) - batch.logp_old).exp()
            metrics = step(*inputs)
            seen.append((ratio.sub(1).abs().max().item(), metrics["approx_kl"].item()))
            return metrics

        return spy

    flags = {"total_timesteps": 128, "learning_rate": 1e-2, "anneal_lr": False}
    args = make_args(script, **flags | changes)
    list(script.ppo(args, {}, compile_step))
    per_iteration = args.update_epochs * args.num_minibatches
    mine = seen[(iteration - 1) * per_iteration : iteration * per_iteration]
    assert mine[0][0] < 1e-5 and abs(mine[0][1]) < 1e-6
    assert mine[-1][0] > 1e-3 and mine[-1][1] > 1e-6  # the spy would see a difference


@pytest.mark.parametrize("surrogate", ["clip", "kl-adaptive", "kl-fixed", "none"])
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_eq9_the_loss_is_minus_the_objective(surrogate, clip_vloss):
    flags = {"surrogate": surrogate, "clip_vloss": clip_vloss, "log_std_final": None}
    networks, _, rollout, _, args = make_iteration(ppo, ent_coef=0.1, **flags)
    policy, critic = networks
    batch = make_batch(ppo, networks, rollout, args)
    loss, metrics = ppo.ppo_loss(policy, critic, batch, torch.tensor(0.7), args)

    mean, log_std = policy.mean_and_log_std(batch.inputs)
    new = torch.distributions.Normal(mean, log_std.exp())
    old = torch.distributions.Normal(batch.mean_old, batch.log_std_old.exp())
    ratio = (new.log_prob(batch.actions).sum(-1) - batch.logp_old).exp()
    kl = torch.distributions.kl_divergence(old, new).sum(-1)
    objective = {
        "clip": torch.minimum(ratio * batch.adv, ratio.clip(0.8, 1.2) * batch.adv),
        "none": ratio * batch.adv,
    }
    objective = objective.get(surrogate, ratio * batch.adv - 0.7 * kl).mean()
    values = critic(batch.inputs)
    error = (values - batch.returns) ** 2
    if clip_vloss:
        near = torch.clamp(values, batch.values_old - 0.2, batch.values_old + 0.2)
        error = torch.maximum(error, (near - batch.returns) ** 2)
    total = objective - error.mean() + 0.1 * new.entropy().sum(-1).mean()

    params = [*policy.parameters(), *critic.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(loss, params), torch.autograd.grad(-total, params), rtol=1e-4, atol=1e-6
    )
    assert metrics["policy_loss"].item() == pytest.approx(-objective.item(), rel=1e-5, abs=1e-6)
    assert metrics["approx_kl"].item() == pytest.approx(kl.mean().item(), abs=1e-6)
    clipped = ((ratio - 1).abs() > 0.2).float().mean().item()
    assert metrics["clipfrac"].item() == clipped


@pytest.mark.parametrize("changes", [{}, IMAGES], ids=["vectors", "images"])
@pytest.mark.parametrize("clip_vloss, norm_adv", [(False, True), (True, False)])
def test_ppo_eq9_the_loss_of_discrete_actions_is_minus_the_objective(changes, clip_vloss, norm_adv):
    flags = {"clip_vloss": clip_vloss, "norm_adv": norm_adv, "orthogonal_init": False}
    networks, _, rollout, _, args = make_iteration(
        ppo_atari, vf_coef=0.3, ent_coef=0.1, **flags | changes
    )
    (policy,) = networks
    batch = make_batch(ppo_atari, networks, rollout, args)
    eps = 0.15
    loss, metrics = ppo_atari.ppo_loss(policy, batch, torch.tensor(eps), args)

    logits, values = policy.logits_and_values(batch.inputs)
    new = torch.distributions.Categorical(logits=logits)
    old = torch.distributions.Categorical(logits=batch.logits_old)
    ratio = (new.log_prob(batch.actions) - old.log_prob(batch.actions)).exp()
    clipped = torch.minimum(ratio * batch.adv, ratio.clip(1 - eps, 1 + eps) * batch.adv)
    error = (values - batch.returns) ** 2
    if clip_vloss:
        near = batch.values_old + (values - batch.values_old).clamp(-eps, eps)
        error = torch.maximum(error, (near - batch.returns) ** 2)
    total = clipped.mean() - 0.3 * error.mean() + 0.1 * new.entropy().mean()

    params = list(policy.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(loss, params), torch.autograd.grad(-total, params), rtol=1e-3, atol=1e-5
    )
    clipfrac = ((ratio - 1).abs() > eps).float().mean()
    expected = {
        "policy_loss": -clipped.mean(),
        "value_loss": error.mean(),
        "entropy": new.entropy().mean(),
        "approx_kl": torch.distributions.kl_divergence(old, new).mean(),
        "clipfrac": clipfrac,
    }
    assert 0 < clipfrac < 1
    torch.testing.assert_close(metrics, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("max_grad_norm", [1e-3, math.inf])
@each_ppo_case
def test_minibatch_step_is_adam_on_gradients_clipped_by_network(script, changes, max_grad_norm):
    if script is ppo:
        changes = {"log_std_final": None}
    networks, adam, rollout, _, args = make_iteration(
        script, max_grad_norm=max_grad_norm, **changes
    )
    batch = make_batch(script, networks, rollout, args)
    extra = torch.tensor(extra_of(script, args))
    others = copy.deepcopy(networks)
    params = [p for net in others for p in net.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-2, eps=1e-5)
    names = ["policy_grad_norm", "value_grad_norm"] if script is ppo else ["grad_norm"]
    for _ in range(3):
        loss, _ = script.ppo_loss(*others, batch, extra, args)
        optimizer.zero_grad()
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(n.parameters(), max_grad_norm) for n in others]
        optimizer.step()
        metrics = script.minibatch_step(*networks, adam, batch, extra, args)
        for name, norm in zip(names, norms, strict=True):
            torch.testing.assert_close(metrics[name], norm, rtol=1e-3, atol=1e-5)
        assert not any(value.requires_grad for value in metrics.values())
        for net, other in zip(networks, others, strict=True):
            mine = list(net.parameters())
            theirs = list(other.parameters())
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


@each_ppo_case
def test_update_visits_every_sample_once_an_epoch(script, changes):
    networks, adam, rollout, rng, args = make_iteration(script, **{"update_epochs": 3} | changes)
    adv, returns, values = advantages_of(script, networks, rollout, args)
    weights = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def mix(inputs, actions, *numbers):
        """One number a sample, in which all of its facts have a share."""
        facts = [inputs.flatten(1).double().mean(-1), actions.view(len(inputs), -1).sum(-1)]
        columns = [x.double() for x in (*facts, *numbers)]
        return torch.stack(columns, -1) @ weights[: len(columns)]

    flat = [x.flatten(0, 1) for x in (rollout.obs, rollout.actions, values, adv, returns)]
    seen = []
    batches = []

    def spy(*inputs):
        batch = inputs[-3]
        batches.append(mix(*[batch[i] for i in (0, 1, -3, -2, -1)]))
        seen.append(mix(batch.inputs, batch.actions, batch.logp_old))
        return script.minibatch_step(*inputs)

    run_update(script, networks, adam, spy, rollout, rng, args)
    assert len(seen) == 3 * args.num_minibatches
    assert len({len(x) for x in seen}) == 1
    first = torch.cat(batches[: args.num_minibatches])  # later epochs have other advantages
    torch.testing.assert_close(first.sort().values, mix(*flat).sort().values, rtol=1e-5, atol=1e-5)
    epochs = torch.cat(seen).view(3, -1)
    assert torch.equal(epochs[0].sort().values, epochs[1].sort().values)
    assert torch.equal(epochs[0].sort().values, epochs[2].sort().values)
    assert not torch.equal(epochs[0], epochs[2]) and not torch.equal(epochs[0], epochs[1])
    assert len(first.unique()) > 0.5 * args.batch_size


@each_ppo
def test_metrics_are_means_over_all_minibatches(script):
    networks, adam, rollout, rng, args = make_iteration(script, update_epochs=3)
    _, returns, values = advantages_of(script, networks, rollout, args)
    seen = []

    def spy(*inputs):
        seen.append(script.minibatch_step(*inputs))
        return seen[-1]

    before = copy.deepcopy(networks[0])
    metrics = run_update(script, networks, adam, spy, rollout, rng, args)
    for name in seen[0]:
        mean = sum(step[name].item() for step in seen) / len(seen)
        assert metrics[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    unexplained = (returns - values).var() / returns.var()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    if script is ppo:
        old = before.mean_and_log_std(rollout.obs)
        new = networks[0].mean_and_log_std(rollout.obs)
        kl = ppo.gaussian_kl(*old, *new).mean()
        assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4) and metrics["kl"] > 1e-4
        assert metrics["action_std"] == pytest.approx(math.exp(-1))


def test_advantages_are_recomputed_only_if_asked(monkeypatch):
    calls = []
    original = ppo.advantages
    monkeypatch.setattr(ppo, "advantages", lambda *x: calls.append(1) or original(*x))
    for flag, count in ((True, 2), (False, 1)):
        parts = make_iteration(ppo, recompute_advantages=flag)
        networks, adam, rollout, rng, args = parts
        calls.clear()
        run_update(ppo, networks, adam, ppo.minibatch_step, rollout, rng, args)
        assert len(calls) == count


@each_with("advantages")
def test_normalized_advantages_do_not_depend_on_the_scale_of_rewards(script):
    networks, rollout, _, args = first_rollout(script, norm_adv=True)
    with torch.no_grad():
        for param in critic_of(networks)[1].parameters():
            param.zero_()
    adv, _, _ = advantages_of(script, networks, rollout, args)
    larger = rollout._replace(rewards=10 * rollout.rewards)
    scaled, _, _ = advantages_of(script, networks, larger, args)
    torch.testing.assert_close(adv, scaled, rtol=1e-4, atol=1e-5)
    assert adv.mean().abs() < 1e-5 and adv.std().item() == pytest.approx(1, abs=1e-4)


# ---- TRPO ----


def distribution(mean, log_std):
    """N(mean, diag σ²), which does not follow later steps of a policy."""
    normal = torch.distributions.Normal(mean.detach().clone(), log_std.detach().clone().exp())
    return torch.distributions.Independent(normal, 1)


def trpo_batch(policy, size=200, seed=0):
    """Inputs, actions of the policy, and advantages that have nothing to do with them."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    inputs = torch.randn(size, len(policy.obs_stats.mean), **options)
    mean, log_std = [x.detach().clone() for x in policy.mean_and_log_std(inputs)]
    log_std = log_std.expand_as(mean)
    actions = mean + log_std.exp() * torch.randn(mean.shape, **options)
    logp = distribution(mean, log_std).log_prob(actions)
    return trpo.Batch(inputs, actions, mean, log_std, logp, torch.randn(size, **options))


def policy_step(policy, batch, args, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return trpo.policy_step(policy, batch, args.max_kl, rng, args)


def old_and_new(policy, batch):
    """π_old and π of the states of a batch."""
    old = distribution(batch.mean_old, batch.log_std_old)
    return old, distribution(*policy.mean_and_log_std(batch.inputs))


def mean_kl(old, new):
    return torch.distributions.kl_divergence(old, new).mean().item()


@pytest.mark.parametrize("seed", range(5))
def test_policy_step_improves_within_the_trust_region(seed):
    policy = double_policy(trpo)
    batch = trpo_batch(policy, seed=seed)
    metrics = policy_step(policy, batch, trpo.Args(cg_iterations=20, max_kl=0.01))
    old, new = old_and_new(policy, batch)
    ratio = (new.log_prob(batch.actions) - old.log_prob(batch.actions)).exp()
    gain = ((ratio * batch.adv).mean() - batch.adv.mean()).item()
    kl = mean_kl(old, new)
    assert 0 < kl <= 0.01 and gain > 0 and metrics["rejected"] == 0
    assert metrics["approx_kl"] == pytest.approx(kl)
    assert metrics["surrogate_gain"] == pytest.approx(gain)
    assert metrics["policy_loss"] == pytest.approx(-(ratio * batch.adv).mean().item())
    assert metrics["max_kl"] == 0.01
    assert kl > 0.01 * 0.8**20  # a step of a size that could be meant


@pytest.mark.parametrize("why", ["the KL is too large", "the surrogate falls", "NaN"])
def test_a_failed_line_search_leaves_every_bit_of_the_policy(monkeypatch, why):
    policy = double_policy(trpo)
    batch = trpo.Batch(*[x.float() for x in trpo_batch(policy)])
    policy.float()
    kl = trpo.gaussian_kl
    surrogate = trpo.importance_surrogate
    calls = []

    def too_far(*inputs):
        return kl(*inputs) + 1

    def worse(ratio, adv):
        calls.append(1)
        if len(calls) == 1:  # that of π_old
            return surrogate(ratio, adv)
        return surrogate(ratio, adv) + (math.nan if why == "NaN" else -1e6)

    if why == "the KL is too large":
        monkeypatch.setattr(trpo, "gaussian_kl", too_far)
    else:
        monkeypatch.setattr(trpo, "importance_surrogate", worse)
    before = copy.deepcopy(policy.state_dict())
    metrics = policy_step(policy, batch, trpo.Args(line_search_steps=3))
    assert metrics["rejected"] == 1 and metrics["step_fraction"] == 0
    after = policy.state_dict()
    assert list(after) == list(before) and len(list(policy.named_parameters())) == 5
    for name, _ in policy.named_parameters():
        assert after[name].numpy().tobytes() == before[name].numpy().tobytes()


def test_a_step_that_overshoots_is_rejected_or_shortened():
    policy = double_policy(trpo)
    batch = trpo_batch(policy)
    before = flat_copy(policy.parameters())
    metrics = policy_step(policy, batch, trpo.Args(max_kl=5.0, line_search_steps=1))
    assert metrics["rejected"] == 1 and torch.equal(flat_copy(policy.parameters()), before)
    assert metrics["approx_kl"] == pytest.approx(0, abs=1e-12)
    metrics = policy_step(policy, batch, trpo.Args(max_kl=5.0, line_search_steps=60))
    assert metrics["rejected"] == 0 and 0 < metrics["approx_kl"] <= 5.0
    assert 0 < metrics["step_fraction"] < 1


def test_line_search_flags_reach_the_line_search(monkeypatch):
    policy = double_policy(trpo)
    seen = []

    def line_search(try_step, theta, full_step, *rest):
        seen.append(rest)
        return theta, False

    monkeypatch.setattr(trpo, "line_search", line_search)
    args = trpo.Args(max_kl=0.3, line_search_steps=7, line_search_decay=0.4)
    policy_step(policy, trpo_batch(policy), args)
    assert seen == [(0.3, 7, 0.4)]


def test_the_constraint_is_the_kl_from_old_to_new():
    """Where σ shrinks, KL(old ‖ new) is larger than KL(new ‖ old). The first is limited."""
    policy = double_policy(trpo, log_std_init=0.0)
    batch = trpo_batch(policy, size=10_000)
    noise = (batch.actions - batch.mean_old) / batch.log_std_old.exp()
    adv = -noise.square().sum(-1)  # small noise is good, so σ must fall
    batch = batch._replace(adv=adv - adv.mean())
    flags = {"max_kl": 0.3, "cg_iterations": 30, "cg_damping": 1e-6}
    args = trpo.Args(**flags, line_search_decay=0.95, line_search_steps=50)
    metrics = policy_step(policy, batch, args)
    old, new = old_and_new(policy, batch)
    assert (policy.log_std < batch.log_std_old[0]).all()
    assert mean_kl(old, new) > 1.2 * mean_kl(new, old)
    assert metrics["approx_kl"] == pytest.approx(mean_kl(old, new))
    assert 0.2 < mean_kl(old, new) <= 0.3


@pytest.mark.parametrize("step", ["truncated", "natural"])
@pytest.mark.parametrize("damping", [0.0, 5.0])
def test_policy_step_is_the_closed_form_natural_gradient_on_a_gaussian_bandit(step, damping):
    """One state and μ = θ: F = 1/σ² + c and g = Ê[Â (a - θ)] / σ².

    Δ = √(2δ / F) g / |g|, or α g / F.
    """
    flags = {"hidden_sizes": (), "log_std_init": -1.0, "norm_obs": False}
    args = trpo.Args(**flags, cg_damping=damping, step=step, max_kl=0.01)
    policy = trpo.Policy((1,), gym.spaces.Box(-1, 1, (1,)), args).double()
    layer = policy.mean_net[0]
    policy.parameters = lambda: iter([layer.bias])  # θ is the bias alone
    batch = trpo_batch(policy, size=500)
    batch = batch._replace(inputs=torch.zeros_like(batch.inputs))
    noise = batch.actions - batch.mean_old
    batch = batch._replace(actions=noise, mean_old=0 * noise, adv=3 * noise[:, 0] + 1)
    policy_step(policy, batch, args)
    g = (batch.adv * noise[:, 0]).mean().item() / math.exp(-2)
    fisher = math.exp(2) + damping
    expected = math.sqrt(2 * 0.01 / fisher) if step == "truncated" else 0.1 * g / fisher
    assert layer.bias.item() == pytest.approx(expected, rel=1e-6)


def natural_gradient(policy, batch, damping):
    """x = F⁻¹ g and F, by an explicit matrix and torch.distributions."""
    fisher = hessian_of_mean_kl(policy, batch.inputs)
    fisher = fisher + damping * torch.eye(len(fisher), dtype=torch.float64)
    mean, log_std = policy.mean_and_log_std(batch.inputs)
    logp = torch.distributions.Normal(mean, log_std.exp()).log_prob(batch.actions).sum(-1)
    grads = torch.autograd.grad((logp * batch.adv).mean(), list(policy.parameters()))
    g = torch.cat([grad.flatten() for grad in grads])
    return torch.linalg.solve(fisher, g), fisher


STEPS = ("trpo", "truncated", "natural")


@pytest.mark.parametrize("damping", [0.05, 0.02])
def test_each_step_is_the_one_it_is_named_for(monkeypatch, damping):
    monkeypatch.setattr(trpo, "CG_TOLERANCE", 1e-28)
    policies = {name: double_policy(trpo) for name in STEPS}
    batch = trpo_batch(policies["trpo"])
    before = flat_copy(policies["trpo"].parameters())
    x, fisher = natural_gradient(policies["trpo"], batch, damping)
    to_the_boundary = math.sqrt(2 * 2.0 / (x @ fisher @ x)) * x
    changes = {}
    metrics = {}
    for name, policy in policies.items():
        flags = {"max_kl": 2.0, "natural_step": 0.3, "cg_damping": damping, "cg_iterations": 300}
        metrics[name] = policy_step(policy, batch, trpo.Args(step=name, **flags))
        changes[name] = flat_copy(policy.parameters()) - before
        kl = mean_kl(*old_and_new(policy, batch))
        assert metrics[name]["approx_kl"] == pytest.approx(kl) and metrics[name]["rejected"] == 0
    close = {"rtol": 1e-6, "atol": 1e-9}
    torch.testing.assert_close(changes["natural"], 0.3 * x, **close)
    torch.testing.assert_close(changes["truncated"], to_the_boundary, **close)
    fraction = metrics["trpo"]["step_fraction"]
    torch.testing.assert_close(changes["trpo"], fraction * to_the_boundary, **close)
    backtracks = math.log(fraction) / math.log(0.8)
    assert backtracks == pytest.approx(round(backtracks), abs=1e-6)
    assert metrics["truncated"]["step_fraction"] == pytest.approx(1)
    # without a line search the whole step is taken, even out of the trust region
    assert metrics["trpo"]["approx_kl"] <= 2.0 < metrics["truncated"]["approx_kl"]


def test_the_natural_gradient_does_not_depend_on_the_parametrization(monkeypatch):
    """θ = W φ changes the step of the weights but not, to first order, that of π."""
    monkeypatch.setattr(trpo, "CG_TOLERANCE", 1e-24)
    policy = double_policy(trpo, hidden_sizes=())
    batch = trpo_batch(policy, size=500)
    args = trpo.Args(cg_iterations=200, cg_damping=0.0, max_kl=1e-6, step="truncated")
    scaled = copy.deepcopy(policy)
    factors = double([1.0, 20.0, 0.05])
    with torch.no_grad():
        scaled.mean_net[0].weight.div_(factors)  # of inputs that are multiplied by them
    scaled_batch = batch._replace(inputs=batch.inputs * factors)
    torch.testing.assert_close(scaled.mean_net(scaled_batch.inputs), batch.mean_old)
    policy_step(policy, batch, args)
    policy_step(scaled, scaled_batch, args)
    change = policy.mean_net(batch.inputs) - batch.mean_old
    other = scaled.mean_net(scaled_batch.inputs) - batch.mean_old
    torch.testing.assert_close(other, change, rtol=1e-4, atol=1e-8)
    assert change.abs().max() > 1e-5
    weights = [net.mean_net[0].weight for net in (policy, scaled)]
    assert not torch.allclose(weights[1] * factors**2, weights[0])


@pytest.mark.parametrize("size", [100, 1000])
@pytest.mark.parametrize("fraction", [0.07, 0.14, 0.28, 0.29, 1.0, 1e-9])
def test_fisher_subsample_takes_this_part_of_the_batch(monkeypatch, size, fraction):
    policy = double_policy(trpo)
    batch = trpo_batch(policy, size)
    seen = []
    original = trpo.fisher_operator

    def spy(policy, inputs, damping):
        seen.append(inputs)
        return original(policy, inputs, damping)

    monkeypatch.setattr(trpo, "fisher_operator", spy)
    args = trpo.Args(fisher_subsample=fraction)
    policy_step(policy, batch, args)
    count = {0.07: 7, 0.14: 14, 0.28: 28, 0.29: 29, 1.0: 100}.get(fraction, 0) * size // 100
    (subset,) = seen  # the same for all products
    assert len(subset) == max(count, 1) and len(subset.unique(dim=0)) == len(subset)
    distance = (subset[:, None] - batch.inputs[None]).abs().sum(-1)
    assert distance.min(1).values.max() == 0
    if count:
        assert distance.argmin(1).max() > size / 2  # from all of the rollout
    policy_step(policy, batch, args, seed=1)
    assert fraction == 1.0 or not torch.equal(seen[1], subset)


def run_trpo_update(networks, adam, step, rollout, rng, args):
    return trpo.update(*networks, adam, step, rollout, args.gamma, rng, args)


def test_update_steps_the_policy_first_and_fits_v_to_targets_from_before(monkeypatch):
    networks, rollout, rng, args = first_rollout(trpo)
    policy, critic = networks
    adam = make_adam(trpo, [critic])
    expected_adv, returns, values = advantages_of(trpo, networks, rollout, args)
    before = flat_copy(critic.parameters())
    order = []
    seen = []
    losses = []
    original = trpo.policy_step

    def spy_policy(*inputs):
        batch = inputs[1]
        assert torch.equal(batch.inputs, rollout.obs.flatten(0, 1))
        assert torch.equal(batch.actions, rollout.actions.flatten(0, 1))
        torch.testing.assert_close(batch.adv, expected_adv.flatten())
        assert inputs[2] == args.max_kl
        old, new = old_and_new(policy, batch)
        assert mean_kl(old, new) == 0
        torch.testing.assert_close(batch.logp_old, old.log_prob(batch.actions))
        start = flat_copy(policy.parameters())
        metrics = original(*inputs)
        order.append("policy")
        assert torch.equal(flat_copy(critic.parameters()), before)  # V stays
        assert not torch.equal(flat_copy(policy.parameters()), start)
        return metrics

    def spy_value(critic, adam, inputs, targets):
        order.append("value")
        seen.append(torch.stack([inputs.sum(-1), targets], -1))
        metrics = trpo.minibatch_step(critic, adam, inputs, targets)
        losses.append(metrics["value_loss"].item())
        return metrics

    monkeypatch.setattr(trpo, "policy_step", spy_policy)
    metrics = run_trpo_update(networks, adam, spy_value, rollout, rng, args)
    assert order == ["policy"] + ["value"] * args.update_epochs * args.num_minibatches
    assert not torch.equal(flat_copy(critic.parameters()), before)
    assert metrics["value_loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    unexplained = (returns - values).var() / returns.var()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item(), rel=1e-4)
    facts = torch.stack([rollout.obs.sum(-1), returns], -1).flatten(0, 1)
    expected = sorted(facts.tolist())
    for epoch in (seen[: args.num_minibatches], seen[args.num_minibatches :]):
        given = sorted(torch.cat(epoch).tolist())
        np.testing.assert_allclose(given, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "scale, floor, norm_reward",
    [(1.0, 0.1, True), (1e-3, 0.1, True), (1e-3, 0.0, True), (1e-3, 0.1, False)],
)
def test_the_trust_region_shrinks_where_returns_hardly_differ(
    monkeypatch, scale, floor, norm_reward
):
    seen = []
    original = trpo.policy_step
    monkeypatch.setattr(trpo, "policy_step", lambda *x: seen.append(x[2]) or original(*x))
    networks, rollout, rng, args = first_rollout(
        trpo, return_floor=floor, max_kl=0.01, norm_reward=norm_reward
    )
    with torch.no_grad():
        networks[1].value_net[-1].weight.zero_()
    rollout = rollout._replace(rewards=scale * rollout.rewards)
    _, returns, _ = advantages_of(trpo, networks, rollout, args)
    std = returns.std().item()
    adam = make_adam(trpo, networks[1:])
    metrics = run_trpo_update(networks, adam, trpo.minibatch_step, rollout, rng, args)
    small = scale < 1 and floor > 0 and norm_reward
    assert norm_reward is False or small == (std < floor)
    expected = 0.01 * (std / floor) ** 2 if small else 0.01
    assert seen == [pytest.approx(expected, rel=1e-3)]
    assert metrics["max_kl"] == seen[0] and metrics["approx_kl"] <= seen[0] * (1 + 1e-6)


def test_gae_eq28_minibatch_step_of_trpo_is_adam_on_the_squared_error():
    networks, _, _, _ = first_rollout(trpo)
    critic = networks[1]
    adam = make_adam(trpo, [critic])
    stock = copy.deepcopy(critic)
    optimizer = torch.optim.Adam(stock.parameters(), lr=1e-2, eps=1e-5)
    for _ in range(5):
        inputs = torch.randn(16, 3)
        targets = torch.randn(16)
        metrics = trpo.minibatch_step(critic, adam, inputs, targets)
        expected = ((stock(inputs) - targets) ** 2).mean()
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert metrics["value_loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert not metrics["value_loss"].requires_grad
        mine = flat_copy(critic.parameters())
        torch.testing.assert_close(mine, flat_copy(stock.parameters()), rtol=1e-4, atol=1e-5)


# ---- ACER ----


def make_acer(obs_shape=(3,), num_actions=4, seed=0, **flags):
    """A policy, an average policy with other weights, and the arguments."""
    flags = {"hidden_sizes": (8,), "orthogonal_init": False, "compile": "off"} | flags
    args = acer.fill_defaults(acer.Args(**flags), images=len(obs_shape) == 3)
    torch.manual_seed(seed)
    policy = acer.ActorCritic(obs_shape, num_actions, args)
    average = acer.ActorCritic(obs_shape, num_actions, args).requires_grad_(False)
    return policy, average, args


def make_segment(steps=6, envs=3, num_actions=4, seed=0):
    """Random steps with both kinds of ends, and V of the final observations."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64}
    obs = torch.randn(steps + 1, envs, 3, **options)
    mu = torch.randn(steps, envs, num_actions, **options).softmax(-1)
    actions = torch.randint(num_actions, (steps, envs), generator=generator)
    rewards = torch.randn(steps, envs, **options)
    terminated, truncated = torch.rand(2, steps, envs, generator=generator) < 0.2
    truncated = truncated & ~terminated
    final_values = torch.randn(steps, envs, **options) * truncated
    ends = (terminated, truncated, terminated | truncated)
    assert terminated.any() and truncated.any()
    return acer.Segment(obs, actions, mu, rewards, *ends, finals=[]), final_values


def gradient(policy, average, segment, final_values, args):
    """The gradient of acer_loss, and its metrics as numbers."""
    loss, metrics = acer.acer_loss(policy, average, segment, final_values, args)
    grads = torch.autograd.grad(loss, list(policy.parameters()))
    return torch.cat([g.flatten() for g in grads]), {k: x.item() for k, x in metrics.items()}


@pytest.mark.parametrize(
    "flags", [{}, {"trust_region": False}, {"bias_correction": False}, {"trunc_c": 1.0}]
)
def test_acer_section3_the_gradient_of_the_loss_is_that_of_its_parts(flags):
    policy, average, args = make_acer(**{"trunc_c": 1.5, "trust_region_delta": 0.05} | flags)
    policy.double()
    average.double()
    segment, final_values = make_segment()
    grad, metrics = gradient(policy, average, segment, final_values, args)

    all_probs, all_q = policy(segment.obs)
    probs = all_probs[:-1]
    f = probs.detach()
    values = (all_probs * all_q).sum(-1).detach()
    next_values = torch.where(segment.truncated, final_values, values[1:])
    chosen = torch.nn.functional.one_hot(segment.actions, 4)
    q_taken = (all_q[:-1] * chosen).sum(-1)
    rho = (f / (segment.mu + acer.EPS) * chosen).sum(-1)
    done = segment.terminated | segment.truncated
    ends = (segment.terminated, done)
    q_ret = acer.retrace(segment.rewards, q_taken.detach(), next_values, rho, *ends, args.gamma)
    z = torch.zeros_like(f)
    moved = 0
    for t in range(6):
        for n in range(3):
            q = all_q[t, n].detach()
            if not args.bias_correction:
                q = values[t, n].expand(4)  # Q = V: no correction, and the same V
            inputs = (f[t, n], q, q_ret[t, n], segment.actions[t, n], segment.mu[t, n])
            z[t, n] = acer.acer_gradient(*inputs, args.trunc_c, args.ent_coef)
            if args.trust_region:
                k = acer.kl_gradient(average(segment.obs[t, n])[0], f[t, n])
                step = acer.trust_region_step(z[t, n], k, args.trust_region_delta)
                moved += not torch.equal(step, z[t, n])
                z[t, n] = step
    policy_loss = -(z * probs).sum(-1).mean()
    q_loss = 0.5 * (q_ret - q_taken).square().mean()
    loss = policy_loss + args.q_coef * q_loss
    expected = torch.autograd.grad(loss, list(policy.parameters()))
    torch.testing.assert_close(grad, torch.cat([g.flatten() for g in expected]))

    assert metrics["policy_loss"] == pytest.approx(policy_loss.item())
    assert metrics["value_loss"] == pytest.approx(q_loss.item())
    assert metrics["mean_ratio"] == pytest.approx(rho.mean().item())
    unexplained = (q_ret - q_taken).var() / q_ret.var()
    assert metrics["explained_variance"] == pytest.approx(1 - unexplained.item())
    assert (moved > 0) == args.trust_region == ("adjusted_states" in metrics)
    if args.trust_region:
        assert metrics["adjusted_states"] == pytest.approx(moved / 18)
        old = torch.distributions.Categorical(average(segment.obs[:-1])[0])
        new = torch.distributions.Categorical(f)
        kl = torch.distributions.kl_divergence(old, new).mean()
        assert metrics["approx_kl"] == pytest.approx(kl.item(), rel=1e-3)


class Table(torch.nn.Module):
    """π and Q of states 0, 1, …, read from tables."""

    def __init__(self, logits, q):
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone())
        self.q = torch.nn.Parameter(q.clone())

    def probs(self, obs):
        return self.logits[obs[..., 0].long()].softmax(-1)

    def forward(self, obs):
        return self.probs(obs), self.q[obs[..., 0].long()]


class Watched(Table):
    """A table that no gradient is taken of."""

    def probs(self, obs):
        assert not torch.is_grad_enabled()
        return super().probs(obs)


def example_gradients(average=None, **flags):
    """Gradients of the worked example by the logits and by Q, (5, 3) each, and its metrics."""
    defaults = {"gamma": 0.9, "trunc_c": 2.0, "trust_region_delta": 0.1, "ent_coef": 0.0}
    args = acer.Args(**(defaults | flags))
    never = torch.zeros(4, 1, dtype=torch.bool)
    states = torch.arange(5.0)[:, None, None]  # (T+1, N, O)
    columns = [x[:, None] for x in (AcerExample.actions, AcerExample.mu, AcerExample.rewards)]
    segment = acer.Segment(states, *columns, never, never, never, finals=[])
    policy = Table(AcerExample.logits, AcerExample.q)
    average = average or Watched(AcerExample.avg.log(), AcerExample.q[:4])
    grad, metrics = gradient(policy, average, segment, torch.zeros(4, 1).double(), args)
    return grad[:15].view(5, 3), grad[15:].view(5, 3), metrics


def test_acer_section3_worked_example():
    """The gradient of the mean over four steps, from formulas written apart from these."""
    by_logits, by_q, metrics = example_gradients()
    expected = [
        [0.00565658, -0.01611845, 0.01046187],
        [0.08878414, -0.06417616, -0.02460798],
        [-0.01441573, -0.09181919, 0.10623492],
        [-0.37955506, 0.27747698, 0.10207808],
        [0, 0, 0],
    ]
    close = {"atol": 2e-7, "rtol": 0}
    torch.testing.assert_close(by_logits, double(expected), **close)
    by_taken = torch.zeros(5, 3, dtype=torch.float64)
    numbers = double([-0.04511983, 0.11616581, 0.09323267, -0.18759474])
    by_taken[torch.arange(4), AcerExample.actions] = numbers  # only the actions taken
    torch.testing.assert_close(by_q, by_taken, **close)
    assert metrics["value_loss"] == pytest.approx(0.47531528, abs=2e-6)
    assert metrics["entropy"] == pytest.approx(0.97892571, abs=2e-6)
    assert metrics["adjusted_states"] == 0.5
    rho = [0.45833503, 0.95034286, 0.72914825, 1.0962581]
    assert metrics["mean_ratio"] == pytest.approx(sum(rho) / 4)
    assert metrics["truncated_ratios"] == 0 and metrics["cut_traces"] == 0.75
    assert example_gradients(trunc_c=0.9)[2]["truncated_ratios"] == 0.5

    with_entropy, _, _ = example_gradients(ent_coef=0.01)
    rows = [[0.08923257, -0.06436531, -0.02486726], [-0.01475298, -0.09130317, 0.10605615]]
    torch.testing.assert_close(with_entropy[1:3], double(rows), **close)
    free, _, _ = example_gradients(trust_region=False)
    rows = [[0.08149687, -0.05957898, -0.02191788], [-0.02112684, -0.08002816, 0.101155]]
    torch.testing.assert_close(free[1:3], double(rows), **close)


def test_acer_eq12_leaves_the_gradient_alone_where_the_policy_is_its_average():
    """There k is -1 for every action, and a constant in z does not pass through a softmax."""
    average = Table(AcerExample.logits, AcerExample.q)
    held, _, metrics = example_gradients(average=average, trust_region_delta=1e-6)
    free, _, _ = example_gradients(trust_region=False)
    assert metrics["adjusted_states"] > 0
    torch.testing.assert_close(held, free, atol=1e-5, rtol=0)


def test_a_batch_that_is_doubled_has_the_same_gradient():
    """δ limits the g of each state, not its share of the mean."""
    policy, average, args = make_acer(trust_region_delta=0.05)
    policy.double()
    average.double()
    segment, final_values = make_segment()
    twice = acer.Segment(*[torch.cat([x, x], 1) for x in segment[:-1]], finals=[])
    once, _ = gradient(policy, average, segment, final_values, args)
    doubled, _ = gradient(policy, average, twice, torch.cat([final_values] * 2, 1), args)
    torch.testing.assert_close(once, doubled)


def test_the_loss_of_the_policy_does_not_reach_the_critic():
    policy, average, args = make_acer(q_coef=0.0)
    segment, final_values = make_segment()
    grad, _ = gradient(policy.double(), average.double(), segment, final_values, args)
    parts = grad.split([p.numel() for p in policy.parameters()])
    for (name, _), part in zip(policy.named_parameters(), parts, strict=True):
        assert (not part.any()) == name.startswith("q_"), name


def test_the_last_state_counts_only_as_a_successor():
    policy, average, args = make_acer()
    policy.double()
    average.double()
    segment, final_values = make_segment()
    segment.truncated[-1] = False
    elsewhere = segment._replace(obs=torch.cat([segment.obs[:-1], segment.obs[-1:] + 1]))
    for ended in (True, False):
        segment.terminated[-1] = ended  # shared by both
        grads = [gradient(policy, average, x, final_values, args)[0] for x in (segment, elsewhere)]
        assert torch.allclose(*grads) == ended


@pytest.mark.parametrize("max_grad_norm", [1e-3, math.inf])
@pytest.mark.parametrize("trust_region", [True, False])
def test_minibatch_step_is_rmsprop_on_the_clipped_gradient_then_the_average(
    max_grad_norm, trust_region
):
    policy, average, args = make_acer(max_grad_norm=max_grad_norm, trust_region=trust_region)
    policy.double()
    average.double()
    if not trust_region:
        average = None
    rmsprop = acer.RMSProp(len(flat_copy(policy.parameters()))).double()
    rmsprop.lr.fill_(0.1)
    v = torch.ones_like(rmsprop.v)
    for seed in range(3):
        segment, final_values = make_segment(seed=seed)
        grad, _ = gradient(policy, average, segment, final_values, args)
        clipped = grad * min(1.0, max_grad_norm / grad.norm().item())
        v = 0.99 * v + 0.01 * clipped**2
        expected = flat_copy(policy.parameters()) - 0.1 * clipped / (v + 1e-5).sqrt()
        expected_average = None
        if trust_region:
            expected_average = 0.99 * flat_copy(average.parameters()) + 0.01 * expected
        metrics = acer.minibatch_step(policy, average, rmsprop, segment, final_values, args)
        assert metrics["grad_norm"].item() == pytest.approx(grad.norm().item())
        assert not any(value.requires_grad for value in metrics.values())
        weights = flat_copy(policy.parameters())
        torch.testing.assert_close(weights, expected, rtol=1e-4, atol=1e-7)
        if trust_region:
            mine = flat_copy(average.parameters())
            torch.testing.assert_close(mine, expected_average, rtol=1e-4, atol=1e-7)


# ---- Replay ----


BREAKOUT = "ALE/Breakout-v5"


def play_segments(env_id, count, num_envs=4, num_steps=5, capacity=50):
    """A replay memory and all segments that were added to it."""
    envs = acer.make_envs(env_id, num_envs, 1, life_loss=True)
    shape = envs.obs.shape[1:]
    policy, _, _ = make_acer(shape, int(envs.action_space.n), hidden_sizes=(16,))
    replay = acer.Replay(capacity // num_steps, stacked=isinstance(envs, acer.AtariEnvs))
    segments = []
    for i in range(count):
        segments.append(acer.collect(envs, policy, draw_noise(policy, num_steps, num_envs, i)))
        replay.add(segments[-1])
    envs.close()
    return replay, segments


def assert_same_column(segment, other, n):
    """Environment n has the same steps in both segments."""
    for name in acer.Segment._fields[:-1]:
        assert torch.equal(getattr(segment, name)[:, n], getattr(other, name)[:, n]), name
    mine = [final for final in segment.finals if final[1] == n]
    theirs = [final for final in other.finals if final[1] == n]
    assert [final[0] for final in mine] == [final[0] for final in theirs]
    assert all(torch.equal(a[2], b[2]) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize(
    "env_id, max_frames, count, sizes",
    [
        ("CartPole-v1", None, 13, {}),
        ("Catch-v0", None, 13, {"num_envs": 2}),
        ("CutCatch-v0", None, 13, {"num_envs": 2}),
        (BREAKOUT, 28, 23, {"num_envs": 2, "capacity": 100}),
        (BREAKOUT, 108_000, 3, {"num_envs": 2, "num_steps": 150, "capacity": 600}),
    ],
)
def test_replay_returns_each_segment_as_it_was_added(monkeypatch, env_id, max_frames, count, sizes):
    monkeypatch.setattr(acer, "MAX_FRAMES", max_frames)
    replay, segments = play_segments(env_id, count, **sizes)
    num_envs = segments[0].rewards.shape[1]
    stored = {i % replay.slots: segment for i, segment in enumerate(segments)}
    assert sum(len(segment.finals) for segment in stored.values()) > 0 or env_id != "CutCatch-v0"
    resets = torch.stack([segment.resets for segment in stored.values()])
    assert resets.any() and (not replay.stacked or resets[:, :-1].any())
    rng = torch.Generator().manual_seed(0)
    for _ in range(20):
        slots = torch.randint(len(stored), (num_envs,), generator=rng)
        batch = replay.take(slots)
        for n, slot in enumerate(slots.tolist()):
            assert_same_column(batch, stored[slot], n)
    for n in range(num_envs):
        assert_same_column(replay.newest(), segments[-1], n)


def test_replay_draws_every_stored_segment_of_every_environment_alike(monkeypatch):
    replay, _ = play_segments("CartPole-v1", 4, num_envs=2)
    drawn = []
    monkeypatch.setattr(replay, "take", lambda slots: drawn.append(slots))
    rng = torch.Generator().manual_seed(0)
    for _ in range(1600):
        replay.sample(rng)
    pairs = torch.stack(drawn)
    counts = torch.zeros(4, 4).index_put_(pairs.unbind(1), torch.ones(1600), accumulate=True)
    assert ((counts - 100).abs() < 50).all()  # all pairs alike: environments draw apart
    replay.newest()
    assert drawn[-1].tolist() == [3, 3]


def test_replay_stores_every_frame_once_and_nothing_else_of_size(monkeypatch):
    allocated = {}

    def allocate(self, value):
        shape = (self.slots, *value.shape)
        allocated[tuple(shape)] = math.prod(shape) * value.element_size()
        return torch.zeros(1, *value.shape, dtype=value.dtype).expand(shape)

    monkeypatch.setattr(acer.Replay, "allocate", allocate)
    steps = torch.zeros(20, 16)
    flags = [torch.zeros(20, 16, dtype=torch.bool)] * 3
    obs = torch.zeros(21, 16, 4, 84, 84, dtype=torch.uint8)
    mu = torch.zeros(20, 16, 6)
    segment = acer.Segment(obs, steps.long(), mu, steps, *flags, finals=[])
    acer.Replay(acer.Args().replay_capacity // 20, stacked=True).add(segment)
    assert (2500, 24, 16, 84, 84) in allocated  # 20 new frames a segment and the 4 before them
    frames = allocated.pop((2500, 24, 16, 84, 84))
    assert 6.30 < frames / 2**30 < 6.32
    assert sum(allocated.values()) < 0.01 * frames


def test_a_replay_memory_that_does_not_fit_is_an_input_error():
    segment, _ = make_segment()
    with pytest.raises(acer.InputError, match="lower --replay-capacity"):
        acer.Replay(2**50, stacked=False).add(segment)


def test_truncations_keep_their_final_observation_and_terminations_need_none():
    _, segments = play_segments("CartPole-v1", 40)
    assert sum(int(segment.terminated.sum()) for segment in segments) > 20
    assert not any(segment.finals for segment in segments)
    envs = acer.Envs([gym.make("CartPole-v1", max_episode_steps=3)], [0])
    policy, _, _ = make_acer((4,), 2)
    segment = acer.collect(envs, policy, draw_noise(policy, 7, 1))
    assert [t for t, _, _ in segment.finals] == [2, 5]
    assert segment.truncated[:, 0].nonzero().flatten().tolist() == [2, 5]
    for t, _, final in segment.finals:
        assert not torch.allclose(final, segment.obs[t + 1, 0]) and segment.resets[t, 0]


def stacked_example():
    """Frames, resets and the observations that the docstring of stack_frames shows for them."""
    rows = re.findall(r"s_\d = (.) (.) (.)", acer.stack_frames.__doc__)
    expected = [["0abcdef".index(letter) for letter in row] for row in rows]
    assert expected == [[1, 2, 3], [2, 3, 4], [0, 0, 5], [0, 5, 6]]
    return torch.arange(1, 7), torch.tensor([False, True, False]), torch.tensor(expected)


def test_stack_frames_does_what_its_docstring_shows():
    frames, resets, expected = stacked_example()
    found = acer.stack_frames(frames[:, None, None, None].byte(), resets[:, None])
    assert found.shape == (4, 1, 3, 1, 1) and found.dtype == torch.uint8
    assert torch.equal(found[:, 0, :, 0, 0].long(), expected)


def test_the_example_of_stack_frames_is_what_ale_does(monkeypatch):
    """A game that is cut between two others: its second observation is the last of the old one."""
    monkeypatch.setattr(acer, "FRAME_STACK", 3)
    monkeypatch.setattr(acer, "MAX_FRAMES", 120)
    envs = acer.make_envs(BREAKOUT, 1, 1)
    rng = np.random.default_rng(0)
    stacks = [torch.from_numpy(envs.obs[0])]
    ends = []
    while len(ends) < 2 or not ends[-2]:
        step = envs.step(rng.integers(4, size=1))
        ends.append(bool(step[2][0] | step[3][0]))
        stacks.append(torch.from_numpy(envs.obs[0]))
    envs.close()
    seen = torch.stack(stacks[-4:])  # of the steps before, at and after the end
    _, resets, expected = stacked_example()
    assert ends[-3:] == resets.tolist()
    frames = torch.cat([seen[0], seen[1:, -1]])  # a b c d e f
    named = torch.cat([torch.zeros_like(frames[:1]), frames])
    assert torch.equal(seen, named[expected])
    assert len(frames.flatten(1).unique(dim=0)) >= 4  # frames can be told apart
    rebuilt = acer.stack_frames(frames[:, None], resets[:, None])
    assert torch.equal(rebuilt[:, 0], seen)


# ---- Update of ACER ----


def acer_iteration(**changes):
    """Environments, the arguments of update but the step, and a function that adds a segment."""
    flags = {"num_envs": 4, "num_steps": 5, "replay_start": 20, "replay_ratio": 4.0}
    args = filled_args(acer, **flags | changes)
    torch.manual_seed(args.seed)
    envs = acer.make_envs(args.env_id, args.num_envs, args.seed)
    policy = acer.ActorCritic(envs.obs.shape[1:], int(envs.action_space.n), args)
    average = copy.deepcopy(policy).requires_grad_(False)
    rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()))
    rmsprop.lr.fill_(args.learning_rate)
    replay = acer.Replay(4, stacked=False)
    rng = torch.Generator().manual_seed(0)

    def step(train_step=acer.minibatch_step):
        noise = draw_noise(policy, args.num_steps, args.num_envs, replay.count)
        replay.add(acer.collect(envs, policy, noise))
        return acer.update(policy, average, rmsprop, train_step, replay, rng, args)

    return policy, average, replay, step, args


def test_on_policy_weights_are_one():
    policy, average, _, step, _ = acer_iteration(learning_rate=0.05)
    off_policy = []
    cut = []
    ratios = []

    def spy(policy, average, rmsprop, batch, final_values, args):
        probs, _ = policy(batch.obs[:-1])
        rho = probs / (batch.mu + acer.EPS)
        rho = rho.gather(-1, batch.actions[..., None]).detach()
        ratios.append(rho)
        return acer.minibatch_step(policy, average, rmsprop, batch, final_values, args)

    for _ in range(60):
        ratios.clear()
        before = flat_copy(average.parameters())
        metrics = step(spy)
        assert not torch.equal(before, flat_copy(average.parameters()))
        assert (ratios[0] - 1).abs().max() < 1e-3  # EPS lowers that of μ = 0.001 by a thousandth
        assert metrics["mean_ratio"] == pytest.approx(1, abs=1e-4)
        assert metrics["truncated_ratios"] == 0
        cut.append(metrics["cut_traces"])
        if metrics["replay_updates"] > 0:
            off_policy.append((metrics["replay_cut_traces"], max(x.max() for x in ratios[1:])))
    assert np.mean(cut) < 0.01
    cut, largest = zip(*off_policy, strict=True)
    assert np.mean(cut) > 0.1 and max(largest) > 1.01


@pytest.mark.parametrize("start, first", [(0, 0), (5, 0), (6, 1), (20, 3), (21, 4)])
def test_replays_begin_with_this_many_steps_of_each_environment(start, first):
    """A segment has five steps of each."""
    _, _, _, step, _ = acer_iteration(replay_ratio=50.0, replay_start=start)
    counts = [step(lambda *_: {"loss": torch.tensor(0.0)})["replay_updates"] for _ in range(6)]
    assert [count > 0 for count in counts] == [i >= first for i in range(6)]


def test_replays_are_poisson():
    _, _, _, step, _ = acer_iteration()
    calls = []

    def train_step(*inputs):
        calls.append(len(calls))
        return {"loss": torch.tensor(float(calls[-1]))}

    counts = []
    for _ in range(300):
        calls.clear()
        metrics = step(train_step)
        counts.append(len(calls) - 1)
        assert metrics["replay_updates"] == counts[-1]
        assert metrics["loss"] == 0  # that of the on-policy call
        if counts[-1] == 0:
            assert math.isnan(metrics["replay_loss"])
        else:
            assert metrics["replay_loss"] == pytest.approx(np.mean(calls[1:]))
    counts = np.array(counts[3:])
    assert counts.mean() == pytest.approx(4, abs=3 * math.sqrt(4 / 297))
    probabilities = [math.exp(-4) * 4**k / math.factorial(k) for k in range(9)]
    for k, probability in enumerate(probabilities):
        expected = pytest.approx(probability, abs=4 * math.sqrt(probability / 297))
        assert (counts == k).mean() == expected


def test_the_first_call_is_on_the_newest_segments_and_the_others_on_stored_ones():
    _, _, replay, step, _ = acer_iteration()
    seen = []

    def train_step(policy, average, rmsprop, batch, *rest):
        seen.append(batch.obs)
        return {"loss": torch.tensor(0.0)}

    older = 0
    for _ in range(20):
        seen.clear()
        step(train_step)
        newest = replay.newest().obs
        assert torch.equal(seen[0], newest)
        slots = [replay.take(torch.full((4,), i)).obs for i in range(min(replay.count, 4))]
        for obs in seen[1:]:
            for n in range(4):
                assert any(torch.equal(obs[:, n], slot[:, n]) for slot in slots)
            older += not torch.equal(obs, newest)
    assert older > 20


def test_truncated_steps_take_v_of_the_final_observation_as_it_is_now():
    policy, average, args = make_acer((4,), 2, num_envs=1, num_steps=7, replay_ratio=0.0)
    envs = acer.Envs([gym.make("CartPole-v1", max_episode_steps=3)], [0])
    rng = torch.Generator().manual_seed(0)
    replay = acer.Replay(2, stacked=False)
    segment = acer.collect(envs, policy, draw_noise(policy, 7, 1))
    replay.add(segment)
    with torch.no_grad():
        for param in policy.parameters():
            param.mul_(1.5)  # the value is not cached
        expected = []
        for _, _, final in segment.finals:
            probs, q = policy(final[None])
            expected.append((probs * q).sum().item())
    seen = []

    def spy(*inputs):
        seen.append(inputs[4])
        return acer.minibatch_step(*inputs)

    rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()))
    acer.update(policy, average, rmsprop, spy, replay, rng, args)
    assert seen[0][[2, 5], 0].tolist() == pytest.approx(expected, rel=1e-4)
    assert seen[0].count_nonzero() == 2


# ---- Compiled ----


LEARNED = {"log_std_final": None, "surrogate": "kl-fixed"}
COMPILED_CASES = [
    pytest.param(ppo, {}, id="ppo_continuous"),
    pytest.param(ppo, LEARNED, id="ppo_continuous with learned σ"),
    pytest.param(trpo, {}, id="trpo_continuous"),
    pytest.param(ppo_atari, {}, id="ppo_atari"),
    pytest.param(ppo_atari, IMAGES | {"bf16": True}, id="ppo_atari images in bf16"),
    pytest.param(acer, {}, id="acer_discrete"),
]


def steps_to_compile(script, changes):
    """Modules, the other arguments of minibatch_step for each of four calls, and args."""
    if script is acer:
        policy, average, args = make_acer(compile="on", **changes)
        rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()))
        rmsprop.lr.fill_(1e-2)
        calls = []
        for seed in range(4):
            segment, final_values = make_segment(seed=seed)
            tensors = [x.float() if x.is_floating_point() else x for x in segment[:-1]]
            segment = acer.Segment(*tensors, finals=[])
            calls.append((segment, final_values.float(), args))
        return [policy, average, rmsprop], calls, args
    networks, rollout, _, args = first_rollout(script, compile="on", **changes)
    if script is trpo:
        critic = networks[1]
        _, returns, _ = advantages_of(trpo, networks, rollout, args)
        inputs = rollout.obs.flatten(0, 1).chunk(4)
        targets = returns.flatten().chunk(4)
        return [critic, make_adam(trpo, [critic])], list(zip(inputs, targets, strict=True)), args
    batch = make_batch(script, networks, rollout, args)
    extra = torch.tensor(extra_of(script, args))
    chunks = zip(*[x.chunk(4) for x in batch], strict=True)
    calls = [(script.Batch(*chunk), extra, args) for chunk in chunks]
    return [*networks, make_adam(script, networks)], calls, args


def to_device(value, device):
    """Move a tensor or a tuple of tensors. Other values stay."""
    if torch.is_tensor(value):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*[to_device(x, device) for x in value])
    return value


def compare_compiled_with_eager(script, changes, device, capsys):
    """Weights, state of the optimizer and metrics of the compiled step, and of the eager one."""
    modules, calls, args = steps_to_compile(script, changes)
    args = dataclasses.replace(args, device=device)
    modules = [module.to(device) for module in modules]
    eager = copy.deepcopy(modules)
    start = flat_copy(modules[0].parameters())
    compiled = script.compile_or_eager(script.minibatch_step, args)
    rough = "env_id" in changes  # images
    for call in calls:
        inputs = [to_device(x, device) for x in call]
        expected = script.minibatch_step(*eager, *inputs)
        metrics = compiled(*modules, *inputs)
        limits = {"rtol": 0.05, "atol": 4e-3} if rough else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(metrics, expected, **limits)
        if rough:
            continue
        for module, other in zip(modules, eager, strict=True):
            for name, value in module.state_dict().items():
                if torch.is_tensor(value):
                    theirs = other.state_dict()[name]
                    torch.testing.assert_close(value, theirs, rtol=1e-4, atol=1e-4)
    changes = [flat_copy(x[0].parameters()) - start for x in (modules, eager)]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > (0.9 if rough else 0.999)
    assert changes[1].abs().max() > 1e-4
    assert compiled is not script.minibatch_step
    assert "not compiled" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler with OpenMP")
@pytest.mark.parametrize("script, changes", COMPILED_CASES)
def test_compiled_step_equals_eager(script, changes, capsys):
    compare_compiled_with_eager(script, changes, "cpu", capsys)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script, changes", COMPILED_CASES)
def test_compiled_step_equals_eager_on_cuda(script, changes, capsys):
    compare_compiled_with_eager(script, changes, "cuda", capsys)


@each_script
def test_without_a_compiler_it_goes_on_uncompiled(script, monkeypatch, capsys):
    def broken(function, **options):
        def call(*inputs):
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    step = script.compile_or_eager(lambda x: {"x": x + 1}, script.Args(compile="on"))
    assert [step(1), step(2)] == [{"x": 2}, {"x": 3}]
    out = capsys.readouterr().out
    assert out.count("not compiled: no compiler here") == 1 and out.count("compiling") == 1


# ---- Iterations ----


def small_images(script, **changes):
    """Flags of a small run on images."""
    flags = {"env_id": "Catch-v0", "num_steps": 12, "hidden_sizes": (32,), "total_timesteps": 72}
    return make_args(script, **flags | changes)


@pytest.mark.parametrize("anneal", [True, False])
@each_script
def test_the_learning_rate_is_annealed_if_asked(script, anneal):
    args = make_args(script, total_timesteps=256, learning_rate=0.01, anneal_lr=anneal)
    rates = [metrics["learning_rate"] for metrics in script.GENERATOR(args)]
    assert rates == pytest.approx([0.01, 0.0075, 0.005, 0.0025] if anneal else [0.01] * 4)


@each_ppo
def test_gamma_is_annealed(script):
    rows = script.ppo(make_args(script, total_timesteps=256, gamma=0.9, gamma_final=0.99))
    assert [row["gamma"] for row in rows] == pytest.approx([0.9, 0.9225, 0.945, 0.9675])


@each_continuous
def test_sigma_is_annealed_on_a_line(script):
    args = make_args(script, total_timesteps=256, log_std_init=-1.0, log_std_final=-3.0)
    rows = list(script.GENERATOR(args))
    first, last = math.exp(-1), math.exp(-3)
    stds = [first + i / 4 * (last - first) for i in range(4)]
    if script is trpo:
        stds = [math.exp(-1 - 2 * i / 4) for i in range(4)]
    assert [row["action_std"] for row in rows] == pytest.approx(stds, rel=1e-5)


@each_continuous
def test_sigma_is_learned_if_not_annealed(script):
    args = make_args(script, total_timesteps=192, log_std_init=-0.3, log_std_final=None)
    state = {}
    stds = [metrics["action_std"] for metrics in script.GENERATOR(args, state)]
    (log_std,) = state["policy"]["log_std"].tolist()
    assert log_std != pytest.approx(-0.3, abs=1e-6) and log_std == pytest.approx(-0.3, abs=0.3)
    assert stds[0] == pytest.approx(math.exp(-0.3)) and len(set(stds)) == 3


@pytest.mark.parametrize("anneal", [True, False])
def test_the_clip_coefficient_is_annealed_if_asked(anneal):
    seen = []

    def compile_step(step):
        def spy(policy, adam, batch, eps_clip, args):
            seen.append(eps_clip.item())
            return step(policy, adam, batch, eps_clip, args)

        return spy

    args = make_args(ppo_atari, total_timesteps=192, clip_coef=0.3, anneal_clip=anneal)
    rows = list(ppo_atari.ppo(args, {}, compile_step))
    expected = [0.3, 0.2, 0.1] if anneal else [0.3] * 3
    assert [row["clip_coef"] for row in rows] == pytest.approx(expected)
    assert seen == pytest.approx([eps for eps in expected for _ in range(8)])


@each_ppo
def test_the_gamma_of_the_iteration_scales_rewards_and_discounts_them(script, monkeypatch):
    used = {"gae": [], "rolling_discounted_sums": []}
    for name in used:
        original = getattr(script, name)

        def spy(*inputs, name=name, original=original):
            used[name].append(inputs[5 if name == "gae" else 3])
            return original(*inputs)

        monkeypatch.setattr(script, name, spy)
    args = make_args(script, total_timesteps=128, gamma=0.998, gamma_final=0.9997)
    gammas = [metrics["gamma"] for metrics in script.ppo(args)]
    assert gammas == pytest.approx([0.998, 0.99885])
    assert used["rolling_discounted_sums"] == gammas and sorted(set(used["gae"])) == gammas


def test_the_penalty_adapts_from_one_iteration_to_the_next():
    flags = {"surrogate": "kl-adaptive", "anneal_lr": False}
    betas = []

    def compile_step(step):
        def spy(policy, critic, adam, batch, beta, args):
            betas.append(beta.item())
            return step(policy, critic, adam, batch, beta, args)

        return spy

    args = make_args(ppo, total_timesteps=192, kl_target=1e-9, **flags)
    rows = list(ppo.ppo(args, {}, compile_step))
    assert sorted(set(betas)) == [1.0, 2.0, 4.0]
    assert [row["kl_coef"] for row in rows] == [1.0, 2.0, 4.0]
    low = make_args(ppo, total_timesteps=64 * 40, kl_target=1e9, update_epochs=1, **flags)
    last = list(ppo.ppo(low))[-1]["kl_coef"]
    assert last == 1e-8  # it can still grow


def test_log_pi_old_is_that_of_the_policy_which_acted(monkeypatch):
    """From iteration 2 on: a = μ + σ ε, so log π_old depends on ε and σ alone."""
    noises = []
    logps = []
    randn = torch.randn

    def spy_noise(*shape, **kwargs):
        noises.append(randn(*shape, **kwargs))
        return noises[-1]

    def compile_step(step):
        def spy(policy, critic, adam, batch, *rest):
            logps.append(batch.logp_old)
            return step(policy, critic, adam, batch, *rest)

        return spy

    args = make_args(ppo, total_timesteps=192, update_epochs=1)
    monkeypatch.setattr(torch, "randn", spy_noise)
    stds = [row["action_std"] for row in ppo.ppo(args, {}, compile_step)]
    for i in (1, 2):
        noise = noises[i].flatten(0, 1)
        log_std = math.log(stds[i])
        expected = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_std
        given = torch.cat(logps[4 * i : 4 * (i + 1)])
        torch.testing.assert_close(given.sort().values, expected.sort().values)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Catch-v0"])
def test_pi_old_of_discrete_actions_is_the_policy_which_acted(monkeypatch, env_id):
    """From iteration 2 on: in iteration 1 the statistics come between."""
    acted = []
    used = []
    collect = ppo_atari.collect

    def spy_collect(envs, policy, noise):
        raw = collect(envs, policy, noise)
        with torch.no_grad():
            logits, _ = policy(raw.obs)
        acted.append(ppo_atari.categorical_logp(logits, raw.actions).flatten())
        return raw

    def compile_step(step):
        def spy(policy, adam, batch, *rest):
            used.append(batch.logp_old)
            return step(policy, adam, batch, *rest)

        return spy

    monkeypatch.setattr(ppo_atari, "collect", spy_collect)
    args = make_args(ppo_atari, env_id=env_id, hidden_sizes=(32,), total_timesteps=192)
    args = dataclasses.replace(args, update_epochs=1, learning_rate=1e-2)
    list(ppo_atari.ppo(args, {}, compile_step))
    for i in range(3):
        given = torch.cat(used[4 * i : 4 * (i + 1)]).sort().values
        assert torch.allclose(given, acted[i].sort().values, atol=1e-5) == (i > 0)


@pytest.mark.parametrize("norm_obs", [True, False])
def test_pixel_statistics_count_each_frame_once_and_follow_the_update(monkeypatch, norm_obs):
    """In the first iteration they come before the update."""
    counts = []
    means = []
    frames = []
    update = ppo_atari.update
    collect = ppo_atari.collect

    def spy_update(policy, *rest):
        counts.append(policy.obs_stats.count)
        means.append(policy.pixel_mean.clone())
        return update(policy, *rest)

    def spy_collect(*inputs):
        raw = collect(*inputs)
        frames.append(raw.obs[::4].flatten(0, 1).double())  # stacks of four frames
        return raw

    monkeypatch.setattr(ppo_atari, "update", spy_update)
    monkeypatch.setattr(ppo_atari, "collect", spy_collect)
    args = small_images(ppo_atari, env_id="ALE/Pong-v5", norm_obs=norm_obs)
    state = {}
    list(ppo_atari.ppo(args, state))
    assert counts == ([6, 6, 12] if norm_obs else [0, 0, 0])  # 2 games, 12 steps
    if not norm_obs:
        assert not state["policy"]["pixel_mean"].any()
        return
    means.append(state["policy"]["pixel_mean"])
    for mean, seen in zip(means, (frames[:1], frames[:1], frames[:2], frames), strict=True):
        expected = torch.cat(seen).mean(0)
        torch.testing.assert_close(mean.double(), expected, atol=1e-3, rtol=1e-5)
    std = torch.cat(frames).std(0, correction=0).clamp(min=1)
    torch.testing.assert_close(state["policy"]["pixel_std"].double(), std, atol=1e-3, rtol=1e-5)


def test_kl_iteration_is_the_kl_between_the_policies_before_and_after(monkeypatch):
    """All that changes π counts: the step, the statistics of observations, the annealing of σ."""
    before = []
    states = []
    collect = trpo.collect

    def spy(envs, policy, *rest):
        before.append(copy.deepcopy(policy))
        raw = collect(envs, policy, *rest)
        states.append(raw.obs)
        return raw

    monkeypatch.setattr(trpo, "collect", spy)
    args = make_args(trpo, total_timesteps=256)
    state = {}
    after = trpo.Policy((3,), gym.make("Pendulum-v1").action_space, args)
    larger = []
    for metrics in trpo.trpo(args, state):
        after.load_state_dict(state["policy"])
        old, new = [distribution(*policy(states[-1])) for policy in (before[-1], after)]
        kl = mean_kl(old, new)
        assert metrics["kl_iteration"] == pytest.approx(kl, rel=1e-3, abs=1e-6)
        larger.append(abs(kl - metrics["approx_kl"]) > 1e-5)
    assert any(larger)  # the step alone is not all


def test_rejected_steps_are_counted_and_the_trust_region_holds(monkeypatch):
    original = trpo.gaussian_kl
    calls = []

    def sometimes_too_far(*inputs):
        calls.append(1)
        return original(*inputs) + (1 if len(calls) <= 11 else 0)  # the first line search

    monkeypatch.setattr(trpo, "gaussian_kl", sometimes_too_far)
    args = make_args(trpo, total_timesteps=640, return_floor=0.0)
    rows = list(trpo.trpo(args))
    assert rows[0]["rejected"] == 1 and rows[0]["step_fraction"] == 0
    assert abs(rows[0]["approx_kl"]) < 1e-6
    assert {row["max_kl"] for row in rows} == {args.max_kl}
    assert all(-1e-6 <= row["approx_kl"] <= args.max_kl * (1 + 1e-6) for row in rows)
    assert np.mean([row["rejected"] for row in rows[1:]]) < 0.5
    assert max(row["approx_kl"] for row in rows) > 0.1 * args.max_kl


def test_acer_keeps_the_average_policy_apart(monkeypatch):
    seen = []
    original = acer.update

    def spy(policy, average, *rest):
        same = torch.equal(flat_copy(policy.parameters()), flat_copy(average.parameters()))
        places = [{p.data_ptr() for p in net.parameters()} for net in (policy, average)]
        assert not places[0] & places[1]
        assert not any(p.requires_grad for p in average.parameters())
        seen.append(same)
        return original(policy, average, *rest)

    monkeypatch.setattr(acer, "update", spy)
    state = {}
    list(acer.acer(make_args(acer, total_timesteps=256), state))
    assert seen == [True, False, False, False]
    assert state["average"].keys() == state["policy"].keys()


@pytest.mark.parametrize("flags", [{}, {"trust_region": False}, {"bias_correction": False}])
@pytest.mark.parametrize("replay_ratio", [0.0, 4])
def test_acer_trains_with_each_of_its_ablations(flags, replay_ratio):
    args = make_args(acer, total_timesteps=640, replay_ratio=replay_ratio, **flags)
    state = {}
    rows = list(acer.acer(args, state))
    assert len(rows) == 10 and 5 < rows[-1]["episodic_return"] < 100
    assert ("approx_kl" in rows[0]) == ("average" in state) == args.trust_region
    replays = sum(row["replay_updates"] for row in rows)
    assert (replays > 0) == (replay_ratio > 0)
    assert all(math.isfinite(row["value_loss"]) for row in rows)


def test_acer_learns_from_the_sign_of_rewards_if_asked(monkeypatch):
    stored = []
    add = acer.Replay.add
    monkeypatch.setattr(acer.Replay, "add", lambda *x: stored.append(x[1].rewards) or add(*x))
    for clip in (True, False):
        stored.clear()
        args = small_images(acer, env_id="CutCatch-v0", clip_rewards=clip)
        rows = list(acer.acer(args))
        scale = 1.0 if clip else 5.0
        assert set(torch.cat(stored).flatten().tolist()) == {0.0, scale, -scale}
        total = torch.cat(stored).sum().item() * 5 / scale
        assert rows[-1]["episodic_return"] == pytest.approx(total / 12)  # of 72 / 6 episodes


CUDA_CASES = [
    *[pytest.param(script, {}, id=script.ALGORITHM) for script in CONTINUOUS + DISCRETE],
    *[pytest.param(script, IMAGES, id=f"{script.ALGORITHM} images") for script in DISCRETE],
]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("script, changes", CUDA_CASES)
def test_a_run_on_cuda_does_what_one_on_the_cpu_does(script, changes, monkeypatch):
    starts = []
    update = script.update

    def spy(policy, *rest):
        starts.append(flat_copy(policy.parameters()).cpu())
        return update(policy, *rest)

    monkeypatch.setattr(script, "update", spy)
    learned = []
    episodes = []
    for device in ("cpu", "cuda"):
        starts.clear()
        args = make_args(script, device=device, total_timesteps=128, **changes)
        state = {}
        list(script.GENERATOR(args, state))
        learned.append(starts[1] - starts[0])  # of the first iteration
        episodes.append(state["episodes"])
    assert torch.nn.functional.cosine_similarity(*learned, dim=0) > 0.9
    assert learned[0].abs().max() > 1e-4
    if script in DISCRETE:  # Pendulum's first episode is longer
        assert episodes[0] == episodes[1] != []  # the same actions in the same episodes

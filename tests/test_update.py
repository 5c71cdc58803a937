"""One iteration: loss, gradient step, epochs of minibatches, schedules."""

import copy
import math
import sys

import pytest
import torch
from conftest import each_continuous, first_networks, make_args

import ppo_continuous as ppo


def make_iteration(**changes):
    policy, critic, rollout, rng, args = first_networks(ppo, **changes)
    adam = ppo.Adam(sum(p.numel() for net in (policy, critic) for p in net.parameters()))
    adam.lr.fill_(1e-2)
    return policy, critic, adam, rollout, rng, args


def make_batch(policy, critic, rollout):
    """A batch whose π_old is not quite the policy."""
    mean, log_std = (x.detach() for x in policy.mean_and_log_std(rollout.obs))
    mean = mean + 0.01
    log_std = (log_std - 0.1).expand_as(mean)
    logp = ppo.gaussian_logp(mean, log_std, rollout.actions)
    adv, returns, values = ppo.advantages(critic, rollout, 0.99, ppo.Args())
    fields = (rollout.obs, rollout.actions, mean, log_std, logp, values, adv, returns)
    return ppo.Batch(*(x.flatten(0, 1) for x in fields))


def run_update(policy, critic, adam, step, rollout, rng, args, beta=1.0):
    return ppo.update(policy, critic, adam, step, rollout, args.gamma, beta, rng, args)


@pytest.mark.parametrize("iteration", [1, 2])
def test_ratio_is_one_and_kl_zero_on_the_first_minibatch(iteration):
    seen = []

    def compile_step(step):
        def spy(policy, critic, adam, batch, *rest):
            logp = ppo.gaussian_logp(*policy.mean_and_log_std(batch.inputs), batch.actions)
            ratio = (logp - batch.logp_old).exp()
            metrics = step(policy, critic, adam, batch, *rest)
            seen.append((ratio.sub(1).abs().max().item(), metrics["approx_kl"].item()))
            return metrics

        return spy

    args = make_args(ppo, total_timesteps=128, learning_rate=1e-2, anneal_lr=False)
    list(ppo.ppo(args, {}, compile_step))
    per_iteration = args.update_epochs * args.num_minibatches
    mine = seen[(iteration - 1) * per_iteration : iteration * per_iteration]
    assert mine[0][0] < 1e-5 and abs(mine[0][1]) < 1e-6
    assert mine[-1][0] > 1e-3 and mine[-1][1] > 1e-6  # the spy would see a difference


@pytest.mark.parametrize("surrogate", ["clip", "kl-adaptive", "kl-fixed", "none"])
@pytest.mark.parametrize("clip_vloss", [False, True])
def test_ppo_eq9_the_loss_is_minus_the_objective(surrogate, clip_vloss):
    flags = {"surrogate": surrogate, "clip_vloss": clip_vloss}
    policy, critic, _, rollout, _, args = make_iteration(ent_coef=0.1, log_std_final=None, **flags)
    batch = make_batch(policy, critic, rollout)
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


@pytest.mark.parametrize("max_grad_norm", [1e-3, math.inf])
def test_minibatch_step_is_adam_on_gradients_clipped_by_network(max_grad_norm):
    policy, critic, adam, rollout, _, args = make_iteration(
        log_std_final=None, max_grad_norm=max_grad_norm
    )
    batch, beta = make_batch(policy, critic, rollout), torch.tensor(1.0)
    nets = copy.deepcopy((policy, critic))
    params = [p for net in nets for p in net.parameters()]
    optimizer = torch.optim.Adam(params, lr=1e-2, eps=1e-5)
    for _ in range(3):
        loss, _ = ppo.ppo_loss(*nets, batch, beta, args)
        optimizer.zero_grad()
        loss.backward()
        norms = [torch.nn.utils.clip_grad_norm_(n.parameters(), max_grad_norm) for n in nets]
        optimizer.step()
        metrics = ppo.minibatch_step(policy, critic, adam, batch, beta, args)
        torch.testing.assert_close(metrics["policy_grad_norm"], norms[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(metrics["value_grad_norm"], norms[1], rtol=1e-3, atol=1e-5)
        assert not any(value.requires_grad for value in metrics.values())
        for net, other in zip((policy, critic), nets, strict=True):
            mine, theirs = list(net.parameters()), list(other.parameters())
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_update_visits_every_sample_once_an_epoch():
    policy, critic, adam, rollout, rng, args = make_iteration(update_epochs=3)
    seen = []
    adv, returns, values = ppo.advantages(critic, rollout, args.gamma, args)
    facts = (rollout.obs.sum(-1), rollout.actions.sum(-1), values, adv, returns)
    samples = torch.stack([x.flatten() for x in facts], 1)  # (B, 5)

    def spy(policy, critic, adam, batch, *rest):
        if len(seen) < args.num_minibatches:  # later epochs have other advantages
            facts = (batch.inputs.sum(-1), batch.actions.sum(-1), batch.values_old)
            rows = torch.stack([*facts, batch.adv, batch.returns], 1)
            distance = (rows[:, None] - samples[None]).abs().sum(-1)  # (M, B)
            assert distance.min(1).values.max() < 1e-4  # a row belongs to one sample as a whole
        seen.append(batch.logp_old)
        return ppo.minibatch_step(policy, critic, adam, batch, *rest)

    run_update(policy, critic, adam, spy, rollout, rng, args)
    assert len(seen) == 3 * args.num_minibatches
    epochs = torch.cat(seen).view(3, -1)
    assert torch.equal(epochs[0].sort().values, epochs[2].sort().values)
    assert not torch.equal(epochs[0], epochs[2])
    assert len(epochs[0].unique()) > 0.9 * args.batch_size


def test_metrics_are_means_over_all_minibatches():
    policy, critic, adam, rollout, rng, args = make_iteration(update_epochs=3)
    seen = []

    def spy(*inputs):
        seen.append(ppo.minibatch_step(*inputs))
        return seen[-1]

    before = copy.deepcopy(policy)
    metrics = run_update(policy, critic, adam, spy, rollout, rng, args)
    for name in seen[0]:
        mean = sum(step[name].item() for step in seen) / len(seen)
        assert metrics[name] == pytest.approx(mean, rel=1e-4, abs=1e-6)
    old, new = before.mean_and_log_std(rollout.obs), policy.mean_and_log_std(rollout.obs)
    kl = ppo.gaussian_kl(*old, *new).mean()
    assert metrics["kl"] == pytest.approx(kl.item(), rel=1e-4) and metrics["kl"] > 1e-4
    assert metrics["action_std"] == pytest.approx(math.exp(-1))


@pytest.mark.parametrize(
    "scale, floor, norm_reward",
    [(1.0, 0.1, True), (1e-3, 0.1, True), (1e-3, 0.0, True), (1e-3, 0.1, False)],
)
def test_the_learning_rate_shrinks_where_returns_hardly_differ(scale, floor, norm_reward):
    policy, critic, adam, rollout, rng, args = make_iteration(
        return_floor=floor, norm_reward=norm_reward
    )
    with torch.no_grad():
        critic.value_net[-1].weight.zero_()
    rollout = rollout._replace(rewards=scale * rollout.rewards)
    _, returns, _ = ppo.advantages(critic, rollout, args.gamma, args)
    std, rate, rates = returns.std().item(), adam.lr.item(), []

    def spy(policy, critic, adam, *rest):
        rates.append(adam.lr.item())
        return ppo.minibatch_step(policy, critic, adam, *rest)

    run_update(policy, critic, adam, spy, rollout, rng, args)
    small = scale < 1 and floor > 0 and norm_reward
    assert (std < floor) == (scale < 1 and floor > 0)
    expected = rate * (std / floor) ** 2 if small else rate
    assert rates == pytest.approx([expected] * 2 * args.num_minibatches, rel=1e-3)


def test_the_learning_rate_shrinks_from_its_schedule_in_each_iteration():
    """The factor of one iteration does not carry over to the next."""
    args = make_args(ppo, total_timesteps=640, return_floor=1e3, anneal_lr=False)
    rates = [metrics["learning_rate"] for metrics in ppo.ppo(args)]
    assert max(rates) < 1e-4 * args.learning_rate and min(rates) > 1e-9 * args.learning_rate
    assert max(rates) < 100 * min(rates)


def test_advantages_are_recomputed_only_if_asked(monkeypatch):
    calls, original = [], ppo.advantages
    monkeypatch.setattr(ppo, "advantages", lambda *x: calls.append(1) or original(*x))
    for flag, count in ((True, 2), (False, 1)):
        parts = make_iteration(recompute_advantages=flag)
        policy, critic, adam, rollout, rng, args = parts
        calls.clear()
        run_update(policy, critic, adam, ppo.minibatch_step, rollout, rng, args)
        assert len(calls) == count


@each_continuous
def test_normalized_advantages_do_not_depend_on_the_scale_of_rewards(script):
    _, critic, rollout, _, args = first_networks(script, norm_adv=True)
    with torch.no_grad():
        for param in critic.value_net[-1].parameters():
            param.zero_()
    adv, _, _ = script.advantages(critic, rollout, args.gamma, args)
    larger = rollout._replace(rewards=10 * rollout.rewards)
    scaled, _, _ = script.advantages(critic, larger, args.gamma, args)
    torch.testing.assert_close(adv, scaled, rtol=1e-4, atol=1e-5)
    assert adv.mean().abs() < 1e-5 and adv.std().item() == pytest.approx(1, abs=1e-4)


# ---- Compiled ----


def compare_compiled_with_eager(device, capsys, **changes):
    """Weights, state of Adam and metrics of the compiled step, beside those of the eager one."""
    policy, critic, adam, rollout, _, args = make_iteration(compile="on", device=device, **changes)
    batch = ppo.Batch(*(x.to(device) for x in make_batch(policy, critic, rollout)))
    nets, beta = [net.to(device) for net in (policy, critic, adam)], torch.tensor(1.0).to(device)
    eager = copy.deepcopy(nets)
    compiled = ppo.compile_or_eager(ppo.minibatch_step, args)
    for chunk in zip(*(x.chunk(4) for x in batch), strict=True):
        minibatch = ppo.Batch(*chunk)
        expected = ppo.minibatch_step(*eager, minibatch, beta, args)
        metrics = compiled(*nets, minibatch, beta, args)
        torch.testing.assert_close(metrics, expected, rtol=1e-4, atol=1e-5)
        for net, other in zip(nets, eager, strict=True):
            for name, value in net.state_dict().items():
                if torch.is_tensor(value):
                    mine, theirs = value, other.state_dict()[name]
                    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert compiled is not ppo.minibatch_step
    assert "not compiled" not in capsys.readouterr().out


@pytest.mark.skipif(sys.platform != "linux", reason="needs a C++ compiler with OpenMP")
@pytest.mark.parametrize("changes", [{}, {"log_std_final": None, "surrogate": "kl-fixed"}])
def test_compiled_step_equals_eager(capsys, changes):
    compare_compiled_with_eager("cpu", capsys, **changes)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_compiled_step_equals_eager_on_cuda(capsys):
    compare_compiled_with_eager("cuda", capsys)


@each_continuous
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


def test_schedules():
    flags = {"gamma": 0.9, "gamma_final": 0.99, "learning_rate": 0.01, "return_floor": 0}
    args = make_args(ppo, total_timesteps=256, **flags)
    rows = list(ppo.ppo(args))
    assert [row["learning_rate"] for row in rows] == pytest.approx([0.01, 0.0075, 0.005, 0.0025])
    assert [row["gamma"] for row in rows] == pytest.approx([0.9, 0.9225, 0.945, 0.9675])
    first, last = math.exp(args.log_std_init), math.exp(args.log_std_final)
    stds = [first + i / 4 * (last - first) for i in range(4)]
    assert [row["action_std"] for row in rows] == pytest.approx(stds, rel=1e-5)


def test_the_gamma_of_the_iteration_scales_rewards_and_discounts_them(monkeypatch):
    used = {"gae": [], "rolling_discounted_sums": []}
    for name in used:
        original = getattr(ppo, name)

        def spy(*inputs, name=name, original=original):
            used[name].append(inputs[5 if name == "gae" else 3])
            return original(*inputs)

        monkeypatch.setattr(ppo, name, spy)
    args = make_args(ppo, total_timesteps=128, gamma=0.998, gamma_final=0.9997)
    gammas = [metrics["gamma"] for metrics in ppo.ppo(args)]
    assert gammas == pytest.approx([0.998, 0.99885])
    assert used["rolling_discounted_sums"] == gammas and sorted(set(used["gae"])) == gammas


def test_the_penalty_adapts_from_one_iteration_to_the_next():
    flags = {"surrogate": "kl-adaptive", "anneal_lr": False, "return_floor": 0}
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
    noises, logps = [], []
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
        noise = torch.cat(noises[32 * i : 32 * (i + 1)])
        log_std = math.log(stds[i])
        expected = -0.5 * (noise.square() + math.log(2 * math.pi)).sum(-1) - log_std
        given = torch.cat(logps[4 * i : 4 * (i + 1)])
        torch.testing.assert_close(given.sort().values, expected.sort().values)

"""acer_discrete.py: its equations, its replay memory, the flow of its data, and that it learns."""

import copy
import dataclasses
import json
import math
import os
import signal
import sys
from functools import partial
from pathlib import Path

import catch  # noqa: F401  registers Catch-v0
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import fingerprint

import acer_discrete as acer
from acer_discrete import Args, train

SCRIPT = Path(acer.__file__)
SMALL = {"num_envs": 4, "num_steps": 5, "replay_start": 20, "replay_capacity": 50, "compile": "off", "eval_episodes": 0}

# ---- Equations -------------------------------------------------------------------------------------------------------

# worked out by hand-written formulas in float64: γ = 0.9, c = 2, δ = 0.1, one environment, four steps, three actions
LOGITS = torch.tensor(
    [[0.5, -0.2, 0.1], [1, 0, -1], [-0.3, 0.8, 0.2], [0, 0.4, -0.6], [0.3, 0.3, -0.2]], dtype=torch.float64
)
AVG = torch.tensor([[0.2, 0.1, 0], [0.4, 0.3, -0.5], [-0.6, 1, 0.1], [-0.5, 0.6, -0.4]], dtype=torch.float64).softmax(
    -1
)
Q = torch.tensor(
    [[1, 0.2, -0.5], [0.3, 0.8, 0], [-0.2, 0.6, 0.4], [0.9, -0.1, 0.5], [0.7, 0.4, 0.1]], dtype=torch.float64
)
MU = torch.tensor([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]], dtype=torch.float64)
ACTIONS, REWARDS = torch.tensor([1, 0, 2, 0]), torch.tensor([1, -0.5, -2, 2], dtype=torch.float64)
PROBS = LOGITS.softmax(-1)
VALUES = (PROBS * Q).sum(-1)


def taken(x, actions=ACTIONS):
    return x.gather(-1, actions[..., None])[..., 0]


def vector_retrace(terminated=None, truncated=None, final=None):
    ends = torch.zeros(2, 4, dtype=torch.bool)
    next_values = VALUES[1:].clone()
    if terminated is not None:
        ends[0, terminated] = True
    if truncated is not None:
        ends[1, truncated], next_values[truncated] = True, final
    inputs = (REWARDS, taken(Q[:4]), next_values, taken(PROBS[:4] / (MU + acer.EPS)), ends[0], ends.any(0))
    return acer.retrace(*(x[:, None] for x in inputs), gamma=0.9)[:, 0]


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, [0.56095864, -0.62932648, -0.34586134, 2.4007579]),
        ({"terminated": 1}, [0.67157269, -0.5, -0.34586134, 2.4007579]),
        ({"truncated": 1, "final": 0.37}, [0.95639045, -0.167, -0.34586134, 2.4007579]),
        ({"terminated": 3}, [0.35851424, -0.86601814, -0.70654345, 2.0]),
    ],
)
def test_acer_eq5_retrace_worked_example(flags, expected):
    torch.testing.assert_close(vector_retrace(**flags), torch.tensor(expected, dtype=torch.float64), atol=1e-7, rtol=0)


def random_returns(seed, steps=7, envs=3):
    generator = torch.Generator().manual_seed(seed)
    rewards, q_taken, next_values = torch.randn(3, steps, envs, generator=generator, dtype=torch.float64)
    rho = 2 * torch.rand(steps, envs, generator=generator, dtype=torch.float64)
    terminated, truncated = torch.rand(2, steps, envs, generator=generator) < 0.2
    return rewards, q_taken, next_values, rho, terminated, terminated | truncated


def test_acer_eq5_retrace_is_the_sum_over_cut_traces():
    for seed in range(5):
        rewards, q_taken, next_values, rho, terminated, done = random_returns(seed)
        got = acer.retrace(rewards, q_taken, next_values, rho, terminated, done, 0.9)
        for t in range(7):
            for n in range(3):
                total, trace = q_taken[t, n].item(), 1.0
                for k in range(t, 7):
                    trace *= 0.9 * min(1.0, rho[k, n].item()) if k > t else 1.0
                    v = 0.0 if terminated[k, n] else next_values[k, n].item()
                    total += trace * (rewards[k, n].item() + 0.9 * v - q_taken[k, n].item())
                    if done[k, n]:
                        break
                assert got[t, n].item() == pytest.approx(total, abs=1e-12)


def test_retrace_eq3_special_cases():
    rewards, q_taken, next_values, rho, terminated, _ = random_returns(0)
    never = torch.zeros_like(terminated)
    one_step = acer.retrace(rewards, q_taken, next_values, 0 * rho, never, never, 0.9)
    torch.testing.assert_close(one_step, rewards + 0.9 * next_values)  # no trace: one-step targets
    q_taken[1:] = next_values[:-1]  # V(s) = Q(s, a): with weights of 1 or more, the n-step return
    returns = acer.retrace(rewards, q_taken, next_values, 1 + rho, never, never, 0.9)
    expected = next_values[-1]
    for t in reversed(range(7)):
        expected = rewards[t] + 0.9 * expected
        torch.testing.assert_close(returns[t], expected)
    torch.testing.assert_close(acer.retrace(rewards, q_taken, next_values, 5 + rho, never, never, 0.9), returns)
    td_lambda = acer.retrace(rewards, q_taken, next_values, torch.full_like(rho, 0.7), never, never, 0.9)
    expected = next_values[-1]  # weights of λ: the λ-return of TD(λ)
    for t in reversed(range(7)):
        expected = rewards[t] + 0.9 * (0.3 * next_values[t] + 0.7 * expected)
        torch.testing.assert_close(td_lambda[t], expected)


def test_retrace_contracts_to_q_of_the_policy_whatever_the_behaviour():
    """Tabular, over all trajectories of two steps, weighted by μ: T Q^π = Q^π and ‖T Q - Q^π‖ ≤ γ ‖Q - Q^π‖."""
    generator = torch.Generator().manual_seed(0)
    states, actions, gamma = 4, 3, 0.8
    transition = torch.rand(states, actions, states, generator=generator, dtype=torch.float64)
    transition /= transition.sum(-1, keepdim=True)
    reward = torch.randn(states, actions, generator=generator, dtype=torch.float64)
    pi, mu = torch.randn(2, states, actions, generator=generator, dtype=torch.float64).softmax(-1)
    matrix = (transition[:, :, :, None] * pi).reshape(states * actions, states * actions)  # to (s', a')
    q_pi = torch.linalg.solve(torch.eye(states * actions, dtype=torch.float64) - gamma * matrix, reward.flatten())
    q_pi = q_pi.view(states, actions)

    def operator(q):
        v = (pi * q).sum(-1)
        # s, a -> s2, a2 -> s3: one column for each trajectory
        s, a, s2, a2, s3 = (x.flatten() for x in torch.meshgrid(
            *(torch.arange(n) for n in (states, actions, states, actions, states)), indexing="ij"
        ))  # fmt: skip
        never = torch.zeros(2, len(s), dtype=torch.bool)
        first = acer.retrace(
            torch.stack([reward[s, a], reward[s2, a2]]), torch.stack([q[s, a], q[s2, a2]]), torch.stack([v[s2], v[s3]]),
            torch.stack([torch.ones(len(s), dtype=torch.float64), (pi / mu)[s2, a2]]), never, never, gamma,
        )[0]  # fmt: skip
        weight = transition[s, a, s2] * mu[s2, a2] * transition[s2, a2, s3]
        return (weight * first).view(states, actions, -1).sum(-1)

    torch.testing.assert_close(operator(q_pi), q_pi)
    for _ in range(20):
        error = 3 * torch.randn(states, actions, generator=generator, dtype=torch.float64)
        assert (operator(q_pi + error) - q_pi).abs().max() <= gamma * error.abs().max()


def objective(logits, q, q_ret, actions, mu, c, beta, eps):
    """ACER eq. 9 with everything but log π detached, per state."""
    probs = logits.softmax(-1)
    f = probs.detach()
    v, rho, log_pi = (f * q).sum(-1), f / (mu + eps), (probs + eps).log()
    first = taken(rho, actions).clamp(max=c) * (q_ret - v) * taken(log_pi, actions)
    second = ((1 - c / (rho + eps)).clamp(min=0) * f * (q - v[:, None]) * log_pi).sum(-1)
    entropy = -(probs * log_pi).sum(-1)
    return first + second + beta * entropy


@pytest.mark.parametrize("c", [0.5, 1.0, 10.0, 1e9])
@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_acer_eq9_gradient_is_that_of_autograd(c, beta):
    generator = torch.Generator().manual_seed(1)
    logits, q = torch.randn(2, 50, 4, generator=generator, dtype=torch.float64)
    mu = (2 * torch.randn(50, 4, generator=generator, dtype=torch.float64)).softmax(-1)
    actions, q_ret = torch.randint(4, (50,), generator=generator), torch.randn(50, dtype=torch.float64)
    g = acer.acer_gradient(logits.softmax(-1), q, q_ret, actions, mu, c, beta)
    probs = logits.softmax(-1)
    by_logits = probs * (g - (probs * g).sum(-1, keepdim=True))  # Jᵀ g
    logits.requires_grad_()
    value = objective(logits, q, q_ret, actions, mu, c, beta, acer.EPS).sum()
    torch.testing.assert_close(by_logits, torch.autograd.grad(value, logits)[0], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0, 1e6])
def test_acer_eq9_gradient_is_unbiased_for_every_truncation(monkeypatch, c):
    """With exact Q the mean over a ~ μ is the gradient of Σ_a π(a) Q(a)."""
    monkeypatch.setattr(acer, "EPS", 0.0)
    generator = torch.Generator().manual_seed(2)
    logits, q = torch.randn(2, 1, 4, generator=generator, dtype=torch.float64)
    mu, probs = (2 * torch.randn(1, 4, generator=generator, dtype=torch.float64)).softmax(-1), logits.softmax(-1)
    mean = sum(mu[0, a] * acer.acer_gradient(probs, q, q[:, a], torch.tensor([a]), mu, c, 0.0) for a in range(4))
    pulled = probs * (mean - (probs * mean).sum(-1, keepdim=True))
    logits.requires_grad_()
    (expected,) = torch.autograd.grad((logits.softmax(-1) * q).sum(), logits)
    torch.testing.assert_close(pulled, expected)


def test_acer_section33_kl_gradient_is_that_of_autograd():
    avg, probs = torch.randn(2, 30, 5, dtype=torch.float64).softmax(-1)
    k = acer.kl_gradient(avg, probs)
    f = probs.clone().requires_grad_()
    kl = (avg * (avg / (f + acer.EPS)).log()).sum()  # KL(average ‖ π)
    torch.testing.assert_close(k, torch.autograd.grad(kl, f)[0])
    torch.testing.assert_close(probs * (k - (probs * k).sum(-1, keepdim=True)), probs - avg, atol=1e-4, rtol=1e-4)
    assert k.square().sum(-1).min() >= 1 - 1e-4


def test_acer_eq11_eq12_trust_region_step_is_the_projection():
    generator = torch.Generator().manual_seed(0)
    g, k = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    z, delta = acer.trust_region_step(g, k, 0.1), 0.1
    slack = (k * z).sum(-1) - delta
    multiplier = ((g - z) * k).sum(-1) / k.square().sum(-1)
    assert slack.max() < 1e-12 and multiplier.min() > -1e-12 and (multiplier * slack).abs().max() < 1e-12
    torch.testing.assert_close(g - z, multiplier[:, None] * k)
    assert 5 < (multiplier > 0).sum() < 35
    for _ in range(200):  # no feasible point is nearer to g
        other = z + 0.3 * torch.randn(z.shape, generator=generator, dtype=torch.float64)
        feasible = (k * other).sum(-1) <= delta
        assert ((other - g).norm(dim=-1) >= (z - g).norm(dim=-1) - 1e-12)[feasible].all()


@pytest.mark.parametrize(
    "beta, row1, row2",
    [
        (0.0, [0.08878414, -0.06417616, -0.02460798], [-0.01441573, -0.09181919, 0.10623492]),
        (0.01, [0.08923257, -0.06436531, -0.02486726], [-0.01475298, -0.09130317, 0.10605615]),
    ],
)
def test_acer_actor_worked_example(beta, row1, row2):
    g = acer.acer_gradient(PROBS[:4], Q[:4], vector_retrace(), ACTIONS, MU, 2.0, beta)
    k = acer.kl_gradient(AVG, PROBS[:4])
    if beta == 0:
        expected = torch.tensor([-0.67258737, 0.95199251, 1.47050387, -4.0935183], dtype=torch.float64)
        torch.testing.assert_close((k * g).sum(-1), expected, atol=1e-7, rtol=0)
    z = acer.trust_region_step(g, k, 0.1)
    loss = -PROBS[:4] * (z - (PROBS[:4] * z).sum(-1, keepdim=True)) / 4  # of the mean over four states, by the logits
    torch.testing.assert_close(loss[1:3], torch.tensor([row1, row2], dtype=torch.float64), atol=1e-7, rtol=0)


# ---- Networks --------------------------------------------------------------------------------------------------------


def make_policy(obs_shape=(3,), num_actions=4, seed=0, **flags):
    torch.manual_seed(seed)
    args = Args(**{"hidden_sizes": (8,), "cnn_hidden": 16, "orthogonal_init": False, **flags})
    return acer.Policy(obs_shape, gym.spaces.Discrete(num_actions), args), args


def test_network_follows_the_observation_space():
    separate, _ = make_policy()
    shared, _ = make_policy(shared_trunk=True)
    images, _ = make_policy((4, 84, 84), cnn_hidden=512)
    size = lambda policy: sum(p.numel() for p in policy.parameters())  # noqa: E731
    assert size(separate) == 2 * (4 * 8 + 9 * 4) and size(shared) == 4 * 8 + 2 * 9 * 4
    convolutions = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64
    assert size(images) == convolutions + (64 * 7 * 7 + 1) * 512 + 2 * 513 * 4
    for policy, obs in ((separate, torch.randn(5, 3)), (images, torch.randint(256, (5, 4, 84, 84)).byte())):
        probs, q = policy(obs)
        assert probs.shape == q.shape == (5, 4) and q.std(0).min() > 1e-4
        torch.testing.assert_close(probs.sum(-1), torch.ones(5))


def test_acer_section33_update_average_moves_in_place():
    policy, _ = make_policy()
    average = copy.deepcopy(policy)
    with torch.no_grad():
        for param in policy.parameters():
            param.add_(1.0)
    before, places = next(average.parameters()).clone(), [p.data_ptr() for p in average.parameters()]
    for _ in range(10):
        acer.update_average(average, policy, 0.99)
    assert places == [p.data_ptr() for p in average.parameters()]
    for a, p in zip(average.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(p - a, torch.full_like(p, 0.99**10))
    assert not torch.equal(next(average.parameters()), before)


def test_rmsprop_is_that_of_tensorflow_1():
    args = Args(learning_rate=0.1)
    param, v = torch.zeros(3), torch.ones(3)
    rmsprop, expected = acer.RMSProp(3, args), torch.zeros(3)
    for grad in torch.randn(5, 3):
        v = 0.99 * v + 0.01 * grad**2
        expected = expected - 0.1 * grad / (v + 1e-5).sqrt()
        rmsprop.step([param[:1], param[1:]], grad)
        torch.testing.assert_close(param, expected)
    first = acer.RMSProp(1, Args())
    weight = torch.zeros(1)
    first.lr.fill_(7e-4)
    first.step([weight], torch.tensor([0.01]))
    assert weight.item() == pytest.approx(-7.0e-6, rel=0.01)  # PyTorch's would be -6.9e-3


# ---- Replay ----------------------------------------------------------------------------------------------------------


def play_segments(env_id, count, stack, **flags):
    args = Args(**{**SMALL, "env_id": env_id, **flags})
    envs = acer.make_envs(env_id, args.num_envs, 1, ale={**args.ale, "life_loss_info": True})
    policy = acer.Policy(envs.obs.shape[1:], envs.envs[0].action_space, dataclasses.replace(args, cnn_hidden=16))
    replay = acer.Replay(envs.obs, int(envs.envs[0].action_space.n), stack, args)
    rng, segments = torch.Generator().manual_seed(0), []
    for _ in range(count):
        segments.append(acer.collect(envs, policy, rng, args.num_steps, torch.device("cpu")))
        replay.add(segments[-1])
    return replay, segments, args


@pytest.mark.parametrize(
    "env_id, stack, count, flags",
    [
        ("CartPole-v1", 1, 13, {}),
        ("catch:Catch-v0", 1, 13, {"num_envs": 2}),
        ("ALE/Breakout-v5", 4, 13, {"max_episode_frames": 28, "num_envs": 2, "replay_capacity": 100}),
        ("ALE/Breakout-v5", 4, 3, {"num_envs": 2, "num_steps": 150, "replay_capacity": 600}),
    ],
)
def test_replay_returns_each_column_as_it_was_added(env_id, stack, count, flags):
    replay, segments, args = play_segments(env_id, count, stack, **flags)
    assert replay.slots == args.replay_capacity // args.num_steps
    rng = np.random.default_rng(0)
    newest = {i % replay.slots: segment for i, segment in enumerate(segments)}
    resets = torch.stack([s.resets for s in newest.values()])
    assert resets.any() and (stack == 1 or resets[:, :-1].any())
    for _ in range(20):
        slots = torch.from_numpy(rng.integers(len(newest), size=args.num_envs))
        batch = replay.batch(slots)
        for n, slot in enumerate(slots.tolist()):
            for name in ("obs", "actions", "mu", "rewards", "terminated", "truncated", "resets"):
                assert torch.equal(getattr(batch, name)[:, n], getattr(newest[slot], name)[:, n]), name
            mine = [f for f in batch.finals if f[1] == n]
            theirs = [f for f in newest[slot].finals if f[1] == n]
            assert [f[:2] for f in mine] == [f[:2] for f in theirs]
            assert all(torch.equal(a[2], b[2]) for a, b in zip(mine, theirs, strict=True))


def test_replay_stores_every_frame_once_and_says_what_it_takes(capsys):
    args = Args(num_envs=2, replay_capacity=100, num_steps=20, cnn_hidden=16)
    replay = acer.Replay(np.zeros((2, 4, 84, 84), np.uint8), 6, 4, args)
    assert replay.memory["frames"].shape == (5, 2, 24, 84, 84)
    policy, _ = make_policy((4, 84, 84))
    acer.describe(policy, replay, args, "found")
    out = capsys.readouterr().out
    assert "convolutions, one trunk" in out and "100 steps of each environment, 0.00 GiB on cpu" in out
    assert "begins with 250 steps of each" in out and out.endswith("found\n")
    acer.describe(policy, replay, dataclasses.replace(args, replay_ratio=0.0), "")
    assert capsys.readouterr().out.endswith("replay memory: none, replay ratio 0\n")


def test_the_memory_of_sixteen_games_is_that_of_its_frames_and_little_else(monkeypatch, capsys):
    real, args = torch.zeros, Args(num_envs=16)
    monkeypatch.setattr(acer.torch, "zeros", lambda shape, dtype, device: real(shape, dtype=dtype, device="meta"))
    replay = acer.Replay(np.zeros((16, 4, 84, 84), np.uint8), 6, 4, args)
    monkeypatch.undo()
    acer.describe(make_policy((4, 84, 84))[0], replay, args, "")
    steps = 50_000 * 16
    frames = steps * 24 // 20 * 84 * 84  # 20 new frames a segment and the 4 before them: 6.31 GiB
    rest = steps * (8 + 6 * 4 + 3 * 1 + 4)  # action, μ, three flags, reward
    assert 6.30 < frames / 2**30 < 6.32
    assert f"50,000 steps of each environment, {(frames + rest) / 2**30:.2f} GiB" in capsys.readouterr().out


def test_a_replay_memory_that_does_not_fit_is_refused_before_training(tmp_path, monkeypatch, capsys):
    command = f"{SCRIPT} --env-id ALE/Pong-v5 --num-envs 2 --replay-capacity 2_000_000_000 --run-dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", command.split())
    assert acer.main() == 2
    error = capsys.readouterr().err
    assert "GiB" in error and "lower --replay-capacity" in error and not (tmp_path / "run").exists()


def test_truncations_keep_their_final_observation_and_terminations_need_none():
    _, segments, _ = play_segments("CartPole-v1", 40, 1, replay_capacity=500)
    assert sum(int(s.terminated.sum()) for s in segments) > 20 and not any(s.finals for s in segments)
    env = gym.make("CartPole-v1", max_episode_steps=3)
    envs = acer.Envs([env], 0)
    policy, args = make_policy((4,), 2)
    segment = acer.collect(envs, policy, torch.Generator().manual_seed(0), 7, torch.device("cpu"))
    assert [t for t, _, _ in segment.finals] == [2, 5] == segment.truncated[:, 0].nonzero().flatten().tolist()
    for t, _, final in segment.finals:
        assert not torch.allclose(final, segment.obs[t + 1, 0]) and segment.resets[t, 0]


# ---- Update ----------------------------------------------------------------------------------------------------------


def make_batch(steps=6, envs=3, num_actions=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    obs = torch.randn(steps + 1, envs, 3, generator=generator, dtype=torch.float64)
    mu = torch.randn(steps, envs, num_actions, generator=generator, dtype=torch.float64).softmax(-1)
    actions = torch.randint(num_actions, (steps, envs), generator=generator)
    rewards = torch.randn(steps, envs, generator=generator, dtype=torch.float64)
    terminated = torch.rand(steps, envs, generator=generator) < 0.2
    truncated = (torch.rand(steps, envs, generator=generator) < 0.2) & ~terminated
    final_values = torch.randn(steps, envs, generator=generator, dtype=torch.float64) * truncated
    return acer.Segment(obs, actions, mu, rewards, terminated, truncated, terminated | truncated, []), final_values


@pytest.mark.parametrize("flags", [{}, {"trust_region": False}, {"bias_correction": False}, {"trunc_c": 1.0}])
def test_acer_section3_minibatch_gradient_is_that_of_its_parts(flags):
    policy, args = make_policy(max_grad_norm=math.inf, trunc_c=flags.get("trunc_c", 1.5), trust_region_delta=0.05)
    args = dataclasses.replace(args, **flags)
    policy, average = policy.double(), make_policy(seed=1)[0].double()
    batch, final_values = make_batch()
    grad, figures = acer.minibatch_gradient(policy, average, batch, final_values, args)

    probs, q = policy(batch.obs)
    f, critic = probs[:-1].detach(), q[:-1]
    values = (probs * q).sum(-1).detach()
    next_values = torch.where(batch.truncated, final_values, values[1:])
    q_taken = taken(critic, batch.actions)
    rho = taken(f / (batch.mu + acer.EPS), batch.actions)
    done = batch.terminated | batch.truncated
    q_ret = acer.retrace(batch.rewards, q_taken.detach(), next_values, rho, batch.terminated, done, args.gamma)
    z, moved = torch.zeros_like(f), 0
    for t in range(6):
        for n in range(3):
            state = critic.detach()[t, n] if args.bias_correction else values[t, n].expand(4)
            one = (x[None] for x in (f[t, n], state, q_ret[t, n], batch.actions[t, n], batch.mu[t, n]))
            g = acer.acer_gradient(*one, args.trunc_c, args.ent_coef)
            if args.trust_region:
                k = acer.kl_gradient(average(batch.obs[t, n : n + 1])[0].detach(), f[t, n][None])
                z[t, n] = acer.trust_region_step(g, k, args.trust_region_delta)[0]
                moved += not torch.equal(z[t, n], g[0])
            else:
                z[t, n] = g[0]
    loss = -(z * probs[:-1]).sum(-1).mean() + args.q_coef * 0.5 * (q_ret - q_taken).square().mean()
    expected = torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(policy.parameters()))])
    torch.testing.assert_close(grad, expected)
    named = dict(zip(acer.LOSSES, figures.tolist(), strict=True))
    assert named["adjusted_states"] == pytest.approx(moved / 18) and named["grad_norm"] == pytest.approx(
        grad.norm().item()
    )
    assert named["mean_ratio"] == pytest.approx(rho.mean().item()) and (moved > 0) == args.trust_region
    assert named["explained_variance"] == pytest.approx(1 - ((q_ret - q_taken).var() / q_ret.var()).item())
    avg = average(batch.obs[:-1])[0]
    kl = torch.distributions.kl_divergence(*(torch.distributions.Categorical(x) for x in (avg, f))).mean()
    assert named["approx_kl"] == pytest.approx(kl.item(), rel=1e-3)
    assert (named["correction_loss"] != 0) == args.bias_correction


class Table(torch.nn.Module):
    """π and Q of states 0, 1, …, read from tables."""

    def __init__(self, logits, q):
        super().__init__()
        self.logits, self.q = torch.nn.Parameter(logits.clone()), torch.nn.Parameter(q.clone())

    def forward(self, obs):
        states = obs[:, 0].long()
        return self.logits[states].softmax(-1), self.q[states]


def worked_example(average=None, **flags):
    """One call of minibatch_gradient on the worked example: gradients by logits and by Q (5, 3), figures."""
    defaults = {"gamma": 0.9, "trunc_c": 2.0, "trust_region_delta": 0.1, "ent_coef": 0.0, "max_grad_norm": math.inf}
    args = Args(**{**defaults, **flags})
    never = torch.zeros(4, 1, dtype=torch.bool)
    columns = (x[:, None] for x in (torch.arange(5.0)[:, None], ACTIONS, MU, REWARDS))
    batch = acer.Segment(*columns, never, never, never, [])
    average = average or Table(AVG.log(), Q[:4])
    grad, figures = acer.minibatch_gradient(Table(LOGITS, Q), average, batch, torch.zeros(4, 1).double(), args)
    return *(x.view(5, 3) for x in grad.split(15)), dict(zip(acer.LOSSES, figures.tolist(), strict=True))


def test_acer_section3_worked_example():
    """The gradient of the mean over four steps, and its figures, from formulas in float64 written apart from these."""
    by_logits, by_q, figures = worked_example()
    expected = [
        [0.00565658, -0.01611845, 0.01046187],
        [0.08878414, -0.06417616, -0.02460798],
        [-0.01441573, -0.09181919, 0.10623492],
        [-0.37955506, 0.27747698, 0.10207808],
        [0, 0, 0],
    ]
    close = partial(torch.testing.assert_close, atol=2e-7, rtol=0)
    close(by_logits, torch.tensor(expected, dtype=torch.float64))
    by_taken = torch.zeros(5, 3, dtype=torch.float64)
    by_taken[torch.arange(4), ACTIONS] = torch.tensor([-0.04511983, 0.11616581, 0.09323267, -0.18759474]).double()
    close(by_q, by_taken)  # only the actions taken
    losses = {"policy_loss": 0.39730910, "correction_loss": 0.01816330, "value_loss": 0.47531528, "entropy": 0.97892571}
    assert {name: figures[name] for name in losses} == pytest.approx(losses, abs=2e-6)
    multipliers = [0, 0.12531745, 0.52247041, 0]
    assert figures["adjusted_states"] == 0.5 and figures["adjustment"] == pytest.approx(sum(multipliers) / 4, abs=1e-6)
    rho = [0.45833503, 0.95034286, 0.72914825, 1.0962581]
    assert figures["mean_ratio"] == pytest.approx(sum(rho) / 4) and figures["largest_ratio"] == pytest.approx(rho[3])
    assert figures["truncated_ratios"] == 0 and figures["cut_traces"] == 0.75
    assert worked_example(trunc_c=0.9)[2]["truncated_ratios"] == 0.5

    with_entropy, _, _ = worked_example(ent_coef=0.01)
    rows = [[0.08923257, -0.06436531, -0.02486726], [-0.01475298, -0.09130317, 0.10605615]]
    close(with_entropy[1:3], torch.tensor(rows, dtype=torch.float64))
    free, _, _ = worked_example(trust_region=False)
    rows = [[0.08149687, -0.05957898, -0.02191788], [-0.02112684, -0.08002816, 0.101155]]
    close(free[1:3], torch.tensor(rows, dtype=torch.float64))


def test_acer_eq12_leaves_the_gradient_alone_where_the_policy_is_its_average():
    """There k is -1 in every direction, and a constant added to z does not reach θ through a softmax."""
    held, _, figures = worked_example(average=Table(LOGITS, Q), trust_region_delta=1e-6)
    free, _, _ = worked_example(trust_region=False)
    assert figures["adjusted_states"] > 0
    torch.testing.assert_close(held, free, atol=1e-5, rtol=0)


def test_acer_eq9_without_truncation_is_an_importance_weighted_policy_gradient():
    """c = ∞: no correction. π = μ: neither, and g is A / π of the action; the trust region holds no A > 0 back."""
    q_ret = vector_retrace()
    unlimited = acer.acer_gradient(PROBS[:4], Q[:4], q_ret, ACTIONS, MU, 1e12, 0.0)
    one_hot = torch.nn.functional.one_hot(ACTIONS, 3)
    expected = one_hot * (PROBS[:4] / MU) * ((q_ret - VALUES[:4])[:, None] / PROBS[:4])
    torch.testing.assert_close(unlimited, expected, atol=1e-4, rtol=1e-4)
    on_policy = acer.acer_gradient(PROBS[:4], Q[:4], q_ret, ACTIONS, PROBS[:4], 1.0 + 1e-3, 0.0)
    torch.testing.assert_close(on_policy, one_hot * (q_ret - VALUES[:4])[:, None] / PROBS[:4], atol=1e-4, rtol=1e-4)
    k, up = acer.kl_gradient(AVG, PROBS[:4]), (q_ret > VALUES[:4])
    z = acer.trust_region_step(on_policy, k, 0.1)
    assert up.any() and not up.all() and torch.equal(z[up], on_policy[up]) and (k.square().sum(-1) >= 1).all()


def test_average_policy_gets_no_gradient():
    class Watched(Table):
        def forward(self, obs):
            assert not torch.is_grad_enabled()
            return super().forward(obs)

    worked_example(average=Watched(AVG.log(), Q[:4]))


def test_gradient_norm_is_limited():
    _, _, figures = worked_example()
    by_logits, by_q, limited = worked_example(max_grad_norm=0.01)
    assert torch.cat([by_logits, by_q]).norm().item() == pytest.approx(0.01, rel=1e-3)
    assert limited["grad_norm"] == pytest.approx(figures["grad_norm"]) and figures["grad_norm"] > 0.1


def test_duplicating_the_batch_leaves_the_gradient_unchanged():
    """δ limits each state's own g, not the mean's share of it."""
    policy, args = make_policy(trust_region_delta=0.05)
    policy, average = policy.double(), make_policy(seed=1)[0].double()
    batch, final_values = make_batch()
    twice = acer.Segment(*(torch.cat([x, x], 1) for x in batch[:-1]), [])
    once, _ = acer.minibatch_gradient(policy, average, batch, final_values, args)
    doubled, _ = acer.minibatch_gradient(policy, average, twice, torch.cat([final_values] * 2, 1), args)
    torch.testing.assert_close(once, doubled)


def test_the_policys_loss_does_not_reach_the_critic_nor_the_last_state():
    policy, args = make_policy(q_coef=0.0, max_grad_norm=math.inf)
    policy, average = policy.double(), make_policy(seed=1)[0].double()
    batch, final_values = make_batch()
    grad, _ = acer.minibatch_gradient(policy, average, batch, final_values, args)
    parts = grad.split([p.numel() for p in policy.parameters()])
    for (name, _), part in zip(policy.named_parameters(), parts, strict=True):
        assert part.eq(0).all() == name.startswith("q_"), name

    args = dataclasses.replace(args, q_coef=1.0)
    ended = batch._replace(terminated=batch.terminated.clone())
    ended.terminated[-1] = True  # so that V of the last state is not used
    elsewhere = ended._replace(obs=torch.cat([ended.obs[:-1], ended.obs[-1:] + 1]))
    grads = [acer.minibatch_gradient(policy, average, x, final_values, args)[0] for x in (ended, elsewhere)]
    torch.testing.assert_close(*grads)


def make_iteration(**flags):
    args = Args(**{**SMALL, "env_id": "CartPole-v1", **flags})
    torch.manual_seed(args.seed)
    envs = acer.make_envs(args.env_id, args.num_envs, args.seed)
    policy = acer.Policy(envs.obs.shape[1:], envs.envs[0].action_space, args)
    average = copy.deepcopy(policy).requires_grad_(False)
    rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()), args)
    return envs, policy, average, rmsprop, acer.Replay(envs.obs, 2, 1, args), torch.Generator().manual_seed(0), args


def test_on_policy_weights_are_one_and_replay_is_poisson():
    envs, policy, average, rmsprop, replay, rng, args = make_iteration(learning_rate=0.05)
    counts, on_policy, off_policy = [], [], []
    for i in range(300):
        replay.add(acer.collect(envs, policy, rng, args.num_steps, torch.device("cpu")))
        before = [p.clone() for p in average.parameters()]
        stats = acer.update(policy, average, rmsprop, acer.minibatch_step, replay, rng, args)
        assert not all(torch.equal(a, b) for a, b in zip(before, average.parameters(), strict=True))
        counts.append(stats["replay_updates"])
        on_policy.append((stats["mean_ratio"], stats["largest_ratio"], stats["correction_loss"], stats["cut_traces"]))
        if stats["replay_updates"]:
            off_policy.append((stats["replay_cut_traces"], stats["replay_largest_ratio"]))
        assert math.isnan(stats["replay_policy_loss"]) == (stats["replay_updates"] == 0)
        assert stats["replay_updates"] == 0 or i >= 3  # replay_start = 20 steps per environment are 4 segments
    assert np.mean(counts[3:]) == pytest.approx(4, abs=3 * math.sqrt(4 / 297)) and np.var(counts[3:]) > 2
    np.testing.assert_allclose(np.array(on_policy)[:, :3], [[1, 1, 0]] * 300, atol=1e-4)
    assert np.mean([cut for *_, cut in on_policy]) < 0.01  # EPS lowers the ratio of an action of μ < 0.01 by 1e-4
    assert np.mean([cut for cut, _ in off_policy]) > 0.1 and max(largest for _, largest in off_policy) > 1.01


def test_replay_draws_every_stored_segment_of_every_column_alike(monkeypatch):
    envs, policy, average, rmsprop, replay, rng, args = make_iteration(num_envs=2, replay_ratio=20.0)
    for _ in range(4):
        replay.add(acer.collect(envs, policy, rng, args.num_steps, torch.device("cpu")))
    drawn, batch = [], replay.batch
    monkeypatch.setattr(replay, "batch", lambda slots: drawn.append(slots) or batch(slots))
    monkeypatch.setattr(acer, "diagnostics", lambda *_: torch.zeros(len(acer.LOSSES)))
    updates = 60
    for _ in range(updates):
        before = len(drawn)
        acer.update(policy, average, rmsprop, acer.minibatch_step, replay, rng, args)
        assert drawn[before].tolist() == [3, 3]  # the on-policy call
        del drawn[before]
    pairs = torch.stack(drawn)  # (about 1200, 2)
    counts = torch.zeros(4, 4).index_put_((pairs[:, 0], pairs[:, 1]), torch.ones(len(pairs)), accumulate=True)
    expected = len(pairs) / 16  # all pairs of slots alike: columns draw apart
    assert ((counts - expected).abs() < 5 * math.sqrt(expected)).all()


def test_truncated_steps_take_v_of_the_final_observation_as_it_is_now(monkeypatch):
    env, steps = gym.make("CartPole-v1", max_episode_steps=3), 7
    policy, args = make_policy((4,), 2, num_envs=1, num_steps=steps, replay_ratio=0.0, replay_capacity=steps)
    envs, rng = acer.Envs([env], 0), torch.Generator().manual_seed(0)
    replay = acer.Replay(envs.obs, 2, 1, args)
    segment = acer.collect(envs, policy, rng, steps, torch.device("cpu"))
    replay.add(segment)
    with torch.no_grad():
        for param in policy.parameters():
            param.mul_(1.5)  # the value is not cached
    seen = []

    def spy(*inputs):
        seen.append(inputs[4])
        return acer.minibatch_step(*inputs)

    average = copy.deepcopy(policy).requires_grad_(False)
    rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()), args)
    with torch.no_grad():
        expected = [(torch.mul(*policy(final[None]))).sum().item() for _, _, final in segment.finals]
    acer.update(policy, average, rmsprop, spy, replay, rng, args)
    assert seen[0][[2, 5], 0].tolist() == pytest.approx(expected, rel=1e-4) and seen[0].count_nonzero() == 2


def test_compiled_step_equals_eager(capsys):
    results = []
    for compiled in (False, True):
        policy, args = make_policy(compile="on")
        average = make_policy(seed=1)[0].requires_grad_(False)
        rmsprop = acer.RMSProp(sum(p.numel() for p in policy.parameters()), args)
        step = (
            acer.compile_or_eager(acer.minibatch_step, args, torch.device("cpu")) if compiled else acer.minibatch_step
        )
        figures = []
        for seed in (0, 1):
            batch, final_values = make_batch(seed=seed)
            batch = acer.Segment(*(x.float() if x.is_floating_point() else x for x in batch[:-1]), [])
            figures.append(step(policy, average, rmsprop, batch, final_values.float(), args).clone())
        weights = [p.detach().flatten() for net in (policy, average) for p in net.parameters()]
        results.append((torch.cat(weights), torch.stack(figures)))
    assert "not compiled" not in capsys.readouterr().out
    for eager, fast in zip(*results, strict=True):
        torch.testing.assert_close(fast, eager, atol=1e-5, rtol=1e-4)


# ---- Train -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_run(tmp_path):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = SMALL | {"total_timesteps": 400, "seed": seed}
        hashes.append(fingerprint(train(Args(**flags, run_dir=str(tmp_path / name)))["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize("save", [True, False])
def test_resuming_restores_all_but_the_replay_memory_unless_it_was_saved(tmp_path, monkeypatch, capsys, save):
    """Exact with the memory, where episodes end with the rollout: Catch's have six steps."""
    flags = SMALL | {"env_id": "catch:Catch-v0", "num_steps": 6, "replay_start": 12, "cnn_hidden": 16, "num_envs": 2}
    flags |= {"total_timesteps": 96, "save_replay": save}
    whole = train(Args(**flags, run_dir=str(tmp_path / "whole")))
    original = acer.check_finite
    kill = lambda step, **x: os.kill(os.getpid(), signal.SIGTERM) if step == 36 and "losses" in x else None  # noqa: E731
    monkeypatch.setattr(acer, "check_finite", kill)
    half = train(Args(**flags, run_dir=str(tmp_path / "parts")))
    monkeypatch.setattr(acer, "check_finite", original)
    assert half["steps"] == 48 and half["signal"] == signal.SIGTERM
    capsys.readouterr()
    rest = train(Args(**flags, resume=half["checkpoint"]))
    out = capsys.readouterr().out
    assert rest["steps"] == 96
    assert (fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])) == save
    assert ("24 steps from" in out) == save and ("empty, filled again" in out) == (not save)
    rows = [row.split(",") for row in Path(rest["run_dir"], "progress.csv").read_text().splitlines()]
    counts = [float(row[rows[0].index("replay_updates")]) for row in rows[1:]]
    assert len(counts) == 8 and counts[0] == 0 and (counts[4] == 0 or save)


def test_a_replay_memory_of_another_step_size_or_kind_is_not_taken(tmp_path, capsys):
    flags = SMALL | {"total_timesteps": 80, "save_replay": True, "save_every": 2}
    path = train(Args(**flags, run_dir=str(tmp_path / "run")))["checkpoint"]
    train(Args(**flags | {"total_timesteps": 160, "save_replay": False}, resume=path))
    capsys.readouterr()
    train(Args(**flags | {"total_timesteps": 200}, resume=path))
    assert "replay.pt is of step 80; empty, filled again" in capsys.readouterr().out
    files = sorted(Path(path).parent.iterdir())
    with pytest.raises(acer.InputError, match="--replay-capacity or --num-steps: .* has another size"):
        train(Args(**flags | {"total_timesteps": 300, "replay_capacity": 100}, resume=path))
    Path(path).with_name("replay.pt").write_bytes(b"PK")
    with pytest.raises(acer.InputError, match="replay.pt is not readable .* move it away"):
        train(Args(**flags | {"total_timesteps": 300}, resume=path))
    assert sorted(Path(path).parent.iterdir()) == files  # a refusal leaves the folder as it is


def test_score_and_ablation_flags_train(tmp_path):
    for i, flags in enumerate(({"replay_ratio": 0.0}, {"trust_region": False}, {"bias_correction": False})):
        result = train(Args(**SMALL | flags, total_timesteps=400, run_dir=str(tmp_path / str(i))))
        assert result["steps"] == 400 and 5 < result["episodic_return"] < 100


def test_atari_trains_and_evaluates_full_games(tmp_path, capsys):
    flags = SMALL | {"env_id": "ALE/Breakout-v5", "num_envs": 2, "cnn_hidden": 16, "max_episode_frames": 100}
    args = Args(**flags | {"total_timesteps": 80, "eval_episodes": 1}, run_dir=str(tmp_path / "run"))
    result = train(args)
    out = capsys.readouterr().out
    assert result["steps"] == 80 and "network: convolutions" in out and "replay memory: 50 steps" in out
    evaluation = json.loads(Path(result["run_dir"], "eval.json").read_text())
    envs = acer.make_envs(args.env_id, 1, 10**6 + args.seed, ale=args.ale)  # 25 steps without a life's end in between
    policy = acer.Policy(envs.obs.shape[1:], envs.action_space, args)
    policy.load_state_dict(torch.load(result["checkpoint"], weights_only=True)["policy"])
    score, steps, ended = 0.0, 0, False
    while not ended:
        _, rewards, terminated, truncated, _ = envs.step(policy.act(torch.from_numpy(envs.obs))[0].numpy())
        score, steps, ended = score + rewards[0], steps + 1, bool(terminated[0] | truncated[0])
    assert evaluation["deterministic"] == [score] and steps == 25


@pytest.mark.parametrize("clip, life_loss", [(True, True), (False, False)])
def test_atari_stores_clipped_rewards_and_lost_lives_as_asked_and_logs_raw_scores(
    tmp_path, monkeypatch, clip, life_loss
):
    """Every reward is made 7 times as large; actions are random."""
    stored, add, step, rng = [], acer.Replay.add, acer.AtariEnvs.step, np.random.default_rng(0)

    def louder(envs, actions):
        next_obs, rewards, *rest = step(envs, rng.integers(4, size=2))
        return next_obs, 7 * rewards, *rest

    monkeypatch.setattr(acer.Replay, "add", lambda self, segment: stored.append(segment) or add(self, segment))
    monkeypatch.setattr(acer.AtariEnvs, "step", louder)
    flags = SMALL | {"env_id": "ALE/Breakout-v5", "num_envs": 2, "cnn_hidden": 16, "num_steps": 50, "seed": 3}
    flags |= {"clip_rewards": clip, "life_loss_terminal": life_loss, "total_timesteps": 800, "replay_ratio": 0.0}
    train(Args(**flags, run_dir=str(tmp_path / "run")))
    rewards, lost = torch.cat([s.rewards for s in stored]), sum(int(s.terminated.sum()) for s in stored)
    games = sum(int(s.resets.sum()) for s in stored)
    assert rewards.unique().tolist() == ([0, 1] if clip else [0, 7])
    assert games >= 2 and (lost >= 4 * games if life_loss else lost == games)


def test_training_keeps_an_average_policy_apart_and_anneals_the_rate_if_asked(tmp_path, monkeypatch):
    seen, original = [], acer.update

    def spy(policy, average, rmsprop, *rest):
        same = [torch.equal(a, b) for a, b in zip(policy.parameters(), average.parameters(), strict=True)]
        shared = {p.data_ptr() for p in policy.parameters()} & {p.data_ptr() for p in average.parameters()}
        seen.append((all(same), bool(shared), rmsprop.lr.item()))
        return original(policy, average, rmsprop, *rest)

    monkeypatch.setattr(acer, "update", spy)
    for anneal in (False, True):
        seen.clear()
        flags = SMALL | {"total_timesteps": 80, "anneal_lr": anneal, "learning_rate": 0.25}
        train(Args(**flags, run_dir=str(tmp_path / str(anneal))))
        same, shared, rates = zip(*seen, strict=True)
        assert same == (True, False, False, False) and not any(shared)
        assert rates == ((0.25, 0.1875, 0.125, 0.0625) if anneal else (0.25,) * 4)


@pytest.mark.parametrize("seed", [1, 2])
def test_learns_cartpole(tmp_path, seed):
    result = train(Args(seed=seed, total_timesteps=60_000, compile="off", run_dir=str(tmp_path / "run")))
    assert result["eval_return"] >= 300


# ---- Command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id Pendulum-v1", "for continuous ones use ppo_continuous.py"),
        ("--env-id FrozenLake-v1", "needs a flat Box or uint8 images"),
        ("--env-id NoSuch-v0", "NoSuch"),
        ("--avg-decay 1.5", "must lie in [0, 1]"),
        ("--hidden-sizes", "--hidden-sizes needs one layer"),
        pytest.param(
            "--replay-device cuda",
            "--replay-device cuda needs a GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        ("--replay-ratio -1", "must not be negative"),
        ("--replay-ratio inf", "--replay-ratio must be finite"),
        ("--replay-start 600 --replay-capacity 519", "would never begin: the memory holds 500 steps"),
        ("--replay-capacity 19", "would never begin: the memory holds 0 steps"),
        ("--total-timesteps 100", "less than one batch"),
        ("--resume nothing/checkpoint.pt", "not a readable checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    assert acer.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("acer_discrete.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_evaluate_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint = train(Args(**SMALL | {"total_timesteps": 400}))["checkpoint"]
    monkeypatch.setattr(sys, "argv", f"{SCRIPT} --evaluate {checkpoint} --eval-episodes 3".split())
    assert acer.main() == 0
    assert "over 3 episodes" in capsys.readouterr().out

"""ppo_atari.py: its equations, ALE's games as the paper has them, its data flow, and that it learns.

What it shares with the other scripts is tested in test_first_edition.py.
"""

import dataclasses
import json
import math
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import ale_py
import catch
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import fingerprint

import ppo_atari as ppo
from ppo_atari import Args, train

SCRIPT = Path(ppo.__file__)
SMALL = {"num_envs": 2, "num_steps": 12, "update_epochs": 2, "compile": "off", "eval_episodes": 0, "hidden_size": 32}
CATCH = {**SMALL, "env_id": "catch:Catch-v0"}

gym.register("CutCatch-v0", catch.Catch, kwargs={"cut": True, "reward": 5})


# ---- Equations -------------------------------------------------------------------------------------------------------


def test_categorical_logp_entropy_and_kl_are_those_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    old, new = 3 * torch.randn(2, 4, 5, 6, generator=generator, dtype=torch.float64)  # (T, N, A) each
    actions = torch.randint(6, (4, 5), generator=generator)
    categorical, other = (torch.distributions.Categorical(logits=x) for x in (old, new))
    torch.testing.assert_close(ppo.categorical_logp(old, actions), categorical.log_prob(actions))
    torch.testing.assert_close(ppo.categorical_entropy(old), categorical.entropy())
    expected = torch.distributions.kl_divergence(categorical, other)
    torch.testing.assert_close(ppo.categorical_kl(old, new), expected)
    assert not torch.allclose(ppo.categorical_kl(new, old), expected)
    with pytest.raises(AssertionError):
        ppo.categorical_logp(old, actions[..., None])


def test_gumbel_noise_samples_the_softmax():
    logits = torch.tensor([0.0, 1.0, -2.0])
    noise = ppo.gumbel_noise(torch.Generator().manual_seed(0), 100_000, 3)
    frequencies = (logits + noise).argmax(-1).bincount(minlength=3) / 100_000
    torch.testing.assert_close(frequencies, logits.softmax(-1), atol=0.005, rtol=0)


# ---- Network ---------------------------------------------------------------------------------------------------------


def test_network_has_the_size_and_gains_of_dqn_with_two_heads():
    torch.manual_seed(0)
    policy = ppo.Policy((4, 84, 84), gym.spaces.Discrete(6), Args())
    convolutions = (4 * 8 * 8 + 1) * 32 + (32 * 4 * 4 + 1) * 64 + (64 * 3 * 3 + 1) * 64  # 84 -> 20 -> 9 -> 7 pixels
    assert sum(p.numel() for p in policy.parameters()) == convolutions + (64 * 7 * 7 + 1) * 512 + 513 * 6 + 513
    logits, values = policy(torch.randint(256, (3, 5, 4, 84, 84), dtype=torch.uint8))
    assert logits.shape == (3, 5, 6) and values.shape == (3, 5)
    for layer in (*policy.convs, policy.hidden, policy.policy_head, policy.value_head):
        weight = layer.weight.flatten(1)
        gain = {policy.policy_head: 0.01, policy.value_head: 1.0}.get(layer, math.sqrt(2))
        gram = weight @ weight.T
        torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram)), atol=1e-5, rtol=1e-5)
        assert layer.bias.eq(0).all()


def test_network_computes_what_stock_modules_do():
    torch.manual_seed(0)
    policy = ppo.Policy((4, 84, 84), gym.spaces.Discrete(6), Args(orthogonal_init=False))
    relu, flatten = torch.nn.ReLU(), torch.nn.Flatten()
    hidden = torch.nn.Linear(64 * 7 * 7, 512)
    hidden.weight, hidden.bias = torch.nn.Parameter(policy.hidden.weight.flatten(1)), policy.hidden.bias
    stock = torch.nn.Sequential(
        *(layer for conv in policy.convs for layer in (conv, relu)), flatten, hidden, relu, policy.policy_head
    )
    frames = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    torch.testing.assert_close(policy(frames)[0], stock(frames.double().div(255).float()), atol=1e-5, rtol=1e-4)
    assert policy(frames)[0].std(0).min() > 1e-4  # it sees the frames


def test_bf16_is_close_and_leaves_parameters_in_float32():
    torch.manual_seed(0)
    policy = ppo.Policy((4, 84, 84), gym.spaces.Discrete(6), Args(bf16=True, orthogonal_init=False))
    frames = torch.randint(256, (5, 4, 84, 84), dtype=torch.uint8)
    rough = policy(frames)
    policy.bf16 = False
    for x, exact in zip(rough, policy(frames), strict=True):
        assert x.dtype == torch.float32 and 0 < (x - exact).abs().max() < 0.01
    assert {p.dtype for p in policy.parameters()} == {torch.float32}


def test_pixels_are_normalized_by_what_was_seen_so_far_and_clipped():
    rng = np.random.default_rng(0)
    images = rng.integers(256, size=(50, 2, 40, 40), dtype=np.uint8)
    images[:, 0] = 7  # never changes
    images[:, 1, 0] = 7 + (np.arange(50) == 0)[:, None]  # hardly ever
    policy = ppo.Policy((2, 40, 40), gym.spaces.Discrete(3), Args(clip_obs=3.0))
    batches = torch.from_numpy(images).split(20)
    fresh = policy.normalize(torch.from_numpy(images))
    torch.testing.assert_close(fresh, torch.from_numpy(images / np.float32(255)))
    for batch in batches:
        policy.obs_stats.update(batch)
    expected = (images - images.mean(0)) / np.maximum(images.std(0), 1.0)
    found = policy.normalize(torch.from_numpy(images)).double()
    torch.testing.assert_close(found, torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    bright, dark = (torch.full((1, 2, 40, 40), level, dtype=torch.uint8) for level in (255, 0))
    assert policy.normalize(bright)[0, 0].unique().tolist() == [3.0]
    assert policy.normalize(dark)[0, 0].unique().tolist() == [-3.0]
    plain = ppo.Policy((2, 40, 40), gym.spaces.Discrete(3), Args(norm_obs=False))
    plain.obs_stats.update(batches[0])
    torch.testing.assert_close(plain.normalize(torch.from_numpy(images)), fresh)


# ---- Environments ----------------------------------------------------------------------------------------------------


def play(game, steps, seed=0, num_envs=1, **flags):
    """Play at random: the envs, and a list of what each step returned."""
    args = Args(**flags)
    ale = {**args.ale, "life_loss_info": args.life_loss_terminal}
    envs, rng = ppo.make_envs(game, num_envs, seed, ale=ale), np.random.default_rng(seed)
    actions = [rng.integers(envs.action_space.n, size=num_envs) for _ in range(steps)]
    return envs, actions, [envs.step(a) for a in actions]


def test_breakout_loses_five_lives_a_game_and_scores_as_an_unwrapped_game():
    envs, actions, steps = play("ALE/Breakout-v5", 1500, noop_max=0)
    ends = [t for t, (_, _, terminated, *_) in enumerate(steps) if terminated[0]]
    assert len(envs.ended) >= 4 and not any(truncated.any() for *_, truncated, _ in steps)
    lengths = [int(length) for _, length in envs.ended]
    assert [t + 1 for t in ends[4::5]] == np.cumsum(lengths).tolist()  # five terminal signals a game

    game, scores, played = ale_py.ALEInterface(), [], iter(actions)
    game.setFloat("repeat_action_probability", 0.0)
    game.loadROM(ale_py.roms.get_rom_path("breakout"))
    buttons = game.getMinimalActionSet()
    for length in lengths:
        game.reset_game()
        game.act(buttons[1])  # fire, as on reset
        scores.append(0)
        lives, lost = game.lives(), False
        for action in (next(played)[0] for _ in range(length)):
            assert not game.game_over()
            scores[-1] += sum(game.act(buttons[1 if lost else action]) for _ in range(4))  # a life begins with fire
            lives, lost = game.lives(), game.lives() < lives
        assert game.game_over()
    assert scores == [score for score, _ in envs.ended] and sum(scores) > 0


@pytest.mark.parametrize("fire", [True, False])
def test_each_life_begins_with_fire_unless_told_otherwise(fire):
    ale = Args(fire_on_reset=fire).ale
    envs = ppo.make_envs("ALE/Breakout-v5", 4, 0, ale={**ale, "life_loss_info": True})
    steps = [np.ones(4, int), *np.zeros((300, 4), int)]  # fire, then never again by choice
    lives = sum(envs.step(actions)[2] for actions in steps)
    assert (lives > 10).all() if fire else (lives == 1).all()
    assert ppo.make_envs("ALE/Qbert-v5", 1, 0, ale=ale).fire == fire
    assert not ppo.make_envs("ALE/MsPacman-v5", 1, 0, ale=ale).fire  # no such button


def test_full_games_end_only_once_all_lives_are_lost():
    envs, _, steps = play("ALE/Breakout-v5", 1000, noop_max=0, life_loss_terminal=False)
    assert len(envs.ended) >= 3
    assert sum(int(terminated.sum()) for _, _, terminated, *_ in steps) == len(envs.ended)


def test_pong_has_no_lives_to_lose():
    envs, _, steps = play("ALE/Pong-v5", 1100, num_envs=2)
    ends = sum(int(terminated.sum()) for _, _, terminated, *_ in steps)
    assert ends == len(envs.ended) >= 2
    assert all(-21 <= score <= -15 for score, _ in envs.ended)


def test_truncated_games_have_their_true_successor_and_frames_never_mix():
    envs, _, steps = play("ALE/Breakout-v5", 150, num_envs=3, max_episode_frames=200)
    cuts = [(t, n) for t, step in enumerate(steps) for n in np.flatnonzero(step[3])]
    assert len(cuts) >= 6 and sorted({length for _, length in envs.ended}) == [50]
    for t, (next_obs, _, _, truncated, obs) in enumerate(steps):
        for n in range(3):
            if truncated[n]:
                assert not obs[n, :3].any() and obs[n, 3].any()  # nothing of the last game in the new one's stack
                assert np.array_equal(next_obs[n, :3], steps[t - 1][4][n, 1:]) and next_obs[n, 3].any()
            else:
                assert np.array_equal(next_obs[n], obs[n])
            if t and not steps[t - 1][3][n]:
                assert np.array_equal(next_obs[n, :3], steps[t - 1][4][n, 1:])


def test_preprocessing_is_that_of_the_flags():
    envs, _, _ = play("ALE/Breakout-v5", 3, frame_stack=2, frame_skip=3, noop_max=0)
    assert envs.obs.shape == (1, 2, 84, 84) and envs.obs.dtype == np.uint8 and envs.frames.tolist() == [1 + 3 * 3]
    starts = set(play("ALE/Breakout-v5", 0, num_envs=8)[0].frames.tolist())
    assert len(starts) > 3 and 1 <= min(starts) < max(starts) <= 31  # no-ops, then fire
    _, _, plain = play("ALE/Breakout-v5", 60, seed=3)
    _, _, sticky = play("ALE/Breakout-v5", 60, seed=3, repeat_action_probability=0.25)
    assert any(not np.array_equal(a[4], b[4]) for a, b in zip(plain, sticky, strict=True))
    assert not ppo.make_envs("ALE/Breakout-v5", 1, 0, ale=Args(fire_on_reset=False, noop_max=0).ale).frames.any()


def test_colour_pictures_show_the_first_game():
    envs = ppo.make_envs("ALE/Breakout-v5", 2, 0, ale=Args(repeat_action_probability=0.25).ale, render_mode="rgb_array")
    rng, differences = np.random.default_rng(0), []
    for _ in range(100):
        obs = envs.step(rng.integers(4, size=2))[4]
        picture = envs.render()
        assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
        gray = (picture @ np.array([0.299, 0.587, 0.114])).reshape(42, 5, 4, 40).mean((1, 3))  # (42, 4)
        seen = obs[:, -1].reshape(2, 42, 2, 4, 21).mean((2, 4))  # (2, 42, 4)
        differences.append(np.abs(seen - gray).max((1, 2)))
    first, second = np.array(differences).T
    assert first.max() < 10 and np.mean(second > 10) > 0.5  # of the first game, not of the second


def test_seeds_do_not_share_games():
    frames = [ppo.make_envs("ALE/Breakout-v5", 6, seed, ale=Args().ale).frames.tolist() for seed in (1, 2, (1, 9), 1)]
    assert frames[0] == frames[3] and len(set(map(tuple, frames))) == 3
    assert len(set(frames[0])) > 3 and frames[0][1:] != frames[1][:-1]


# ---- Rollout ---------------------------------------------------------------------------------------------------------


def rollout_of(env_id, seed=0, **flags):
    args = Args(**{**SMALL, "env_id": env_id, "orthogonal_init": False, **flags})
    torch.manual_seed(seed)
    envs = ppo.make_envs(env_id, args.num_envs, seed, ale={**args.ale, "life_loss_info": args.life_loss_terminal})
    policy = ppo.Policy(envs.obs.shape[1:], envs.envs[0].action_space, args)
    frames = torch.zeros(args.num_steps, *envs.obs.shape, dtype=torch.uint8)
    steps, step = [], envs.step
    envs.step = lambda actions: steps.append((actions, *step(actions))) or steps[-1][1:]
    first = envs.obs.copy()
    return ppo.collect(envs, policy, torch.Generator().manual_seed(seed), frames), policy, steps, first, args


@pytest.mark.parametrize(
    "env_id, flags",
    [("ALE/Breakout-v5", {"num_steps": 130, "max_episode_frames": 160}), ("CutCatch-v0", {}), ("catch:Catch-v0", {})],
)
def test_rollout_holds_what_happened_and_truncations_bootstrap_from_the_final_observation(env_id, flags):
    rollout, policy, steps, first, _ = rollout_of(env_id, **flags)
    actions, next_obs, rewards, terminated, truncated, obs = (np.stack(x) for x in zip(*steps, strict=True))
    assert np.array_equal(rollout.obs.numpy(), np.concatenate([first[None], obs[:-1]]))
    assert np.array_equal(rollout.actions.numpy(), actions) and np.array_equal(rollout.rewards.numpy(), rewards)
    assert np.array_equal(rollout.terminated.numpy(), terminated)
    assert np.array_equal(rollout.done.numpy(), terminated | truncated)
    with torch.no_grad():
        logits, values = policy(rollout.obs)
        successors = policy(torch.from_numpy(next_obs))[1]
    torch.testing.assert_close(rollout.logits, logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(rollout.values, values, atol=1e-5, rtol=1e-4)
    alive = ~rollout.terminated
    torch.testing.assert_close(rollout.next_values[alive], successors[alive], atol=1e-5, rtol=1e-4)
    assert truncated.any() == (env_id != "catch:Catch-v0") and terminated.any() == (env_id != "CutCatch-v0")
    cut = torch.from_numpy(truncated)
    acted_on = torch.cat([values[1:], policy(torch.from_numpy(obs[-1:]))[1]]).detach()
    assert not cut.any() or (successors - acted_on)[cut].abs().max() > 1e-4  # the two could be told apart


# ---- Update ----------------------------------------------------------------------------------------------------------


def random_minibatch(policy, size=32, num_actions=3):
    generator = torch.Generator().manual_seed(5)
    obs = torch.randint(256, (size, 1, 84, 84), dtype=torch.uint8, generator=generator)
    actions = torch.randint(num_actions, (size,), generator=generator)
    logits_old = policy(obs)[0].detach() + 0.3 * torch.randn(size, num_actions, generator=generator)
    logp_old = ppo.categorical_logp(logits_old, actions)
    values_old, adv, returns = torch.randn(3, size, generator=generator)
    return ppo.Minibatch(obs, actions, logits_old, logp_old, values_old, adv, returns)


@pytest.mark.parametrize("clip_vloss, norm_adv", [(False, True), (True, False)])
def test_ppo_eq9_minibatch_gradient_is_that_of_the_objective(clip_vloss, norm_adv):
    args = Args(hidden_size=32, clip_vloss=clip_vloss, norm_adv=norm_adv, max_grad_norm=math.inf, orthogonal_init=False)
    torch.manual_seed(0)
    policy = ppo.Policy((1, 84, 84), gym.spaces.Discrete(3), args)
    mb, eps = random_minibatch(policy), 0.1
    grad, figures = ppo.minibatch_gradient(policy, mb, torch.tensor(eps), args)

    logits, values = policy(mb.obs)
    pi, old = (torch.distributions.Categorical(logits=x) for x in (logits, mb.logits_old))
    ratio = (pi.log_prob(mb.actions) - old.log_prob(mb.actions)).exp()
    adv = (mb.adv - mb.adv.mean()) / mb.adv.std() if norm_adv else mb.adv
    surrogate = torch.minimum(ratio * adv, ratio.clamp(1 - eps, 1 + eps) * adv).mean()
    error = (values - mb.returns) ** 2
    if clip_vloss:
        error = torch.maximum(error, (mb.values_old + (values - mb.values_old).clamp(-eps, eps) - mb.returns) ** 2)
    loss = -surrogate + args.vf_coef * error.mean() - args.ent_coef * pi.entropy().mean()
    policy.zero_grad()
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    torch.testing.assert_close(grad, expected, atol=1e-5, rtol=1e-3)
    kl = torch.distributions.kl_divergence(old, pi).mean()
    clipfrac = ((ratio - 1).abs() > eps).float().mean()
    wanted = torch.stack([-surrogate, error.mean(), pi.entropy().mean(), kl, clipfrac, expected.norm()])
    torch.testing.assert_close(figures, wanted, atol=1e-5, rtol=1e-3)
    assert 0 < clipfrac < 1
    clipped, _ = ppo.minibatch_gradient(policy, mb, torch.tensor(eps), dataclasses.replace(args, max_grad_norm=0.01))
    torch.testing.assert_close(clipped, 0.01 * expected / expected.norm(), atol=1e-6, rtol=1e-3)


def test_update_visits_every_sample_once_an_epoch_starting_from_ratio_one():
    rollout, policy, _, _, args = rollout_of("CutCatch-v0")
    adam, seen, ratios = ppo.Adam(sum(p.numel() for p in policy.parameters()), 1e-2, 1e-5), [], []

    def spy(policy, adam, mb, eps_clip, args):
        logp = ppo.categorical_logp(policy(mb.obs)[0], mb.actions)
        ratios.append((logp - mb.logp_old).exp().sub(1).abs().max().item())
        seen.append(mb)
        return ppo.minibatch_step(policy, adam, mb, eps_clip, args)

    stats = ppo.update(policy, adam, spy, rollout, 0.1, torch.Generator().manual_seed(0), args)
    assert len(seen) == args.update_epochs * args.num_minibatches and ratios[0] < 1e-5 < 1e-3 < ratios[-1]
    adv = ppo.gae(
        *(getattr(rollout, x) for x in ("rewards", "values", "next_values", "terminated", "done")), 0.99, 0.95
    )
    rows = [torch.stack([x.flatten() for x in (rollout.actions, rollout.values, adv, adv + rollout.values)], 1)]
    for epoch in (seen[:4], seen[4:]):
        rows.append(torch.cat([torch.stack([mb.actions, mb.values_old, mb.adv, mb.returns], 1) for mb in epoch]))
    everything = [sorted(map(tuple, x.double().round(decimals=4).tolist())) for x in rows]
    assert everything[0] == everything[1] == everything[2]
    returns = adv + rollout.values
    assert stats["explained_variance"] == pytest.approx(1 - ((returns - rollout.values).var() / returns.var()).item())


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_step_equals_eager(capsys, bf16):
    args = Args(hidden_size=32, compile="on", orthogonal_init=False, bf16=bf16)
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        policy = ppo.Policy((1, 84, 84), gym.spaces.Discrete(3), args)
        start = torch.cat([p.detach().flatten() for p in policy.parameters()])
        adam = ppo.Adam(len(start), 1e-3, 1e-5)
        step = ppo.compile_or_eager(ppo.minibatch_step, args, torch.device("cpu")) if compiled else ppo.minibatch_step
        mb, figures = random_minibatch(policy), []
        for eps in (0.1, 0.05):
            figures.append(step(policy, adam, mb, torch.tensor(eps), args))
        results.append((torch.cat([p.detach().flatten() for p in policy.parameters()]) - start, torch.stack(figures)))
    assert "not compiled" not in capsys.readouterr().out
    (change, figures), (fast_change, fast_figures) = results
    assert torch.nn.functional.cosine_similarity(change, fast_change, dim=0) > (0.9 if bf16 else 0.9999)
    tolerance = {"atol": 4e-3, "rtol": 0.05} if bf16 else {"atol": 2e-4, "rtol": 1e-3}
    torch.testing.assert_close(fast_figures, figures, **tolerance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_trains_and_collects_what_the_cpu_does(tmp_path):
    results = {}
    for device in ("cpu", "cuda"):
        flags = CATCH | {"compile": "on" if device == "cuda" else "off", "total_timesteps": 24, "device": device}
        saved = ppo.load_checkpoint(train(Args(**flags, run_dir=str(tmp_path / device)))["checkpoint"])
        results[device] = torch.cat([x.flatten() for x in saved["policy"].values()]), saved["episodes"]
    torch.manual_seed(1)
    untrained = ppo.Policy((1, 84, 84), catch.Catch.action_space, Args(hidden_size=32))
    start = torch.cat([x.flatten() for x in untrained.state_dict().values()])
    changes = [results[device][0] - start for device in ("cpu", "cuda")]
    assert torch.nn.functional.cosine_similarity(*changes, dim=0) > 0.9 and changes[0].abs().max() > 1e-3
    assert results["cpu"][1] == results["cuda"][1]  # the same actions in the same episodes


# ---- Train -----------------------------------------------------------------------------------------------------------


def test_same_seed_same_run(tmp_path):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = SMALL | {"env_id": "ALE/Breakout-v5", "total_timesteps": 72, "seed": seed}
        hashes.append(fingerprint(train(Args(**flags, run_dir=str(tmp_path / name)))["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


def test_resumed_run_equals_uninterrupted_run_where_episodes_end_with_the_rollout(tmp_path, monkeypatch):
    whole = train(Args(**CATCH, total_timesteps=96, run_dir=str(tmp_path / "whole")))
    original = ppo.check_finite
    monkeypatch.setattr(
        ppo,
        "check_finite",
        lambda step, **x: os.kill(os.getpid(), signal.SIGTERM) if step == 24 and "losses" in x else None,
    )
    half = train(Args(**CATCH, total_timesteps=96, run_dir=str(tmp_path / "parts")))
    monkeypatch.setattr(ppo, "check_finite", original)
    assert half["steps"] == 48 and half["signal"] == signal.SIGTERM
    rest = train(Args(**CATCH, total_timesteps=96, resume=half["checkpoint"]))
    assert rest["steps"] == 96 and fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])


def test_a_resumed_game_goes_on_from_new_seeds(tmp_path, monkeypatch):
    seen, make_envs, collect = [], ppo.make_envs, ppo.collect
    flags = SMALL | {"env_id": "ALE/Breakout-v5", "total_timesteps": 48, "num_envs": 4, "num_steps": 6}
    starts = [make_envs("ALE/Breakout-v5", 4, seed, ale=Args().ale).frames.tolist() for seed in (1, (1, 48))]
    monkeypatch.setattr(ppo, "collect", lambda envs, *x: seen.append(envs.frames.tolist()) or collect(envs, *x))
    first = train(Args(**flags, run_dir=str(tmp_path / "run")))
    rest = train(Args(**flags | {"total_timesteps": 96}, resume=first["checkpoint"]))
    assert rest["steps"] == 96 and starts[0] != starts[1]
    assert seen[::2] == starts
    rows = (tmp_path / "run" / "progress.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "24", "48", "72", "96"]


def test_learning_sees_clipped_rewards_and_the_log_raw_scores(tmp_path, monkeypatch):
    seen, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *x: seen.append(x[3].rewards.clone()) or update(*x))
    for clip in (True, False):
        flags = {**SMALL, "env_id": "CutCatch-v0", "clip_rewards": clip, "total_timesteps": 240, "eval_episodes": 3}
        result = train(Args(**flags, run_dir=str(tmp_path / str(clip))))
        rewards = Counter(torch.stack(seen).flatten().tolist())
        assert set(rewards) == ({0.0, 1.0, -1.0} if clip else {0.0, 5.0, -5.0})
        scale = 5 if clip else 1
        total = scale * sum(value * times for value, times in rewards.items())
        assert result["episodic_return"] == pytest.approx(total / 40)  # of 240 / 6 episodes
        written = json.loads((tmp_path / str(clip) / "eval.json").read_text())
        assert {abs(x) for x in written["deterministic"] + written["sampled"]} == {5.0}
        seen.clear()


def test_a_reward_that_is_no_number_ends_the_run(tmp_path):
    gym.register("PoisonedCatch-v0", catch.Catch, kwargs={"reward": math.nan})
    with pytest.raises(FloatingPointError, match="rewards, in the iteration after step 0"):
        train(Args(**SMALL, env_id="PoisonedCatch-v0", total_timesteps=48, run_dir=str(tmp_path / "run")))


@pytest.mark.parametrize("norm_obs", [True, False])
def test_pixel_statistics_follow_the_update_and_count_each_frame_once(tmp_path, monkeypatch, norm_obs):
    seen, frames, update = [], [], ppo.update

    def spy(policy, adam, step, rollout, *rest):
        seen.append(policy.obs_stats.count.item())
        frames.append(rollout.obs[..., -1, :, :].clone())
        return update(policy, adam, step, rollout, *rest)

    monkeypatch.setattr(ppo, "update", spy)
    flags = SMALL | {"env_id": "ALE/Pong-v5", "total_timesteps": 72, "norm_obs": norm_obs}
    saved = ppo.load_checkpoint(train(Args(**flags, run_dir=str(tmp_path / "run")))["checkpoint"])["policy"]
    assert seen == ([0, 6, 12] if norm_obs else [0, 0, 0])  # 2 games, 12 steps, 4 frames in a stack
    if norm_obs:
        newest = torch.cat([x[::4].flatten(0, 1) for x in frames]).double()
        torch.testing.assert_close(saved["obs_stats.mean"][0, -1].double(), newest.mean(0), atol=1e-3, rtol=1e-5)
        torch.testing.assert_close(
            saved["obs_stats.var"][0, -1].double(), newest.var(0, correction=0), atol=0.1, rtol=1e-3
        )


def test_schedules_and_their_ends(tmp_path, monkeypatch):
    seen, update = [], ppo.update
    monkeypatch.setattr(ppo, "update", lambda *x: seen.append((x[1].lr.item(), x[4])) or update(*x))
    train(Args(**CATCH, total_timesteps=72, anneal_clip=True, run_dir=str(tmp_path / "a")))
    assert seen == [(pytest.approx(2.5e-4 * x / 3), pytest.approx(0.1 * x / 3)) for x in (3, 2, 1)]
    seen.clear()
    train(Args(**CATCH, total_timesteps=48, anneal_lr=False, run_dir=str(tmp_path / "b")))
    assert seen == [(pytest.approx(2.5e-4), 0.1)] * 2


@pytest.mark.parametrize("seed", [1, 2])
def test_learns_to_catch(tmp_path, seed):
    flags = {"num_envs": 16, "num_steps": 30, "learning_rate": 1e-3, "hidden_size": 128, "compile": "off"}
    args = Args(env_id="catch:Catch-v0", seed=seed, total_timesteps=12_000, eval_episodes=200, **flags)
    result = train(dataclasses.replace(args, run_dir=str(tmp_path / "run")))
    assert result["eval_return"] >= 0.9  # 95 % caught


# ---- Command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id CartPole-v1", "needs uint8 images (C, H, W)"),
        ("--env-id Pendulum-v1", "for continuous ones use ppo_continuous.py"),
        ("--env-id ALE/Brakeout-v5", "Brakeout"),
        ("--env-id NoSuch-v0", "NoSuch"),
        ("--num-minibatches 3", "--num-minibatches must divide"),
        ("--total-timesteps 100", "less than one batch"),
        ("--repeat-action-probability 1.5", "must lie in [0, 1]"),
        ("--frame-skip 0", "must be positive"),
        ("--clip-obs 0", "must be positive"),
        ("--num-envs 2 --num-steps 2 --total-timesteps 4 --num-minibatches 4", "one sample in each"),
        ("--device cuda:9", "--device cuda:9"),
        ("--resume nothing/checkpoint.pt", "not a readable checkpoint"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *flags.split()])
    assert ppo.main() == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("ppo_atari.py: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_evaluate_from_the_command_line_plays_full_games_with_a_gif(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = SMALL | {"env_id": "ALE/Breakout-v5", "total_timesteps": 24, "max_episode_frames": 400, "frame_stack": 2}
    checkpoint = train(Args(**flags))["checkpoint"]
    command = f"{SCRIPT} --evaluate {checkpoint} --eval-episodes 2 --video-dir film"
    monkeypatch.setattr(sys, "argv", command.split())
    assert ppo.main() == 0
    out = capsys.readouterr().out
    assert "evaluation, deterministic: " in out and "over 2 episodes" in out
    import imageio.v3

    (film,) = (tmp_path / "film").iterdir()
    assert film.name == "Breakout-v5__ppo_atari__s1000001.gif" and imageio.v3.imread(film).shape[1:] == (210, 160, 3)
    for other in ("--no-norm-obs", "--clip-obs 3"):
        monkeypatch.setattr(sys, "argv", [*command.split(), *other.split()])
        assert ppo.main() == 2 and "which can't be changed" in capsys.readouterr().err

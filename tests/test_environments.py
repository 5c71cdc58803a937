"""Environments and rollouts: successors, returns, random streams, spaces, mistakes, closing."""

import importlib.util
import itertools
import math
import random
import sys
import types
from functools import partial

import ale_py
import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import (
    CONTINUOUS,
    DISCRETE,
    EVERY_SCRIPT,
    PerfectCritic,
    Toy,
    draw_noise,
    each_continuous,
    each_discrete,
    each_script,
    each_with,
    make_args,
    make_networks,
    small,
)

import acer_discrete
import ppo_atari
import ppo_continuous
import trpo_continuous

each_with_a_rollout = each_with("prepare")  # acer_discrete.py has segments in its place


def filled(script, **flags):
    """Args of a script for vectors."""
    args = script.Args(**flags)
    return script.fill_defaults(args, images=False) if script in DISCRETE else args


def roll(script, env_id, num_steps=10, num_envs=2, **flags):
    envs = script.make_envs(env_id, num_envs, seed=0)
    args = filled(script, norm_obs=False, norm_reward=False, norm_adv=False, **flags)
    networks = make_networks(script, envs.obs.shape[1:], envs.action_space, args)
    raw = script.collect(envs, networks[0], draw_noise(networks[0], num_steps, num_envs))
    rollout, _ = script.prepare(raw, *networks, torch.zeros(num_envs), args.gamma, args)
    return rollout, args


def advantages(script, critic, rollout, gamma, args):
    """Â, V^targ and V for a critic that is any function of observations."""
    if script is ppo_atari:

        def logits_and_values(obs):
            return torch.zeros(*obs.shape[:-1], 3), critic(obs)

        policy = types.SimpleNamespace(logits_and_values=logits_and_values)
        return script.advantages(policy, rollout, gamma, args)[:3]
    return script.advantages(critic, rollout, gamma, args)


# ---- Successors and returns ----


@each_with_a_rollout
@pytest.mark.parametrize("env_id, finite", [("Chain-v0", True), ("EndlessChain-v0", False)])
def test_perfect_critic_has_no_advantage_to_report(script, env_id, finite):
    rollout, args = roll(script, env_id)
    assert rollout.done.sum() == 6 and rollout.terminated.sum() == (6 if finite else 0)
    critic = PerfectCritic(finite, args.gamma)
    adv, returns, values = advantages(script, critic, rollout, args.gamma, args)
    torch.testing.assert_close(adv, torch.zeros(10, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(returns, values)


@each_with_a_rollout
@pytest.mark.parametrize("env_id", ["Chain-v0", "EndlessChain-v0"])
def test_advantages_take_the_value_of_the_true_successor(script, env_id):
    rollout, args = roll(script, env_id, gae_lambda=0.0)

    def critic(obs):
        return 1 + obs.squeeze(-1)  # another value in each state

    adv, _, _ = advantages(script, critic, rollout, 0.9, args)
    after = critic(rollout.next_obs) * ~rollout.terminated
    torch.testing.assert_close(adv, rollout.rewards + 0.9 * after - critic(rollout.obs))


@each_script
def test_step_gives_the_true_successor_and_the_observation_to_act_on(script):
    envs = script.make_envs("Chain-v0", 1, seed=0)
    seen = []
    for _ in range(4):
        before = float(envs.obs[0, 0])
        seen.append((before, float(envs.step(np.zeros((1, 1)))[0][0, 0])))
    assert seen == [(0, 1), (1, 2), (2, 3), (0, 1)] and envs.obs == 1.0


@each_with_a_rollout
def test_an_environment_may_reuse_its_observation(script, toy):
    buffer = np.zeros(2)

    def step(env):
        buffer[:] = env.time
        return buffer, 1.0, False, env.time >= 3, {}

    def reset(env):
        buffer[:] = -1
        return buffer, {}

    toy(step=step, reset=reset)
    rollout, _ = roll(script, "Toy-v0", num_steps=4, num_envs=1)
    assert rollout.next_obs[:, 0, 0].tolist() == [1, 2, 3, 1]
    assert rollout.obs[:, 0, 0].tolist() == [-1, 1, 2, -1]


@each_script
def test_returns_are_those_of_an_unwrapped_environment(script):
    env_id = "Hopper-v5" if script in CONTINUOUS else "CartPole-v1"
    envs = script.make_envs(env_id, 1, seed=5)
    start = envs.rng_states[0]
    rng = np.random.default_rng(0)
    if script in CONTINUOUS:
        actions = rng.uniform(-1, 1, (200, 1, 3)).astype(np.float32)
    else:
        actions = rng.integers(2, size=(200, 1))
    counter = script.Episodes(1)
    for action in actions:
        _, rewards, terminated, truncated = envs.step(action)
        ended = torch.from_numpy(terminated | truncated)
        counter.add(torch.from_numpy(rewards)[None], ended[None])

    env = gym.make(env_id).unwrapped
    expected = []
    env.reset(seed=0)
    env.np_random.bit_generator.state = start
    env.reset()
    total, length = 0.0, 0
    for action in actions[:, 0]:
        _, reward, terminated, _, _ = env.step(action)
        total, length = total + float(reward), length + 1
        if terminated:
            expected.append((total, length))
            total, length = 0.0, 0
            env.reset()
    assert len(expected) > 3
    np.testing.assert_allclose(counter.last, expected, rtol=1e-6)


def scaled(script, rewards, carry, gamma):
    """`prepare` of a rollout with these rewards (T, N), whose episodes never end."""
    args = filled(script)
    space = gym.spaces.Box(-1, 1, (1,)) if script in CONTINUOUS else gym.spaces.Discrete(3)
    networks = make_networks(script, (3,), space, args)
    never = torch.zeros(rewards.shape, dtype=torch.bool)
    obs = torch.zeros(*rewards.shape, 3)
    resets = [never] if script is ppo_atari else []
    actions = torch.zeros(*rewards.shape, 1)
    raw = script.Rollout(obs, obs, actions, rewards, never, never, *resets)
    return script.prepare(raw, *networks, carry, gamma, args)


@each_with_a_rollout
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rewards_are_scaled_by_the_std_of_the_discounted_return(script, scale):
    rewards = scale * torch.randn(64, 4, dtype=torch.float64)
    start = torch.zeros(4, dtype=torch.float64)
    ready, carry = scaled(script, rewards, start, 0.9)
    never = torch.zeros(64, 4, dtype=torch.bool)
    sums, last = script.rolling_discounted_sums(rewards, never, start, 0.9)
    expected = (rewards / sums.std(correction=0)).clamp(-10, 10).float()
    torch.testing.assert_close(ready.rewards, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(carry, last)


@each_with_a_rollout
def test_scaled_rewards_are_clipped(script):
    rewards = torch.zeros(1000, 1, dtype=torch.float64)
    rewards[500] = -1.0  # 30 standard deviations
    ready, _ = scaled(script, rewards, torch.zeros(1, dtype=torch.float64), 0.0)
    assert ready.rewards.min() == -10


def stored_rewards(script, inputs):
    """Rewards (T, N) that `update` learns from."""
    if script is acer_discrete:
        return inputs[4].newest().rewards
    return inputs[3].rewards


@each_discrete
@pytest.mark.parametrize("clip", [True, False])
def test_learning_sees_clipped_rewards_and_the_log_raw_scores(script, monkeypatch, clip):
    seen = []
    update = script.update
    monkeypatch.setattr(
        script, "update", lambda *x: seen.append(stored_rewards(script, x).clone()) or update(*x)
    )
    flags = {"env_id": "CutCatch-v0", "hidden_sizes": (16,), "num_steps": 12}
    args = make_args(script, **flags, clip_rewards=clip, total_timesteps=240)
    *_, metrics = script.GENERATOR(args)
    rewards = torch.stack(seen).flatten()
    assert set(rewards.tolist()) == ({0.0, 1.0, -1.0} if clip else {0.0, 5.0, -5.0})
    total = rewards.sum().item() * (5 if clip else 1)
    assert metrics["episodic_return"] == pytest.approx(total / 40)  # of 240 / 6 episodes


# ---- Games of ALE ----


BREAKOUT = "ALE/Breakout-v5"


def no_noops(monkeypatch):
    monkeypatch.setattr(ale_py, "AtariVectorEnv", partial(ale_py.AtariVectorEnv, noop_max=0))


def play(script, steps, game=BREAKOUT, num_envs=1, seed=0, life_loss=True, **kwargs):
    """Play at random. Returns the episodes, the actions, results of the steps and obs after."""
    envs = script.make_envs(game, num_envs, seed, life_loss=life_loss, **kwargs)
    rng = np.random.default_rng(seed)
    actions = [rng.integers(envs.action_space.n, size=num_envs) for _ in range(steps)]
    played = []
    counter = script.Episodes(num_envs)
    for action in actions:
        result = envs.step(action)
        played.append((*(x.copy() for x in result), envs.obs.copy()))
        counter.add(torch.from_numpy(result[1])[None], torch.from_numpy(envs.lengths == 0)[None])
    return counter.last, actions, played


@each_discrete
def test_breakout_loses_five_lives_a_game_and_scores_as_an_unwrapped_game(script, monkeypatch):
    no_noops(monkeypatch)
    episodes, actions, played = play(script, 1500)
    ends = [t for t, (_, _, terminated, *_) in enumerate(played) if terminated[0]]
    assert len(episodes) >= 4 and not any(step[3].any() for step in played)
    lengths = [length for _, length in episodes]
    fifths = [t + 1 for t in ends[4::5]]  # five terminal signals a game
    assert fifths == np.cumsum(lengths).tolist()

    game = ale_py.ALEInterface()
    game.setFloat("repeat_action_probability", 0.0)
    game.loadROM(ale_py.roms.get_rom_path("breakout"))
    buttons = game.getMinimalActionSet()
    scores = []
    remaining = iter(actions)
    for length in lengths:
        game.reset_game()
        game.act(buttons[1])  # fire, as on reset
        scores.append(0)
        lives = game.lives()
        lost = False
        for _ in range(length):
            assert not game.game_over()
            chosen = next(remaining)[0]
            action = buttons[1 if lost else chosen]  # a life begins with fire
            scores[-1] += sum(game.act(action) for _ in range(4))
            lost = game.lives() < lives
            lives = game.lives()
        assert game.game_over()
    assert scores == [score for score, _ in episodes] and sum(scores) > 0


@each_discrete
def test_each_life_begins_with_fire(script):
    envs = script.make_envs(BREAKOUT, 4, 0, life_loss=True)
    lives = envs.step(np.ones(4, int))[2].astype(int)
    for _ in range(300):
        lives += envs.step(np.zeros(4, int))[2]  # never again by choice
    assert (lives > 10).all()
    assert script.make_envs("ALE/Qbert-v5", 1, 0).has_fire
    assert not script.make_envs("ALE/MsPacman-v5", 1, 0).has_fire  # no such button


@each_discrete
def test_full_games_end_only_once_all_lives_are_lost(script):
    episodes, _, played = play(script, 1000, life_loss=False)
    assert len(episodes) >= 3
    assert sum(int(step[2].sum()) for step in played) == len(episodes)


@each_discrete
def test_pong_has_no_lives_to_lose(script):
    episodes, _, played = play(script, 1100, "ALE/Pong-v5", num_envs=2)
    assert sum(int(step[2].sum()) for step in played) == len(episodes) >= 2
    assert all(-21 <= score <= -15 for score, _ in episodes)


@each_discrete
def test_truncated_games_have_their_true_successor_and_frames_never_mix(script, monkeypatch):
    monkeypatch.setattr(script, "MAX_FRAMES", 200)
    episodes, _, played = play(script, 150, num_envs=3)
    assert sum(int(step[3].sum()) for step in played) >= 6
    assert sorted({length for _, length in episodes}) == [50]
    for t, (next_obs, _, _, truncated, obs) in enumerate(played):
        for n in range(3):
            fresh = t > 0 and played[t - 1][3][n]
            if truncated[n]:
                assert not obs[n, :3].any() and obs[n, 3].any()  # nothing of the game before
                assert next_obs[n, 3].any()
            else:
                assert np.array_equal(next_obs[n], obs[n])
            if t > 0 and not fresh:
                assert np.array_equal(next_obs[n, :3], played[t - 1][4][n, 1:])


@each_discrete
def test_games_are_stepped_as_the_constants_say(script, monkeypatch):
    starts = set(script.make_envs(BREAKOUT, 8, 0).frames.tolist())
    assert len(starts) > 3 and 1 <= min(starts) < max(starts) <= 31  # no-ops, then fire
    monkeypatch.setattr(script, "FRAME_STACK", 2)
    monkeypatch.setattr(script, "FRAME_SKIP", 3)
    no_noops(monkeypatch)
    envs = script.make_envs(BREAKOUT, 1, 0)
    for _ in range(3):
        envs.step(np.zeros(1, int))
    assert envs.obs.shape == (1, 2, 84, 84) and envs.obs.dtype == np.uint8
    assert envs.frames.tolist() == [1 + 3 * 3] and envs.fps == 20


@each_discrete
def test_sticky_actions_change_the_game(script):
    _, _, plain = play(script, 60, seed=3)
    _, _, again = play(script, 60, seed=3)
    _, _, sticky = play(script, 60, seed=3, repeat_action_probability=0.25)
    assert all(np.array_equal(a[4], b[4]) for a, b in zip(plain, again, strict=True))
    assert any(not np.array_equal(a[4], b[4]) for a, b in zip(plain, sticky, strict=True))


@each_discrete
def test_colour_pictures_show_the_first_game(script):
    options = {"repeat_action_probability": 0.25, "render_mode": "rgb_array"}
    envs = script.make_envs(BREAKOUT, 2, 0, **options)
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(100):
        envs.step(rng.integers(4, size=2))
        picture = envs.render()
        assert picture.shape == (210, 160, 3) and picture.dtype == np.uint8
        gray = (picture @ np.array([0.299, 0.587, 0.114])).reshape(42, 5, 4, 40).mean((1, 3))
        seen = envs.obs[:, -1].reshape(2, 42, 2, 4, 21).mean((2, 4))  # (2, 42, 4)
        differences.append(np.abs(seen - gray).max((1, 2)))
    first, second = np.array(differences).T
    assert first.max() < 10 and np.mean(second > 10) > 0.5  # of the first game, not of the second


@each_discrete
def test_seeds_do_not_share_games(script):
    frames = [script.make_envs(BREAKOUT, 4, seed).frames.tolist() for seed in (1, 2, 1)]
    assert frames[0] == frames[2] and frames[0] != frames[1]
    assert len(set(frames[0])) > 2 and frames[0][1:] != frames[1][:-1]


@each_discrete
def test_a_resumed_game_goes_on_from_new_seeds(script, monkeypatch):
    seen = []
    collect = script.collect
    monkeypatch.setattr(
        script, "collect", lambda envs, *x: seen.append(envs.frames.tolist()) or collect(envs, *x)
    )
    changes = {"env_id": BREAKOUT, "num_steps": 6, "hidden_sizes": (16,)}
    args = make_args(script, **changes, total_timesteps=48)
    seed = script.stream_seed(args.seed, "environments")
    starts = [script.make_envs(BREAKOUT, 2, seed, x).frames.tolist() for x in (None, [12, 12])]
    state = {}
    iterations = script.GENERATOR(args, state)
    next(iterations)
    next(iterations)
    iterations.close()
    assert state["env_rng_states"] == [12, 12]
    list(script.GENERATOR(args, state))
    assert state["step"] == 48 and starts[0] != starts[1]
    assert seen[::2] == starts


@each_discrete
@pytest.mark.parametrize("clip, life_loss", [(True, True), (False, False)])
def test_lost_lives_end_returns_as_asked(script, monkeypatch, clip, life_loss):
    """Every reward is made 7 times as large, and actions are random."""
    rewards, terminated = [], []
    step = script.AtariEnvs.step
    rng = np.random.default_rng(0)

    def louder(envs, actions):
        next_obs, reward, *ends = step(envs, rng.integers(4, size=2))
        return next_obs, 7 * reward, *ends

    def spy(*inputs):  # in place of an update, which takes long
        batch = inputs[4].newest() if script is acer_discrete else inputs[3]
        rewards.append(batch.rewards)
        terminated.append(batch.terminated)
        return {"policy_loss": 0.0, "value_loss": 0.0}

    monkeypatch.setattr(script, "update", spy)
    monkeypatch.setattr(script.AtariEnvs, "step", louder)
    changes = {"env_id": BREAKOUT, "num_steps": 50, "seed": 3, "hidden_sizes": (16,)}
    changes |= {"clip_rewards": clip, "life_loss_terminal": life_loss, "total_timesteps": 800}
    state = {}
    list(script.GENERATOR(make_args(script, **changes), state))
    games = len(state["episodes"])
    lost = int(torch.stack(terminated).sum())
    assert torch.stack(rewards).unique().tolist() == ([0, 1] if clip else [0, 7])
    assert games >= 2 and (lost >= 4 * games if life_loss else lost == games)


@pytest.mark.parametrize(
    "env_id, num_steps", [(BREAKOUT, 130), ("CutCatch-v0", 12), ("Catch-v0", 12)]
)
def test_a_rollout_of_images_is_what_happened_and_truncations_bootstrap(
    monkeypatch, env_id, num_steps
):
    monkeypatch.setattr(ppo_atari, "MAX_FRAMES", 160)
    torch.manual_seed(0)
    envs = ppo_atari.make_envs(env_id, 2, 0, life_loss=True)
    flags = {"orthogonal_init": False, "hidden_sizes": (32,), "norm_obs": False}
    args = ppo_atari.fill_defaults(ppo_atari.Args(**flags), images=True)
    policy = ppo_atari.ActorCritic(envs.obs.shape[1:], int(envs.action_space.n), args)
    steps = []
    step = envs.step

    def spy(actions):
        steps.append((actions, *step(actions), envs.obs))
        return steps[-1][1:5]

    envs.step = spy
    first = envs.obs.copy()
    raw = ppo_atari.collect(envs, policy, draw_noise(policy, num_steps, 2))
    columns = [torch.from_numpy(np.stack(column)) for column in zip(*steps, strict=True)]
    actions, next_obs, rewards, terminated, truncated, obs = columns
    acted_on = torch.cat([torch.from_numpy(first)[None], obs[:-1]])
    expected = (acted_on, next_obs, actions, rewards, terminated, terminated | truncated)
    assert all(torch.equal(a, b) for a, b in zip(raw[:-1], expected, strict=True))

    seen = []
    gae = ppo_atari.gae
    monkeypatch.setattr(ppo_atari, "gae", lambda *x: seen.append(x) or gae(*x))
    rollout, _ = ppo_atari.prepare(raw, policy, torch.zeros(2), 0.99, args)
    ppo_atari.advantages(policy, rollout, 0.99, args)
    (_, values, next_values, *_) = seen[0]
    with torch.no_grad():
        _, expected = policy(acted_on)
        _, successors = policy(next_obs)
        _, after = policy(obs)
    torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-4)
    alive = ~terminated
    torch.testing.assert_close(next_values[alive], successors[alive], atol=1e-5, rtol=1e-4)
    assert truncated.any() == (env_id != "Catch-v0")
    assert terminated.any() == (env_id != "CutCatch-v0")
    if truncated.any():  # the two could be told apart
        assert (successors - after)[truncated].abs().max() > 1e-4


# ---- Random streams ----


@each_script
def test_seeds_do_not_share_environment_streams(script):
    env_id = small(script)["env_id"]
    first, second = (script.make_envs(env_id, 4, seed).obs for seed in (1, 2))
    assert len(np.unique(np.concatenate([first, second])[:, 0])) == 8


@each_script
def test_random_streams_differ(script):
    seeds = {(s, name): script.stream_seed(s, name) for s in range(50) for name in script.STREAMS}
    assert len(set(seeds.values())) == 50 * len(script.STREAMS) and len(script.STREAMS) == 5
    numbers = [torch.randn(8, generator=torch.Generator().manual_seed(s)) for s in seeds.values()]
    assert len({tuple(x.tolist()) for x in numbers}) == len(seeds)


@each_script
def test_a_run_draws_weights_noise_and_order_from_different_streams(script, monkeypatch):
    noises, orders, seeds = [], [], []
    collect, make_envs, update = script.collect, script.make_envs, script.update

    def spy_collect(envs, policy, noise):
        noises.append(noise)
        return collect(envs, policy, noise)

    def spy_make(env_id, num_envs, seed, *rest, **kwargs):
        if rest:  # not the one that is only looked at
            seeds.append(seed)
        return make_envs(env_id, num_envs, seed, *rest, **kwargs)

    def spy_update(*inputs):
        (rng,) = [x for x in inputs if isinstance(x, torch.Generator)]
        before = rng.get_state()
        metrics = update(*inputs)
        if not torch.equal(rng.get_state(), before):
            orders.append(rng.initial_seed())
        return metrics

    monkeypatch.setattr(script, "collect", spy_collect)
    monkeypatch.setattr(script, "make_envs", spy_make)
    monkeypatch.setattr(script, "update", spy_update)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed))
    list(script.GENERATOR(make_args(script, total_timesteps=256, seed=7)))
    expected = {name: script.stream_seed(7, name) for name in script.STREAMS}
    shape = noises[0].shape
    rng = torch.Generator().manual_seed(expected["exploration"])
    for noise in noises:
        if script in CONTINUOUS:
            assert torch.equal(noise, torch.randn(shape, generator=rng))
        else:
            assert torch.equal(noise, torch.empty(shape).exponential_(generator=rng))
    assert set(orders) == {expected["minibatches"]}
    assert seeds == [expected["weights"], expected["environments"]]


# ---- Statistics ----


@each_with_a_rollout
def test_the_first_update_has_the_statistics_of_its_own_rollout(script, monkeypatch):
    """π_old, V and the ratio of iteration 1 are computed under them; later ones come after."""
    raws, inputs, policies = [], [], []
    collect = script.collect

    def spy(envs, policy, noise):
        raws.append(collect(envs, policy, noise))
        policies.append(policy)
        return raws[-1]

    def compile_step(step):
        def spied(*batch):
            if script is trpo_continuous:
                inputs[-1].append(batch[2])
            else:
                inputs[-1] += [x.inputs for x in batch if isinstance(x, script.Batch)]
            return step(*batch)

        return spied

    monkeypatch.setattr(script, "collect", spy)
    changes = {"total_timesteps": 192, "update_epochs": 1, "num_minibatches": 1}
    if script is trpo_continuous:
        changes["step"] = "truncated"  # trpo takes statistics over within its trust region only
    args = make_args(script, **changes)
    inputs.append([])
    for _ in script.GENERATOR(args, {}, compile_step):
        inputs.append([])
    rows = [raw.obs.flatten(0, 1).double() for raw in raws]
    for i, seen in enumerate((rows[:1], rows[:1], rows[:2])):
        before = torch.cat(seen)
        normalized = (rows[i] - before.mean(0)) / before.std(0, correction=0)
        expected = normalized.clamp(-10, 10).float()
        given = inputs[i][0]
        order = [(expected - row).abs().sum(-1).argmin().item() for row in given]
        assert sorted(order) == list(range(64))
        torch.testing.assert_close(given, expected[order], rtol=1e-5, atol=1e-5)
    assert policies[0].obs_stats.count == 192


# ---- What environments may give ----


@each_script
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_observations_of_any_type(script, toy, dtype):
    toy(dtype=dtype)
    envs = script.make_envs("Toy-v0", 2, seed=0)
    assert envs.obs.dtype == dtype
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    metrics = next(script.GENERATOR(args))
    assert metrics["episodic_return"] == 10 and math.isfinite(metrics["policy_loss"])


@each_script
@pytest.mark.parametrize("value", [0.5, np.nan])
def test_an_integer_box_takes_no_fractions(script, toy, value):
    toy(dtype=np.int32, step=lambda env: (np.array([1, value]), 1.0, False, env.time >= 9, {}))
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    with pytest.raises(script.InputError, match="returned float64.* must return .* type int32"):
        list(script.GENERATOR(args))


@each_script
@pytest.mark.parametrize("reward", [np.float32(1), np.int8(1), True, 1, np.array(1.0), 1e-30, 1e30])
@pytest.mark.parametrize("over", [np.bool_(True), 1, True, np.array(True)])
def test_rewards_and_flags_of_any_type(script, toy, reward, over):
    toy(step=lambda env: (env.obs(), reward, over if env.time >= 4 else False, False, {}))
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    if script is acer_discrete and float(reward) > 1e20:  # it does not scale rewards
        with pytest.raises(script.NonFiniteError, match="losses, iteration 1"):
            next(script.GENERATOR(args))
        return
    metrics = next(script.GENERATOR(args))
    assert metrics["episodic_return"] == pytest.approx(4 * float(reward))
    assert metrics["episodic_length"] == 4 and math.isfinite(metrics["policy_loss"])


@each_script
@pytest.mark.parametrize(
    "result, said",
    [
        (lambda obs: (obs, np.array([1.0]), False, False, {}), "float64(1,), bool, bool, dict"),
        (lambda obs: (obs, None, False, False, {}), "float64(2,), NoneType, bool"),
        (lambda obs: (obs, 1.0, np.array([False, True]), False, {}), "float, bool(2,)"),
        (lambda obs: (obs[:1], 1.0, False, False, {}), "float64(1,), float"),
        (lambda obs: (1.0, 1.0, False, False, {}), "float, float, bool"),
        (lambda obs: ("no numbers", 1.0, False, False, {}), "str, float, bool"),
        (lambda obs: ([[1], [2, 3]], 1.0, False, False, {}), "list, float, bool"),
        (lambda obs: (obs, 1.0, False, {}), "float64(2,), float, bool, dict"),
        (lambda obs: None, "NoneType"),
    ],
)
def test_a_mistake_of_an_environment_is_named(script, toy, result, said):
    def step(env):
        wrong = env.time == 5 and env.count == 15
        return result(env.obs()) if wrong else (env.obs(), 1.0, False, env.time >= 10, {})

    toy(step=step)
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    with pytest.raises(script.InputError) as caught:
        list(script.GENERATOR(args))
    message = str(caught.value)
    assert "environment 0, step 5 of its episode" in message and said in message
    assert "\n" not in message and Toy.made == Toy.closed == 2 + (script in DISCRETE)


@each_script
@pytest.mark.parametrize(
    "result, said",
    [
        (lambda obs: obs, "an observation of type float64 and shape (2,) and a dict"),
        (lambda obs: (obs[:1], {}), "float64(1,), dict"),
        (lambda obs: None, "NoneType"),
    ],
)
def test_a_mistake_of_a_reset_is_named(script, toy, result, said):
    toy(reset=lambda env: result(env.obs()))
    with pytest.raises(script.InputError, match="environment 0, step 0 of its episode") as caught:
        script.make_envs("Toy-v0", 3, seed=0)
    assert said in str(caught.value) and Toy.made == Toy.closed == 3


# ---- Spaces and ids ----


BOX = gym.spaces.Box(-1, 1, (2,))
IMAGE = gym.spaces.Box(0, 255, (3, 84, 84), np.uint8)
CHANNELS_LAST = gym.spaces.Box(0, 255, (84, 84, 3), np.uint8)
TOO_LOW = gym.spaces.Box(0, 255, (3, 35, 84), np.uint8)


def hint_of(script, obs, actions):
    """What check_spaces says after the spaces, or None if it takes them."""
    env = gym.Env()
    env.observation_space, env.action_space = obs, actions
    try:
        script.check_spaces(env, "X-v0")
    except script.InputError as error:
        assert "\n" not in str(error) and "this script needs" in str(error)
        return str(error).partition("this script needs")[2]
    return None


@each_continuous
@pytest.mark.parametrize(
    "obs, actions, hint",
    [
        (BOX, BOX, None),
        (BOX, gym.spaces.Discrete(3), "ppo_atari.py and acer_discrete.py take discrete actions"),
        (IMAGE, gym.spaces.Discrete(3), "ppo_atari.py and acer_discrete.py take discrete actions"),
        (BOX, gym.spaces.Discrete(3, start=1), "from 0: shift them with the wrapper"),
        (BOX, gym.spaces.MultiDiscrete([3, 2]), "No script here takes it"),
        (BOX, gym.spaces.MultiBinary(4), "No script here takes it"),
        (BOX, gym.spaces.Box(-1, 1, (2, 2)), "No script here takes it"),
        (BOX, gym.spaces.Box(-1, 1, (0,)), "No script here takes it"),
        (gym.spaces.Box(-1, 1, (0,)), BOX, "No script here takes it"),
        (IMAGE, gym.spaces.Box(0, 9, (2,), np.int64), "No script here takes it"),
        (BOX, gym.spaces.Box(0, 9, (2,), np.int64), "No script here takes it"),
        (gym.spaces.Dict(a=BOX), BOX, "Wrap it in FlattenObservation"),
        (gym.spaces.Box(-1, 1, (2, 2)), BOX, "Wrap it in FlattenObservation"),
        (gym.spaces.Dict(a=BOX), gym.spaces.Discrete(3), "No script here takes it"),
        (gym.spaces.Discrete(5), gym.spaces.Discrete(3), "No script here takes it"),
    ],
)
def test_a_wrong_space_of_a_continuous_script(script, obs, actions, hint):
    found = hint_of(script, obs, actions)
    assert found is None if hint is None else hint in found


@each_discrete
@pytest.mark.parametrize(
    "obs, actions, hint",
    [
        (BOX, gym.spaces.Discrete(3), None),
        (IMAGE, gym.spaces.Discrete(3), None),
        (gym.spaces.Box(0, 255, (4, 36, 40), np.uint8), gym.spaces.Discrete(3), None),
        (BOX, BOX, "ppo_continuous.py takes continuous actions"),
        (BOX, gym.spaces.Discrete(3, start=1), "Shift the actions with the wrapper"),
        (BOX, gym.spaces.MultiDiscrete([3, 2]), "No script here takes it"),
        (BOX, gym.spaces.Box(0, 9, (2,), np.int64), "No script here takes it"),
        (CHANNELS_LAST, gym.spaces.Discrete(3), "with the wrapper TransformObservation"),
        (TOO_LOW, gym.spaces.Discrete(3), "of 36 x 36 pixels or more. Turn its images"),
        (gym.spaces.Dict(a=BOX), gym.spaces.Discrete(3), "Wrap it in FlattenObservation"),
        (gym.spaces.Box(-1, 1, (2, 2)), gym.spaces.Discrete(3), "Wrap it in FlattenObservation"),
        (gym.spaces.Discrete(5), gym.spaces.Discrete(3), "Wrap it in FlattenObservation"),
    ],
)
def test_a_wrong_space_of_a_discrete_script(script, obs, actions, hint):
    found = hint_of(script, obs, actions)
    assert found is None if hint is None else hint in found


OBSERVATIONS = [BOX, IMAGE, gym.spaces.Box(-1, 1, (0,)), gym.spaces.Box(-1, 1, (2, 2))]
OBSERVATIONS += [gym.spaces.Dict(a=BOX), gym.spaces.Discrete(5)]
ACTIONS = [BOX, gym.spaces.Discrete(3), gym.spaces.MultiDiscrete([3, 2])]
ACTIONS += [gym.spaces.Box(-1, 1, (2, 2)), gym.spaces.Box(0, 9, (2,), np.int64)]


@each_script
def test_a_script_that_is_named_takes_these_spaces(script):
    wrong = []
    for obs, actions in itertools.product(OBSERVATIONS, ACTIONS):
        hint = hint_of(script, obs, actions) or ""
        named = {other.ALGORITHM for other in EVERY_SCRIPT if f"{other.ALGORITHM}.py" in hint}
        takers = {other.ALGORITHM for other in EVERY_SCRIPT if not hint_of(other, obs, actions)}
        if not named <= takers or (takers and "No script here takes it" in hint):
            wrong.append(f"{obs}, {actions}: {hint}")
    assert not wrong


@each_script
def test_every_valid_way_to_write_an_id(script, toy):
    toy()
    gym.register("a_space/Spaced-v2", Toy, disable_env_checker=True)
    gym.register("Unversioned", Toy, disable_env_checker=True)
    for env_id, name in (
        ("Toy-v0", "Toy-v0"),
        ("Toy", "Toy"),
        ("conftest:Toy-v0", "Toy-v0"),
        ("a_space/Spaced-v2", "Spaced-v2"),
        ("conftest:a_space/Spaced-v2", "Spaced-v2"),
        ("Unversioned", "Unversioned"),
    ):
        script.make_envs(env_id, 1, seed=0).close()
        assert script.task_name(env_id) == name


@each_script
@pytest.mark.parametrize(
    "env_id", ["NoSuchTask-v0", "nomodule:Task-v0", "a b!c", "", "a:b:c", ":Toy-v0"]
)
def test_an_id_that_does_not_exist_is_one_line(script, env_id):
    with pytest.raises(script.InputError, match="--env-id") as caught:
        script.make_envs(env_id, 1, seed=0)
    assert len(str(caught.value).splitlines()) == 1


# ---- Closing ----


@each_script
def test_every_environment_is_closed_once_after_a_run(script, toy, tmp_path):
    toy()
    args = make_args(script, env_id="Toy-v0", total_timesteps=128, eval_episodes=2)
    script.train(script.Args(**{**vars(args), "run_dir": str(tmp_path / "run")}))
    assert Toy.made == Toy.closed >= 6


@each_script
@pytest.mark.parametrize("failing", ["make", "step", "abandoned"])
def test_every_environment_is_closed_once_after_an_error(script, toy, failing):
    looked_at = 1 if script in DISCRETE else 0  # by observes_images

    def make(count):
        if failing == "make" and count == 3 + looked_at:
            raise RuntimeError("the third of four")

    def step(env):
        if failing == "step" and env.count > 40:
            raise RuntimeError("in the second iteration")
        return env.obs(), 1.0, False, env.time >= 10, {}

    toy(make=make, step=step)
    args = make_args(script, env_id="Toy-v0", num_envs=4, total_timesteps=1280)
    iterations = script.GENERATOR(args)
    if failing == "abandoned":
        next(iterations)
        iterations.close()
    else:
        with pytest.raises(RuntimeError):
            list(iterations)
    assert Toy.closed == looked_at + (2 if failing == "make" else 4)
    iterations.close()
    assert Toy.closed == looked_at + (2 if failing == "make" else 4)


@each_script
def test_an_environment_that_fails_to_close_leaves_no_other_open(script, toy, monkeypatch):
    toy()
    close = Toy.close

    def failing(env):
        close(env)
        if Toy.closed == 2:
            raise RuntimeError("cannot close")

    monkeypatch.setattr(Toy, "close", failing)
    envs = script.make_envs("Toy-v0", 4, seed=0)
    with pytest.warns(UserWarning, match="cannot close"):
        envs.close()
    assert Toy.closed == 4


# ---- Random states ----


@each_script
@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64", "old", "own"])
def test_random_states_of_every_kind_are_saved_and_restored(script, toy, kind, tmp_path):
    def reset(env):
        if env.count == 0 and not hasattr(env, "ready"):
            env.ready = True
            if kind == "old":
                env.np_random = np.random.RandomState(3)
            elif kind == "own":
                env.own = random.Random(3)
            else:
                env.np_random = np.random.Generator(getattr(np.random, kind)(3))
        draw = env.own.random if kind == "own" else env.np_random.uniform
        return np.array([draw(), draw()]), {}

    toy(reset=reset, step=lambda env: (np.zeros(2), 1.0, False, env.time >= 8, {}))
    args = make_args(script, env_id="Toy-v0", total_timesteps=128)
    state = {}
    iterations = script.GENERATOR(args, state)
    next(iterations)
    iterations.close()
    script.save_checkpoint(tmp_path, args, state)
    saved = script.load_checkpoint(str(tmp_path / "checkpoint.pt"))
    assert saved["env_rng_states"] == state["env_rng_states"]
    list(script.GENERATOR(args, saved))
    if kind not in ("old", "own"):
        envs = script.make_envs("Toy-v0", 2, 0)
        again = script.make_envs("Toy-v0", 2, 0, envs.rng_states)
        np.testing.assert_array_equal(envs.obs, again.obs)


@each_script
def test_values_of_libraries_become_those_of_python(script):
    value = {"a": [np.float64(1), (np.arange(2), torch.ones(1))]}
    assert script.to_python(value) == {"a": [1.0, ([0, 1], [1.0])]}


# ---- EnvPool ----

NINE = (
    *("Ant-v5", "HalfCheetah-v5", "Hopper-v5", "Humanoid-v5", "InvertedDoublePendulum-v5"),
    *("InvertedPendulum-v5", "Reacher-v5", "Swimmer-v5", "Walker2d-v5"),
)


def pool_envs(script, task, num_envs=2, threads=1, seed=0, **kwargs):
    pytest.importorskip("envpool")
    return script.make_envs(f"envpool:{task}", num_envs, seed, env_threads=threads, **kwargs)


def state_of(task, obs):
    """(qpos, qvel) of a MuJoCo task from an observation, with 0 for what that does not show."""
    if task == "Reacher-v5":
        cos, sin, target, speed = obs[0:2], obs[2:4], obs[4:6], obs[6:8]
        return np.array([*np.arctan2(sin, cos), *target]), np.array([*speed, 0, 0])
    if task == "InvertedDoublePendulum-v5":
        return np.array([obs[0], *np.arctan2(obs[1:3], obs[3:5])]), obs[5:8]
    hidden = {"InvertedPendulum-v5": 0, "HalfCheetah-v5": 1, "Hopper-v5": 1, "Walker2d-v5": 1}
    hidden = hidden.get(task, 2)
    num_speeds = gym.make(task).unwrapped.model.nv
    num_positions = gym.make(task).unwrapped.model.nq
    positions = obs[: num_positions - hidden]
    return np.array([*np.zeros(hidden), *positions]), obs[num_positions - hidden :][:num_speeds]


@pytest.mark.parametrize("task", NINE)
def test_envpool_steps_as_gymnasium_does(task):
    """From the same state, with the same actions. Feet on the ground make errors grow fast."""
    script = ppo_continuous
    envs = pool_envs(script, task, num_envs=1)
    env = gym.make(task).unwrapped
    env.reset(seed=0)
    env.set_state(*state_of(task, envs.obs[0]))
    rng = np.random.default_rng(0)
    space = env.action_space
    legs = task in ("Ant-v5", "Humanoid-v5")
    close = {"rtol": 0, "atol": 1e-5 if legs else 1e-6}
    for _ in range(1 if legs else 40):
        action = rng.uniform(space.low, space.high).astype(np.float32)
        next_obs, rewards, terminated, truncated = envs.step(action[None])
        obs, reward, over, _, _ = env.step(action)
        np.testing.assert_allclose(next_obs[0], obs, **close)
        np.testing.assert_allclose(rewards[0], reward, rtol=1e-6, atol=close["atol"])
        assert terminated[0] == over and not truncated[0]
        if over:
            break


@each_continuous
@pytest.mark.parametrize("task, num_steps", [("Hopper-v5", 200), ("HalfCheetah-v5", 1010)])
def test_a_rollout_of_envpool_is_whole_and_a_perfect_critic_has_no_advantage(
    script, task, num_steps
):
    """No step is lost at the end of an episode, and none comes from EnvPool's own reset."""
    envs = pool_envs(script, task, num_envs=3, threads=2)
    args = filled(script, norm_obs=False, norm_reward=False, norm_adv=False)
    policy, _ = make_networks(script, envs.obs.shape[1:], envs.action_space, args)
    raw = script.collect(envs, policy, draw_noise(policy, num_steps, 3))
    ends = raw.done[:-1]
    follows = (raw.next_obs[:-1] == raw.obs[1:]).all(-1)
    assert torch.equal(follows, ~ends) and ends.any()
    time_limit = task == "HalfCheetah-v5"
    assert raw.terminated.any() != time_limit and (raw.done & ~raw.terminated).any() == time_limit
    if time_limit:
        assert raw.done.nonzero()[:, 0].tolist() == [999] * 3

    counter = script.Episodes(3)
    counter.add(raw.rewards, raw.done)
    starts = torch.zeros(3, dtype=int)
    expected = []
    for t, n in raw.done.nonzero().tolist():
        rewards = raw.rewards[starts[n] : t + 1, n]
        expected.append((pytest.approx(rewards.sum().item()), len(rewards)))
        starts[n] = t + 1
    assert list(counter.last) == expected[-100:]

    after = raw.rewards.new_tensor([[7.0, 8.0, 9.0]])  # V where the rollout ends
    values = torch.empty_like(raw.rewards)
    next_values = torch.empty_like(raw.rewards)
    for t in reversed(range(num_steps)):
        after = torch.where(raw.done[t], 5.0, after)  # V of a final observation
        next_values[t] = after
        after = raw.rewards[t] + 0.9 * after * ~raw.terminated[t]
        values[t] = after
    table = {}
    for obs, v in ((raw.obs, values), (raw.next_obs, next_values)):
        states = map(bytes, obs.flatten(0, 1).numpy())
        table |= dict(zip(states, v.flatten().tolist(), strict=True))

    def critic(obs):
        flat = [table[bytes(row)] for row in obs.reshape(-1, obs.shape[-1]).numpy()]
        return torch.tensor(flat, dtype=torch.float64).reshape(obs.shape[:-1])

    adv, _, _ = script.advantages(critic, raw, 0.9, args)
    torch.testing.assert_close(adv, torch.zeros_like(adv), atol=1e-9, rtol=0)


def test_threads_of_envpool_change_nothing_and_seeds_are_those_of_the_environments():
    actions = np.random.default_rng(0).uniform(-1, 1, (60, 4, 3)).astype(np.float32)
    played = []
    for threads in (1, 2):
        envs = pool_envs(ppo_continuous, "Hopper-v5", 4, threads)
        played.append([np.concatenate(envs.step(x)[:1]) for x in actions])
    np.testing.assert_array_equal(*played)
    whole = pool_envs(ppo_continuous, "Hopper-v5", 4)
    part = pool_envs(ppo_continuous, "Hopper-v5", 4, part=slice(2, 4))
    np.testing.assert_array_equal(whole.obs[2:], part.obs)
    resumed = pool_envs(ppo_continuous, "Hopper-v5", 4, rng_states=[640] * 4)
    assert not (whole.obs == resumed.obs).any() and resumed.rng_states == [640] * 4
    assert len({*map(bytes, whole.obs), *map(bytes, resumed.obs)}) == 8


@each_continuous
def test_training_in_envpool_resumes_and_is_evaluated_in_gymnasium(script, tmp_path, monkeypatch):
    pytest.importorskip("envpool")
    made = []
    make = gym.make
    monkeypatch.setattr(gym, "make", lambda *x, **y: made.append(x[0]) or make(*x, **y))
    task = "InvertedPendulum-v5"
    args = make_args(script, env_id=f"envpool:{task}", env_threads=1, total_timesteps=128)
    args.run_dir = str(tmp_path / "run")
    args.eval_episodes = 2
    result = script.train(args)
    assert result["eval_return"] > 0 and set(made) == {task}
    args = script.Args(**script.load_checkpoint(result["checkpoint"])["args"])
    args.resume = result["checkpoint"]
    args.total_timesteps *= 2
    assert script.train(args)["steps"] == args.total_timesteps


@each_script
def test_bad_use_of_envpool_is_one_line(script, tmp_path, monkeypatch):
    run_dir = str(tmp_path / "run")
    wrong = dict.fromkeys(
        ("envpool:Nope-v5", "envpool:Pendulum-v1", "envpool:Pong-v5", "envpool:Ant-v4"),
        "EnvPool is for MuJoCo tasks such as Hopper-v5",
    )
    if script in DISCRETE:
        wrong = {"envpool:Pong-v5": "EnvPool is for the scripts of continuous actions"}
    elif importlib.util.find_spec("envpool") is None:
        pytest.skip("needs envpool")
    for env_id, message in wrong.items():
        with pytest.raises(script.InputError, match=message):
            script.train(make_args(script, env_id=env_id, run_dir=run_dir))
    if script in CONTINUOUS:
        with pytest.raises(script.InputError, match="--env-threads has no effect"):
            script.train(make_args(script, env_threads=2, run_dir=run_dir))
        monkeypatch.setitem(sys.modules, "envpool", None)
        with pytest.raises(script.InputError, match="pip install envpool"):
            script.train(make_args(script, env_id="envpool:Hopper-v5", run_dir=run_dir))
    assert not (tmp_path / "run").exists()


@each_continuous
def test_the_policy_of_a_pool_is_evaluated_without_it(script, command, tmp_path, monkeypatch):
    pytest.importorskip("envpool")
    flags = "--env-id envpool:Hopper-v5 --num-envs 4 --num-steps 8 --num-minibatches 2"
    flags += f" --total-timesteps 64 --eval-episodes 0 --run-dir {tmp_path}/run"
    assert command(script, flags) == 0
    monkeypatch.setitem(sys.modules, "envpool", None)  # import raises ImportError
    assert command(script, f"--evaluate {tmp_path}/run/checkpoint.pt --eval-episodes 1") == 0

"""Environments and rollouts: successors, returns, random streams, spaces, mistakes, closing."""

import math
import random

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import PerfectCritic, Toy, each_continuous, first_networks, make_args

import ppo_continuous as ppo


def simple_policy(script, envs, **flags):
    args = script.Args(norm_obs=False, **flags)
    return script.Policy(envs.obs.shape[1:], envs.action_space, args), args


def roll(script, env_id, num_steps=10, num_envs=2, **flags):
    envs = script.make_envs(env_id, num_envs, seed=0)
    policy, args = simple_policy(script, envs, norm_reward=False, **flags)
    raw = script.collect(envs, policy, torch.Generator(), num_steps)
    critic = script.Critic(envs.obs.shape[1:], args)
    rollout, _ = script.prepare(raw, policy, critic, torch.zeros(num_envs), args.gamma, args)
    return rollout, args


# ---- Successors and returns ----


@each_continuous
@pytest.mark.parametrize("env_id, finite", [("Chain-v0", True), ("EndlessChain-v0", False)])
def test_perfect_critic_has_no_advantage_to_report(script, env_id, finite):
    rollout, args = roll(script, env_id)
    assert rollout.done.sum() == 6 and rollout.terminated.sum() == (6 if finite else 0)
    critic = PerfectCritic(finite, args.gamma)
    adv, returns, values = script.advantages(critic, rollout, args.gamma, args)
    torch.testing.assert_close(adv, torch.zeros(10, 2), atol=2e-5, rtol=0)
    torch.testing.assert_close(returns, values)


@each_continuous
@pytest.mark.parametrize("env_id", ["Chain-v0", "EndlessChain-v0"])
def test_advantages_take_the_value_of_the_true_successor(script, env_id):
    rollout, args = roll(script, env_id, gae_lambda=0.0)

    def critic(obs):
        return 1 + obs.squeeze(-1)  # another value in each state

    adv, _, _ = script.advantages(critic, rollout, 0.9, args)
    after = critic(rollout.next_obs) * ~rollout.terminated
    torch.testing.assert_close(adv, rollout.rewards + 0.9 * after - critic(rollout.obs))


@each_continuous
def test_step_gives_the_true_successor_and_the_observation_to_act_on(script):
    envs = script.make_envs("Chain-v0", 1, seed=0)
    seen = []
    for _ in range(4):
        before = float(envs.obs[0, 0])
        seen.append((before, float(envs.step(np.zeros((1, 1)))[0][0, 0])))
    assert seen == [(0, 1), (1, 2), (2, 3), (0, 1)] and envs.obs == 1.0


@each_continuous
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


@each_continuous
def test_returns_are_those_of_an_unwrapped_environment(script):
    envs = script.make_envs("Hopper-v5", 1, seed=5)
    start = envs.rng_states[0]
    actions = np.random.default_rng(0).uniform(-1, 1, (200, 1, 3)).astype(np.float32)
    for action in actions:
        envs.step(action)

    env, expected = gym.make("Hopper-v5").unwrapped, []
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
    np.testing.assert_allclose(envs.episodes, expected, rtol=1e-6)


@each_continuous
@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_rewards_are_scaled_by_the_std_of_the_discounted_return(script, scale):
    policy, critic, _, rng, args = first_networks(script, num_steps=64, num_envs=4)
    shape = (64, 4)
    rewards = scale * torch.randn(shape, dtype=torch.float64)
    never = torch.zeros(shape, dtype=torch.bool)
    obs = torch.zeros(*shape, 3)
    raw = script.Rollout(obs, obs, torch.zeros(*shape, 1), rewards, never, never)
    start = torch.zeros(4, dtype=torch.float64)
    critic = script.Critic((3,), args)
    ready, carry = script.prepare(raw, policy, critic, start, 0.9, args)
    sums, last = script.rolling_discounted_sums(rewards, never, start, 0.9)
    expected = (rewards / sums.std(correction=0)).clamp(-10, 10).float()
    torch.testing.assert_close(ready.rewards, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(carry, last)


@each_continuous
def test_scaled_rewards_are_clipped(script):
    policy, critic, _, _, args = first_networks(script)
    rewards = torch.zeros(1000, 1, dtype=torch.float64)
    rewards[500] = -1.0  # 30 standard deviations
    never = torch.zeros(1000, 1, dtype=torch.bool)
    obs = torch.zeros(1000, 1, 3)
    raw = script.Rollout(obs, obs, torch.zeros(1000, 1, 1), rewards, never, never)
    carry = torch.zeros(1, dtype=torch.float64)
    ready, _ = script.prepare(raw, policy, script.Critic((3,), args), carry, 0.0, args)
    assert ready.rewards.min() == -10


# ---- Random streams ----


@each_continuous
def test_seeds_do_not_share_environment_streams(script):
    first, second = (script.make_envs("Pendulum-v1", 4, seed).obs for seed in (1, 2))
    assert len(np.unique(np.concatenate([first, second])[:, 0])) == 8


@each_continuous
def test_random_streams_differ(script):
    seeds = {(s, name): script.stream_seed(s, name) for s in range(50) for name in script.STREAMS}
    assert len(set(seeds.values())) == 50 * len(script.STREAMS) and len(script.STREAMS) == 5
    numbers = [torch.randn(8, generator=torch.Generator().manual_seed(s)) for s in seeds.values()]
    assert len({tuple(x.tolist()) for x in numbers}) == len(seeds)


@each_continuous
def test_a_run_draws_weights_noise_and_order_from_different_streams(script, monkeypatch):
    drawn = {"noise": [], "seeds": []}
    sample, make_envs = script.Policy.sample, script.make_envs

    def spy_sample(policy, obs, rng=None):
        drawn["noise"].append(rng.initial_seed())
        return sample(policy, obs, rng)

    def spy_make(env_id, num_envs, seed, *rest, **kwargs):
        drawn["seeds"].append(seed)
        return make_envs(env_id, num_envs, seed, *rest, **kwargs)

    monkeypatch.setattr(script.Policy, "sample", spy_sample)
    monkeypatch.setattr(script, "make_envs", spy_make)
    monkeypatch.setattr(torch, "manual_seed", lambda s: drawn["seeds"].append(s))
    args = make_args(script, total_timesteps=64, seed=7)
    orders = []
    randperm = torch.randperm
    monkeypatch.setattr(
        torch,
        "randperm",
        lambda n, generator: (
            orders.append(generator.initial_seed()) or randperm(n, generator=generator)
        ),
    )
    next(script.GENERATOR(args))
    expected = {name: script.stream_seed(7, name) for name in script.STREAMS}
    assert set(drawn["noise"]) == {expected["exploration"]}
    assert set(orders) == {expected["minibatches"]}
    assert drawn["seeds"] == [expected["weights"], expected["environments"]]


# ---- Statistics ----


@each_continuous
def test_the_first_update_has_the_statistics_of_its_own_rollout(script, monkeypatch):
    """π_old, V and the ratio of iteration 1 are computed under them; later ones come after."""
    raws, inputs, policies = [], [], []
    collect = script.collect

    def spy(envs, policy, rng, num_steps):
        raws.append(collect(envs, policy, rng, num_steps))
        policies.append(policy)
        return raws[-1]

    def compile_step(step):
        def spied(policy, critic, optimizer, batch, *rest):
            inputs[-1].append(batch.inputs)
            return step(policy, critic, optimizer, batch, *rest)

        return spied

    monkeypatch.setattr(script, "collect", spy)
    args = make_args(script, total_timesteps=192, update_epochs=1, num_minibatches=1)
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


@each_continuous
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int32, np.uint8])
def test_observations_of_any_type(script, toy, dtype):
    toy(dtype=dtype)
    envs = script.make_envs("Toy-v0", 2, seed=0)
    assert envs.obs.dtype == dtype
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    metrics = next(script.GENERATOR(args))
    assert metrics["episodic_return"] == 10 and math.isfinite(metrics["policy_loss"])


@each_continuous
@pytest.mark.parametrize("value", [0.5, np.nan])
def test_an_integer_box_takes_no_fractions(script, toy, value):
    toy(dtype=np.int32, step=lambda env: (np.array([1, value]), 1.0, False, env.time >= 9, {}))
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    with pytest.raises(script.InputError, match="returned float64.* must return .* type int32"):
        list(script.GENERATOR(args))


@each_continuous
@pytest.mark.parametrize("reward", [np.float32(1), np.int8(1), True, 1, np.array(1.0), 1e-30, 1e30])
@pytest.mark.parametrize("over", [np.bool_(True), 1, True, np.array(True)])
def test_rewards_and_flags_of_any_type(script, toy, reward, over):
    toy(step=lambda env: (env.obs(), reward, over if env.time >= 4 else False, False, {}))
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    metrics = next(script.GENERATOR(args))
    assert metrics["episodic_return"] == pytest.approx(4 * float(reward))
    assert metrics["episodic_length"] == 4 and math.isfinite(metrics["policy_loss"])


@each_continuous
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
        wrong = env.time == 5 and Toy.made == 2 and env.count == 15
        return result(env.obs()) if wrong else (env.obs(), 1.0, False, env.time >= 10, {})

    toy(step=step)
    args = make_args(script, env_id="Toy-v0", total_timesteps=64)
    with pytest.raises(script.InputError) as caught:
        list(script.GENERATOR(args))
    message = str(caught.value)
    assert "environment 0, step 5 of its episode" in message and said in message
    assert "\n" not in message and Toy.made == Toy.closed == 2


@each_continuous
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


@each_continuous
@pytest.mark.parametrize(
    "obs, actions, hint",
    [
        (BOX, gym.spaces.Discrete(3), "acer_discrete.py takes discrete actions"),
        (IMAGE, gym.spaces.Discrete(3), "acer_discrete.py takes discrete actions"),
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
def test_a_wrong_space_leads_to_a_script_that_takes_it_or_to_none(script, obs, actions, hint):
    env = gym.Env()
    env.observation_space, env.action_space = obs, actions
    with pytest.raises(script.InputError) as caught:
        script.check_spaces(env, "X-v0")
    assert hint in str(caught.value) and "\n" not in str(caught.value)


@each_continuous
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


@each_continuous
@pytest.mark.parametrize(
    "env_id", ["NoSuchTask-v0", "nomodule:Task-v0", "a b!c", "", "a:b:c", ":Toy-v0"]
)
def test_an_id_that_does_not_exist_is_one_line(script, env_id):
    with pytest.raises(script.InputError, match="--env-id") as caught:
        script.make_envs(env_id, 1, seed=0)
    assert len(str(caught.value).splitlines()) == 1


# ---- Closing ----


@each_continuous
def test_every_environment_is_closed_once_after_a_run(script, toy, tmp_path):
    toy()
    args = make_args(script, env_id="Toy-v0", total_timesteps=128, eval_episodes=2)
    script.train(script.Args(**{**vars(args), "run_dir": str(tmp_path / "run")}))
    assert Toy.made == Toy.closed >= 6


@each_continuous
@pytest.mark.parametrize("failing", ["make", "step", "abandoned"])
def test_every_environment_is_closed_once_after_an_error(script, toy, failing):
    def make(count):
        if failing == "make" and count == 3:
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
    assert Toy.closed == (2 if failing == "make" else 4)
    iterations.close()
    assert Toy.closed == (2 if failing == "make" else 4)


@each_continuous
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


@each_continuous
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


def test_the_toy_counts():
    assert ppo.to_python({"a": [np.float64(1), (np.arange(2),)]}) == {"a": [1.0, ([0, 1],)]}

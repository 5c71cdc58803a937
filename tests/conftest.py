"""Helpers of all tests: the scripts, small settings, toy environments."""

import hashlib
import math
import os
import signal
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import acer_discrete
import ppo_atari
import ppo_continuous
import trpo_continuous

ROOT = Path(__file__).parents[1]
CONTINUOUS = [ppo_continuous]
EVERY_SCRIPT = [ppo_continuous, trpo_continuous, ppo_atari, acer_discrete]
SMALL = {
    "env_id": "Pendulum-v1",
    "num_envs": 2,
    "num_steps": 32,
    "num_minibatches": 4,
    "update_epochs": 2,
    "compile": "off",
    "eval_episodes": 0,
}
if os.name != "posix":  # they need POSIX signals and file locks
    collect_ignore = ["test_first_edition.py", "test_trpo_continuous.py", "test_benchmarks.py"]
    collect_ignore += ["test_ppo_atari.py", "test_acer_discrete.py"]
EVERY_SIGNAL = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def each_with(name):
    """Run a test for every script that has this function."""
    scripts = [script for script in EVERY_SCRIPT if hasattr(script, name)]
    return pytest.mark.parametrize("script", scripts, ids=lambda s: s.__name__)


each_continuous = pytest.mark.parametrize("script", CONTINUOUS, ids=lambda s: s.ALGORITHM)


@pytest.fixture(autouse=True)
def the_process_is_left_as_it_was():
    """main() installs signal handlers, train() sets the number of threads."""
    handlers = {number: signal.getsignal(number) for number in EVERY_SIGNAL}
    folder, threads = os.getcwd(), torch.get_num_threads()
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    os.chdir(folder)
    torch.set_num_threads(threads)


@pytest.fixture
def command(monkeypatch):
    """Run a script's main() with these flags in this process; returns the exit code."""

    def run(script, *flags):
        words = [str(word) for flag in flags for word in str(flag).split()]
        monkeypatch.setattr(sys, "argv", [script.__file__, *words])
        return script.main()

    return run


def random_ends(steps, envs, seed=0):
    """Random (terminated, truncated), with both on some steps."""
    generator = np.random.default_rng(seed)
    return torch.from_numpy(generator.random((2, steps, envs)) < 0.2).unbind()


class PerfectCritic:
    """The true V of Chain: of three steps left to go, or of reward 1 for ever."""

    def __init__(self, finite, gamma):
        self.finite = finite
        self.gamma = gamma

    def __call__(self, obs):
        left = 3 - obs.squeeze(-1)
        if self.finite:
            return (1 - self.gamma**left) / (1 - self.gamma)
        return torch.full_like(left, 1 / (1 - self.gamma))


def make_args(script, **changes):
    return script.Args(**(SMALL | changes))


def small_flags(**changes):
    """SMALL as flags of the command line."""
    settings = SMALL | changes
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def first_networks(script, **changes):
    """Networks and optimizer as the generator makes them, on one rollout of theirs."""
    args = make_args(script, **changes)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(0)
    envs = script.make_envs(args.env_id, args.num_envs, args.seed)
    policy = script.Policy(envs.obs.shape[1:], envs.action_space, args)
    critic = script.Critic(envs.obs.shape[1:], args)
    raw = script.collect(envs, policy, rng, args.num_steps)
    policy.obs_stats.update(raw.obs.flatten(0, 1))
    raw = script.collect(envs, policy, rng, args.num_steps)
    carry = torch.zeros(args.num_envs, dtype=torch.float64)
    rollout, _ = script.prepare(raw, policy, critic, carry, args.gamma, args)
    envs.close()
    return policy, critic, rollout, rng, args


def fingerprint(checkpoint):
    """SHA-256 of all tensors and numbers of a checkpoint, but not of its arguments."""
    saved = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()

    def visit(value):
        if isinstance(value, dict):
            for key in value:
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            plain = value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
            digest.update(plain)

    visit({key: value for key, value in saved.items() if key != "args"})
    return digest.hexdigest()


class Chain(gym.Env):
    """Position 0, 1, 2, … with reward 1 a step. Ends after three steps if `finite`."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, finite=True, render_mode=None):
        self.finite = finite
        self.render_mode = render_mode

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.position = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.position += 1
        over = self.finite and self.position == 3
        return np.array([self.position], np.float32), 1.0, over, False, {}

    def render(self):
        return np.full((16, 16, 3), 50 * self.position, np.uint8)


class Toy(gym.Env):
    """Ten steps an episode; returns what the test asks for, and counts what was made and closed."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    made = 0
    closed = 0
    actions = []

    def __init__(self, step=None, reset=None, make=None, action_space=None, dtype=np.float64):
        type(self).made += 1
        self.own_step, self.own_reset, self.count = step, reset, 0
        low, high = (0, 200) if dtype in (np.uint8, np.int32) else (-np.inf, np.inf)
        self.observation_space = gym.spaces.Box(low, high, (2,), dtype)
        if action_space is not None:
            self.action_space = action_space
        if make is not None:
            make(type(self).made)

    def obs(self):
        return self.np_random.uniform(0, 100, 2).astype(self.observation_space.dtype)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return (self.obs(), {}) if self.own_reset is None else self.own_reset(self)

    def step(self, action):
        self.time += 1
        self.count += 1
        type(self).actions.append(action)
        if self.own_step is not None:
            return self.own_step(self)
        return self.obs(), 1.0, False, self.time >= 10, {}

    def close(self):
        type(self).closed += 1


class Poison(Chain):
    """Gives NaN or infinity from the 20th step on."""

    def __init__(self, poison):
        super().__init__()
        self.poison = poison
        self.count = 0

    def reset(self, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return (obs * np.nan if self.poison == "observations" and self.count > 20 else obs), info

    def step(self, action):
        obs, reward, *rest = super().step(action)
        self.count += 1
        if self.count > 20 and self.poison == "successors":
            obs = obs * np.nan
        if self.count > 20 and self.poison == "rewards":
            reward = math.inf
        return obs, reward, *rest


gym.register("Chain-v0", Chain, disable_env_checker=True)
gym.register("EndlessChain-v0", Chain, kwargs={"finite": False}, max_episode_steps=3)
gym.register("Unlimited-v0", Chain, kwargs={"finite": False})
gym.register("Poison-v0", Poison)
gym.register("Toy-v0", Toy, disable_env_checker=True)


@pytest.fixture
def toy(monkeypatch):
    """Set what Toy-v0 does; counts start at zero."""
    monkeypatch.setattr(Toy, "made", 0)
    monkeypatch.setattr(Toy, "closed", 0)
    monkeypatch.setattr(Toy, "actions", [])

    def configure(**kwargs):
        monkeypatch.setattr(gym.registry["Toy-v0"], "kwargs", kwargs)
        return Toy

    return configure

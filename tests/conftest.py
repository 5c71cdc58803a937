"""Helpers of all tests: the scripts, small settings, toy environments."""

import hashlib
import math
import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for PyTorch: two tests run at once

import gymnasium as gym
import numpy as np
import pytest
import torch

import acer_discrete
import ppo_atari
import ppo_continuous
import trpo_continuous

ROOT = Path(__file__).parents[1]
CONTINUOUS = [ppo_continuous, trpo_continuous]
DISCRETE = [ppo_atari, acer_discrete]
EVERY_SCRIPT = CONTINUOUS + DISCRETE
SMALL = {
    "env_id": "Pendulum-v1",
    "device": "cpu",
    "num_envs": 2,
    "num_steps": 32,
    "num_minibatches": 4,
    "update_epochs": 2,
    "compile": "off",
    "eval_episodes": 0,
}
if os.name != "posix":  # it needs POSIX signals and file locks
    collect_ignore = ["test_benchmarks.py"]
EVERY_SIGNAL = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def each_with(name):
    """Run a test for every script that has this function."""
    scripts = [script for script in EVERY_SCRIPT if hasattr(script, name)]
    return pytest.mark.parametrize("script", scripts, ids=lambda s: s.__name__)


each_script = pytest.mark.parametrize("script", EVERY_SCRIPT, ids=lambda s: s.ALGORITHM)
each_continuous = pytest.mark.parametrize("script", CONTINUOUS, ids=lambda s: s.ALGORITHM)
each_discrete = pytest.mark.parametrize("script", DISCRETE, ids=lambda s: s.ALGORITHM)


@pytest.fixture(autouse=True)
def weights_and_noise_are_the_same_in_every_order_of_the_tests():
    torch.manual_seed(0)
    np.random.seed(0)


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


@pytest.fixture(autouse=True)
def toys_have_the_actions_of_the_script(request, monkeypatch):
    """Chain and Toy have discrete actions in the tests of a script that takes these."""
    parameters = getattr(request.node, "callspec", None)
    if parameters is not None and parameters.params.get("script") in DISCRETE:
        for toy in (Chain, Toy):
            monkeypatch.setattr(toy, "action_space", gym.spaces.Discrete(3))


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


def small(script, **changes):
    """SMALL for this script, as fields of its Args, and changes."""
    settings = dict(SMALL)
    if script in DISCRETE:
        settings["env_id"] = "CartPole-v1"
    if script is acer_discrete:
        del settings["num_minibatches"], settings["update_epochs"]
        settings |= {"replay_start": 64, "replay_capacity": 320, "replay_ratio": 1.0}
    return settings | changes


def make_args(script, **changes):
    return script.Args(**small(script, **changes))


def small_flags(script, **changes):
    """The settings of `small` as flags of the command line."""
    words = []
    for name, value in small(script, **changes).items():
        flag = name.replace("_", "-")
        words.append(f"--no-{flag}" if value is False else f"--{flag} {value}")
    return " ".join(words)


def make_networks(script, obs_shape, action_space, args):
    """[policy, critic] of a continuous script, [policy] with both heads of a discrete one."""
    if script in CONTINUOUS:
        return [script.Policy(obs_shape, action_space, args), script.Critic(obs_shape, args)]
    args = script.fill_defaults(args, images=len(obs_shape) == 3)
    return [script.ActorCritic(obs_shape, int(action_space.n), args)]


def draw_noise(policy, num_steps, num_envs, seed=0):
    """Noise (T, N, A) for `collect`."""
    rng = torch.Generator().manual_seed(seed)
    if hasattr(policy, "action_dim"):
        return torch.randn(num_steps, num_envs, policy.action_dim, generator=rng)
    return torch.empty(num_steps, num_envs, policy.num_actions).exponential_(generator=rng)


def flat_copy(parameters):
    """Parameters as one vector of their own."""
    return torch.cat([param.detach().flatten() for param in parameters])


def double_policy(script, obs_dim=3, action_dim=2, **flags):
    """Policy in float64 with statistics, whose KL has curvature in all weights."""
    torch.manual_seed(1)
    space = gym.spaces.Box(-1, 1, (action_dim,))
    args = script.Args(**({"hidden_sizes": (5,), "log_std_final": None} | flags))
    policy = script.Policy((obs_dim,), space, args).double()
    policy.obs_stats.update(2 * torch.randn(50, obs_dim, dtype=torch.float64) + 1)
    with torch.no_grad():
        for param in policy.parameters():
            param += 0.3 * torch.randn_like(param)
    return policy


def hessian_of_mean_kl(policy, inputs):
    """Hessian of the mean KL(π_old ‖ π) in the weights (P, P), by two backward passes."""
    params = list(policy.parameters())
    mean, log_std = policy.mean_and_log_std(inputs)
    log_std = log_std.expand_as(mean)
    old = torch.distributions.Normal(mean.detach(), log_std.detach().exp())
    new = torch.distributions.Normal(mean, log_std.exp())
    kl = torch.distributions.kl_divergence(old, new).sum(-1).mean()
    grads = torch.autograd.grad(kl, params, create_graph=True)
    gradient = torch.cat([grad.flatten() for grad in grads])
    assert gradient.abs().max() < 1e-12  # at its minimum
    rows = []
    for g in gradient:
        row = torch.autograd.grad(g, params, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([part.flatten() for part in row]))
    return torch.stack(rows)


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


class AcerExample:
    """Four steps in one environment with three actions, worked out from formulas in float64.

    γ = 0.9, c = 2, δ = 0.1. Rows are states s_0 to s_4, or steps 0 to 3.
    """

    logits = double(
        [[0.5, -0.2, 0.1], [1, 0, -1], [-0.3, 0.8, 0.2], [0, 0.4, -0.6], [0.3, 0.3, -0.2]]
    )
    q = double([[1, 0.2, -0.5], [0.3, 0.8, 0], [-0.2, 0.6, 0.4], [0.9, -0.1, 0.5], [0.7, 0.4, 0.1]])
    avg = double([[0.2, 0.1, 0], [0.4, 0.3, -0.5], [-0.6, 1, 0.1], [-0.5, 0.6, -0.4]]).softmax(-1)
    mu = double([[0.2, 0.5, 0.3], [0.7, 0.2, 0.1], [0.5, 0.1, 0.4], [0.3, 0.3, 0.4]])
    actions = torch.tensor([1, 0, 2, 0])
    rewards = double([1, -0.5, -2, 2])
    probs = logits.softmax(-1)
    values = (probs * q).sum(-1)
    q_ret = double([0.56095864, -0.62932648, -0.34586134, 2.4007579])


def fingerprint(checkpoint):
    """SHA-256 of all tensors and numbers of a checkpoint, but not of its arguments."""
    saved = torch.load(checkpoint, weights_only=True)
    digest = hashlib.sha256()

    def visit(value):
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                visit(value[key])
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            plain = value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode()
            digest.update(plain)

    visit({key: value for key, value in saved.items() if key != "args"})
    return digest.hexdigest()


class Catch(gym.Env):
    """A ball falls from a random column, the paddle below moves left, stays or moves right.

    Observations are images of 7 x 7 cells. Episodes have six steps. The reward of the last one is
    `reward` for a catch and -`reward` for a miss. With `cut` a time limit ends the episodes.
    """

    action_space = gym.spaces.Discrete(3)
    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, reward=1, cut=False, pixels=12, render_mode=None):
        self.pixels = pixels  # height and width of a cell
        self.observation_space = gym.spaces.Box(0, 255, (1, 7 * pixels, 7 * pixels), np.uint8)
        self.reward = reward
        self.cut = cut
        self.render_mode = render_mode

    def picture(self):
        cells = np.zeros((7, 7), np.uint8)
        cells[self.row, self.ball] = 255
        cells[-1, self.paddle] = 255
        return cells.repeat(self.pixels, 0).repeat(self.pixels, 1)[None]

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.row = 0
        self.paddle = 3
        self.ball = int(self.np_random.integers(7))
        return self.picture(), {}

    def step(self, action):
        self.row += 1
        self.paddle = int(np.clip(self.paddle + action - 1, 0, 6))
        over = self.row == 6
        reward = 0
        if over:
            reward = self.reward if self.ball == self.paddle else -self.reward
        return self.picture(), reward, over and not self.cut, over and self.cut, {}

    def render(self):
        return self.picture()[0, ..., None].repeat(3, -1)


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


gym.register("Catch-v0", Catch)
gym.register("SmallCatch-v0", Catch, kwargs={"pixels": 8})
gym.register("CutCatch-v0", Catch, kwargs={"cut": True, "reward": 5})
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

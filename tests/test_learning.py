"""Each script learns a small task."""

import itertools

import gymnasium as gym
import numpy as np
from conftest import each_continuous, each_discrete

import ppo_atari
import ppo_continuous
import trpo_continuous


@each_continuous
def test_learns_inverted_pendulum(script, tmp_path):
    changes = {"env_id": "InvertedPendulum-v5", "total_timesteps": 100_000, "eval_episodes": 10}
    if script is ppo_continuous:  # fewer, larger steps: they are slow where they are not compiled
        changes |= {"num_minibatches": 8, "update_epochs": 5, "learning_rate": 1e-3}
    args = script.Args(**changes, compile="off", run_dir=str(tmp_path / "run"))
    assert script.train(args)["eval_return"] >= 900


@each_discrete
def test_learns_cartpole(script, tmp_path):
    changes = {"env_id": "CartPole-v1", "total_timesteps": 60_000, "eval_episodes": 20}
    args = script.Args(**changes, compile="off", run_dir=str(tmp_path / "run"))
    assert script.train(args)["eval_return"] >= 300


def test_learns_to_catch_from_images(tmp_path):
    changes = {"num_envs": 16, "num_steps": 30, "learning_rate": 1e-3, "hidden_sizes": (128,)}
    changes |= {"env_id": "SmallCatch-v0", "total_timesteps": 12_000, "eval_episodes": 200}
    args = ppo_atari.Args(**changes, compile="off", run_dir=str(tmp_path / "run"))
    assert ppo_atari.train(args)["eval_return"] >= 0.9  # 95 % caught


def test_the_trust_region_holds_over_whole_iterations():
    """All that changes π counts: the step, the statistics of observations, the annealing of σ."""
    args = trpo_continuous.Args(env_id="Hopper-v5")
    iterations = itertools.islice(trpo_continuous.GENERATOR(args), 30)
    kls = [metrics["kl_iteration"] for metrics in iterations]
    assert len(kls) == 30 and min(kls) > 0
    assert max(kls[:10]) <= 2 * args.max_kl
    assert max(kls[10:]) <= 1.1 * args.max_kl


class LateNoise(gym.Env):
    """One component of the observations is 5 for a long time, and then varies by 1e-3."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    steps = 0

    def obs(self):
        late = 1e-3 * self.np_random.normal() if self.steps > 420 else 0.0
        return np.array([self.np_random.normal(), 5 + late])

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return self.obs(), {}

    def step(self, action):
        self.time += 1
        self.steps += 1
        return self.obs(), -float((action[0] - 0.3) ** 2), False, self.time >= 16, {}


gym.register("LateNoise-v0", LateNoise)


def test_statistics_never_move_the_policy_beyond_the_trust_region(monkeypatch):
    settings = {"env_id": "LateNoise-v0", "num_envs": 4, "num_steps": 16, "log_std_final": None}
    args = trpo_continuous.Args(**settings, total_timesteps=128 * 20)
    kls = [metrics["kl_iteration"] for metrics in trpo_continuous.GENERATOR(args)]
    assert max(kls) <= 1.1 * args.max_kl
    monkeypatch.setattr(trpo_continuous.RunningMeanStd, "set_extra_state", lambda *_: None)
    kls = [metrics["kl_iteration"] for metrics in trpo_continuous.GENERATOR(args)]
    assert max(kls) > 1.5 * args.max_kl  # the case is one that needs it

"""What training with either continuous script must do: repeat itself, resume exactly, run on CUDA, and learn."""

import hashlib
import math
import os
import signal
from pathlib import Path

import pytest
import torch

import ppo_continuous
import trpo_continuous

SMALL = {"num_envs": 2, "num_steps": 32, "num_minibatches": 4, "update_epochs": 2, "compile": "off", "eval_episodes": 0}

each_script = pytest.mark.parametrize("script", [ppo_continuous, trpo_continuous], ids=lambda script: script.SCRIPT)


def fingerprint(checkpoint):
    """SHA-256 of all tensors and numbers of a checkpoint but its arguments."""
    saved, digest = torch.load(checkpoint, weights_only=True), hashlib.sha256()

    def visit(value):
        if isinstance(value, dict):
            for key in value:
                visit(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                visit(item)
        else:
            digest.update(value.numpy().tobytes() if torch.is_tensor(value) else repr(value).encode())

    visit({key: value for key, value in saved.items() if key != "args"})
    return digest.hexdigest()


def make_parts(script, env_id="Pendulum-v1", **flags):
    """Networks with statistics from one rollout, and the next rollout; the generator they drew from, the arguments."""
    args = script.Args(**{**SMALL, "env_id": env_id, **flags})
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(0)
    envs = script.make_envs(args.env_id, args.num_envs, args.seed)
    policy = script.Policy(envs.obs.shape[1:], envs.envs[0].action_space, args)
    critic = script.Critic(envs.obs.shape[1], args)
    policy.obs_stats.update(script.collect(envs, policy, rng, args.num_steps).obs.flatten(0, 1))
    return policy, critic, script.collect(envs, policy, rng, args.num_steps), rng, args


@each_script
def test_same_seed_same_run(tmp_path, script):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        flags = {**SMALL, "env_id": "Hopper-v5", "total_timesteps": 320, "seed": seed}
        result = script.train(script.Args(**flags, run_dir=str(tmp_path / name)))
        hashes.append(fingerprint(result["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    "script, own",
    [
        (ppo_continuous, {"surrogate": "clip"}),
        (ppo_continuous, {"surrogate": "kl-adaptive"}),
        (trpo_continuous, {"fisher_subsample": 0.5}),
    ],
)
def test_resumed_run_equals_uninterrupted_run(tmp_path, monkeypatch, script, own):
    flags = {**SMALL, "num_steps": 1000, "num_minibatches": 10, "total_timesteps": 8000, **own}
    whole = script.train(script.Args(**flags, run_dir=str(tmp_path / "whole")))
    assert whole["steps"] == 8000

    original = script.check_finite
    monkeypatch.setattr(
        script,
        "check_finite",
        lambda step, **x: os.kill(os.getpid(), signal.SIGTERM) if step == 2000 and "losses" in x else None,
    )
    half = script.train(script.Args(**flags, run_dir=str(tmp_path / "parts")))
    monkeypatch.setattr(script, "check_finite", original)
    assert half["steps"] == 4000 and half["signal"] == signal.SIGTERM and half["eval_return"] is None
    rest = script.train(script.Args(**flags, resume=half["checkpoint"]))
    assert rest["steps"] == 8000 and rest["run_dir"] == half["run_dir"]
    assert fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])

    def curve(run_dir):
        rows = [line.split(",") for line in Path(run_dir, "progress.csv").read_text().splitlines()]
        keep = [i for i, name in enumerate(rows[0]) if name not in ("seconds", "SPS")]
        return [[row[i] for i in keep] for row in rows]

    assert curve(rest["run_dir"]) == curve(whole["run_dir"]) and len(curve(rest["run_dir"])) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_script
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_trains_on_cuda(tmp_path, script, compiled):
    flags = {**SMALL, "compile": compiled, "device": "cuda", "eval_episodes": 1, "env_id": "Pendulum-v1"}
    result = script.train(script.Args(**flags, total_timesteps=640, run_dir=str(tmp_path / "run")))
    assert result["steps"] == 640 and math.isfinite(result["eval_return"])


@each_script
@pytest.mark.parametrize("seed", [1, 2])
def test_learns_inverted_pendulum(tmp_path, script, seed):
    flags = {"env_id": "InvertedPendulum-v5", "total_timesteps": 100_000, "seed": seed, "compile": "off"}
    assert script.train(script.Args(**flags, run_dir=str(tmp_path / "run")))["eval_return"] >= 900

"""train() and the command line: resuming, checkpoints, files, output, signals, bad input."""

import csv
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import imageio.v3
import numpy as np
import pytest
import torch
from conftest import (
    CONTINUOUS,
    DISCRETE,
    EVERY_SCRIPT,
    ROOT,
    SMALL,
    Chain,
    Toy,
    each_continuous,
    each_discrete,
    each_script,
    fingerprint,
    make_args,
    small,
    small_flags,
)

import acer_discrete
import ppo_atari
import ppo_continuous as ppo
import trpo_continuous

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


def name_of(value):
    """The name of a script, for the ids of tests."""
    return getattr(value, "ALGORITHM", None)


def with_fields(script, **changes):
    """Those of the changes that are fields of this script's Args."""
    return {name: value for name, value in changes.items() if hasattr(script.Args, name)}


def rows_of(run_dir, leave_out=("seconds", "SPS")):
    rows = csv.DictReader(Path(run_dir, "progress.csv").read_text().splitlines())
    return [{name: row[name] for name in row if name not in leave_out} for row in rows]


def train_small(script, tmp_path, **changes):
    return script.train(make_args(script, **({"run_dir": str(tmp_path / "run")} | changes)))


class After(list):
    """A list of signals that has one from the n-th look at it on."""

    def __init__(self, looks):
        self.looks = looks

    def __bool__(self):
        self.looks -= 1
        return self.looks < 0


# ---- The same run again, and resumed ----


@each_script
def test_same_seed_same_run(script, tmp_path):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        changes = {"total_timesteps": 320, "seed": seed}
        changes |= {"env_id": "Hopper-v5"} if script in CONTINUOUS else {}
        result = train_small(script, tmp_path / name, **changes)
        hashes.append(fingerprint(result["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


@each_discrete
def test_same_seed_same_games(script, tmp_path):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        changes = {"env_id": "ALE/Breakout-v5", "hidden_sizes": (16,), "num_steps": 12}
        result = train_small(script, tmp_path / name, **changes, total_timesteps=48, seed=seed)
        hashes.append(fingerprint(result["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


# Episodes end with the rollouts, so that a resumed run can be the same to the last bit.
CHEETAH = {"env_id": "HalfCheetah-v5", "num_steps": 1000, "num_minibatches": 10}
CHAIN = {"env_id": "EndlessChain-v0", "num_steps": 30}
CATCH = {"env_id": "Catch-v0", "num_steps": 6, "hidden_sizes": (16,)}
ADAPTIVE = {"surrogate": "kl-adaptive", "anneal_lr": False}
RESUMED = [
    (ppo, CHEETAH),
    (ppo, CHEETAH | ADAPTIVE),
    (trpo_continuous, CHEETAH | {"fisher_subsample": 0.5}),
    (ppo_atari, CHAIN),
    (ppo_atari, CATCH),
    (acer_discrete, CHAIN | {"save_replay": True}),
    (acer_discrete, CATCH | {"save_replay": True, "replay_start": 6}),
]


@pytest.mark.parametrize("script, changes", RESUMED, ids=name_of)
def test_resumed_run_equals_uninterrupted_run(script, changes, tmp_path):
    args = make_args(script, **changes)
    batch = args.num_envs * args.num_steps
    total = 4 * batch
    whole = train_small(script, tmp_path / "whole", **changes, total_timesteps=total)
    assert whole["steps"] == total

    run_dir = str(tmp_path / "parts" / "run")
    args = dataclasses.replace(args, total_timesteps=total, run_dir=run_dir)
    half = script.train(args, After(1))
    assert half["steps"] == 2 * batch and half["eval_return"] is None
    rest = script.train(dataclasses.replace(args, run_dir=None, resume=half["checkpoint"]))
    assert rest["steps"] == total and rest["run_dir"] == half["run_dir"]
    assert fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])
    assert rows_of(rest["run_dir"]) == rows_of(whole["run_dir"])
    assert len(rows_of(rest["run_dir"])) == 4


def test_without_save_replay_a_resumed_memory_is_empty(tmp_path):
    changes = CATCH | {"replay_start": 12, "replay_ratio": 50.0}
    half = train_small(acer_discrete, tmp_path, **changes, total_timesteps=48)
    assert "replay" not in acer_discrete.load_checkpoint(half["checkpoint"])
    args = make_args(acer_discrete, **changes, total_timesteps=96, resume=half["checkpoint"])
    rest = acer_discrete.train(args)
    updates = [float(row["replay_updates"]) for row in rows_of(rest["run_dir"])]
    assert [x > 0 for x in updates] == [False, True, True, True, False, True, True, True]


def test_with_save_replay_the_memory_goes_on(tmp_path):
    changes = CATCH | {"replay_start": 12, "replay_ratio": 50.0, "save_replay": True}
    changes |= {"replay_capacity": 18}
    half = train_small(acer_discrete, tmp_path, **changes, total_timesteps=48)
    saved = acer_discrete.load_checkpoint(half["checkpoint"])["replay"]
    assert saved["count"] == 4 and saved["memory"]["rewards"].shape == (3, 6, 2)
    args = make_args(acer_discrete, **changes, total_timesteps=96, resume=half["checkpoint"])
    rest = acer_discrete.train(args)
    updates = [float(row["replay_updates"]) for row in rows_of(rest["run_dir"])]
    assert [x > 0 for x in updates] == [False] + [True] * 7
    assert acer_discrete.load_checkpoint(rest["checkpoint"])["replay"]["count"] == 8


def test_resuming_without_save_replay_takes_the_memory_and_stores_it_no_more(tmp_path):
    changes = CATCH | {"replay_start": 12, "replay_ratio": 50.0}
    first = changes | {"save_replay": True, "total_timesteps": 48}
    half = train_small(acer_discrete, tmp_path, **first)
    args = make_args(acer_discrete, **changes, total_timesteps=60, resume=half["checkpoint"])
    rest = acer_discrete.train(args)
    assert float(rows_of(rest["run_dir"])[-1]["replay_updates"]) > 0
    assert "replay" not in acer_discrete.load_checkpoint(rest["checkpoint"])


CHOICES = [
    (ppo, {"surrogate": "none", "norm_adv": True}),
    (ppo, {"surrogate": "kl-fixed", "clip_vloss": True}),
    (ppo, {"log_std_final": None, "ent_coef": 0.01, "gamma_final": 0.9}),
    (ppo, {"recompute_advantages": False, "norm_obs": False, "norm_reward": False}),
    (trpo_continuous, {"step": "truncated", "fisher_subsample": 0.2, "log_std_final": None}),
    (trpo_continuous, {"step": "natural", "norm_adv": False, "anneal_lr": False}),
    (trpo_continuous, {"return_floor": 0.5, "norm_obs": False}),
    (ppo_atari, CATCH | {"bf16": True, "clip_vloss": True}),
    (ppo_atari, CATCH | {"norm_obs": False, "anneal_clip": True}),
    (ppo_atari, {"gamma_final": 0.9, "norm_obs": False, "norm_reward": False}),
    (acer_discrete, {"trunc_c": math.inf, "clip_rewards": False}),
    (acer_discrete, CATCH | {"anneal_lr": True, "replay_start": 6}),
]


@pytest.mark.parametrize("script, changes", CHOICES, ids=name_of)
def test_trains_with_other_choices(script, changes, tmp_path):
    result = train_small(script, tmp_path, **changes, total_timesteps=192)
    assert result["steps"] == 192
    rows = rows_of(result["run_dir"])
    assert all(math.isfinite(float(row["policy_loss"])) for row in rows)
    saved = script.load_checkpoint(result["checkpoint"])["args"]
    assert {name: saved[name] for name in changes} == changes


@each_script
def test_the_generator_broken_off_and_restored_equals_the_uninterrupted_one(script):
    saves = with_fields(script, save_replay=True)
    args = make_args(script, **CHAIN, **saves, total_timesteps=240)
    whole, parts = {}, {}
    rows = list(script.GENERATOR(args, whole))
    iterations = script.GENERATOR(args, parts)
    first = [next(iterations), next(iterations)]
    iterations.close()
    rest = list(script.GENERATOR(args, parts))
    assert str(first + rest) == str(rows) and len(rows) == 4
    assert whole.keys() == parts.keys()
    for name in whole:
        assert str(parts[name]) == str(whole[name])
    for name, value in whole["policy"].items():
        assert str(value) == str(parts["policy"][name])
        assert not torch.is_tensor(value) or torch.equal(value, parts["policy"][name])


@each_script
@pytest.mark.parametrize(
    "damage",
    [
        lambda text: b"",
        lambda text: text + b"\n",
        lambda text: text + b"25",
        lambda text: text + b"25,1\n",
        lambda text: text[: text.index(b"\n")],
        lambda text: b"\x00\xff garbage \xfe\n" * 3,
        lambda text: b"x" * 200_000 + b"\n" + text,
        lambda text: text.replace(b"step", b"stop"),
        lambda text: text + text.splitlines()[-1].replace(b"128", b"192") + b"\n",
        None,
    ],
)
def test_a_damaged_progress_csv_does_not_stop_a_resumed_run(script, tmp_path, damage):
    result = train_small(script, tmp_path, total_timesteps=128)
    path = Path(result["run_dir"], "progress.csv")
    before = path.read_bytes()
    path.unlink()
    if damage is not None:
        path.write_bytes(damage(before))
    resumed = make_args(script, total_timesteps=256, resume=result["checkpoint"])
    assert script.train(resumed)["steps"] == 256
    steps = [row["step"] for row in rows_of(result["run_dir"])]
    assert steps in (["64", "128", "192", "256"], ["192", "256"])
    whole = damage is not None and damage(before).startswith(before)
    assert whole == (steps[0] == "64")


@each_script
def test_rows_after_the_checkpoint_are_cut_and_seconds_go_on(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=128)
    path = Path(result["run_dir"], "progress.csv")
    lines = path.read_text().splitlines()
    cells = lines[-1].split(",")
    cells[1] = "1000.00"
    path.write_text(
        "\n".join([*lines[:-1], ",".join(cells), lines[-1].replace("128", "999")]) + "\n"
    )
    script.train(make_args(script, total_timesteps=192, resume=result["checkpoint"]))
    rows = rows_of(result["run_dir"], leave_out=())
    assert [row["step"] for row in rows] == ["64", "128", "192"]
    assert float(rows[-1]["seconds"]) >= 1000


@each_script
def test_a_finished_run_says_that_nothing_is_left(script, tmp_path, capsys):
    result = train_small(script, tmp_path, total_timesteps=128)
    before = fingerprint(result["checkpoint"])
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"], eval_episodes=1)
    capsys.readouterr()
    assert script.train(args)["steps"] == 128
    out = capsys.readouterr().out
    assert "nothing is left to train" in out and "compiling" not in out
    assert "evaluation, deterministic" in out
    assert fingerprint(result["checkpoint"]) == before
    assert [row["step"] for row in rows_of(result["run_dir"])] == ["64", "128"]


@each_script
def test_an_old_evaluation_does_not_outlive_its_weights(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=128, eval_episodes=1)
    path = Path(result["run_dir"], "eval.json")
    assert path.exists()
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    script.train(args)
    assert path.exists()  # nothing was trained
    script.train(dataclasses.replace(args, total_timesteps=192))
    assert not path.exists()


@each_script
def test_explicit_flags_win_over_the_checkpoint(script, tmp_path, command):
    result = train_small(script, tmp_path, gamma=0.9, total_timesteps=128)
    assert command(script, "--resume", result["checkpoint"], "--total-timesteps 256") == 0
    saved = script.load_checkpoint(result["checkpoint"])
    assert saved["step"] == 256
    assert saved["args"]["gamma"] == 0.9 and saved["args"]["num_steps"] == 32


# ---- Checkpoints ----


@each_script
def test_fields_that_a_checkpoint_lacks_or_that_are_no_more(script, tmp_path, capsys):
    path = train_small(script, tmp_path, total_timesteps=64)["checkpoint"]
    saved = torch.load(path, weights_only=True)
    saved["args"] |= {"gone": 1, "also_gone": "x"}
    del saved["args"]["video_dir"], saved["args"]["gamma"]
    torch.save(saved, path)
    args = script.Args(**script.load_checkpoint(path)["args"])
    assert args.gamma == script.Args().gamma and args.video_dir is None
    out = capsys.readouterr().out
    args = dataclasses.replace(args, resume=path, total_timesteps=128)
    assert script.train(args)["steps"] == 128
    out += capsys.readouterr().out
    assert out.count("are not known here: ignored also_gone, gone") == 1


NUMBERS = {
    "learning_rate": np.geomspace(1e-4, 1e-3, 3)[1],
    "gamma": np.float32(0.5),
    "seed": np.int64(3),
    "num_envs": np.uint8(2),
    "num_steps": 32.0,
    "hidden_sizes": np.array([8, 8]),
    "max_grad_norm": torch.tensor(0.5),
    "norm_obs": np.bool_(True),
    "total_timesteps": np.float64(128),
    "ent_coef": 0,
    "log_std_init": -1,
}


@pytest.mark.parametrize(
    "script, name",
    [(script, name) for script in EVERY_SCRIPT for name in NUMBERS if hasattr(script.Args, name)],
    ids=name_of,
)
def test_arguments_may_be_numbers_of_any_library(script, tmp_path, name):
    changes = {"total_timesteps": 128, name: NUMBERS[name]}
    result = script.train(make_args(script, **changes, run_dir=tmp_path / "run"))
    saved = script.load_checkpoint(result["checkpoint"])["args"]
    assert saved[name] == NUMBERS[name] if name != "hidden_sizes" else saved[name] == (8, 8)
    resumed = script.Args(**saved)
    resumed.resume, resumed.total_timesteps = result["checkpoint"], 192
    assert script.train(resumed)["steps"] == 192


WRONG_TYPES = [
    ({"surrogate": "klip"}, "--surrogate 'klip': choose from clip, kl-adaptive"),
    ({"step": "npg"}, "--step 'npg': choose from trpo, truncated, natural"),
    ({"compile": True}, "--compile True: choose from auto, on, off"),
    ({"num_envs": "4"}, "--num-envs '4' must be of type int"),
    ({"hidden_sizes": 64}, "--hidden-sizes 64 must be a tuple of whole numbers"),
    ({"hidden_sizes": (64.0, 8)}, "--hidden-sizes (64.0, 8) must be a tuple of whole numbers"),
    ({"gamma_final": "0.99"}, "--gamma-final '0.99' must be of type float or None"),
    ({"norm_obs": None}, "--norm-obs None must be of type bool"),
    ({"trust_region": None}, "--trust-region None must be of type bool"),
    ({"clip_rewards": 1}, "--clip-rewards 1 must be of type bool"),
    ({"resume": ""}, "--resume is empty"),
    ({"num_envs": 2.5}, "--num-envs 2.5 must be a whole number"),
    ({"total_timesteps": math.inf}, "--total-timesteps inf must be a whole number"),
    ({"learning_rate": True}, "--learning-rate True must be of type float"),
    ({"num_envs": True}, "--num-envs True must be of type int"),
    ({"gamma": 10**400}, "--gamma is too large"),
    ({"evaluate": "x", "eval_episodes": 1}, "in Python use evaluate_policy"),
    ({"gamma": None}, "--gamma None must be of type float"),
    ({"env_id": gym.spec("Pendulum-v1")}, "must be of type str"),
    ({"paper": True}, "paper=True changes nothing in Python: write Args(**PAPER)"),
]


def wrong_types():
    for script in EVERY_SCRIPT:
        for changes, message in WRONG_TYPES:
            if with_fields(script, **changes):
                yield script, changes, message


@pytest.mark.parametrize("script, changes, message", wrong_types(), ids=name_of)
def test_bad_arguments_from_python(script, tmp_path, changes, message):
    with pytest.raises(script.InputError, match=re.escape(message)):
        train_small(script, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@each_script
def test_what_can_not_be_read_back_never_replaces_a_checkpoint(script, tmp_path):
    path = train_small(script, tmp_path, total_timesteps=64)["checkpoint"]
    saved = script.load_checkpoint(path)
    before = Path(path).read_bytes()
    with pytest.raises(script.SaveError, match="not a readable checkpoint"):
        script.save_checkpoint(Path(path).parent, script.Args(), saved | {"step": np.float64(1)})
    assert Path(path).read_bytes() == before


@each_script
def test_a_checkpoint_is_saved_after_the_first_iteration_and_then_once_a_minute(
    script, tmp_path, monkeypatch
):
    steps = []
    save = script.save_checkpoint
    monkeypatch.setattr(
        script,
        "save_checkpoint",
        lambda *x: steps.append((x[2]["step"], clock[0])) or save(*x),
    )
    clock = [0.0]

    def monotonic():
        clock[0] += 5.0
        return clock[0]

    monkeypatch.setattr(script.time, "monotonic", monotonic)
    train_small(script, tmp_path, total_timesteps=64 * 30)
    assert steps[0][0] == 64 and steps[-1][0] == 64 * 30
    gaps = np.diff([at for _, at in steps[:-1]])
    assert len(gaps) > 2 and (gaps >= 60).all() and (gaps <= 75).all()


@each_discrete
@pytest.mark.parametrize("env_id", ["Toy-v0", "Catch-v0"])
def test_load_discrete_policy_without_the_environment(script, tmp_path, monkeypatch, env_id):
    changes = {"env_id": env_id, "num_steps": 12, "hidden_sizes": (16,), "total_timesteps": 24}
    path = train_small(script, tmp_path, **changes)["checkpoint"]
    monkeypatch.setattr(gym, "make", lambda *x, **y: pytest.fail("no environment is needed"))
    policy = script.load_policy(path)
    if env_id == "Toy-v0":
        obs = 100 * np.random.default_rng(0).random((5, 2))
        np.testing.assert_array_equal(policy.act(obs.astype(np.float32)), policy.act(obs))
    else:
        obs = np.random.default_rng(0).integers(256, size=(5, 1, 84, 84), dtype=np.uint8)
    actions = policy.act(obs)
    assert actions.shape == (5,) and all(action in range(3) for action in actions)
    single = policy.act(obs[0])
    assert single.shape == () and single == actions[0]
    samples = policy.act(np.repeat(obs[:1], 100, 0), deterministic=False)
    assert set(samples.tolist()) == {0, 1, 2}


@each_continuous
def test_load_policy_without_the_environment(script, tmp_path, toy, monkeypatch):
    box = gym.spaces.Box(np.array([-1, 0, -np.inf]), np.array([3, 10, 5]), dtype=np.float64)
    toy(action_space=box)
    path = train_small(script, tmp_path, env_id="Toy-v0", total_timesteps=128)["checkpoint"]
    monkeypatch.setattr(gym, "make", lambda *x, **y: pytest.fail("no environment is needed"))
    policy = script.load_policy(path)
    obs = 100 * np.random.default_rng(0).random((5, 2))
    actions = policy.act(obs)
    assert actions.shape == (5, 3) and actions.dtype == np.float64
    assert all(box.contains(action) for action in actions)
    np.testing.assert_allclose(policy.act(obs.astype(np.float32)), actions, rtol=1e-4)
    np.testing.assert_allclose(policy.act(obs[0]), actions[0], rtol=1e-4)
    samples = policy.act(np.repeat(obs[:1], 500, 0), deterministic=False)
    assert len(np.unique(samples[:, 2])) > 400
    assert policy.obs_stats.count == 128


@each_script
def test_the_evaluated_policy_is_the_saved_one_with_frozen_statistics(script, tmp_path):
    changes = {"total_timesteps": 256, "eval_episodes": 2}
    result = train_small(script, tmp_path, **changes)
    policy = script.load_policy(result["checkpoint"])
    before = str(policy.state_dict())
    args = script.Args(**script.load_checkpoint(result["checkpoint"])["args"])
    evaluation = script.evaluate_policy(policy, args)
    assert str(policy.state_dict()) == before
    assert script is acer_discrete or policy.obs_stats.count == 256
    assert np.mean(evaluation["deterministic"]) == pytest.approx(result["eval_return"])
    written = json.loads(Path(result["run_dir"], "eval.json").read_text())
    assert written == evaluation and len(written["sampled"]) == 2
    assert not list(Path(result["run_dir"]).glob("*.tmp"))


# ---- Files ----


@each_script
def test_run_folder_has_the_tags_of_dashboards_and_the_configuration(script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"env_id": "Chain-v0", "total_timesteps": 256, "eval_episodes": 1, "gamma": 0.9}
    result = train_small(script, tmp_path, **changes)
    events = EventAccumulator(result["run_dir"]).Reload()
    charts = ("episodic_return", "episodic_length", "SPS", "learning_rate")
    losses = ["policy_loss", "value_loss", "entropy", "approx_kl", "explained_variance"]
    if hasattr(script.Args, "clip_coef"):
        losses.append("clipfrac")
    tags = {f"charts/{x}" for x in charts} | {f"losses/{x}" for x in losses} | {"eval/return"}
    assert tags <= set(events.Tags()["scalars"])
    returns = [(x.step, x.value) for x in events.Scalars("charts/episodic_return")]
    assert returns == [(64 * i, 3.0) for i in (1, 2, 3, 4)]
    assert [(x.step, x.value) for x in events.Scalars("eval/return")] == [(256, 3.0)]
    config = json.loads(Path(result["run_dir"], "config.json").read_text())
    assert config["args"]["gamma"] == 0.9 and config["device"] == "cpu"
    assert config["torch"] == torch.__version__ and config["numpy"] == np.__version__
    source = Path(script.__file__).read_bytes()
    assert config["script_sha256"] == hashlib.sha256(source).hexdigest()
    names = {re.sub("events.*", "events", p.name) for p in Path(result["run_dir"]).iterdir()}
    assert names == {"config.json", "progress.csv", "events", "checkpoint.pt", "eval.json"}


@each_script
def test_files_are_standard_json(script, tmp_path):
    def refuse(word):
        raise ValueError(word)

    infinite = with_fields(script, max_grad_norm=math.inf)
    run_dir = Path(train_small(script, tmp_path, **infinite, total_timesteps=64)["run_dir"])
    config = json.loads((run_dir / "config.json").read_text(), parse_constant=refuse)
    assert all(float(config["args"][name]) == math.inf for name in infinite)
    script.write_json(run_dir / "x.json", {"a": [math.nan, -math.inf, 1.5]})
    values = json.loads((run_dir / "x.json").read_text(), parse_constant=refuse)["a"]
    assert values == ["NaN", "-Infinity", 1.5]


@each_script
@pytest.mark.parametrize("when", ["make", "reset", "step"])
def test_an_environment_may_change_the_folder(script, tmp_path, toy, monkeypatch, when, capsys):
    (tmp_path / "elsewhere").mkdir()

    def leave(now):
        if now == when:
            os.chdir(tmp_path / "elsewhere")

    def step(env):
        leave("step")
        return env.obs(), 1.0, False, env.time >= 10, {}

    def reset(env):
        leave("reset")
        return env.obs(), {}

    toy(step=step, reset=reset, make=lambda count: leave("make"))
    monkeypatch.chdir(tmp_path)
    changes = {"env_id": "Toy-v0", "total_timesteps": 128, "eval_episodes": 1, "run_dir": "mine"}
    result = train_small(script, tmp_path, **changes)
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if line.startswith(f"{script.SCRIPT}  Toy-v0")]
    assert head.endswith("  mine") and lines[-1].endswith(f"  {Path('mine/checkpoint.pt')}")
    os.chdir(tmp_path)
    assert script.train(make_args(script, **(changes | {"run_dir": None, "total_timesteps": 192}),
                                  resume="mine/checkpoint.pt"))["steps"] == 192  # fmt: skip
    assert result["run_dir"] == str(tmp_path / "mine") and Path(result["checkpoint"]).exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "elsewhere"}


@each_script
def test_an_environment_that_fails_to_close_costs_nothing(script, tmp_path, toy, monkeypatch):
    def close(env):
        if env.count:
            raise RuntimeError("the simulator is gone")

    toy()
    monkeypatch.setattr(Toy, "close", close)
    changes = {"env_id": "Toy-v0", "total_timesteps": 192, "eval_episodes": 1}
    with pytest.warns(UserWarning, match="the simulator is gone"):
        result = train_small(script, tmp_path, **changes)
    assert script.load_checkpoint(result["checkpoint"])["step"] == 192
    assert result["eval_return"] == 10


@each_script
def test_a_checkpoint_that_can_not_be_written_is_tried_again(script, tmp_path, monkeypatch, capsys):
    save, tries = torch.save, []

    def failing(content, file):
        if not isinstance(file, io.BytesIO):
            tries.append(file)
            if len(tries) == 1:
                raise RuntimeError("basic_ios::clear: iostream error")
        save(content, file)

    monkeypatch.setattr(torch, "save", failing)
    assert train_small(script, tmp_path, total_timesteps=128)["steps"] == 128
    assert script.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] == 128
    assert f"in {tmp_path / 'run'}: basic_ios" in capsys.readouterr().out


def test_a_run_whose_last_checkpoint_can_not_be_written_says_so(
    tmp_path, monkeypatch, command, capsys
):
    save = torch.save

    def failing(content, file):
        if not isinstance(file, io.BytesIO):
            raise OSError(28, "No space left on device")
        save(content, file)

    monkeypatch.setattr(torch, "save", failing)
    flags = small_flags(ppo, total_timesteps=128)
    assert command(ppo, flags, "--run-dir", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and len(err.splitlines()) == 1


@each_script
def test_a_folder_that_can_not_be_written_is_one_line(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=64)
    progress = Path(result["run_dir"], "progress.csv")
    progress.unlink()
    progress.mkdir()
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="--resume .*Name a folder that can be written"):
        script.train(args)
    args = make_args(script, total_timesteps=128, run_dir=result["run_dir"])
    with pytest.raises(script.InputError, match="--run-dir .*Name a new folder that can be"):
        script.train(args)


@each_script
def test_a_checkpoint_of_other_networks_is_one_line(script, tmp_path, monkeypatch):
    result = train_small(script, tmp_path, total_timesteps=64)
    monkeypatch.setattr(script, "mlp", lambda sizes, *_, **__: torch.nn.Sequential(
        torch.nn.Linear(sizes[0], sizes[-1])))  # fmt: skip
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="has other networks than this"):
        script.train(args)


@each_script
def test_a_checkpoint_of_other_bounds_is_one_line(script, tmp_path, toy):
    toy()
    changes = {"env_id": "Toy-v0", "total_timesteps": 64}
    result = train_small(script, tmp_path, **changes)
    other = gym.spaces.Box(-7, 7, (1,)) if script in CONTINUOUS else gym.spaces.Discrete(5)
    toy(action_space=other)
    args = make_args(script, **(changes | {"total_timesteps": 128}), resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="other spaces than the environment of the check"):
        script.train(args)


@each_script
def test_a_smaller_horizon_leaves_a_finished_run_as_it_is(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=192)
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    assert script.train(args)["steps"] == 192
    assert script.load_checkpoint(result["checkpoint"])["args"]["total_timesteps"] == 192
    if "num_steps" in script.FIXED_ON_RESUME:
        return
    longer = make_args(script, total_timesteps=300, num_steps=50, resume=result["checkpoint"])
    assert script.train(longer)["steps"] == 292  # never beyond --total-timesteps


@each_script
@pytest.mark.parametrize("where", ["csv", "events"])
def test_a_full_disk_stops_no_training(script, tmp_path, monkeypatch, capsys, where):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_):
        raise OSError(28, f"No space left on device for {where}")

    if where == "csv":
        monkeypatch.setattr(csv.DictWriter, "writerow", full)
    else:
        monkeypatch.setattr(SummaryWriter, "add_scalar", full)
        monkeypatch.setattr(SummaryWriter, "close", full)
    result = train_small(script, tmp_path, total_timesteps=128, eval_episodes=1)
    assert result["steps"] == 128 and math.isfinite(result["eval_return"])
    assert capsys.readouterr().out.count("progress.csv and TensorBoard are not complete") == 1
    rows = rows_of(result["run_dir"])
    assert [row["step"] for row in rows] == ([] if where == "csv" else ["64", "128"])


# ---- Evaluation and film ----


def still(script):
    """A policy that does not move."""
    if script in CONTINUOUS:
        return lambda obs: np.zeros((len(obs), 1))
    return lambda obs: np.zeros(len(obs), int)


@each_script
def test_evaluation_counts_one_whole_episode_each(script, capsys):
    act = still(script)
    assert script.evaluate(act, "EndlessChain-v0", 4, seed=0) == [3.0] * 4
    assert capsys.readouterr().out == ""


@each_script
def test_evaluation_leaves_out_episodes_that_do_not_end(script, toy, monkeypatch, capsys):
    monkeypatch.setattr(script, "LONGEST_EVALUATION", 7)
    act = still(script)
    assert script.evaluate(act, "Unlimited-v0", 2, seed=0) == []
    assert "2 of 2 episodes did not end within 7 steps" in capsys.readouterr().out
    numbers = []

    def step(env):
        if not hasattr(env, "number"):
            numbers.append(env)
            env.number = len(numbers)
        return env.obs(), math.nan if env.count > 5 else 1.0, False, env.count == env.number * 3, {}

    toy(step=step)
    assert script.evaluate(act, "Toy-v0", 3, seed=0)[:1] == [3.0]
    assert "1 of 3 episodes did not end" in capsys.readouterr().out


@each_script
def test_a_run_whose_evaluation_never_ends(script, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "LONGEST_EVALUATION", 7)
    changes = {"env_id": "Unlimited-v0", "total_timesteps": 64, "eval_episodes": 3}
    result = train_small(script, tmp_path, **changes)
    assert result["eval_return"] is None and math.isnan(result["episodic_return"])
    out = capsys.readouterr().out
    assert "evaluation, sampled: no episode ended" in out
    assert "no training episode ended" in out
    evaluation = json.loads(Path(result["run_dir"], "eval.json").read_text())
    assert evaluation == {"deterministic": [], "sampled": []}


def test_evaluate_from_the_command_line_with_a_gif(tmp_path, command, capsys):
    path = train_small(ppo, tmp_path, env_id="Chain-v0", total_timesteps=64)["checkpoint"]
    folder = tmp_path / "films"
    assert command(ppo, "--evaluate", path, "--seed 9", "--video-dir", folder) == 0
    (film,) = folder.iterdir()
    frames = imageio.v3.imread(film)
    assert frames.shape == (2, 16, 16, 3)  # 50 steps/s make 25 frames/s: positions 0 and 2
    out = capsys.readouterr().out
    assert "deterministic: 3.0 ± 0.0 over 10 episodes" in out
    assert "sampled: 3.0 ± 0.0 over 10 episodes" in out and str(film) in out


@each_script
@pytest.mark.parametrize(
    "metadata", [{"render_fps": 0}, {"render_fps": None}, {}, {"render_fps": 4}]
)
def test_a_film_needs_no_frame_rate(script, tmp_path, monkeypatch, metadata):
    monkeypatch.setattr(Chain, "metadata", {"render_modes": ["rgb_array"], **metadata})
    changes = {"env_id": "Chain-v0", "total_timesteps": 64, "video_dir": str(tmp_path / "films")}
    train_small(script, tmp_path, **changes)
    (film,) = (tmp_path / "films").iterdir()
    assert len(imageio.v3.imread(film)) == 3


@each_script
def test_a_film_that_fails_costs_nothing_else(script, tmp_path, monkeypatch, capsys):
    pictures = []

    def render(env):
        pictures.append(1)
        return np.zeros((16, 16, 3), np.uint8) if len(pictures) < 2 else 1 / 0

    monkeypatch.setattr(Chain, "render", render)
    changes = {"env_id": "Chain-v0", "total_timesteps": 64, "eval_episodes": 1}
    result = train_small(script, tmp_path, video_dir=str(tmp_path / "films"), **changes)
    assert result["eval_return"] == 3.0 and Path(result["run_dir"], "eval.json").exists()
    assert "no film" in capsys.readouterr().out
    assert not list((tmp_path / "films").iterdir())


def test_a_film_that_can_not_be_made_is_refused_before_training(
    tmp_path, monkeypatch, command, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Chain, "render", lambda self: 1 / 0)
    assert command(ppo, "--env-id Chain-v0 --video-dir films") == 2
    assert "--video-dir: can't render Chain-v0" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@each_script
def test_a_film_that_has_no_folder_costs_nothing_else(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    changes = {"env_id": "Chain-v0", "total_timesteps": 64, "eval_episodes": 1}
    result = train_small(script, tmp_path, video_dir=str(tmp_path / "file"), **changes)
    assert result["eval_return"] == 3.0 and "no film" in capsys.readouterr().out


@each_script
def test_a_film_is_written_frame_by_frame(script, tmp_path, monkeypatch):
    sizes = []
    film = tmp_path / "films" / f"Endless-v0__{script.SCRIPT}__s1.gif"
    noise = np.random.default_rng(0)

    def render(env):
        part = film.with_suffix(".tmp")
        sizes.append(part.stat().st_size if part.exists() else 0)
        return noise.integers(0, 255, (64, 64, 3), np.uint8)

    monkeypatch.setattr(Chain, "render", render)
    monkeypatch.setattr(script, "LONGEST_FILM", 50)
    gym.register("Endless-v0", Chain, kwargs={"finite": False})
    changes = {"env_id": "Endless-v0", "total_timesteps": 64, "video_dir": str(film.parent)}
    train_small(script, tmp_path, **changes)
    del gym.registry["Endless-v0"]
    assert len(sizes) == 51 and film.exists() and sizes[-1] > sizes[len(sizes) // 2] > sizes[5] > 0


@each_continuous
@pytest.mark.parametrize("env_id, follows", [("HalfCheetah-v5", True), ("Reacher-v5", False)])
def test_the_camera_follows_the_robot(script, env_id, follows):
    mujoco = pytest.importorskip("mujoco")
    envs = script.make_film_env(make_args(script, env_id=env_id))
    renderer = envs.envs[0].unwrapped.mujoco_renderer
    camera = renderer.camera_id
    if follows:
        kind = mujoco.mjtObj.mjOBJ_CAMERA
        assert mujoco.mj_id2name(renderer.model, kind, camera) == "track"
    else:
        assert camera == -1
    envs.close()


@each_continuous
def test_an_environment_keeps_its_own_camera(script, monkeypatch):
    monkeypatch.setitem(gym.registry["Hopper-v5"].kwargs, "camera_id", 0)
    envs = script.make_film_env(make_args(script, env_id="Hopper-v5"))
    assert envs.envs[0].unwrapped.mujoco_renderer.camera_id == 0
    envs.close()


@each_discrete
def test_evaluation_of_a_game_counts_whole_games(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "MAX_FRAMES", 400)  # 100 steps
    changes = {"env_id": "ALE/Breakout-v5", "hidden_sizes": (16,), "num_steps": 10}
    changes |= {"total_timesteps": 20, "eval_episodes": 1, "repeat_action_probability": 0.25}
    result = train_small(script, tmp_path, **changes)
    seed = script.stream_seed(1, "evaluation")
    envs = script.make_envs("ALE/Breakout-v5", 1, seed, repeat_action_probability=0.25)
    policy = script.load_policy(result["checkpoint"])
    score = 0.0
    steps = 0
    over = False
    while not over:
        _, rewards, terminated, truncated = envs.step(policy.act(envs.obs))
        score += rewards[0]
        steps += 1
        over = terminated[0] or truncated[0]
    assert result["eval_return"] == score and steps > 60  # a life is shorter


@each_discrete
def test_a_game_is_filmed_in_colour(script, tmp_path, monkeypatch, command, capsys):
    monkeypatch.setattr(script, "MAX_FRAMES", 100)
    changes = {"env_id": "ALE/Breakout-v5", "hidden_sizes": (16,), "num_steps": 10}
    path = train_small(script, tmp_path, **changes, total_timesteps=20)["checkpoint"]
    folder = tmp_path / "films"
    flags = ("--evaluate", path, "--eval-episodes 2 --video-dir", folder)
    assert command(script, *flags) == 0
    assert "over 2 episodes" in capsys.readouterr().out
    (film,) = folder.iterdir()
    assert film.name == f"Breakout-v5__{script.SCRIPT}__s1.gif"
    assert imageio.v3.imread(film).shape[1:] == (210, 160, 3)


# ---- NaN and infinity ----


@each_script
@pytest.mark.parametrize("poison", ["observations", "successors", "rewards"])
def test_nan_ends_the_run_and_keeps_the_last_checkpoint(
    script, tmp_path, monkeypatch, command, capsys, poison
):
    monkeypatch.setitem(gym.registry["Poison-v0"].kwargs, "poison", poison)
    monkeypatch.setattr(script, "SAVE_SECONDS", 0)
    flags = small_flags(script, env_id="Poison-v0", num_steps=8, total_timesteps=999)
    assert command(script, flags, "--run-dir", tmp_path / "run") == 1
    culprit = "rewards" if poison == "rewards" else "observations"
    err = capsys.readouterr().err
    assert f"NaN or infinity in {culprit}, iteration 3" in err and len(err.splitlines()) == 1
    saved = script.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))
    assert saved["step"] == 32
    tensors = [x for x in saved["policy"].values() if torch.is_tensor(x)]
    assert all(x.isfinite().all() for x in tensors)


@each_script
@pytest.mark.parametrize(
    "norm_obs, value, said",
    [
        (False, 1e12, "observations beyond 1e+10, iteration 1: add --norm-obs"),
        (False, -1e12, "observations beyond 1e+10, iteration 1: add --norm-obs"),
        (True, 1e200, "observations beyond 1e+100, iteration 1"),
        (True, -np.inf, "NaN or infinity in observations, iteration 1"),
    ],
)
def test_observations_that_can_not_be_trained_on(script, toy, norm_obs, value, said):
    toy(step=lambda env: (np.array([0, value]), 1.0, False, env.time >= 10, {}))
    if script is acer_discrete:  # it does not normalize
        said = said.partition(": add")[0].replace("observations beyond 1e+100", "observations")
    changes = with_fields(script, norm_obs=norm_obs)
    args = make_args(script, env_id="Toy-v0", **changes, total_timesteps=64)
    with pytest.raises(script.NonFiniteError, match=re.escape(said)):
        list(script.GENERATOR(args))


@each_script
def test_diverging_training_is_reported(script, tmp_path, command, capsys):
    changes = with_fields(script, max_grad_norm="inf")
    changes |= {"learning_rate": 1e38, "total_timesteps": 9999}
    assert command(script, small_flags(script, **changes), "--run-dir", tmp_path / "run") == 1
    assert re.search("NaN or infinity in (losses|parameters), iteration", capsys.readouterr().err)


# ---- Flags ----


COMMON_MISTAKES = [
    ("--env-id NoSuchTask-v0", "NoSuchTask"),
    ("--env-id nomodule:Task-v0", "nomodule"),
    ("--env-id {other} --video-dir films", "this script needs"),
    ("--num-envs 2 --num-steps 9 --total-timesteps 17", "less than one batch, --num-envs x --num"),
    ("--total-timesteps 2047.5", "--total-timesteps 2047.5 must be a whole number"),
    ("--num-envs 1 --num-steps 1", "2 or more"),
    ("--gamma 1.1", "--gamma 1.1 must lie in [0, 1]"),
    ("--gamma nan", "--gamma nan must lie in [0, 1]"),
    ("--learning-rate 0", "--learning-rate 0.0 must be positive"),
    ("--learning-rate inf", "--learning-rate inf must be finite"),
    ("--num-envs 0", "--num-envs 0 must be positive"),
    ("--hidden-sizes 64 0", "--hidden-sizes (64, 0) must be positive"),
    ("--seed -1", "--seed -1 must not be negative"),
    ("--device nothing", "--device nothing"),
    ("--device meta", "--device meta"),
    ("--resume nothing.pt", "nothing.pt is not a readable checkpoint"),
    ("--evaluate nothing.pt", "nothing.pt is not a readable checkpoint"),
    ("--resume {garbage}", "is not a readable checkpoint"),
    ("--resume {older}", "is not a checkpoint of this version of {name}.py"),
    ("--resume {foreign}", "was written by another.py"),
    ("--resume {copy}", "name its checkpoint.pt, not best.pt"),
    ("--resume ''", "--resume is empty"),
    ("--resume {checkpoint} --paper", "--paper: a checkpoint has its own settings"),
    ("--resume {checkpoint} --env-id Toy-v0", "--env-id Toy-v0: the checkpoint has"),
    ("--resume {checkpoint} --hidden-sizes 32", "--hidden-sizes (32,): the checkpoint has"),
    ("--resume {checkpoint} --run-dir elsewhere", "the checkpoint's folder"),
    ("--evaluate {checkpoint} --paper", "--paper: a checkpoint has its own settings"),
    ("--evaluate {checkpoint} --env-id Toy-v0", "other spaces than the environment"),
    ("--evaluate {checkpoint} --hidden-sizes 32", "--hidden-sizes (32,): the checkpoint has"),
    ("--evaluate {checkpoint} --eval-episodes 0", "--eval-episodes of 1 or more"),
    ("--run-dir {folder}", "File exists"),
]
MISTAKES_OF_CONTINUOUS = [
    ("--env-id CartPole-v1", "ppo_atari.py and acer_discrete.py take discrete actions"),
    ("--num-minibatches 3", "--num-minibatches must divide"),
    ("--gae-lambda -0.1", "--gae-lambda -0.1 must lie in [0, 1]"),
    ("--log-std-init nan", "--log-std-init nan must lie in [-20, 5]"),
    ("--resume {checkpoint} --log-std-init 0", "--log-std-init"),
]
MISTAKES_OF_DISCRETE = [
    ("--env-id Pendulum-v1", "ppo_continuous.py takes continuous actions"),
    ("--env-id FrozenLake-v1", "FlattenObservation"),
    ("--env-id ALE/Brakeout-v5", "Brakeout"),
    ("--hidden-sizes", "--hidden-sizes needs one layer"),
    ("--repeat-action-probability 1.5", "must lie in [0, 1]"),
    ("--repeat-action-probability 0.25", "--repeat-action-probability is for games of ALE"),
]
ADAPT = "--surrogate kl-adaptive"
STEADY = f"{ADAPT} --no-anneal-lr"
MISTAKES = {
    ppo: [
        ("--log-std-final 100", "--log-std-final 100.0 must lie in [-20, 5]"),
        ("--resume {checkpoint} --log-std-final -4", "--log-std-final"),
        ("--resume {checkpoint} --log-std-final None", "--log-std-final"),
        ("--gamma-final 1.1", "--gamma-final 1.1 must lie in [0, 1]"),
        ("--clip-coef -0.2", "--clip-coef -0.2 must be positive"),
        ("--kl-coef inf", "--kl-coef inf must be finite"),
        ("--ent-coef 0.1", "--ent-coef has no effect on an annealed σ"),
        (ADAPT, "add --no-anneal-lr"),
        (f"{STEADY} --kl-coef 0", "--kl-coef 0 stays 0"),
        ("--kl-coef 2", "--kl-coef has no effect with --surrogate clip"),
        ("--surrogate kl-fixed --kl-target 2", "--kl-target has no effect"),
    ],
    trpo_continuous: [
        ("--max-kl 0", "--max-kl 0.0 must be positive"),
        ("--return-floor -1", "--return-floor -1.0 must not be negative"),
        ("--no-norm-reward --return-floor 0.5", "--return-floor has no effect without"),
        ("--cg-iterations 0", "--cg-iterations 0 must be positive"),
        ("--cg-damping -1", "--cg-damping -1.0 must not be negative"),
        ("--fisher-subsample 0", "--fisher-subsample 0.0 must be positive"),
        ("--fisher-subsample 2", "--fisher-subsample 2.0 must lie in [0, 1]"),
        ("--line-search-decay 1.5", "--line-search-decay 1.5 must lie"),
        ("--step natural --natural-step -0.1", "--natural-step -0.1 must be positive"),
        ("--natural-step 0.5", "--natural-step has no effect with --step trpo"),
        ("--step truncated --natural-step 0.5", "--natural-step has no effect"),
        ("--step truncated --line-search-steps 5", "--line-search-steps has no effect"),
        ("--step truncated --line-search-decay 0.5", "--line-search-decay has no effect"),
        ("--step natural --max-kl 0.02", "--max-kl has no effect with --step natural"),
        ("--step natural --return-floor 0.5", "--return-floor has no effect"),
        ("--step natural --line-search-steps 5", "--line-search-steps has no effect"),
        ("--step natural --line-search-decay 0.5", "--line-search-decay has no effect"),
    ],
    ppo_atari: [
        ("--num-minibatches 3", "--num-minibatches must divide"),
        ("--gae-lambda -0.1", "--gae-lambda -0.1 must lie in [0, 1]"),
        ("--clip-coef 0", "--clip-coef 0.0 must be positive"),
        ("--vf-coef -1", "--vf-coef -1.0 must not be negative"),
        ("--paper", "--paper is for images: the paper has no vectors"),
        ("--evaluate {checkpoint} --no-norm-obs", "--norm-obs False: the checkpoint has True"),
    ],
    acer_discrete: [
        ("--avg-decay 1.5", "--avg-decay 1.5 must lie in [0, 1]"),
        ("--trunc-c 0", "--trunc-c 0.0 must be positive"),
        ("--replay-ratio -1", "--replay-ratio -1.0 must not be negative"),
        ("--replay-ratio inf", "--replay-ratio inf must be finite"),
        ("--replay-start 600 --replay-capacity 519", "memory holds 500 steps of each environment"),
        ("--replay-capacity 19", "memory holds 0 steps of each environment"),
        ("--no-trust-region --avg-decay 0.9", "--avg-decay has no effect with --no-trust-region"),
        ("--no-trust-region --trust-region-delta 2", "--trust-region-delta has no effect"),
        ("--replay-ratio 0 --save-replay", "--save-replay has no effect with --replay-ratio 0"),
        ("--resume {checkpoint} --num-steps 16", "--num-steps 16: the checkpoint has 32"),
        ("--resume {checkpoint} --replay-capacity 99", "--replay-capacity 99: the checkpoint has"),
        ("--resume {checkpoint} --no-trust-region", "--trust-region False: the checkpoint has"),
    ],
}


def mistakes():
    for script in EVERY_SCRIPT:
        of_kind = MISTAKES_OF_CONTINUOUS if script in CONTINUOUS else MISTAKES_OF_DISCRETE
        for flags, message in COMMON_MISTAKES + of_kind + MISTAKES[script]:
            yield script, flags, message


@pytest.fixture(scope="module")
def small_checkpoints(tmp_path_factory):
    """Checkpoints after the first iteration, {script: path}."""
    paths = {}
    for script in EVERY_SCRIPT:
        folder = tmp_path_factory.mktemp(script.ALGORITHM)
        paths[script] = train_small(script, folder, total_timesteps=64)["checkpoint"]
    return paths


@pytest.mark.parametrize("script, flags, message", mistakes(), ids=name_of)
def test_bad_input_is_one_line_and_exit_code_2(
    script, flags, message, tmp_path, monkeypatch, capsys, small_checkpoints
):
    monkeypatch.chdir(tmp_path)
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"algorithm": "another", "args": {}}, "foreign.pt")
    torch.save({"script": script.ALGORITHM, "args": {}}, "older.pt")
    Path("run").mkdir()
    shutil.copy(small_checkpoints[script], "run/checkpoint.pt")
    shutil.copy(small_checkpoints[script], "best.pt")
    places = {"garbage": "garbage.pt", "copy": "best.pt", "foreign": "foreign.pt"}
    places |= {"older": "older.pt", "checkpoint": "run/checkpoint.pt", "folder": "run"}
    places["other"] = small(DISCRETE[0] if script in CONTINUOUS else CONTINUOUS[0])["env_id"]
    words = shlex.split(flags.format(**places))
    if not {"--env-id", "--resume", "--evaluate"} & set(words):
        words += ["--env-id", small(script)["env_id"]]  # not a game of ALE
    before = sorted(Path().rglob("*"))
    monkeypatch.setattr(sys, "argv", [script.__file__, *words])
    capsys.readouterr()
    assert script.main() == 2
    error = capsys.readouterr().err
    assert message.format(name=script.ALGORITHM) in error
    assert error.startswith(f"{script.SCRIPT}.py: ") and len(error.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


def test_a_replay_memory_that_does_not_fit_is_refused(tmp_path, command, capsys):
    flags = "--env-id CartPole-v1 --replay-capacity 2_000_000_000_000"
    assert command(acer_discrete, flags, "--run-dir", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert "lower --replay-capacity" in error and len(error.splitlines()) == 1


@each_discrete
def test_flags_of_games_are_refused_where_there_is_no_game(script, tmp_path):
    with pytest.raises(script.InputError, match="--repeat-action-probability is for games of ALE"):
        train_small(script, tmp_path, **CATCH, total_timesteps=24, repeat_action_probability=0.25)


# ---- Defaults by the kind of observation ----


@each_discrete
@pytest.mark.parametrize("env_id, images", [("CartPole-v1", False), ("Catch-v0", True)])
def test_defaults_follow_the_observations_and_a_line_says_which(
    script, tmp_path, capsys, env_id, images
):
    changes = {"env_id": env_id, "num_steps": 6, "total_timesteps": 12, "learning_rate": 1e-3}
    result = train_small(script, tmp_path, **changes)
    saved = script.load_checkpoint(result["checkpoint"])["args"]
    config = json.loads(Path(result["run_dir"], "config.json").read_text())["args"]
    (line,) = [x for x in capsys.readouterr().out.splitlines() if x.startswith("defaults for")]
    assert line.startswith(f"defaults for {'images' if images else 'vectors'}: ")
    given = make_args(script, **changes)
    for name, (for_images, for_vectors) in script.DEFAULTS.items():
        expected = for_images if images else for_vectors
        chosen = getattr(given, name) is None
        assert not chosen or saved[name] == expected
        assert (f" {name} {expected}" in line) == chosen
        assert getattr(script.Args(), name) is None
        assert config[name] == (list(saved[name]) if name == "hidden_sizes" else saved[name])
    assert saved["images"] == images and saved["learning_rate"] == 1e-3


@each_discrete
@pytest.mark.parametrize("images", [True, False])
def test_filled_defaults_leave_what_was_given(script, images):
    empty = script.Args()
    filled = script.fill_defaults(empty, images)
    for name, pair in script.DEFAULTS.items():
        assert getattr(empty, name) is None and getattr(filled, name) == pair[1 - images]
    given = script.fill_defaults(script.Args(learning_rate=0.5, hidden_sizes=(3,)), images)
    assert given.learning_rate == 0.5 and given.hidden_sizes == (3,)
    text = " ".join(Path(script.__file__).read_text(encoding="utf-8").split())
    assert text.count("None: ") >= len(script.DEFAULTS)  # the help of each says both values


# ---- Settings of the paper ----


@each_script
def test_paper_takes_the_settings_of_the_paper_and_flags_override_them(script, tmp_path, command):
    changes = {"total_timesteps": 128, "num_steps": 16, "hidden_sizes": "16"}
    changes |= {"env_id": "Catch-v0"} if script is ppo_atari else {}
    changes |= {"replay_start": 16} if script is acer_discrete else {}
    given = small(script, **changes)
    path = str(tmp_path / "run" / "checkpoint.pt")
    flags = small_flags(script, **changes)
    assert command(script, "--paper", flags, "--run-dir", tmp_path / "run") == 0
    saved = script.load_checkpoint(path)["args"]
    assert saved["paper"] and saved["num_steps"] == 16 and saved["num_envs"] == 2
    assert set(script.PAPER) <= {field.name for field in dataclasses.fields(script.Args)}
    taken = {name: value for name, value in script.PAPER.items() if name not in given}
    assert len(taken) >= 3
    for name, value in taken.items():
        assert saved[name] == value
    for name, value in script.PAPER.items():
        assert getattr(script.Args(), name) != value, name
    assert command(script, "--resume", path, "--total-timesteps 192") == 0
    saved = script.load_checkpoint(path)["args"]
    assert saved["total_timesteps"] == 192
    assert {name: saved[name] for name in taken} == taken


@pytest.mark.parametrize("step", ["truncated", "natural"])
def test_paper_goes_with_each_step_of_trpo(tmp_path, command, step):
    flags = small_flags(trpo_continuous, total_timesteps=128, num_steps=16, cg_damping=0.1)
    run_dir = tmp_path / "run"
    assert command(trpo_continuous, f"--paper --step {step}", flags, "--run-dir", run_dir) == 0


@each_script
def test_total_timesteps_may_be_written_with_an_exponent(script, tmp_path, command):
    for text, steps in (("1.28e2", 128), ("1_28", 128)):
        path = tmp_path / text
        flags = small_flags(script, total_timesteps=text)
        assert command(script, flags, "--run-dir", path) == 0
        saved = script.load_checkpoint(str(path / "checkpoint.pt"))
        assert saved["step"] == steps and saved["args"]["total_timesteps"] == steps
        assert type(saved["args"]["total_timesteps"]) is int


@each_script
def test_help_shows_the_groups(script, command, capsys):
    with pytest.raises(SystemExit):
        command(script, "--help")
    text = capsys.readouterr().out
    groups = [text.index(f"{name} options") for name in ("run", "environment", "algorithm")]
    flags = [text.index(f"{flag} ") for flag in ("--env-id", "--num-envs", "--num-steps")]
    assert groups[0] < flags[0] < groups[1] < flags[1] < groups[2] < flags[2]
    assert flags[0] < text.index("--seed ")


# ---- Output ----


def run_script(folder, *flags, script=ppo, **options):
    words = [word for flag in flags for word in str(flag).split()]
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run([sys.executable, script.__file__, *words], cwd=folder, **options)


@pytest.mark.parametrize(
    "script, encoding", [(ppo, "ascii"), (acer_discrete, "cp1252")], ids=name_of
)
def test_output_on_a_terminal_that_knows_no_greek(script, tmp_path, encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    result = run_script(tmp_path, "--help", script=script, env=env, encoding=encoding)
    assert result.returncode == 0 and "discount factor" in result.stdout
    flags = small_flags(script, total_timesteps=128, eval_episodes=1)
    result = run_script(tmp_path, flags, script=script, env=env, encoding=encoding)
    assert result.returncode == 0 and "over 1 episodes" in result.stdout


@each_script
def test_train_prints_on_a_stream_that_knows_no_greek(script, tmp_path, monkeypatch):
    with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        train_small(script, tmp_path, total_timesteps=64, eval_episodes=1)
    assert "over 1 episodes" in (tmp_path / "out.txt").read_text()


@POSIX
@pytest.mark.parametrize("script", [ppo], ids=name_of)
def test_output_into_a_closed_pipe(script, tmp_path):
    flags = small_flags(script, total_timesteps=640, eval_episodes=1)
    line = f"{sys.executable} {script.__file__} {flags} --run-dir run; echo $? >code"
    process = subprocess.run(f"({line}) | head -n 1", shell=True, cwd=tmp_path, timeout=120,
                             capture_output=True, text=True)  # fmt: skip
    assert (tmp_path / "code").read_text() == "0\n" and process.stderr == ""
    assert script.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] == 640
    assert (tmp_path / "run" / "eval.json").exists()
    line = f"{sys.executable} {script.__file__} --help | head -n 1"
    process = subprocess.run(line, shell=True, timeout=120, capture_output=True, text=True)
    assert process.stderr == "" and process.stdout.startswith("usage:")


class Tee:
    """What users put in the place of stdout."""

    def write(self, text):
        pass


@each_script
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["none", "closed", "tee"])
def test_without_a_stream(script, tmp_path, monkeypatch, name, kind):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, name, {"none": None, "closed": closed, "tee": Tee()}[kind])
    assert train_small(script, tmp_path, total_timesteps=64, eval_episodes=1)["steps"] == 64


@each_script
def test_where_stdout_is_no_terminal_lines_say_how_far_the_run_is(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "LINE_SECONDS", 0)
    train_small(script, tmp_path, total_timesteps=192)
    out = capsys.readouterr().out
    line = rf"step (\d+) of 192  return .*  {script.SHOWN} .*  \d+ steps/s"
    assert re.findall(line, out) == ["64", "128", "192"]
    monkeypatch.setattr(script, "LINE_SECONDS", 60)
    train_small(script, tmp_path / "b", total_timesteps=192)
    assert "step 64" not in capsys.readouterr().out


@POSIX
@pytest.mark.parametrize("script", [ppo], ids=name_of)
def test_on_a_terminal_the_bar_has_a_line_of_its_own(script, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    flags = small_flags(script, total_timesteps=640, compile="on", eval_episodes=1)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    process = subprocess.Popen([sys.executable, script.__file__, *flags.split()], cwd=tmp_path,
                               stdout=slave, stderr=slave, close_fds=True)  # fmt: skip
    os.close(slave)
    text = b""
    while True:
        try:
            chunk = os.read(master, 4096)
        except OSError:  # Linux says so when the other end closes
            break
        if not chunk:
            break
        text += chunk
    os.close(master)
    assert process.wait(timeout=60) == 0
    text = text.decode()
    assert re.search(r"\ncompiling: [\w ]+\r\n", text)
    assert "640/640" in text and "evaluation, sampled" in text
    assert not re.search(r"step/s[^\r\n]*(compiling|evaluation, |mean return)", text)


# ---- Copies ----


def test_a_renamed_copy_has_its_own_name_and_reads_the_same_checkpoints(tmp_path):
    copy = tmp_path / "my_ppo.py"
    shutil.copy(ppo.__file__, copy)
    command = [sys.executable, str(copy), *small_flags(ppo, total_timesteps=128).split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.startswith("my_ppo  Pendulum-v1")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "__my_ppo__s1__" in run_dir.name
    assert ppo.load_policy(str(run_dir / "checkpoint.pt")).act(np.zeros(3)).shape == (1,)


@each_script
@pytest.mark.parametrize("name", ["__main__", "cell"])
def test_the_file_pasted_into_a_notebook(script, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cell = {"__name__": name}
    source = Path(script.__file__).read_text(encoding="utf-8")
    exec(compile(source, "<cell>", "exec"), cell)
    result = cell["train"](cell["Args"](**small(script), total_timesteps=128))
    assert Path(result["checkpoint"]).exists()
    assert f"__{script.ALGORITHM}__" in Path(result["run_dir"]).name


@POSIX
def test_the_file_read_from_standard_input(tmp_path):
    source = Path(ppo.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-OO", "-", *small_flags(ppo, total_timesteps=128).split()]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run(command, input=source, **options)
    assert result.returncode == 0 and result.stdout.startswith("ppo_continuous  Pendulum-v1")


# ---- Signals ----


def start(script, folder, *flags, **options):
    """Start a long run in a process of its own and wait for its second iteration."""
    words = [word for flag in flags for word in flag.split()]
    env_id = small(script)["env_id"]
    command = [sys.executable, script.__file__, "--env-id", env_id, "--compile", "off"]
    command += ["--total-timesteps", "1e7", "--run-dir", "run", *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, **options)  # fmt: skip
    progress = folder / "run" / "progress.csv"
    while not (progress.exists() and len(progress.read_text().splitlines()) > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def resume_two_iterations(script, command, batch):
    """Resume the run in ./run, check its progress.csv, and return the step of the checkpoint."""
    step = script.load_checkpoint("run/checkpoint.pt")["step"]
    flags = f"--resume run/checkpoint.pt --total-timesteps {step + 2 * batch} --eval-episodes 1"
    assert command(script, flags) == 0
    steps = [int(row["step"]) for row in rows_of(Path("run"))]
    assert steps == list(range(batch, step + 2 * batch + 1, batch))
    return step


def default_signals():
    """Some shells start the tests with Ctrl-C ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@POSIX
@pytest.mark.parametrize(
    "script, name, code",
    [
        (ppo, "SIGINT", 130),
        (ppo, "SIGTERM", 143),
        (ppo, "SIGHUP", 129),
        (trpo_continuous, "SIGTERM", 143),
        (ppo_atari, "SIGTERM", 143),
        (acer_discrete, "SIGTERM", 143),
    ],
    ids=name_of,
)
def test_a_signal_saves_and_the_run_resumes(script, name, code, tmp_path, monkeypatch, command):
    process = start(script, tmp_path, "--num-envs 4 --num-steps 256", preexec_fn=default_signals)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "a second signal kills" in err and "Traceback" not in err
    last = int(rows_of(tmp_path / "run")[-1]["step"])
    monkeypatch.chdir(tmp_path)
    assert resume_two_iterations(script, command, batch=1024) == last > 1024


@POSIX
def test_a_second_signal_kills(tmp_path):
    process = start(ppo, tmp_path, "--num-steps 4096 --update-epochs 2", preexec_fn=default_signals)
    process.send_signal(signal.SIGTERM)
    assert "a second signal kills" in process.stderr.readline() + process.stderr.readline()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == -signal.SIGINT


@POSIX
def test_a_signal_that_was_ignored_stays_ignored(tmp_path):
    def nohup():
        default_signals()
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    process = start(ppo, tmp_path, preexec_fn=nohup)
    process.send_signal(signal.SIGHUP)
    rows = len(rows_of(tmp_path / "run"))
    while len(rows_of(tmp_path / "run")) < rows + 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 143


@POSIX
def test_a_kill_leaves_a_checkpoint_that_resumes(tmp_path, monkeypatch, command):
    process = start(ppo, tmp_path)
    process.kill()
    process.wait(timeout=10)
    monkeypatch.chdir(tmp_path)
    assert resume_two_iterations(ppo, command, batch=2048) >= 2048


@POSIX
def test_main_stops_for_a_signal_during_the_evaluation(tmp_path, monkeypatch, command):
    evaluate = ppo.evaluate

    def interrupted(act, *rest):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(act, *rest)

    monkeypatch.setattr(ppo, "evaluate", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    flags = small_flags(ppo, total_timesteps=128, eval_episodes=1)
    assert command(ppo, flags, "--run-dir", tmp_path / "run") == 130
    assert ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] == 128
    assert not (tmp_path / "run" / "eval.json").exists()


def test_an_interrupt_that_an_environment_raises_is_no_success(tmp_path, toy, command):
    def step(env):
        raise KeyboardInterrupt

    toy(step=step)
    flags = small_flags(ppo, env_id="Toy-v0", total_timesteps=128)
    assert command(ppo, flags, "--run-dir", tmp_path / "run") == 130


@POSIX
def test_a_signal_is_taken_though_nobody_reads_stderr(tmp_path, monkeypatch, command):
    def broken(*_):
        raise BrokenPipeError

    def train(args, signals):
        monkeypatch.setattr(os, "write", broken)
        os.kill(os.getpid(), signal.SIGTERM)
        assert list(signals) == [signal.SIGTERM]
        default = signal.getsignal(signal.SIGTERM)
        assert default == signal.getsignal(signal.SIGINT) == signal.SIG_DFL

    signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(ppo, "train", train)
    assert command(ppo, small_flags(ppo, total_timesteps=128)) == 143


@each_script
def test_an_interrupt_of_a_caller_reaches_the_caller(script, tmp_path, toy):
    def step(env):
        if env.count == 200:
            raise KeyboardInterrupt  # what Python's own handler of Ctrl-C does
        return env.obs(), 1.0, False, env.time >= 10, {}

    toy(step=step)
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(KeyboardInterrupt):
        train_small(script, tmp_path, env_id="Toy-v0", total_timesteps=6400)
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before
    saved = script.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))
    assert saved["step"] == 64 and Toy.made == Toy.closed


@POSIX
def test_sigterm_ends_a_search_that_calls_train(tmp_path):
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import ppo_continuous as ppo
for seed in range(1000):
    ppo.train(ppo.Args(**{SMALL!r}, seed=seed, total_timesteps=128))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path,
                               stdout=subprocess.PIPE, text=True)  # fmt: skip
    while "128 steps" not in process.stdout.readline():
        assert process.poll() is None
    process.terminate()
    assert process.wait(timeout=30) == -signal.SIGTERM


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_script
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_trains_on_cuda(script, tmp_path, compiled):
    changes = {"compile": compiled, "device": "cuda", "eval_episodes": 1, "total_timesteps": 640}
    result = train_small(script, tmp_path, **changes)
    assert result["steps"] == 640 and math.isfinite(result["eval_return"])

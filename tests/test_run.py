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
    ROOT,
    SMALL,
    Chain,
    Toy,
    each_continuous,
    fingerprint,
    make_args,
    small_flags,
)

import ppo_continuous as ppo

POSIX = pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")


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


@each_continuous
def test_same_seed_same_run(script, tmp_path):
    hashes = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        changes = {"env_id": "Hopper-v5", "total_timesteps": 320, "seed": seed}
        result = train_small(script, tmp_path / name, **changes)
        hashes.append(fingerprint(result["checkpoint"]))
    assert hashes[0] == hashes[1] != hashes[2]


RESUMED = {"num_steps": 1000, "num_minibatches": 10, "total_timesteps": 8000}


@each_continuous
@pytest.mark.parametrize("surrogate", ["clip", "kl-adaptive"])
def test_resumed_run_equals_uninterrupted_run(script, tmp_path, surrogate):
    changes = {**RESUMED, "env_id": "HalfCheetah-v5", "surrogate": surrogate}
    if surrogate == "kl-adaptive":
        changes |= {"anneal_lr": False, "return_floor": 0.0}
    whole = train_small(script, tmp_path / "whole", **changes)
    assert whole["steps"] == 8000

    args = make_args(script, **changes, run_dir=str(tmp_path / "parts" / "run"))
    half = script.train(args, After(1))
    assert half["steps"] == 4000 and half["eval_return"] is None
    rest = script.train(dataclasses.replace(args, run_dir=None, resume=half["checkpoint"]))
    assert rest["steps"] == 8000 and rest["run_dir"] == half["run_dir"]
    assert fingerprint(rest["checkpoint"]) == fingerprint(whole["checkpoint"])
    assert rows_of(rest["run_dir"]) == rows_of(whole["run_dir"])
    assert len(rows_of(rest["run_dir"])) == 4


@each_continuous
def test_the_generator_broken_off_and_restored_equals_the_uninterrupted_one(script):
    args = make_args(script, **RESUMED)
    whole, parts = {}, {}
    rows = list(script.GENERATOR(args, whole))
    iterations = script.GENERATOR(args, parts)
    first = [next(iterations), next(iterations)]
    iterations.close()
    rest = list(script.GENERATOR(args, parts))
    assert first + rest == rows
    for name in ("policy", "critic", "adam"):
        for key, value in whole[name].items():
            other = parts[name][key]
            same = torch.equal(value, other) if torch.is_tensor(value) else None
            assert same or str(value) == str(other)
    assert parts["step"] == whole["step"] and parts["episodes"] == whole["episodes"]


@each_continuous
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


@each_continuous
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


@each_continuous
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


@each_continuous
def test_an_old_evaluation_does_not_outlive_its_weights(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=128, eval_episodes=1)
    path = Path(result["run_dir"], "eval.json")
    assert path.exists()
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    script.train(args)
    assert path.exists()  # nothing was trained
    script.train(dataclasses.replace(args, total_timesteps=192))
    assert not path.exists()


def test_explicit_flags_win_over_the_checkpoint(tmp_path, command):
    result = train_small(ppo, tmp_path, gamma=0.9, total_timesteps=128)
    assert command(ppo, "--resume", result["checkpoint"], "--total-timesteps 256") == 0
    saved = ppo.load_checkpoint(result["checkpoint"])
    assert saved["step"] == 256
    assert saved["args"]["gamma"] == 0.9 and saved["args"]["num_steps"] == 32


# ---- Checkpoints ----


@each_continuous
def test_fields_that_a_checkpoint_lacks_or_that_are_no_more(script, tmp_path, capsys):
    path = train_small(script, tmp_path, total_timesteps=64)["checkpoint"]
    saved = torch.load(path, weights_only=True)
    saved["args"] |= {"gone": 1, "also_gone": "x"}
    del saved["args"]["gamma_final"], saved["args"]["gamma"]
    torch.save(saved, path)
    args = script.Args(**script.load_checkpoint(path)["args"])
    assert args.gamma == script.Args().gamma and args.gamma_final is None
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


@each_continuous
@pytest.mark.parametrize("name", NUMBERS)
def test_arguments_may_be_numbers_of_any_library(script, tmp_path, name):
    changes = {"total_timesteps": 128, name: NUMBERS[name]}
    result = script.train(make_args(script, **changes, run_dir=tmp_path / "run"))
    saved = script.load_checkpoint(result["checkpoint"])["args"]
    assert saved[name] == NUMBERS[name] if name != "hidden_sizes" else saved[name] == (8, 8)
    resumed = script.Args(**saved)
    resumed.resume, resumed.total_timesteps = result["checkpoint"], 192
    assert script.train(resumed)["steps"] == 192


@each_continuous
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"surrogate": "klip"}, "--surrogate 'klip': choose from clip, kl-adaptive"),
        ({"compile": True}, "--compile True: choose from auto, on, off"),
        ({"num_envs": "4"}, "--num-envs '4' must be of type int"),
        ({"hidden_sizes": 64}, "--hidden-sizes 64 must be a tuple of whole numbers"),
        ({"hidden_sizes": (64.0, 8)}, "--hidden-sizes (64.0, 8) must be a tuple of whole numbers"),
        ({"gamma_final": "0.99"}, "--gamma-final '0.99' must be of type float or NoneType"),
        ({"norm_obs": None}, "--norm-obs None must be of type bool"),
        ({"resume": ""}, "--resume is empty"),
        ({"num_envs": 2.5}, "--num-envs 2.5 must be a whole number"),
        ({"total_timesteps": math.inf}, "--total-timesteps inf must be a whole number"),
        ({"learning_rate": True}, "--learning-rate True must be of type float"),
        ({"num_envs": True}, "--num-envs True must be of type int"),
        ({"max_grad_norm": 10**400}, "--max-grad-norm is too large"),
        ({"evaluate": "x", "eval_episodes": 1}, "in Python use evaluate_policy"),
        ({"gamma": None}, "--gamma None must be of type float"),
        ({"env_id": gym.spec("Pendulum-v1")}, "must be of type str"),
        ({"paper": True}, "paper=True changes nothing in Python: write Args(**PAPER)"),
    ],
)
def test_bad_arguments_from_python(script, tmp_path, changes, message):
    with pytest.raises(script.InputError, match=re.escape(message)):
        train_small(script, tmp_path, **changes)
    assert not list(tmp_path.iterdir())


@each_continuous
def test_what_can_not_be_read_back_never_replaces_a_checkpoint(script, tmp_path):
    path = train_small(script, tmp_path, total_timesteps=64)["checkpoint"]
    saved = script.load_checkpoint(path)
    before = Path(path).read_bytes()
    with pytest.raises(script.SaveError, match="not a readable checkpoint"):
        script.save_checkpoint(Path(path).parent, script.Args(), saved | {"step": np.float64(1)})
    assert Path(path).read_bytes() == before


@each_continuous
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


@each_continuous
def test_the_evaluated_policy_is_the_saved_one_with_frozen_statistics(script, tmp_path):
    changes = {"total_timesteps": 256, "eval_episodes": 2}
    result = train_small(script, tmp_path, **changes)
    policy = script.load_policy(result["checkpoint"])
    before = str(policy.state_dict())
    args = script.Args(**script.load_checkpoint(result["checkpoint"])["args"])
    evaluation = script.evaluate_policy(policy, args)
    assert str(policy.state_dict()) == before and policy.obs_stats.count == 256
    assert np.mean(evaluation["deterministic"]) == pytest.approx(result["eval_return"])
    written = json.loads(Path(result["run_dir"], "eval.json").read_text())
    assert written == evaluation and len(written["sampled"]) == 2
    assert not list(Path(result["run_dir"]).glob("*.tmp"))


# ---- Files ----


@each_continuous
def test_run_folder_has_the_tags_of_dashboards_and_the_configuration(script, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    changes = {"env_id": "Chain-v0", "total_timesteps": 256, "eval_episodes": 1, "gamma": 0.9}
    result = train_small(script, tmp_path, **changes)
    events = EventAccumulator(result["run_dir"]).Reload()
    charts = ("episodic_return", "episodic_length", "SPS", "learning_rate")
    losses = ("policy_loss", "value_loss", "entropy", "approx_kl", "clipfrac", "explained_variance")
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


@each_continuous
def test_files_are_standard_json(script, tmp_path):
    def refuse(word):
        raise ValueError(word)

    infinite = {"max_grad_norm": math.inf, "total_timesteps": 64}
    run_dir = Path(train_small(script, tmp_path, **infinite)["run_dir"])
    config = json.loads((run_dir / "config.json").read_text(), parse_constant=refuse)
    assert float(config["args"]["max_grad_norm"]) == math.inf
    script.write_json(run_dir / "x.json", {"a": [math.nan, -math.inf, 1.5]})
    values = json.loads((run_dir / "x.json").read_text(), parse_constant=refuse)["a"]
    assert values == ["NaN", "-Infinity", 1.5]


@each_continuous
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
    assert lines[0].endswith("  mine") and lines[-1].endswith(f"  {Path('mine/checkpoint.pt')}")
    os.chdir(tmp_path)
    assert script.train(make_args(script, **(changes | {"run_dir": None, "total_timesteps": 192}),
                                  resume="mine/checkpoint.pt"))["steps"] == 192  # fmt: skip
    assert result["run_dir"] == str(tmp_path / "mine") and Path(result["checkpoint"]).exists()
    assert not list((tmp_path / "elsewhere").iterdir())
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "elsewhere"}


@each_continuous
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


@each_continuous
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
    flags = small_flags(total_timesteps=128)
    assert command(ppo, flags, "--run-dir", tmp_path / "run") == 1
    err = capsys.readouterr().err
    assert "No space left on device" in err and len(err.splitlines()) == 1


@each_continuous
def test_a_folder_that_can_not_be_written_is_one_line(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=64)
    progress = Path(result["run_dir"], "progress.csv")
    progress.unlink()
    progress.mkdir()
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="Name a folder that can be written"):
        script.train(args)


@each_continuous
def test_a_checkpoint_of_other_networks_is_one_line(script, tmp_path, monkeypatch):
    result = train_small(script, tmp_path, total_timesteps=64)
    monkeypatch.setattr(script, "mlp", lambda sizes, **_: torch.nn.Sequential(
        torch.nn.Linear(sizes[0], sizes[-1])))  # fmt: skip
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="has other networks than this"):
        script.train(args)


@each_continuous
def test_a_checkpoint_of_other_bounds_is_one_line(script, tmp_path, toy):
    toy()
    changes = {"env_id": "Toy-v0", "total_timesteps": 64}
    result = train_small(script, tmp_path, **changes)
    toy(action_space=gym.spaces.Box(-7, 7, (1,)))
    args = make_args(script, **(changes | {"total_timesteps": 128}), resume=result["checkpoint"])
    with pytest.raises(script.InputError, match="other spaces than the environment of the check"):
        script.train(args)


@each_continuous
def test_a_smaller_horizon_leaves_a_finished_run_as_it_is(script, tmp_path):
    result = train_small(script, tmp_path, total_timesteps=192)
    args = make_args(script, total_timesteps=128, resume=result["checkpoint"])
    assert script.train(args)["steps"] == 192
    assert script.load_checkpoint(result["checkpoint"])["args"]["total_timesteps"] == 192
    longer = make_args(script, total_timesteps=300, num_steps=50, resume=result["checkpoint"])
    assert script.train(longer)["steps"] == 292  # never beyond --total-timesteps


@each_continuous
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
    assert result["steps"] == 128 and result["eval_return"] < 0
    assert capsys.readouterr().out.count("progress.csv and TensorBoard are not complete") == 1
    rows = rows_of(result["run_dir"])
    assert [row["step"] for row in rows] == ([] if where == "csv" else ["64", "128"])


# ---- Evaluation and film ----


@each_continuous
def test_evaluation_counts_one_whole_episode_each(script, capsys):
    act = lambda obs: np.zeros((len(obs), 1))  # noqa: E731
    assert script.evaluate(act, "EndlessChain-v0", 4, seed=0) == [3.0] * 4
    assert capsys.readouterr().out == ""


@each_continuous
def test_evaluation_leaves_out_episodes_that_do_not_end(script, toy, monkeypatch, capsys):
    monkeypatch.setattr(script, "LONGEST_EVALUATION", 7)
    act = lambda obs: np.zeros((len(obs), 1))  # noqa: E731
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


@each_continuous
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


@each_continuous
@pytest.mark.parametrize(
    "metadata", [{"render_fps": 0}, {"render_fps": None}, {}, {"render_fps": 4}]
)
def test_a_film_needs_no_frame_rate(script, tmp_path, monkeypatch, metadata):
    monkeypatch.setattr(Chain, "metadata", {"render_modes": ["rgb_array"], **metadata})
    changes = {"env_id": "Chain-v0", "total_timesteps": 64, "video_dir": str(tmp_path / "films")}
    train_small(script, tmp_path, **changes)
    (film,) = (tmp_path / "films").iterdir()
    assert len(imageio.v3.imread(film)) == 3


@each_continuous
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


@each_continuous
def test_a_film_that_has_no_folder_costs_nothing_else(script, tmp_path, capsys):
    (tmp_path / "file").touch()
    changes = {"env_id": "Chain-v0", "total_timesteps": 64, "eval_episodes": 1}
    result = train_small(script, tmp_path, video_dir=str(tmp_path / "file"), **changes)
    assert result["eval_return"] == 3.0 and "no film" in capsys.readouterr().out


@each_continuous
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
    envs = script.make_film_env(env_id, seed=0)
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
    envs = script.make_film_env("Hopper-v5", seed=0)
    assert envs.envs[0].unwrapped.mujoco_renderer.camera_id == 0
    envs.close()


# ---- NaN and infinity ----


@pytest.mark.parametrize("poison", ["observations", "successors", "rewards"])
def test_nan_ends_the_run_and_keeps_the_last_checkpoint(
    tmp_path, monkeypatch, command, capsys, poison
):
    monkeypatch.setitem(gym.registry["Poison-v0"].kwargs, "poison", poison)
    monkeypatch.setattr(ppo, "SAVE_SECONDS", 0)
    changes = {"env_id": "Poison-v0", "num_steps": 8, "total_timesteps": 999}
    assert command(ppo, small_flags(**changes), "--run-dir", tmp_path / "run") == 1
    culprit = "rewards" if poison == "rewards" else "observations"
    err = capsys.readouterr().err
    assert f"NaN or infinity in {culprit}, iteration 3" in err and len(err.splitlines()) == 1
    saved = ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))
    assert saved["step"] == 32
    tensors = [x for x in saved["policy"].values() if torch.is_tensor(x)]
    assert all(x.isfinite().all() for x in tensors)


@each_continuous
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
    args = make_args(script, env_id="Toy-v0", norm_obs=norm_obs, total_timesteps=64)
    with pytest.raises(script.NonFiniteError, match=re.escape(said)):
        list(script.GENERATOR(args))


def test_diverging_training_is_reported(tmp_path, command, capsys):
    changes = {"learning_rate": 1e38, "max_grad_norm": "inf", "total_timesteps": 9999}
    assert command(ppo, small_flags(**changes), "--run-dir", tmp_path / "run") == 1
    assert re.search("NaN or infinity in (losses|parameters), iteration", capsys.readouterr().err)


# ---- Flags ----


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--env-id CartPole-v1", "acer_discrete.py"),
        ("--env-id NoSuchTask-v0", "NoSuchTask"),
        ("--env-id nomodule:Task-v0", "nomodule"),
        ("--total-timesteps 2047", "less than one batch, --num-envs x --num-steps = 2048"),
        ("--total-timesteps 2047.5", "--total-timesteps 2047.5 must be a whole number"),
        ("--num-minibatches 3", "--num-minibatches must divide"),
        ("--num-envs 1 --num-steps 1 --num-minibatches 1", "2 or more"),
        ("--gamma 1.1", "--gamma 1.1 must lie in [0, 1]"),
        ("--gamma-final 1.1", "--gamma-final 1.1 must lie in [0, 1]"),
        ("--gae-lambda -0.1", "--gae-lambda -0.1 must lie in [0, 1]"),
        ("--gamma nan", "--gamma nan must lie in [0, 1]"),
        ("--learning-rate 0", "--learning-rate 0.0 must be positive"),
        ("--learning-rate inf", "--learning-rate inf must be finite"),
        ("--num-envs 0", "--num-envs 0 must be positive"),
        ("--clip-coef -0.2", "--clip-coef -0.2 must be positive"),
        ("--hidden-sizes 64 0", "--hidden-sizes (64, 0) must be positive"),
        ("--seed -1", "--seed -1 must not be negative"),
        ("--kl-coef inf", "--kl-coef inf must be finite"),
        ("--return-floor -1", "--return-floor -1.0 must not be negative"),
        ("--device nothing", "--device nothing"),
        ("--env-id CartPole-v1 --video-dir films", "acer_discrete.py"),
        ("--resume nothing.pt", "nothing.pt is not a readable checkpoint"),
        ("--evaluate nothing.pt", "nothing.pt is not a readable checkpoint"),
        ("--resume {garbage}", "is not a readable checkpoint"),
        ("--resume {older}", "is not a checkpoint of this version of ppo_continuous.py"),
        ("--resume {copy}", "name its checkpoint.pt, not best.pt"),
        ("--resume {checkpoint} --log-std-init 0", "--log-std-init"),
        ("--resume {checkpoint} --log-std-final None", "--log-std-final"),
        ("--resume {checkpoint} --paper", "--paper: a checkpoint has its own settings"),
        ("--evaluate {checkpoint} --paper", "--paper: a checkpoint has its own settings"),
        ("--log-std-init nan", "--log-std-init nan must lie in [-20, 5]"),
        ("--log-std-final 100", "--log-std-final 100.0 must lie in [-20, 5]"),
        ("--ent-coef 0.1", "--ent-coef has no effect on an annealed σ"),
        ("--surrogate kl-adaptive", "add --no-anneal-lr --return-floor 0"),
        (
            "--surrogate kl-adaptive --no-anneal-lr --return-floor 0 --kl-coef 0",
            "--kl-coef 0 stays 0",
        ),
        ("--evaluate {checkpoint} --env-id Hopper-v5", "other spaces than the environment"),
        ("--evaluate {checkpoint} --hidden-sizes 32", "--hidden-sizes (32,): the checkpoint has"),
        ("--resume ''", "--resume is empty"),
        ("--device meta", "--device meta"),
        ("--kl-coef 2", "--kl-coef has no effect with --surrogate clip"),
        ("--surrogate kl-fixed --kl-target 2", "--kl-target has no effect"),
        ("--evaluate {checkpoint} --eval-episodes 0", "--eval-episodes of 1 or more"),
        ("--resume {foreign}", "was written by trpo_continuous.py"),
        ("--resume {checkpoint} --env-id Hopper-v5", "--env-id"),
        ("--resume {checkpoint} --hidden-sizes 32", "--hidden-sizes"),
        ("--resume {checkpoint} --run-dir elsewhere", "the checkpoint's folder"),
        ("--run-dir {folder}", "File exists"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    result = ppo.train(make_args(ppo, total_timesteps=64, run_dir="run"))
    Path("garbage.pt").write_bytes(b"not a checkpoint")
    torch.save({"algorithm": "trpo_continuous", "args": {}}, "foreign.pt")
    torch.save({"script": "ppo_continuous", "args": {}}, "older.pt")
    shutil.copy(result["checkpoint"], "best.pt")
    places = {"garbage": "garbage.pt", "copy": "best.pt", "foreign": "foreign.pt"}
    places |= {"older": "older.pt", "checkpoint": result["checkpoint"], "folder": "run"}
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    monkeypatch.setattr(sys, "argv", [ppo.__file__, *shlex.split(flags.format(**places))])
    assert ppo.main() == 2
    error = capsys.readouterr().err
    assert message in error and len(error.splitlines()) == 1
    assert sorted(Path().rglob("*")) == before


@each_continuous
def test_paper_takes_the_settings_of_the_paper_and_flags_override_them(script, tmp_path, command):
    flags = "--paper --num-steps 64 --total-timesteps 128 --eval-episodes 0 --compile off"
    flags += " --env-id Pendulum-v1"
    assert command(script, flags, "--run-dir", tmp_path / "run") == 0
    saved = script.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["args"]
    assert saved["paper"] and saved["num_steps"] == 64
    for name, value in script.PAPER.items():
        assert saved[name] == value or name == "num_steps"
        assert getattr(script.Args(), name) != value, name
    assert set(script.PAPER) <= {field.name for field in dataclasses.fields(script.Args)}
    path = str(tmp_path / "run" / "checkpoint.pt")
    assert command(script, "--resume", path, "--total-timesteps 192") == 0
    assert script.load_checkpoint(path)["args"]["learning_rate"] == script.PAPER["learning_rate"]


@each_continuous
def test_total_timesteps_may_be_written_with_an_exponent(script, tmp_path, command):
    for text, steps in (("1.28e2", 128), ("1_28", 128)):
        path = tmp_path / text
        changes = {"total_timesteps": text}
        assert command(script, small_flags(**changes), "--run-dir", path) == 0
        saved = script.load_checkpoint(str(path / "checkpoint.pt"))
        assert saved["step"] == steps and saved["args"]["total_timesteps"] == steps
        assert type(saved["args"]["total_timesteps"]) is int


@each_continuous
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


@each_continuous
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_output_on_a_terminal_that_knows_no_greek(script, tmp_path, encoding):
    env = os.environ | {"PYTHONIOENCODING": encoding}
    result = run_script(tmp_path, "--help", script=script, env=env, encoding=encoding)
    assert result.returncode == 0 and "discount factor" in result.stdout
    changes = {"total_timesteps": 128, "eval_episodes": 1}
    flags = small_flags(**changes)
    result = run_script(tmp_path, flags, script=script, env=env, encoding=encoding)
    assert result.returncode == 0 and "over 1 episodes" in result.stdout


@each_continuous
def test_train_prints_on_a_stream_that_knows_no_greek(script, tmp_path, monkeypatch):
    with open(tmp_path / "out.txt", "w", encoding="ascii") as file:
        monkeypatch.setattr(sys, "stdout", file)
        train_small(script, tmp_path, total_timesteps=64, eval_episodes=1)
    assert "over 1 episodes" in (tmp_path / "out.txt").read_text()


@POSIX
@each_continuous
def test_output_into_a_closed_pipe(script, tmp_path):
    flags = small_flags(total_timesteps=640, eval_episodes=1)
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


@each_continuous
@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["none", "closed", "tee"])
def test_without_a_stream(script, tmp_path, monkeypatch, name, kind):
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, name, {"none": None, "closed": closed, "tee": Tee()}[kind])
    assert train_small(script, tmp_path, total_timesteps=64, eval_episodes=1)["steps"] == 64


@each_continuous
def test_where_stdout_is_no_terminal_lines_say_how_far_the_run_is(
    script, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(script, "LINE_SECONDS", 0)
    train_small(script, tmp_path, total_timesteps=192)
    out = capsys.readouterr().out
    assert re.findall(r"step (\d+) of 192  return .* kl .* steps/s", out) == ["64", "128", "192"]
    monkeypatch.setattr(script, "LINE_SECONDS", 60)
    train_small(script, tmp_path / "b", total_timesteps=192)
    assert "step 64" not in capsys.readouterr().out


@POSIX
@each_continuous
def test_on_a_terminal_the_bar_has_a_line_of_its_own(script, tmp_path):
    import fcntl
    import pty
    import struct
    import termios

    flags = small_flags(total_timesteps=640, compile="on", eval_episodes=1)
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
    changes = {"total_timesteps": 128}
    command = [sys.executable, str(copy), *small_flags(**changes).split()]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and result.stdout.startswith("my_ppo  Pendulum-v1")
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert "__my_ppo__s1__" in run_dir.name
    assert ppo.load_policy(str(run_dir / "checkpoint.pt")).act(np.zeros(3)).shape == (1,)


@each_continuous
@pytest.mark.parametrize("name", ["__main__", "cell"])
def test_the_file_pasted_into_a_notebook(script, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    cell = {"__name__": name}
    source = Path(script.__file__).read_text(encoding="utf-8")
    exec(compile(source, "<cell>", "exec"), cell)
    result = cell["train"](cell["Args"](**SMALL, total_timesteps=128))
    assert Path(result["checkpoint"]).exists()
    assert f"__{script.ALGORITHM}__" in Path(result["run_dir"]).name


@POSIX
def test_the_file_read_from_standard_input(tmp_path):
    source = Path(ppo.__file__).read_text(encoding="utf-8")
    command = [sys.executable, "-OO", "-", *small_flags(total_timesteps=128).split()]
    options = {"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 120}
    result = subprocess.run(command, input=source, **options)
    assert result.returncode == 0 and result.stdout.startswith("ppo_continuous  Pendulum-v1")


# ---- Signals ----


def start(script, folder, *flags, **options):
    """Start a long run in a process of its own and wait for its second iteration."""
    words = [word for flag in flags for word in flag.split()]
    command = [sys.executable, script.__file__, "--env-id", "Pendulum-v1", "--compile", "off"]
    command += ["--total-timesteps", "1e7", "--run-dir", "run", *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, **options)  # fmt: skip
    progress = folder / "run" / "progress.csv"
    while not (progress.exists() and len(progress.read_text().splitlines()) > 2):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    return process


def default_signals():
    """Some shells start the tests with Ctrl-C ignored."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@POSIX
@pytest.mark.parametrize("name, code", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_saves_and_the_run_resumes(tmp_path, name, code):
    process = start(ppo, tmp_path, preexec_fn=default_signals)
    process.send_signal(getattr(signal, name))
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and "a second signal kills" in err and "Traceback" not in err
    step = ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"]
    steps = [int(row["step"]) for row in rows_of(tmp_path / "run")]
    assert step == steps[-1] > 2048
    flags = f"--resume run/checkpoint.pt --total-timesteps {step + 2048} --eval-episodes 1"
    assert run_script(tmp_path, flags).returncode == 0
    steps = [int(row["step"]) for row in rows_of(tmp_path / "run")]
    assert steps == list(range(2048, step + 2049, 2048))


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
def test_a_kill_leaves_a_checkpoint_that_resumes(tmp_path):
    process = start(ppo, tmp_path)
    process.kill()
    process.wait(timeout=10)
    step = ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"]
    flags = f"--resume run/checkpoint.pt --total-timesteps {step + 4096} --eval-episodes 0"
    assert run_script(tmp_path, flags).returncode == 0
    steps = [int(row["step"]) for row in rows_of(tmp_path / "run")]
    assert steps == list(range(2048, step + 4097, 2048))


@POSIX
def test_main_stops_for_a_signal_during_the_evaluation(tmp_path, monkeypatch, command):
    evaluate = ppo.evaluate

    def interrupted(act, *rest):
        os.kill(os.getpid(), signal.SIGINT)
        return evaluate(act, *rest)

    monkeypatch.setattr(ppo, "evaluate", interrupted)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    changes = {"total_timesteps": 128, "eval_episodes": 1}
    assert command(ppo, small_flags(**changes), "--run-dir", tmp_path / "run") == 130
    assert ppo.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] == 128
    assert not (tmp_path / "run" / "eval.json").exists()


def test_an_interrupt_that_an_environment_raises_is_no_success(tmp_path, toy, command):
    def step(env):
        raise KeyboardInterrupt

    toy(step=step)
    changes = {"env_id": "Toy-v0", "total_timesteps": 128}
    assert command(ppo, small_flags(**changes), "--run-dir", tmp_path / "run") == 130


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
    assert command(ppo, small_flags(total_timesteps=128)) == 143


@each_continuous
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
@each_continuous
@pytest.mark.parametrize("compiled", ["on", "off"])
def test_trains_on_cuda(script, tmp_path, compiled):
    changes = {"compile": compiled, "device": "cuda", "eval_episodes": 1, "total_timesteps": 640}
    result = train_small(script, tmp_path, **changes)
    assert result["steps"] == 640 and math.isfinite(result["eval_return"])

"""Several processes, as torchrun starts them, do what one process does."""

import csv
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import pytest
import torch
import torch.distributed as dist
import torch.utils.tensorboard
from conftest import each_continuous, each_discrete, each_script, fingerprint, make_args

import acer_discrete
import ppo_atari
import ppo_continuous

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs fork")


def in_process(rank, size, folder, function, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=size)
    try:
        results.put((rank, function()))
    except Exception as error:
        results.put((rank, error))
    finally:
        dist.destroy_process_group()


def in_processes(size, folder, function):
    """Call `function` in each of `size` processes of one group. Returns results or exceptions."""
    folder.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = []
    for rank in range(size):
        inputs = (rank, size, folder, function, results)
        processes.append(context.Process(target=in_process, args=inputs))
        processes[-1].start()
    found = dict(results.get() for _ in range(size))
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    return [found[rank] for rank in range(size)]


def rows_of(run_dir):
    with open(run_dir / "progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{name: x for name, x in row.items() if name not in ("SPS", "seconds")} for row in rows]


# ---- The same run ----


@each_continuous
def test_any_number_of_processes_makes_the_same_run_and_resumes_it(script, tmp_path):
    """Bit for bit: weights, optimizer, statistics, random states and progress.csv."""
    changes = {"env_id": "Hopper-v5", "num_envs": 16, "num_steps": 32, "eval_episodes": 0}
    gym.make(changes["env_id"]).close()  # what is imported now is not imported by each process
    runs = []
    for size in (1, 2, 4):
        folder = tmp_path / str(size)
        args = make_args(script, **changes, total_timesteps=1536, run_dir=str(folder / "run"))
        in_processes(size, folder, lambda args=args: script.train(args))
        path = folder / "run" / "checkpoint.pt"
        first = (fingerprint(path), rows_of(folder / "run"))

        args = script.Args(**script.load_checkpoint(str(path))["args"])
        args.resume = str(path)
        args.total_timesteps = 2560
        in_processes(4 // size, folder / "resumed", lambda args=args: script.train(args))
        second = (fingerprint(path), rows_of(folder / "run"))
        runs.append((first, second))
    assert len(runs[0][0][1]) == 3 and len(runs[0][1][1]) == 5
    assert float(runs[0][1][1][-1]["episodic_return"]) > 0
    assert runs[1] == runs[0] and runs[2] == runs[0]


def one_update(script, **changes):
    """State after three iterations, each of one minibatch step over the whole batch."""
    args = make_args(script, **{"num_envs": 8, "num_steps": 8, **changes}, total_timesteps=192)
    state = {}
    *_, metrics = script.GENERATOR(args, state)
    weights = torch.cat([x.flatten() for x in state["policy"].values() if torch.is_tensor(x)])
    return weights.tolist(), state["episodes"], metrics


@each_discrete
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Catch-v0"])
def test_gradients_statistics_and_moments_are_of_all_processes(script, tmp_path, env_id):
    changes = {"env_id": env_id, "hidden_sizes": (16,)}
    if script is ppo_atari:
        changes |= {"update_epochs": 2, "num_minibatches": 1, "norm_adv": True}
    else:
        changes |= {"replay_start": 1, "replay_ratio": 2.0}
    alone, first, second = [
        run
        for size in (1, 2)
        for run in in_processes(size, tmp_path / str(size), lambda: one_update(script, **changes))
    ]
    assert str(first) == str(second)  # a NaN equals no NaN
    assert first[1] == alone[1]
    torch.testing.assert_close(torch.tensor(first[0]), torch.tensor(alone[0]), atol=1e-5, rtol=1e-4)
    names = ["value_loss", "entropy", "grad_norm", "episodic_return"]
    if script is ppo_atari:
        names.append("explained_variance")
    for name in names:
        assert first[2][name] == pytest.approx(alone[2][name], rel=1e-3, abs=1e-5, nan_ok=True)


def played_games(script):
    args = make_args(script, env_id="ALE/Pong-v5", num_envs=4, num_steps=4, total_timesteps=32)
    args = script.fill_defaults(args, images=True)
    part = script.own_part(4)
    with torch.no_grad():
        envs = script.make_envs(args.env_id, 4, 3, part=part, **script.env_options(args))
    return envs.frames.tolist()


@each_discrete
def test_each_process_plays_games_of_its_own(script, tmp_path):
    alone, *parts = [
        frames
        for size in (1, 2)
        for frames in in_processes(size, tmp_path / str(size), lambda: played_games(script))
    ]
    assert parts[0] + parts[1] == alone and parts[0] != parts[1]


# ---- Errors and ends ----


@each_script
def test_environments_that_do_not_divide_are_one_error(script, tmp_path):
    args = make_args(script, num_envs=4, total_timesteps=640, run_dir=str(tmp_path / "run"))
    first, *others = in_processes(3, tmp_path, lambda: script.train(args))
    assert isinstance(first, script.InputError)
    assert str(first) == "--num-envs 4 is not a multiple of the 3 processes of torchrun"
    assert all(script.lost_process(error) for error in others)
    assert not (tmp_path / "run").exists()


@each_script
def test_more_processes_than_gpus_are_one_error(script, monkeypatch):
    monkeypatch.setattr(script, "rank_and_size", lambda: (0, 2))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = make_args(script, device="cuda", total_timesteps=640)
    with pytest.raises(script.InputError, match="^2 processes but 1 GPUs: lower --nproc"):
        script.check_args(args)


def test_a_replay_memory_in_parts_is_not_saved(tmp_path):
    changes = {"num_envs": 4, "save_replay": True, "total_timesteps": 640}
    args = make_args(acer_discrete, **changes, run_dir=str(tmp_path / "run"))
    first, _ = in_processes(2, tmp_path, lambda: acer_discrete.train(args))
    assert isinstance(first, acer_discrete.InputError) and "--save-replay" in str(first)


def start_torchrun(script, folder, *flags, nodes=1):
    """Start a long run of two processes, on one or two machines, and wait for its second iteration.

    Returns torchrun's process, or a list of one for each machine.
    """
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(2 // nodes)]
    command += ["--nnodes", str(nodes), "--rdzv-id", "test"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", script.__file__]
    command += ["--total-timesteps", "1e7", "--run-dir", "run", "--compile", "off", *flags]
    options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    launchers = []
    for _ in range(nodes):
        launchers.append(subprocess.Popen(command, **options, start_new_session=True))
    progress = folder / "run" / "progress.csv"
    while not (progress.exists() and len(progress.read_text().splitlines()) > 2):
        for launcher in launchers:
            assert launcher.poll() is None, launcher.stderr.read()
        time.sleep(0.1)
    return launchers if nodes > 1 else launcher


def worker(launcher, rank):
    """Process id of one of the processes that torchrun started."""
    pids = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    for pid in pids:
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"):
            return int(pid)
    raise AssertionError("no such process")


needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")


@needs_proc
def test_a_process_that_dies_ends_the_others_with_one_line(tmp_path):
    flags = "--env-id CartPole-v1 --num-envs 4 --num-steps 64"
    launcher = start_torchrun(ppo_atari, tmp_path, *flags.split())
    os.kill(worker(launcher, 1), signal.SIGKILL)
    out, err = launcher.communicate(timeout=30)
    assert launcher.returncode != 0
    (line,) = [line for line in (out + err).splitlines() if line.startswith("ppo_atari.py")]
    end = "another process ended. The last checkpoint, if there is one, stays ("
    assert line.startswith(f"ppo_atari.py: {end}")
    assert ppo_atari.load_checkpoint(str(tmp_path / "run" / "checkpoint.pt"))["step"] >= 256


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_signal_on_one_machine_ends_the_run_on_all(tmp_path, stopped):
    flags = "--env-id CartPole-v1 --num-envs 4 --num-steps 32 --hidden-sizes 16"
    launchers = start_torchrun(acer_discrete, tmp_path, *flags.split(), nodes=2)
    launchers[stopped].send_signal(signal.SIGINT)
    out = ""
    for launcher in launchers:  # after an exit code of 0 torchrun would wait for the other one
        out += launcher.communicate(timeout=60)[0]
        assert launcher.returncode != 0
    assert out.count("mean return of") == 1 and "evaluation" not in out
    assert (tmp_path / "run" / "checkpoint.pt").exists()


@needs_proc
def test_a_signal_to_all_saves_once_and_the_run_resumes(tmp_path):
    flags = "--env-id Pendulum-v1 --num-envs 8 --num-steps 64 --num-minibatches 4"
    launcher = start_torchrun(ppo_continuous, tmp_path, *flags.split())
    for rank in (0, 1):  # as a terminal does it. torchrun then sends it again
        os.kill(worker(launcher, rank), signal.SIGINT)
    launcher.send_signal(signal.SIGINT)
    out, err = launcher.communicate(timeout=30)
    assert out.count("mean return of") + out.count("no training episode") == 1
    assert "evaluation" not in out and "Error" not in err.replace("SignalException", "")
    rows = rows_of(tmp_path / "run")
    path = tmp_path / "run" / "checkpoint.pt"
    saved = ppo_continuous.load_checkpoint(str(path))
    assert saved["step"] == int(rows[-1]["step"])
    args = ppo_continuous.Args(**saved["args"])
    args.resume = str(path)
    args.total_timesteps = saved["step"] + 512
    args.eval_episodes = 1
    assert ppo_continuous.train(args)["steps"] == saved["step"] + 512

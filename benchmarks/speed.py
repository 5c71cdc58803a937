"""Training steps per second of a script and of its peer, side by side.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --script ppo_continuous --task HalfCheetah-v5 --repetitions 5
    python benchmarks/speed.py --script ppo_continuous --against 5d3cfc1     (the script of that commit is the peer)

The peer is Stable-Baselines3's PPO, or sb3-contrib's TRPO, with its default flags; for Atari with the flags that are
ppo_atari.py's defaults. No other ACER runs on these versions: acer_discrete.py's peer is ppo_atari.py. Each repetition
trains every contestant once, each in a process of its own, with one thread for MuJoCo and one a core for Atari, one
after the other in an order that turns, so that a slow minute of the machine hits all alike. A run's figure is steps /
seconds from the end of its first iteration to the end of its last, everything included (environment, inference, update,
logging). What passes from the start of the process to the end of the first iteration, compilation among it, is reported
apart as start-up: cold in the first repetition (empty compile cache), warm in the others. Compilation is forced on, as
these runs are too short for `--compile auto`. Peak memory is the main process's, without the compiler's. The table
gives the median over repetitions and the range, and the median over repetitions of the ratio to the peer; below it,
where the time of the first contestant after the peer goes. For Atari, the last line has the limits: ALE and the
compiled minibatch step alone, and the steps/s that they would allow one after the other.
"""

import copy
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[1]
Script = Literal["ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete"]
PEERS = {"ppo_continuous": "sb3", "trpo_continuous": "sb3-contrib", "ppo_atari": "sb3", "acer_discrete": "ppo_atari"}
POOLED = "peer + EnvPool"
ATARI = ("ppo_atari", "acer_discrete")
CONTESTANTS = {  # continuous ones: 10 epochs, two hidden layers of 64; as the peer's defaults
    "ppo_continuous": {  # minibatches of 64
        "default": "",
        "1 x 2048": "--num-envs 1 --num-steps 2048",
        "not compiled": "--compile off",
        "EnvPool": "--env-id envpool:TASK",
        "EnvPool (1 thread)": "--env-id envpool:TASK --env-threads 1",
        "2 processes": "",
    },
    "trpo_continuous": {  # critic minibatches of 128, 15 iterations of conjugate gradients
        "16 x 128": "--num-steps 128 --cg-iterations 15 --update-epochs 10 --num-minibatches 16",
        "1 x 2048": "--cg-iterations 15 --update-epochs 10 --num-minibatches 16 --num-envs 1 --num-steps 2048",
        "not compiled": "--num-steps 128 --cg-iterations 15 --update-epochs 10 --num-minibatches 16 --compile off",
        "EnvPool": "--num-steps 128 --cg-iterations 15 --update-epochs 10 --num-minibatches 16 --env-id envpool:TASK",
    },
    "ppo_atari": {"default": "", "bf16": "--bf16", "not compiled": "--compile off", "2 processes": ""},
    "acer_discrete": {  # replay from the first iteration on, which the first update fills
        "replay ratio 4": "--replay-start 1 --num-envs 8",
        "16 environments": "--replay-start 1 --num-envs 16",
        "replay ratio 0": "--replay-ratio 0 --num-envs 8",
        "not compiled": "--replay-start 1 --num-envs 8 --compile off",
    },
}
PARTS = {"Envs.step", "AtariEnvs.step", "PoolEnvs.step", "Policy.sample", "Policy.to_env", "ActorCritic.sample", "advantages"}
PARTS |= {"fisher_operator", "conjugate_gradient", "line_search", "policy_step", "update", "Replay.take", "Replay.add"}


@dataclass
class Args:
    script: Script = "ppo_continuous"  # which script
    task: str | None = None  # Gymnasium id; default HalfCheetah-v5 or ALE/Breakout-v5
    steps: int | None = None  # training steps of each run; default 40,960 for MuJoCo, 10,240 for Atari
    repetitions: int = 5  # runs of each contestant
    contestants: tuple[str, ...] = ()  # only these of CONTESTANTS, and the peer with EnvPool if "peer + EnvPool"
    against: str | None = None  # commit whose version of the script is compared with today's, both with default flags
    out: Path | None = None  # CSV for the single runs, default benchmarks/results/speed/<script>__<task>.csv
    one: str | None = None  # run this contestant once in this process (what the script does to itself)


def pool_for_peer(task: str):
    """EnvPool's 16 environments, one thread a core, as a vectorized environment of Stable-Baselines3."""
    import numpy as np
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv

    sys.path.insert(0, str(ROOT))
    import ppo_continuous

    class Pool(VecEnv):
        def __init__(self):
            threads = ppo_continuous.env_options(ppo_continuous.Args())
            self.pool = ppo_continuous.make_envs(f"envpool:{task}", 16, 1, **threads)
            with ppo_continuous.closing(ppo_continuous.gym.make(task)) as env:
                super().__init__(16, env.observation_space, env.action_space)

        def reset(self):
            return self.pool.obs

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            next_obs, rewards, terminated, truncated = self.pool.step(self.actions)
            infos = [{} for _ in rewards]
            for i in np.flatnonzero(terminated | truncated):
                infos[i] = {"terminal_observation": next_obs[i], "TimeLimit.truncated": not terminated[i]}
            return self.pool.obs, rewards, terminated | truncated, infos

        def close(self):
            self.pool.close()

        def get_attr(self, name, indices=None):
            return [None] * 16  # of its environments it asks only for their render mode

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * 16

        def set_attr(self, name, value, indices=None):
            raise NotImplementedError

        def env_method(self, name, *args, indices=None, **kwargs):
            raise NotImplementedError

    return Pool()


def run_peer(args: Args) -> tuple[list[float], int]:
    """Train the peer with its default flags; -> the times at which its iterations ended, and steps in each."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    if args.script == "trpo_continuous":
        from sb3_contrib import TRPO as Peer
    else:
        from stable_baselines3 import PPO as Peer

    class Clock(BaseCallback):
        times: list[float] = []

        def _on_rollout_start(self) -> None:
            self.times.append(time.time())

        def _on_step(self) -> bool:
            return True

    clock = Clock()
    if args.script == "ppo_atari":
        import ale_py  # noqa: F401  registers its games
        from stable_baselines3.common.env_util import make_atari_env
        from stable_baselines3.common.vec_env import VecFrameStack

        game = args.task.removeprefix("ALE/").removesuffix("-v5") + "NoFrameskip-v4"  # its wrappers skip frames
        envs = VecFrameStack(make_atari_env(game, n_envs=8, seed=1), n_stack=4)
        flags = {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "learning_rate": 2.5e-4, "clip_range": 0.1}
        peer = Peer("CnnPolicy", envs, ent_coef=0.01, **flags, device="cpu", seed=1)
    else:
        torch.set_num_threads(1)
        envs, flags = args.task, {}
        if args.one == POOLED:
            envs, flags = pool_for_peer(args.task), {"n_steps": 128}
        peer = Peer("MlpPolicy", envs, device="cpu", seed=1, **flags)
    peer.learn(args.steps, callback=clock)
    times = [*clock.times[1:], time.time()]  # the first rollout starts iteration 1, which has not ended
    return times, peer.n_steps * peer.n_envs


def timed(function, spent: list[float]):
    """`function`, adding the seconds of each call to `spent`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def run_script(args: Args) -> tuple[list[float], int, dict[str, float]]:
    """Train a script; -> the times at which its iterations ended, steps in each, seconds in PARTS between them."""
    contestants = CONTESTANTS[args.script]
    script, own, folder = args.script, contestants.get(args.one, ""), ROOT
    if args.one in ATARI:
        script = args.one
    if args.one == args.against:
        own = next(iter(contestants.values()))
        folder = Path(tempfile.mkdtemp())
        show = ["git", "show", f"{args.against}:{script}.py"]
        (folder / f"{script}.py").write_bytes(subprocess.run(show, cwd=ROOT, capture_output=True, check=True).stdout)
    sys.path.insert(0, str(folder))
    module = __import__(script)
    times, steps, spent = [], [], defaultdict(list)
    for part in PARTS:
        owner, _, name = part.rpartition(".")
        owner = getattr(module, owner, None) if owner else module
        if hasattr(owner, name):
            setattr(owner, name, timed(getattr(owner, name), spent[part]))
    original = module.Log.__call__

    def log(*inputs) -> None:
        original(*inputs)
        times.append(time.time())
        steps.append(inputs[1])
        if len(times) == 1:
            for seconds in spent.values():
                seconds.clear()

    module.Log.__call__ = log
    flags = ["--env-id", args.task, "--total-timesteps", str(args.steps), "--eval-episodes", "0", "--compile", "on"]
    with tempfile.TemporaryDirectory() as folder:
        own = own.replace("TASK", args.task).split()
        parsed = tyro.cli(module.Args, args=[*flags, *own, "--run-dir", f"{folder}/run"])
        if "TORCHELASTIC_RUN_ID" in os.environ:
            module.join_processes()
        module.train(parsed)
    if not steps:  # a process that is not the first
        sys.exit()
    return times, steps[1] - steps[0], {part: sum(seconds) for part, seconds in spent.items() if seconds}


def atari_limits(script: str, task: str) -> dict[str, float]:
    """Steps/s of ALE alone, samples/s of the compiled minibatch step alone, and steps/s of both in turn."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    module = __import__(script)
    args = module.fill_defaults(module.Args(compile="on"), images=True)
    envs = module.make_envs(task, args.num_envs, 1)
    actions = np.random.default_rng(1).integers(envs.action_space.n, size=(500, args.num_envs))
    policy = module.ActorCritic(envs.obs.shape[1:], int(envs.action_space.n), args)
    num_weights = sum(param.numel() for param in policy.parameters())
    step = module.compile_or_eager(module.minibatch_step, args)
    if script == "ppo_atari":
        adam, passes, size = module.Adam(num_weights), args.update_epochs, args.batch_size // args.num_minibatches
        obs, zeros = torch.randint(256, (size, *envs.obs.shape[1:]), dtype=torch.uint8), torch.zeros(size)
        batch = module.Batch(obs, zeros.long(), policy(obs)[0].detach(), zeros, zeros, torch.randn(size), zeros)
        inputs = policy, adam, batch, torch.tensor(0.1), args
    else:
        rmsprop, passes, size = module.RMSProp(num_weights), 1 + args.replay_ratio, args.batch_size
        segment = module.collect(envs, policy, torch.ones(args.num_steps, args.num_envs, policy.num_actions))
        average = copy.deepcopy(policy).requires_grad_(False)
        inputs = policy, average, rmsprop, segment._replace(finals=[]), torch.zeros(segment.rewards.shape), args
    tries = {"ALE": lambda: [envs.step(a) for a in actions], "CNN": lambda: step(*inputs)}
    times = {}
    for name, repetitions in (("ALE", 4), ("CNN", 12)):
        spent = []
        for _ in range(repetitions):
            timed(tries[name], spent)()
        times[name] = statistics.median(spent[2:])
    ale, cnn = args.num_envs * len(actions) / times["ALE"], size / times["CNN"]
    return {"ALE steps/s": ale, "CNN samples/s": cnn, "limit": 1 / (1 / ale + passes / cnn)}


def run_once(args: Args) -> None:
    """Print one JSON line: start-up seconds, steps/s, peak memory, seconds in parts per second of training."""
    if args.one == "limits":
        print(json.dumps(atari_limits(args.script, args.task)))
        return
    if args.one in ("sb3", "sb3-contrib", POOLED):
        (times, batch), spent = run_peer(args), {}
    else:
        times, batch, spent = run_script(args)
    peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, times[-1] - times[0]
    sps = batch * (len(times) - 1) / seconds
    result = {"start_up_s": times[0] - float(os.environ["STARTED"]), "sps": sps}
    print(json.dumps(result | {"peak_mb": peak, "parts": {part: s / seconds for part, s in spent.items()}}))


def print_table(task: str, results: dict[str, list[dict]]) -> None:
    """Markdown table, the peer first, and the breakdown."""
    peer, first = list(results)[:2]
    print(f"| {task} | steps/s (range) | times {peer} (range) | start-up cold / warm, s | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        sps = [r["sps"] for r in runs]
        ratios = [a["sps"] / b["sps"] for a, b in zip(runs, results[peer], strict=True)]
        warm = statistics.median([r["start_up_s"] for r in runs[1:]] or [float("nan")])
        print(
            f"| {name} | {statistics.median(sps):.0f} ({min(sps):.0f}-{max(sps):.0f}) "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) "
            f"| {runs[0]['start_up_s']:.1f} / {warm:.1f} | {max(r['peak_mb'] for r in runs):.0f} |"
        )
    share = {part: statistics.median(r["parts"][part] for r in results[first]) for part in results[first][0]["parts"]}
    acting = sum(share.get(part, 0) for part in ("Policy.sample", "Policy.to_env", "ActorCritic.sample"))
    stepping = sum(share.get(part, 0) for part in ("Envs.step", "AtariEnvs.step", "PoolEnvs.step"))
    parts = {"environment": stepping, "acting": acting}
    if "policy_step" in share:
        parts["conjugate gradients"] = share["fisher_operator"] + share["conjugate_gradient"]
        parts["line search"] = share["line_search"]
        parts["rest of the policy step"] = share["policy_step"] - parts["conjugate gradients"] - share["line_search"]
        parts["critic"] = share["update"] - share["policy_step"]
    elif "Replay.take" in share:
        parts["replay sampling and storing"] = share["Replay.take"] + share["Replay.add"]
        parts["network passes of the update"] = share["update"] - share["Replay.take"]
    elif "advantages" not in share:
        parts["update"] = share["update"]
    else:
        parts |= {"advantages": share["advantages"], "rest of the update": share["update"] - share["advantages"]}
    parts["all else"] = 1 - sum(parts.values())
    print(f"\n{first}: " + ", ".join(f"{name} {100 * x:.0f} %" for name, x in parts.items()))


def main(args: Args) -> None:
    name = f"{args.script}__{Path(args.task).name}"
    folder = ROOT / "benchmarks" / "results" / "speed" / ("editions" if args.against else "")
    out = args.out or folder / f"{name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    names = [PEERS[args.script], *(args.contestants or CONTESTANTS[args.script])]
    if args.against:
        names = [args.against, next(iter(CONTESTANTS[args.script]))]
    results = {name: [] for name in names}
    with out.open("w") as file, tempfile.TemporaryDirectory() as cache:
        file.write("contestant,repetition,steps_per_second,start_up_seconds,peak_megabytes\n")
        for repetition in range(args.repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                command = [sys.executable]
                if name == "2 processes":
                    command += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
                command += [__file__, "--script", args.script, "--task", args.task]
                command += ["--steps", str(args.steps), "--one", name]
                command += ["--against", args.against] if args.against else []
                threads = os.cpu_count() if args.script in ATARI and name != "2 processes" else 1
                environment = os.environ | {"STARTED": str(time.time()), "OMP_NUM_THREADS": str(threads)}
                environment["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{name.replace(' ', '_')}"  # g++ can't have spaces
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if "not compiled: " in done.stdout:
                    sys.exit(f"{name} could not be compiled: {done.stdout}")
                if done.returncode:
                    sys.exit(f"{name} failed: {done.stderr.splitlines()[-1] if done.stderr else done.stdout}")
                result = json.loads(done.stdout.splitlines()[-1])
                results[name].append(result)
                figures = f"{result['sps']:.0f},{result['start_up_s']:.1f},{result['peak_mb']:.0f}"
                file.write(f"{name},{repetition + 1},{figures}\n")
                print(f"{repetition + 1}/{args.repetitions} {name}: {result['sps']:.0f} steps/s", file=sys.stderr)
    print_table(Path(args.task).name, results)
    if args.script in ATARI and not args.against:
        done = subprocess.run([*command[:-1], "limits"], env=environment, capture_output=True, text=True, check=True)
        limits = json.loads(done.stdout.splitlines()[-1])
        print("limits: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    atari = arguments.script in ATARI
    arguments.task = arguments.task or ("ALE/Breakout-v5" if atari else "HalfCheetah-v5")
    arguments.steps = arguments.steps or (10_240 if atari else 40_960)
    run_once(arguments) if arguments.one else main(arguments)

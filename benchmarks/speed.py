"""Training steps per second of a script and of its peer, side by side.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --script ppo_continuous --task HalfCheetah-v5 --repetitions 5
    python benchmarks/speed.py --script ppo_continuous --against 5d3cfc1   # an older version

The peer is PPO of Stable-Baselines3 or TRPO of sb3-contrib with its default flags. On Atari it has
the flags that are ppo_atari.py's defaults. No other ACER runs on these versions, so the peer of
acer_discrete.py is ppo_atari.py.

In each repetition every contestant trains once, in a process of its own, one after the other. Their
order turns, so that a slow minute of the machine hits all alike. MuJoCo gets one thread, Atari one
for each core.

Steps per second are those from the end of the first iteration to the end of the last, with
everything included. What passes before is the start-up: cold in the first repetition, where the
compiler's cache is empty, and warm in the others. Compilation is on, because these runs are too
short for `--compile auto`. Memory is the peak of the main process, without the compiler's.

The table shows the median over repetitions, the range, and the median ratio to the peer. Below it
stands where the time of the next contestant goes. On Atari the last line has the limits: ALE
alone, the compiled minibatch step alone, and what both would allow in turn.
"""

import copy
import functools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[1]
PEERS = {
    "ppo_continuous": "sb3",
    "trpo_continuous": "sb3-contrib",
    "ppo_atari": "sb3",
    "acer_discrete": "ppo_atari",
}
POOLED = "peer + EnvPool"
ATARI = ("ppo_atari", "acer_discrete")
TRPO = "--cg-iterations 15 --update-epochs 10 --num-minibatches 16"  # as the peer has it
CONTESTANTS = {  # script -> name -> flags
    "ppo_continuous": {
        "default": "",
        "1 x 2048": "--num-envs 1 --num-steps 2048",
        "not compiled": "--compile off",
        "EnvPool": "--env-id envpool:TASK",
        "EnvPool (1 thread)": "--env-id envpool:TASK --env-threads 1",
        "2 processes": "",
    },
    "trpo_continuous": {
        "16 x 128": f"{TRPO} --num-steps 128",
        "1 x 2048": f"{TRPO} --num-envs 1 --num-steps 2048",
        "not compiled": f"{TRPO} --num-steps 128 --compile off",
        "EnvPool": f"{TRPO} --num-steps 128 --env-id envpool:TASK",
    },
    "ppo_atari": {
        "default": "",
        "bf16": "--bf16",
        "not compiled": "--compile off",
        "2 processes": "",
    },
    "acer_discrete": {  # with --replay-start 1 it replays from the first iteration on
        "replay ratio 4": "--replay-start 1 --num-envs 8",
        "16 environments": "--replay-start 1 --num-envs 16",
        "replay ratio 0": "--replay-ratio 0 --num-envs 8",
        "not compiled": "--replay-start 1 --num-envs 8 --compile off",
    },
}
STEPPING = ("Envs.step", "AtariEnvs.step", "PoolEnvs.step")
ACTING = ("Policy.sample", "Policy.to_env", "ActorCritic.sample")
PARTS = (  # functions of the scripts whose time is measured
    *STEPPING,
    *ACTING,
    "advantages",
    "fisher_operator",
    "conjugate_gradient",
    "line_search",
    "policy_step",
    "update",
    "Replay.take",
    "Replay.add",
)


@dataclass
class Args:
    script: Literal["ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete"] = (
        "ppo_continuous"
    )
    task: str | None = None  # Gymnasium id. Default: HalfCheetah-v5 or ALE/Breakout-v5
    steps: int | None = None  # steps of each run. Default: 40,960, on Atari 10,240
    repetitions: int = 5  # runs of each contestant
    # only these contestants. "peer + EnvPool", the peer on EnvPool, runs only if it is named
    contestants: tuple[str, ...] = ()
    # a commit. Its version of the script is the peer, with the flags of the first contestant
    against: str | None = None
    # CSV of the single runs. Default: benchmarks/results/speed/<script>__<task>.csv
    out: Path | None = None
    # train this contestant once in this process. The other processes are started with it
    one: str | None = None


class Timing:
    """What one run measures."""

    def __init__(self):
        self.times = []  # when its iterations ended
        self.batch = 0  # steps of an iteration
        self.parts = {}  # function -> seconds since the end of the first iteration

    def result(self) -> dict:
        if len(self.times) < 2:
            sys.exit("--steps must be two iterations or more")
        seconds = self.times[-1] - self.times[0]
        return {
            "start_up_s": self.times[0] - float(os.environ["STARTED"]),
            "sps": self.batch * (len(self.times) - 1) / seconds,
            "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "parts": {part: spent / seconds for part, spent in self.parts.items()},
        }


# ---- One run -------------------------------------------------------------------------------------


def run_script(args: Args) -> Timing:
    """Train a script."""
    script = args.one if args.one in ATARI else args.script  # the peer of ACER is a script
    contestants = CONTESTANTS[args.script]
    flags = contestants.get(args.one, "")
    folder = ROOT
    if args.one == args.against:
        flags = next(iter(contestants.values()))
        folder = Path(tempfile.mkdtemp())
        show = ["git", "show", f"{args.against}:{script}.py"]
        text = subprocess.run(show, cwd=ROOT, capture_output=True, check=True).stdout
        (folder / f"{script}.py").write_bytes(text)
    sys.path.insert(0, str(folder))
    module = __import__(script)
    spent = measure_parts(module)
    timing = Timing()
    steps = []
    original = module.Log.__call__

    def log(*inputs) -> None:
        original(*inputs)
        timing.times.append(time.time())
        steps.append(inputs[1])  # environment steps so far
        if len(steps) == 1:
            for seconds in spent.values():
                seconds.clear()

    module.Log.__call__ = log
    command = ["--env-id", args.task, "--total-timesteps", str(args.steps)]
    command += ["--eval-episodes", "0", "--compile", "on"]
    command += flags.replace("TASK", args.task).split()
    with tempfile.TemporaryDirectory() as parent:
        parsed = tyro.cli(module.Args, args=[*command, "--run-dir", f"{parent}/run"])
        if "TORCHELASTIC_RUN_ID" in os.environ:
            module.join_processes()
        module.train(parsed)
    if not steps:  # of several processes only the first writes a log
        sys.exit()
    timing.batch = steps[0]
    timing.parts = {part: sum(seconds) for part, seconds in spent.items() if seconds}
    return timing


def measure_parts(module) -> dict[str, list[float]]:
    """Replace the functions PARTS of a script by timed ones. Returns where the seconds appear."""
    spent = defaultdict(list)
    for part in PARTS:
        owner, _, name = part.rpartition(".")
        owner = getattr(module, owner, None) if owner else module
        if hasattr(owner, name):
            setattr(owner, name, timed(getattr(owner, name), spent[part]))
    return spent


def timed(function: Callable, spent: list[float]) -> Callable:
    """Return `function` that appends the seconds of each call to `spent`."""

    @functools.wraps(function)
    def call(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    return call


def run_peer(args: Args) -> Timing:
    """Train the peer with its default flags."""
    import torch
    from stable_baselines3.common.callbacks import BaseCallback

    if args.script == "trpo_continuous":
        from sb3_contrib import TRPO as Peer
    else:
        from stable_baselines3 import PPO as Peer

    timing = Timing()

    class Clock(BaseCallback):
        def _on_rollout_start(self) -> None:
            timing.times.append(time.time())

        def _on_step(self) -> bool:
            return True

    if args.script == "ppo_atari":
        envs = peer_atari(args.task)
        flags = {"n_steps": 128, "n_epochs": 4, "batch_size": 256, "ent_coef": 0.01}
        flags |= {"learning_rate": 2.5e-4, "clip_range": 0.1}
        peer = Peer("CnnPolicy", envs, device="cpu", seed=1, **flags)
    else:
        torch.set_num_threads(1)
        envs = peer_pool(args.task) if args.one == POOLED else args.task
        flags = {"n_steps": 128} if args.one == POOLED else {}
        peer = Peer("MlpPolicy", envs, device="cpu", seed=1, **flags)
    peer.learn(args.steps, callback=Clock())
    timing.times.append(time.time())
    del timing.times[0]  # the start of the first rollout. The others are ends of iterations
    timing.batch = peer.n_steps * peer.n_envs
    return timing


def peer_atari(task: str):
    """Return eight games with the wrappers of Stable-Baselines3."""
    import ale_py  # noqa: F401  registers its games
    from stable_baselines3.common.env_util import make_atari_env
    from stable_baselines3.common.vec_env import VecFrameStack

    game = task.removeprefix("ALE/").removesuffix("-v5")
    envs = make_atari_env(f"{game}NoFrameskip-v4", n_envs=8, seed=1)  # its wrappers skip frames
    return VecFrameStack(envs, n_stack=4)


def peer_pool(task: str):
    """Return EnvPool's 16 environments, one thread a core, for Stable-Baselines3."""
    import numpy as np
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv

    sys.path.insert(0, str(ROOT))
    import ppo_continuous

    class Pool(VecEnv):
        def __init__(self):
            options = ppo_continuous.env_options(ppo_continuous.Args())
            self.pool = ppo_continuous.make_envs(f"envpool:{task}", 16, 1, **options)
            with closing(ppo_continuous.gym.make(task)) as env:
                super().__init__(16, env.observation_space, env.action_space)

        def reset(self):
            return self.pool.obs

        def step_async(self, actions):
            self.actions = actions

        def step_wait(self):
            next_obs, rewards, terminated, truncated = self.pool.step(self.actions)
            infos = [{} for _ in rewards]
            for i in np.flatnonzero(terminated | truncated):
                infos[i]["terminal_observation"] = next_obs[i]
                infos[i]["TimeLimit.truncated"] = not terminated[i]
            return self.pool.obs, rewards, terminated | truncated, infos

        def close(self):
            self.pool.close()

        def get_attr(self, name, indices=None):
            return [None] * 16  # Stable-Baselines3 asks only for the render mode

        def env_is_wrapped(self, wrapper, indices=None):
            return [False] * 16

        def set_attr(self, name, value, indices=None):
            raise NotImplementedError

        def env_method(self, name, *args, indices=None, **kwargs):
            raise NotImplementedError

    return Pool()


def atari_limits(script: str, task: str) -> dict[str, float]:
    """Return steps/s of ALE, samples/s of the minibatch step, and steps/s of both in turn."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    import torch

    module = __import__(script)
    args = module.fill_defaults(module.Args(compile="on"), images=True)
    envs = module.make_envs(task, args.num_envs, 1)
    obs_shape = envs.obs.shape[1:]
    num_actions = int(envs.action_space.n)
    policy = module.ActorCritic(obs_shape, num_actions, args)
    num_weights = sum(param.numel() for param in policy.parameters())
    step = module.compile_or_eager(module.minibatch_step, args)
    if script == "ppo_atari":
        passes = args.update_epochs  # over each sample
        size = args.batch_size // args.num_minibatches
        obs = torch.randint(256, (size, *obs_shape), dtype=torch.uint8)
        logits = policy(obs)[0].detach()
        zeros = torch.zeros(size)
        adv = torch.randn(size)
        batch = module.Batch(obs, zeros.long(), logits, zeros, zeros, adv, zeros)
        inputs = (policy, module.Adam(num_weights), batch, torch.tensor(0.1), args)
    else:
        passes = 1 + args.replay_ratio
        size = args.batch_size
        uniforms = torch.ones(args.num_steps, args.num_envs, num_actions)
        segment = module.collect(envs, policy, uniforms)._replace(finals=[])
        average = copy.deepcopy(policy).requires_grad_(False)
        rmsprop = module.RMSProp(num_weights)
        inputs = (policy, average, rmsprop, segment, torch.zeros(segment.rewards.shape), args)
    actions = np.random.default_rng(1).integers(num_actions, size=(500, args.num_envs))
    ale = actions.size / median_seconds(lambda: [envs.step(row) for row in actions], 2)
    cnn = size / median_seconds(lambda: step(*inputs), 10)
    return {"ALE steps/s": ale, "CNN samples/s": cnn, "limit": 1 / (1 / ale + passes / cnn)}


def median_seconds(function: Callable, repetitions: int) -> float:
    """Return the median time of a call, after two that do not count."""
    spent = []
    for _ in range(2 + repetitions):
        timed(function, spent)()
    return statistics.median(spent[2:])


def run_once(args: Args) -> None:
    """Print what one contestant measured as one line of JSON."""
    if args.one == "limits":
        result = atari_limits(args.script, args.task)
    elif args.one in ("sb3", "sb3-contrib", POOLED):
        result = run_peer(args).result()
    else:
        result = run_script(args).result()
    print(json.dumps(result))


# ---- All runs ------------------------------------------------------------------------------------


def choose(args: Args) -> list[str]:
    """Return the contestants, the peer first. Exits with a line for flags that make no sense."""
    contestants = list(CONTESTANTS[args.script])
    known = contestants if args.script in ATARI else [*contestants, POOLED]
    for name in args.contestants:
        if name not in known or args.contestants.count(name) > 1:
            sys.exit(f"speed.py: --contestants {name}: once each of {', '.join(known)}")
    if args.repetitions < 1:
        sys.exit(f"speed.py: --repetitions {args.repetitions}: one or more")
    if not args.against:
        return [PEERS[args.script], *(args.contestants or contestants)]
    if args.contestants:
        sys.exit("speed.py: --against compares one contestant: leave out --contestants")
    show = ["git", "cat-file", "-e", f"{args.against}:{args.script}.py"]
    if subprocess.run(show, cwd=ROOT, capture_output=True).returncode != 0:
        sys.exit(f"speed.py: --against {args.against}: no commit with a {args.script}.py")
    return [args.against, contestants[0]]


def main(args: Args) -> None:
    names = choose(args)
    folder = ROOT / "benchmarks" / "results" / "speed"
    if args.against:
        folder = folder / "editions"
    out = args.out or folder / f"{args.script}__{Path(args.task).name}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {name: [] for name in names}
    unfinished = out.with_suffix(".tmp")
    with unfinished.open("w") as file, tempfile.TemporaryDirectory() as cache:
        file.write("contestant,repetition,steps_per_second,start_up_seconds,peak_megabytes\n")
        for repetition in range(args.repetitions):
            first = repetition % len(names)
            for name in names[first:] + names[:first]:
                result = start(args, name, cache)
                results[name].append(result)
                figures = f"{result['sps']:.0f},{result['start_up_s']:.1f},{result['peak_mb']:.0f}"
                file.write(f"{name},{repetition + 1},{figures}\n")
                file.flush()
                count = f"{repetition + 1}/{args.repetitions}"
                print(f"{count} {name}: {result['sps']:.0f} steps/s", file=sys.stderr)
        os.replace(unfinished, out)
        print_table(Path(args.task).name, results)
        if results[names[1]][0]["parts"]:
            print_parts(names[1], results[names[1]])
        if args.script in ATARI and not args.against:
            limits = start(args, "limits", cache)
            print("limits: " + ", ".join(f"{name} {value:.0f}" for name, value in limits.items()))


def start(args: Args, name: str, cache: str) -> dict:
    """Run one contestant in a process of its own. Returns what it measured."""
    command = [sys.executable]
    if name == "2 processes":
        command += ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += [__file__, "--script", args.script, "--task", args.task]
    command += ["--steps", str(args.steps), "--one", name]
    if args.against:
        command += ["--against", args.against]
    threads = os.cpu_count() if args.script in ATARI and name != "2 processes" else 1
    environment = os.environ | {
        "STARTED": str(time.time()),
        "OMP_NUM_THREADS": str(threads),
        "TORCHINDUCTOR_CACHE_DIR": f"{cache}/{name.replace(' ', '_')}",  # g++ can't have spaces
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "not compiled: " in done.stdout:
        sys.exit(f"{name} could not be compiled: {done.stdout}")
    if done.returncode != 0:
        words = re.findall(r".*\w.*", done.stderr or done.stdout)  # torchrun ends with a rule
        sys.exit(f"{name} failed: {words[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_table(task: str, results: dict[str, list[dict]]) -> None:
    """Print a table in Markdown, the peer first."""
    peer = next(iter(results))
    head = [task, "steps/s (range)", f"times {peer} (range)"]
    head += ["start-up cold / warm, s", "peak memory, MB"]
    print(f"| {' | '.join(head)} |")
    print("|---" * len(head) + "|")
    for name, runs in results.items():
        speeds = [run["sps"] for run in runs]
        ratios = [a["sps"] / b["sps"] for a, b in zip(runs, results[peer], strict=True)]
        cold, *warm = [run["start_up_s"] for run in runs]
        cells = [name, with_range(speeds, 0), with_range(ratios, 1)]
        cells += [f"{cold:.1f} / {statistics.median(warm or [float('nan')]):.1f}"]
        cells += [f"{max(run['peak_mb'] for run in runs):.0f}"]
        print(f"| {' | '.join(cells)} |")


def with_range(values: list[float], digits: int) -> str:
    """Return median (lowest-highest)."""
    found = (statistics.median(values), min(values), max(values))
    median, low, high = (f"{value:.{digits}f}" for value in found)
    return f"{median} ({low}-{high})"


def print_parts(name: str, runs: list[dict]) -> None:
    """Print where the time of a contestant goes, in percent."""
    share = defaultdict(float)  # function -> share of the time, 0 where the script has none
    for part in runs[0]["parts"]:
        share[part] = statistics.median(run["parts"][part] for run in runs)
    parts = {
        "environment": sum(share[part] for part in STEPPING),
        "acting": sum(share[part] for part in ACTING),
    }
    if "policy_step" in share:
        gradients = share["fisher_operator"] + share["conjugate_gradient"]
        search = share["line_search"]
        parts["conjugate gradients"] = gradients
        parts["line search"] = search
        parts["rest of the policy step"] = share["policy_step"] - gradients - search
        parts["critic"] = share["update"] - share["policy_step"]
    elif "Replay.take" in share:
        parts["replay sampling and storing"] = share["Replay.take"] + share["Replay.add"]
        parts["network passes of the update"] = share["update"] - share["Replay.take"]
    else:
        parts["advantages"] = share["advantages"]
        parts["rest of the update"] = share["update"] - share["advantages"]
    parts["all else"] = 1 - sum(parts.values())
    print(f"\n{name}: " + ", ".join(f"{part} {100 * x:.0f} %" for part, x in parts.items()))


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    is_atari = arguments.script in ATARI
    arguments.task = arguments.task or ("ALE/Breakout-v5" if is_atari else "HalfCheetah-v5")
    arguments.steps = arguments.steps or (10_240 if is_atari else 40_960)
    if arguments.one:
        run_once(arguments)
    else:
        main(arguments)

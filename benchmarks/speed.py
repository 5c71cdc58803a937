"""Training steps per second of ppo_continuous.py and of Stable-Baselines3's PPO, side by side.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/speed.py --task HalfCheetah-v5 --repetitions 5

Each repetition trains every contestant once for `--steps` steps, each in a process of its own with one thread, one
after the other in an order that turns, so that a slow minute of the machine hits all alike. A run's figure is steps /
seconds from the end of its first iteration to the end of its last, everything included (environment, inference,
update, logging). What passes from the start of the process to the end of the first iteration, compilation among it,
is reported apart as start-up: cold in the first repetition (empty compile cache), warm in the others. Compilation is
forced on, as these runs are too short for `--compile auto`. Peak memory is the main process's, without the
compiler's. The table gives the median over repetitions and the range, and the median over repetitions of the ratio to
Stable-Baselines3.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
CONTESTANTS = {  # all: 2048 steps an iteration, 10 epochs, minibatches of 64, two hidden layers of 64
    "sb3": [],
    "default": [],
    "1 x 2048": ["--num-envs", "1", "--num-steps", "2048"],
    "not compiled": ["--compile", "off"],
}


@dataclass
class Args:
    task: str = "HalfCheetah-v5"  # Gymnasium id
    steps: int = 40_960  # training steps of each run
    repetitions: int = 5  # runs of each contestant
    out: Path | None = None  # CSV for the single runs, default benchmarks/results/speed/<task>.csv
    one: str | None = None  # run this contestant once in this process (what the script does to itself)


def run_sb3(args: Args) -> list[float]:
    """Train SB3's PPO with its default flags; -> the times at which its iterations ended."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback

    class Clock(BaseCallback):
        times: list[float] = []

        def _on_rollout_start(self) -> None:
            self.times.append(time.time())

        def _on_step(self) -> bool:
            return True

    torch.set_num_threads(1)
    clock = Clock()
    PPO("MlpPolicy", args.task, device="cpu", seed=1).learn(args.steps, callback=clock)
    return [*clock.times[1:], time.time()]  # the first rollout starts iteration 1, which has not ended


def run_script(args: Args) -> list[float]:
    """Train ppo_continuous.py; -> the times at which its iterations ended."""
    sys.path.insert(0, str(ROOT))
    import ppo_continuous as ppo

    times, original = [], ppo.Log.__call__

    def timed(*inputs) -> None:
        original(*inputs)
        times.append(time.time())

    ppo.Log.__call__ = timed
    flags = ["--env-id", args.task, "--total-timesteps", str(args.steps), "--eval-episodes", "0", "--compile", "on"]
    with tempfile.TemporaryDirectory() as folder:
        run_args = tyro.cli(ppo.Args, args=[*flags, *CONTESTANTS[args.one], "--run-dir", f"{folder}/run"])
        ppo.train(run_args)
    return times


def run_once(args: Args) -> None:
    """Print one JSON line: start-up seconds, steps/s, peak memory."""
    times = run_sb3(args) if args.one == "sb3" else run_script(args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    sps = 2048 * (len(times) - 1) / (times[-1] - times[0])
    print(json.dumps({"start_up_s": times[0] - float(os.environ["STARTED"]), "sps": sps, "peak_mb": peak}))


def main(args: Args) -> None:
    out = args.out or ROOT / "benchmarks" / "results" / "speed" / f"{args.task}.csv"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = {name: [] for name in CONTESTANTS}
    with out.open("w") as file, tempfile.TemporaryDirectory() as cache:
        file.write("contestant,repetition,steps_per_second,start_up_seconds,peak_megabytes\n")
        for repetition in range(args.repetitions):
            names = list(CONTESTANTS)
            for name in names[repetition % len(names) :] + names[: repetition % len(names)]:
                command = [sys.executable, __file__, "--task", args.task, "--steps", str(args.steps), "--one", name]
                environment = os.environ | {"STARTED": str(time.time()), "OMP_NUM_THREADS": "1"}
                environment["TORCHINDUCTOR_CACHE_DIR"] = f"{cache}/{name}"
                done = subprocess.run(command, env=environment, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(f"{name} failed: {done.stderr.splitlines()[-1] if done.stderr else done.stdout}")
                result = json.loads(done.stdout.splitlines()[-1])
                results[name].append(result)
                file.write(
                    f"{name},{repetition + 1},{result['sps']:.0f},{result['start_up_s']:.1f},{result['peak_mb']:.0f}\n"
                )
                print(f"{repetition + 1}/{args.repetitions} {name}: {result['sps']:.0f} steps/s", file=sys.stderr)
    print(f"| {args.task} | steps/s (range) | times SB3 (range) | start-up cold / warm, s | peak memory, MB |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        sps = [r["sps"] for r in runs]
        ratios = [a["sps"] / b["sps"] for a, b in zip(runs, results["sb3"], strict=True)]
        warm = statistics.median([r["start_up_s"] for r in runs[1:]] or [float("nan")])
        print(
            f"| {name} | {statistics.median(sps):.0f} ({min(sps):.0f}-{max(sps):.0f}) "
            f"| {statistics.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f}) "
            f"| {runs[0]['start_up_s']:.1f} / {warm:.1f} | {max(r['peak_mb'] for r in runs):.0f} |"
        )


if __name__ == "__main__":
    arguments = tyro.cli(Args, description=__doc__)
    run_once(arguments) if arguments.one else main(arguments)

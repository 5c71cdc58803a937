"""Train a script on its tasks and keep the learning curves.

    python benchmarks/learning.py --script ppo_continuous --seeds 1 2 3 --workers 2

Each run leaves <script>__<task>__s<seed>.csv (step, mean return of the last 100 training episodes, largest mean KL of
an update since the row before; about 100 rows) in benchmarks/results/mujoco or atari, and a row in index.csv beside it
(command, hash of the script, final scores, seconds). A run whose row is there is not done again (delete the row for
that); a half-done one goes on from its checkpoint. Ends with the table of means.
"""

import csv
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SUITES = {"ppo_continuous": "mujoco", "trpo_continuous": "mujoco", "ppo_atari": "atari"}
FOUR = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "InvertedDoublePendulum-v5")
TASKS = {  # the flags that differ from the defaults
    "ppo_continuous": dict.fromkeys((*FOUR, "InvertedPendulum-v5", "Reacher-v5"), ""),
    "trpo_continuous": {
        **dict.fromkeys(FOUR, ""),
        "Hopper-v5": "--num-steps 64 --num-minibatches 8 --max-kl 0.01",
        "InvertedDoublePendulum-v5": "--adv-floor 0.1",
        "Swimmer-v5": "--gamma 0.9999 --num-steps 64 --num-minibatches 8 --max-kl 0.01 --gae-lambda 0.98 --log-std-init 0",
    },
    "ppo_atari": {"ALE/Breakout-v5": "--total-timesteps 1_000_000", "ALE/Pong-v5": "--total-timesteps 5_000_000"},
}
SEEDS = {"ppo_continuous": (1, 2, 3), "trpo_continuous": (1, 2, 3), "ppo_atari": (1,)}
SCORES = ["steps", "last100", "deterministic", "sampled"]
COLUMNS = ["script", "task", "seed", *SCORES, "seconds", "script_sha256", "command"]


@dataclass
class Args:
    script: Literal["ppo_continuous", "trpo_continuous", "ppo_atari"] = "ppo_continuous"  # which script
    tasks: tuple[str, ...] = ()  # Gymnasium ids; default all that the script has bars for
    seeds: tuple[int, ...] = ()  # one run each; default 1 2 3, for Atari 1
    workers: int = 2  # runs at a time, one thread each
    runs: Path = ROOT / "runs" / "learning"  # run folders, not kept in git


def index(script: str) -> list[dict[str, str]]:
    """Rows of a script in its index.csv."""
    path = RESULTS / SUITES[script] / "index.csv"
    return [row for row in csv.DictReader(path.open()) if row["script"] == script] if path.exists() else []


def curve_path(script: str, task: str, seed: int | str) -> Path:
    """Where the curve of a run is kept."""
    return RESULTS / SUITES[script] / f"{script}__{Path(task).name}__s{seed}.csv"


def curve(row: dict[str, str]) -> list[tuple[int, float, float]]:
    """(step, mean return of the last 100 training episodes, largest mean KL) of a run."""
    with curve_path(row["script"], row["task"], row["seed"]).open() as file:
        return [tuple(map(float, cells.values())) for cells in csv.DictReader(file)]


def worst_drop(rows: list[tuple[int, float, float]]) -> float:
    """The lowest ratio of the return to its best so far, from 300,000 steps on; 1 = never fell."""
    best, ratios = -math.inf, [1.0]
    for step, value, _ in rows:
        best = max(best, value)
        if step >= 300_000:
            ratios.append(value / best)
    return min(ratios)


def table(script: str, tasks: tuple[str, ...] = (), seeds: tuple[int, ...] = ()) -> str:
    """Markdown table of the means over seeds in index.csv, with the single values."""
    trust = script == "trpo_continuous"
    head = ["task", "last 100 training episodes", "deterministic evaluation"]
    head += ["largest mean KL", "lowest / best so far"] if trust else []
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for task in tasks or TASKS[script]:
        rows = [r for r in index(script) if r["task"] == task and int(r["seed"]) in (seeds or SEEDS[script])]
        if not rows:
            continue
        cells = []
        for column in ("last100", "deterministic"):
            values = [float(row[column]) for row in rows]
            digits = 0 if abs(statistics.mean(values)) >= 100 else 2
            cells.append(f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})")
        if trust:
            curves = [curve(row) for row in rows]
            cells.append(f"{max(kl for points in curves for _, _, kl in points):.5f}")
            cells.append(f"{min(map(worst_drop, curves)):.2f}")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def extract(run_dir: Path, script: str, task: str, seed: int, command: str) -> dict[str, str]:
    """Write the curve of a finished run; -> its row of index.csv."""
    rows = list(csv.DictReader((run_dir / "progress.csv").open()))
    evaluation = json.loads((run_dir / "eval.json").read_text())
    every = max(1, len(rows) // 100)
    with curve_path(script, task, seed).open("w") as file:
        file.write("step,episodic_return,largest_kl\n")
        for end in range((len(rows) - 1) % every + 1, len(rows) + 1, every):
            kl = max(float(r["approx_kl"]) for r in rows[max(0, end - every) : end])
            if rows[end - 1]["episodic_return"]:
                file.write(f"{rows[end - 1]['step']},{rows[end - 1]['episodic_return']},{kl:.5g}\n")
    scores = {mode: f"{statistics.mean(returns):.2f}" for mode, returns in evaluation.items()}
    digest = json.loads((run_dir / "config.json").read_text())["script_sha256"][:16]
    last = {"steps": rows[-1]["step"], "last100": f"{float(rows[-1]['episodic_return']):.2f}"}
    row = {"script": script, "task": task, "seed": str(seed), **last, **scores, "seconds": rows[-1]["seconds"]}
    return row | {"script_sha256": digest, "command": command}


def run(script: str, task: str, seed: int, folder: Path) -> dict[str, str]:
    """Train one run to its end; -> its row of index.csv. Raises RuntimeError with the last line of a failed run."""
    run_dir = folder / curve_path(script, task, seed).stem
    checkpoint = run_dir / "checkpoint.pt"
    command = ["python", f"{script}.py", "--env-id", task, "--seed", str(seed), *TASKS[script].get(task, "").split()]
    line = [sys.executable, *command[1:], "--run-dir", str(run_dir)]
    if checkpoint.exists():
        line = [*line[:2], "--resume", str(checkpoint)]
    else:
        shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was killed before its first checkpoint
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} seed {seed} failed: {(done.stderr or done.stdout).splitlines()[-1]}")
    return extract(run_dir, script, task, seed, " ".join(command))


def main(args: Args) -> None:
    path = RESULTS / SUITES[args.script] / "index.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    tasks, seeds = args.tasks or tuple(TASKS[args.script]), args.seeds or SEEDS[args.script]
    done = {(row["task"], row["seed"]) for row in index(args.script)}
    todo = [(task, seed) for seed in seeds for task in tasks if (task, str(seed)) not in done]
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, args.script, task, seed, args.runs) for task, seed in todo]
        for future in tqdm(futures, unit="run"):
            try:
                row = future.result()
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            new = not path.exists()
            with path.open("a") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writerows(([dict(zip(COLUMNS, COLUMNS, strict=True))] if new else []) + [row])
    print(table(args.script, tasks, seeds))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

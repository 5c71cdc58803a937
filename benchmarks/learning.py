"""Train ppo_continuous.py with its default flags on the MuJoCo tasks and keep the learning curves.

    python benchmarks/learning.py --seeds 1 2 3 --workers 2

Each run leaves benchmarks/results/mujoco/<script>__<task>__s<seed>.csv (step, mean return of the last 100 training
episodes; about 100 rows) and a row in index.csv beside it (command, hash of the script, final scores, seconds). A run
whose row is there is not done again (delete the row for that); a half-done one starts anew. Ends with the table of
means.
"""

import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "mujoco"
SCRIPT = "ppo_continuous"
TASKS = ("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "InvertedDoublePendulum-v5", "InvertedPendulum-v5", "Reacher-v5")
COLUMNS = ["task", "seed", "steps", "last100", "deterministic", "sampled", "seconds", "script_sha256", "command"]


@dataclass
class Args:
    tasks: tuple[str, ...] = TASKS  # Gymnasium ids
    seeds: tuple[int, ...] = (1, 2, 3)  # one run each
    workers: int = 2  # runs at a time, one thread each
    runs: Path = ROOT / "runs" / "learning"  # run folders, not kept in git


def index() -> list[dict[str, str]]:
    """Rows of index.csv."""
    path = RESULTS / "index.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def table(tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = (1, 2, 3)) -> str:
    """Markdown table of the means over seeds in index.csv, with the single values."""
    lines = ["| task | last 100 training episodes | deterministic evaluation |", "|---|---|---|"]
    for task in tasks:
        rows = [row for row in index() if row["task"] == task and int(row["seed"]) in seeds]
        if not rows:
            continue
        cells = []
        for column in ("last100", "deterministic"):
            values = [float(row[column]) for row in rows]
            digits = 0 if abs(statistics.mean(values)) >= 100 else 2
            cells.append(f"{statistics.mean(values):.{digits}f} ({', '.join(f'{v:.{digits}f}' for v in values)})")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def run(task: str, seed: int, folder: Path) -> dict[str, str]:
    """Train one run to its end; -> its row of index.csv. Raises RuntimeError with the last line of a failed run."""
    run_dir = folder / f"{SCRIPT}__{task}__s{seed}"
    shutil.rmtree(run_dir, ignore_errors=True)  # of a run that was killed
    command = ["python", f"{SCRIPT}.py", "--env-id", task, "--seed", str(seed)]
    line = [sys.executable, *command[1:], "--run-dir", str(run_dir)]
    done = subprocess.run(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{task} seed {seed} failed: {(done.stderr or done.stdout).splitlines()[-1]}")
    rows = list(csv.DictReader((run_dir / "progress.csv").open()))
    evaluation = json.loads((run_dir / "eval.json").read_text())
    every = max(1, len(rows) // 100)
    with (RESULTS / f"{run_dir.name}.csv").open("w") as file:
        file.write("step,episodic_return\n")
        file.writelines(
            f"{r['step']},{r['episodic_return']}\n" for r in rows[::-1][::every][::-1] if r["episodic_return"]
        )
    scores = {mode: f"{statistics.mean(returns):.2f}" for mode, returns in evaluation.items()}
    digest = json.loads((run_dir / "config.json").read_text())["script_sha256"][:16]
    last = {"steps": rows[-1]["step"], "last100": f"{float(rows[-1]['episodic_return']):.2f}"}
    return {"task": task, "seed": str(seed), **last, **scores, "seconds": rows[-1]["seconds"]} | {
        "script_sha256": digest,
        "command": " ".join(command),
    }


def main(args: Args) -> None:
    RESULTS.mkdir(parents=True, exist_ok=True)
    done = {(row["task"], row["seed"]) for row in index()}
    todo = [(t, s) for s in args.seeds for t in args.tasks if (t, str(s)) not in done]
    with ThreadPoolExecutor(args.workers) as pool:
        futures = [pool.submit(run, task, seed, args.runs) for task, seed in todo]
        for future in tqdm(futures, unit="run"):
            try:
                row = future.result()
            except RuntimeError as error:
                print(error, file=sys.stderr)
                continue
            new = not (RESULTS / "index.csv").exists()
            with (RESULTS / "index.csv").open("a") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writerows(([dict(zip(COLUMNS, COLUMNS, strict=True))] if new else []) + [row])
    print(table(args.tasks, args.seeds))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))

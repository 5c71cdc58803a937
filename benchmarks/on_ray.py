"""Runs of a suite as tasks of a Ray cluster: one task and one core a run.

Every node needs the packages of requirements.txt. It gets the code from the machine that this starts on, and what a run
leaves comes back to that machine, into the same run folder, CSV and index as without Ray.
"""

import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import ray
from tqdm import tqdm

from benchmarks.runner import (
    ROOT,
    BenchmarkError,
    Job,
    append,
    code_hash,
    commit,
    record,
    say_where,
    score,
    stop_on_signals,
)

LEFT_OUT = [".git", "runs", "tests", "benchmarks/results"]  # of what a node gets


def train(job: Job, at_commit: str) -> tuple[str, dict[str, bytes], dict[str, str], str]:
    """One run, on a node; -> why it failed or "", the files of its folder, its row of index.csv, its curve."""
    if code_hash(job.script) != job.code:
        return f"{job.script.name} has changed since this command began: run it again", {}, {}, ""
    with tempfile.TemporaryDirectory() as folder:  # another try may still be writing into its own
        command = [sys.executable, *shlex.split(job.command)[1:], "--run-dir", f"{folder}/run"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, **options)
        try:
            output, _ = process.communicate()
        finally:  # Ray raises KeyboardInterrupt to cancel
            process.kill()
        if process.returncode:
            last = [*output.strip().splitlines()[-4:], f"exit code {process.returncode}"]
            return " / ".join(last), {}, {}, ""
        files = {path.name: path.read_bytes() for path in Path(folder, "run").iterdir() if path.is_file()}
    keep(job, files)
    row = record(job, at_commit)
    return "", files, row, job.curve.read_text()


def keep(job: Job, files: dict[str, bytes]) -> None:
    """Write the files of a run into its folder."""
    job.folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (job.folder / name).write_bytes(content)


def run_on_ray(jobs: list[Job], address: str) -> int:
    """Train these jobs on the cluster at `address`; -> the exit code. Ctrl-C cancels what is not done.

    Runs of a lost node are tried again on another one, from their start.
    """
    code = {"working_dir": str(ROOT), "excludes": LEFT_OUT}
    try:
        ray.init(address, runtime_env=code, log_to_driver=False)
    except (ConnectionError, ValueError) as error:
        hint = "start one with `ray start --head`, and `ray start --address HOST:6379` on the other machines"
        raise BenchmarkError(f"--ray {address}: no cluster there ({str(error).splitlines()[0]}). {hint}") from error
    task = ray.remote(num_cpus=1, max_retries=-1)(train)
    at_commit, failed = commit(), 0
    with stop_on_signals() as stop, tqdm(total=len(jobs), unit="run", disable=None) as bar:
        running = {task.remote(job, at_commit): job for job in jobs}
        while running and not stop.is_set():
            finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0.5)
            for reference in finished:
                job = running.pop(reference)
                try:
                    why, files, row, curve = ray.get(reference)
                except ray.exceptions.RayError as error:
                    why = str(error).splitlines()[-1]
                if why:
                    failed += 1
                    job.error.parent.mkdir(parents=True, exist_ok=True)
                    job.error.write_text(f"{why}\n")
                    tqdm.write(f"failed: {job.command}\n  {why}")
                else:
                    job.error.unlink(missing_ok=True)
                    keep(job, files)
                    job.curve.parent.mkdir(parents=True, exist_ok=True)
                    job.curve.write_text(curve)
                    append(job.suite, row)
                    tqdm.write(f"done: {job.command}\n  {score(job)}")
                bar.update()
        for reference in running:
            ray.cancel(reference)
        if running:  # until the nodes have ended them
            ray.wait(list(running), num_returns=len(running), timeout=10)
    ray.shutdown()
    if jobs:
        say_where(jobs[0].suite)
    return 130 if stop.is_set() else 1 if failed else 0

"""Runs of a suite as tasks of a Ray cluster: one task and one core a run.

Every node needs the packages of requirements.txt. It gets the code from the machine that this starts on, and what a run
leaves comes back to that machine, into the same run folder, CSV and index as without Ray.
"""

import os
import signal
import socket
import subprocess
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


def train(job: Job, files: dict[str, bytes], at_commit: str) -> tuple[int, str, dict[str, bytes], dict[str, str], str]:
    """One run, on a node, from the files of its folder.

    -> exit code, last lines of its output, and of a finished run the files, the row of index.csv and the curve
    """
    if code_hash(job.script) != job.code:
        return 1, f"{job.script.name} has changed since this command began: run it again", {}, {}, ""
    with tempfile.TemporaryDirectory() as parent:  # another try may still be writing into its own
        folder = Path(parent, "run")
        if "checkpoint.pt" in files:
            keep(folder, files)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(job.argv(folder), cwd=ROOT, env=environment, **options)
        try:
            output, _ = process.communicate()
        finally:  # Ray raises KeyboardInterrupt to cancel
            process.kill()
        code = process.returncode
        if code != 0:
            return code, " / ".join([*output.strip().splitlines()[-4:], f"exit code {code}"]), {}, {}, ""
        files = read(folder)
    keep(job.folder, files)
    row = record(job, at_commit)
    return 0, "", files, row, job.curve.read_text()


def read(folder: Path) -> dict[str, bytes]:
    """The files of a run folder, by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def keep(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files of a run folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def check_address(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT, as Ray would try for minutes, and ValueError for an empty one."""
    if not address:
        raise ValueError("write auto or HOST:PORT")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def run_on_ray(jobs: list[Job], address: str) -> int:
    """Train these jobs on the cluster at `address`; -> the exit code. Ctrl-C cancels what is not done.

    Half-done runs go on from their checkpoint on this machine. Those of a lost node do so again on another one.
    """
    try:
        check_address(address)
        ray.init(address, runtime_env={"working_dir": str(ROOT), "excludes": LEFT_OUT}, log_to_driver=False)
    except (OSError, ValueError) as error:
        hint = "start one with `ray start --head`, and `ray start --address HOST:6379` on the other machines"
        raise BenchmarkError(f"--ray {address}: no cluster there ({str(error).splitlines()[0]}). {hint}") from error
    task = ray.remote(num_cpus=1, max_retries=-1)(train)
    at_commit, failed = commit(), 0
    with stop_on_signals() as stop, tqdm(total=len(jobs), unit="run", disable=None) as bar:
        running = {task.remote(job, read(job.folder), at_commit): job for job in jobs}
        while running and not stop.is_set():
            finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0.5)
            for reference in finished:
                job = running.pop(reference)
                try:
                    code, text, files, row, curve = ray.get(reference)
                except ray.exceptions.RayError as error:
                    code, text = 1, str(error).splitlines()[-1]
                job.error.unlink(missing_ok=True)
                if code == 0:
                    keep(job.folder, files)
                    job.curve.parent.mkdir(parents=True, exist_ok=True)
                    job.curve.write_text(curve)
                    append(job.suite, row)
                    tqdm.write(f"done: {job.command}\n  {score(job)}")
                else:
                    failed += 1
                    if code > 0:
                        job.error.parent.mkdir(parents=True, exist_ok=True)
                        job.error.write_text(f"{text}\n")
                    else:
                        text = f"killed by {signal.Signals(-code).name}; the same command tries again"
                    tqdm.write(f"failed: {job.command}\n  {text}")
                bar.update()
        if running:
            tqdm.write(f"stopping: {len(running)} runs are cancelled. What they have done is lost")
        for reference in running:
            ray.cancel(reference)
        if running:  # until the nodes have ended them
            ray.wait(list(running), num_returns=len(running), timeout=10)
    ray.shutdown()
    if jobs:
        say_where(jobs[0].suite)
    return 130 if stop.is_set() else 1 if failed else 0

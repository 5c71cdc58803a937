"""Runs of a suite as tasks of a Ray cluster, one core each.

Every node needs the packages of requirements.txt. It gets the code and the files of half-done runs
from the machine that starts this. What a run leaves comes back to that machine.
"""

import os
import signal
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

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
    score,
    stop_on_signals,
)

LEFT_OUT = [".git", "runs", "tests", "benchmarks/results"]  # of what a node gets


class Outcome(NamedTuple):
    """What comes back from a node."""

    code: int  # exit code of the run
    text: str = ""  # last lines of the output of a failed run
    files: dict[str, bytes] = {}  # the run folder of a finished run
    row: dict[str, str] = {}  # its row of index.csv
    curve: str = ""  # its learning curve


def run_on_ray(jobs: list[Job], address: str) -> int:
    """Train these jobs on the cluster at `address`. Returns the exit code.

    Half-done runs go on from their checkpoint on this machine. If a node is lost, its runs start
    from there again on another one. Ctrl-C cancels what is not done. Raises BenchmarkError if there
    is no cluster.
    """
    connect(address)
    task = ray.remote(num_cpus=1, max_retries=-1)(train)
    at_commit = commit()
    failed = False
    bar = tqdm(total=len(jobs), unit="run", disable=None)
    with stop_on_signals() as stop, bar:
        running = {task.remote(job, read(job.folder), at_commit): job for job in jobs}
        while running and not stop.is_set():
            finished, _ = ray.wait(list(running), num_returns=len(running), timeout=0.5)
            for reference in finished:
                job = running.pop(reference)
                try:
                    outcome = ray.get(reference)
                except ray.exceptions.RayError as error:
                    outcome = Outcome(1, str(error).splitlines()[-1])
                failed = failed or outcome.code != 0
                store(job, outcome)
                bar.update()
        if running:
            tqdm.write(f"stopping: {len(running)} runs are cancelled. What they have done is lost")
            for reference in running:
                ray.cancel(reference)
            ray.wait(list(running), num_returns=len(running), timeout=10)  # for the nodes to end
    ray.shutdown()
    if stop.is_set():
        return 130
    return 1 if failed else 0


def connect(address: str) -> None:
    """Connect to the cluster at `address`. Raises BenchmarkError."""
    try:
        check_address(address)
        environment = {"working_dir": str(ROOT), "excludes": LEFT_OUT}
        ray.init(address, runtime_env=environment, log_to_driver=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        hint = "`ray start --head`, and `ray start --address HOST:6379` on the other machines"
        raise BenchmarkError(
            f"--ray {address}: no cluster there ({reason}). Start one with {hint}"
        ) from error


def check_address(address: str) -> None:
    """Raise OSError if nothing answers at HOST:PORT, where Ray would try for minutes.

    Raises ValueError for an empty address.
    """
    if not address:
        raise ValueError("write auto or HOST:PORT")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def train(job: Job, files: dict[str, bytes], at_commit: str) -> Outcome:
    """Train one run on a node. `files` are those of its folder so far."""
    if code_hash(job.script) != job.code:
        text = f"{job.script.name} has changed since this command began: run it again"
        return Outcome(1, text)
    with (
        tempfile.TemporaryDirectory() as parent
    ):  # not job.folder, in which an earlier try may still write
        folder = Path(parent, "run")
        if "checkpoint.pt" in files:
            write(folder, files)
        process = subprocess.Popen(
            job.argv(folder),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            output, _ = process.communicate()
        finally:  # Ray raises KeyboardInterrupt to cancel
            process.kill()
        code = process.returncode
        if code != 0:
            lines = [*output.strip().splitlines()[-4:], f"exit code {code}"]
            return Outcome(code, " / ".join(lines))
        files = read(folder)
    write(job.folder, files)
    row = record(job, at_commit)
    return Outcome(0, "", files, row, job.curve.read_text())


def store(job: Job, outcome: Outcome) -> None:
    """Keep what came back from a node, and print how the run ended."""
    job.error.unlink(missing_ok=True)
    text = outcome.text
    if outcome.code == 0:
        write(job.folder, outcome.files)
        write(job.curve.parent, {job.curve.name: outcome.curve.encode()})
        append(job.suite, outcome.row)
        tqdm.write(f"done: {job.command}\n  {score(job)}")
        return
    if outcome.code > 0:
        write(job.error.parent, {job.error.name: f"{text}\n".encode()})
    else:
        name = signal.Signals(-outcome.code).name
        text = f"killed by {name}; the same command tries again"
    tqdm.write(f"failed: {job.command}\n  {text}")


def read(folder: Path) -> dict[str, bytes]:
    """Return the files of a run folder by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)

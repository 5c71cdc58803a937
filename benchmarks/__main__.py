"""Run the scripts on suites of tasks, and report.

python -m benchmarks run --suite mujoco --seeds 1-5 --workers 2
python -m benchmarks status --suite mujoco --seeds 1-5
python -m benchmarks report
"""

import shlex
import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.runner import (
    ROOT,
    BenchmarkError,
    Job,
    missing_package,
    progress,
    read_index,
    run_jobs,
    score,
    select,
    state,
)


@dataclass
class Choice:
    suite: str  # a name of benchmarks/suites.py
    seeds: str = "1-3"  # for example 1-5 or 1,3,7-9
    only: tuple[str, ...] = ()  # labels, such as ppo_continuous. None given: all of the suite
    tasks: tuple[str, ...] = ()  # Gymnasium ids. None given: all of the suite


@dataclass
class Run(Choice):
    """Train what is not done. The same command goes on after Ctrl-C, a crash or a kill."""

    workers: int = 2  # runs at a time, one thread each
    # send the runs to a Ray cluster: auto is the one of this machine, or give HOST:PORT
    ray: str | None = None
    retry: bool = False  # try failed runs again
    # print the commands of what is not done, for a scheduler. The same command without this flag
    # then records the runs
    dry_run: bool = False


@dataclass
class Status(Choice):
    """Print how far the runs of a suite are, and their scores."""


@dataclass
class Report:
    """Write the tables of the README files and the pictures, from the stored results."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def print_commands(jobs: list[Job], done: set[str]) -> None:
    """Print the command of each run that has not ended."""
    for job in jobs:
        if state(job, done) not in ("done", "to record"):
            _, *words = job.argv(job.folder.relative_to(ROOT))
            print(shlex.join(["python", *words]))


def print_status(jobs: list[Job], done: set[str]) -> None:
    """Print the state of each run, and how many are in each state."""
    states = {job: state(job, done) for job in jobs}
    for job, found in states.items():
        detail = ""
        if found == "done":
            detail = score(job)
        elif found == "half-done":
            detail = f"{progress(job):,} steps"
        elif found == "failed":
            detail = " / ".join(job.error.read_text().splitlines()[-2:])
        print(f"{found:10} {job.name:60} {detail}".rstrip())
    print(", ".join(f"{count} {found}" for found, count in Counter(states.values()).items()))


def report() -> None:
    """Draw the pictures and write the tables."""
    try:
        from benchmarks.pictures import draw_pictures
        from benchmarks.tables import write_tables
    except ModuleNotFoundError as error:
        raise missing_package(error.name) from error
    for path in [*draw_pictures(), *write_tables()]:
        print(path.relative_to(ROOT))


def main() -> int:
    """Returns the exit code."""
    command = tyro.cli(Command, description=__doc__)
    if isinstance(command, Report):
        report()
        return 0
    jobs = select(command.suite, command.seeds, command.only, command.tasks)
    done = {row["key"] for row in read_index(command.suite)}
    if isinstance(command, Status):
        print_status(jobs, done)
        return 0
    if command.dry_run:
        print_commands(jobs, done)
        return 0
    if command.workers < 1:
        raise BenchmarkError(f"--workers {command.workers}: one or more")
    return run_jobs(jobs, command.workers, command.retry, command.ray)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, OSError) as error:
        sys.exit(f"benchmarks: {error}")

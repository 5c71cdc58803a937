"""Run the scripts on suites of tasks, and report.

python -m benchmarks run --suite mujoco --seeds 1-5 --workers 2
python -m benchmarks status --suite mujoco --seeds 1-5
python -m benchmarks report
"""

import sys
from collections import Counter
from dataclasses import dataclass
from typing import Annotated

import tyro

from benchmarks.runner import (
    ROOT,
    BenchmarkError,
    progress,
    read_index,
    run_jobs,
    score,
    select,
    state,
)


@dataclass
class Run:
    """Train what is not done yet; the same command goes on after a Ctrl-C, a crash or a kill."""

    suite: str  # a name of benchmarks/suites.py
    seeds: str = "1-3"  # for example 1-5 or 1,3,7-9
    only: tuple[str, ...] = ()  # labels, for example ppo_continuous; default all of the suite
    tasks: tuple[str, ...] = ()  # Gymnasium ids; default all of the suite
    workers: int = 2  # runs at a time, one thread each
    ray: str | None = None  # send the runs to a Ray cluster instead: auto (the one of this machine) or its address
    retry: bool = False  # try failed runs again
    dry_run: bool = False  # print one command line a run; once they are done, the same without this flag records them


@dataclass
class Status:
    """How far the runs of a suite are."""

    suite: str  # a name of benchmarks/suites.py
    seeds: str = "1-3"  # for example 1-5 or 1,3,7-9
    only: tuple[str, ...] = ()  # labels; default all of the suite
    tasks: tuple[str, ...] = ()  # Gymnasium ids; default all of the suite


@dataclass
class Report:
    """Write tables into the README files and pictures into benchmarks/results, from the stored results."""


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Status, tyro.conf.subcommand("status")]
    | Annotated[Report, tyro.conf.subcommand("report")]
)


def main() -> int:
    command = tyro.cli(Command, description=__doc__)
    if isinstance(command, Report):
        try:
            from benchmarks.report import write_report
        except ModuleNotFoundError as error:
            raise BenchmarkError(f"{error.name} is missing: pip install -r benchmarks/requirements.txt") from error
        for path in write_report():
            print(path.relative_to(ROOT))
        return 0
    jobs = select(command.suite, command.seeds, command.only, command.tasks)
    if isinstance(command, Run):
        if command.workers < 1:
            raise BenchmarkError(f"--workers {command.workers}: one or more")
        if command.dry_run:
            print("\n".join(f"{job.command} --run-dir {job.folder.relative_to(ROOT)}" for job in jobs))
            return 0
        return run_jobs(jobs, command.workers, command.retry, command.ray)
    done = {row["key"] for row in read_index(command.suite)}
    states = {job: state(job, done) for job in jobs}
    for job, what in states.items():
        detail = f"{progress(job):,} steps" if what == "half-done" else score(job) if what == "done" else ""
        if what == "failed":
            detail = " / ".join(job.error.read_text().splitlines()[-2:])
        print(f"{what:10} {job.name:60} {detail}".rstrip())
    print(", ".join(f"{count} {what}" for what, count in Counter(states.values()).items()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (BenchmarkError, OSError) as error:
        sys.exit(f"benchmarks: {error}")

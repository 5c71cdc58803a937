"""Runs of a suite: which are done, half-done, failed; and doing them, some at a time, each in a process of its own."""

import ast
import csv
import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from tqdm import tqdm

from benchmarks.suites import SUITES, Entry

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PEERS = ("sb3_ppo", "sb3_trpo")
POINTS = 100  # of a learning curve
INDEX_LOCK = threading.Lock()
COLUMNS = (
    *("key", "label", "script", "task", "seed", "steps", "last100", "deterministic", "deterministic_std", "sampled"),
    *("sampled_std", "eval_episodes", "seconds", "code", "command", "commit", "versions", "hardware", "date"),
)


class BenchmarkError(Exception):
    """Bad input or a missing piece; the message is one line that says what to change."""


def code_hash(path: Path) -> str:
    """Hash of a script's syntax tree without docstrings: comments and layout may change, nothing else."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:]

    def plain(x: object) -> object:  # not ast.dump, which differs between versions of Python
        if isinstance(x, ast.AST):
            return type(x).__name__, [(name, plain(y)) for name, y in ast.iter_fields(x) if y not in (None, [])]
        return [plain(y) for y in x] if isinstance(x, list) else x

    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()[:16]


def script_path(name: str) -> Path:
    """The file that trains, of a script or a peer."""
    return ROOT / ("benchmarks/peers.py" if name in PEERS else f"{name}.py")


def commit() -> str:
    """The commit of the working tree, or nothing where git can't tell."""
    try:
        command = ["git", "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


@dataclass(frozen=True)
class Job:
    """One run: an entry of a suite with a seed, and the code of its script."""

    suite: str
    entry: Entry
    seed: int
    code: str  # code_hash of the script

    @property
    def script(self) -> Path:
        return script_path(self.entry.script)

    @property
    def command(self) -> str:
        """What to type in the repository's root, but for --run-dir."""
        peer = f" --peer {self.entry.script}" if self.entry.script in PEERS else ""
        start = f"python {self.script.relative_to(ROOT)}{peer} --env-id {self.entry.task} --seed {self.seed}"
        return " ".join(f"{start} {self.entry.flags}".split())

    @property
    def key(self) -> str:
        """Names the run: the same script with the same command gives the same. In `tuning` the command is enough."""
        code = "" if self.suite == "tuning" else self.code
        return hashlib.sha256(f"{code} {self.command}".encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return f"{self.entry.label}__{Path(self.entry.task).name.replace(':', '-')}__s{self.seed}"

    @property
    def folder(self) -> Path:
        """Its run folder, not kept in git."""
        return ROOT / "runs" / "benchmarks" / self.suite / f"{self.name}__{self.key}"

    @property
    def error(self) -> Path:
        """The output of a run that failed by itself."""
        return self.folder.with_suffix(".error")

    @property
    def log(self) -> Path:
        """The output of the run."""
        return self.folder.with_suffix(".log")

    @property
    def curve(self) -> Path:
        return RESULTS / self.suite / f"{self.name}.csv"

    def argv(self, folder: Path) -> list[str]:
        """The command with this Python: from the start, or from the checkpoint that an earlier one left in `folder`."""
        command, checkpoint = shlex.split(self.command), folder / "checkpoint.pt"
        if checkpoint.exists():
            return [sys.executable, command[1], "--resume", str(checkpoint)]
        return [sys.executable, *command[1:], "--run-dir", str(folder)]


def read_index(suite: str) -> list[dict[str, str]]:
    """Rows of a suite's index.csv, those of finished runs."""
    path = RESULTS / suite / "index.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def score(job: Job) -> str:
    """The scores of a finished run, in words."""
    row = next(row for row in read_index(job.suite) if row["key"] == job.key)
    mean = f", {row['deterministic']} with mean actions" if row["deterministic"] else ""
    return f"{row['last100'] or 'no episode'} in training{mean}"


def state(job: Job, done: set[str]) -> str:
    """done, to record (finished, but not by this harness), failed, half-done or to do."""
    if job.key in done:
        return "done"
    if (job.folder / "eval.json").exists():
        return "to record"
    return "failed" if job.error.exists() else "half-done" if (job.folder / "checkpoint.pt").exists() else "to do"


def parse_seeds(text: str) -> list[int]:
    """'1-3,7' -> [1, 2, 3, 7]. Raises BenchmarkError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise BenchmarkError(f"--seeds {text}: write for example 1-5 or 1,3,7-9")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    return list(dict.fromkeys(seeds))


def select(suite: str, seeds: str, only: tuple[str, ...] = (), tasks: tuple[str, ...] = ()) -> list[Job]:
    """Jobs of a suite, all tasks of the first seed first. Raises BenchmarkError for names that are not there."""
    if suite not in SUITES:
        raise BenchmarkError(f"--suite {suite}: choose from {', '.join(SUITES)}")
    for flag, names, known in (
        ("only", only, {e.label for e in SUITES[suite]}),
        ("tasks", tasks, {e.task for e in SUITES[suite]}),
    ):
        if unknown := set(names) - known:
            raise BenchmarkError(f"--{flag} {' '.join(sorted(unknown))}: {suite} has {', '.join(sorted(known))}")
    entries = [e for e in SUITES[suite] if (not only or e.label in only) and (not tasks or e.task in tasks)]
    if not entries:
        raise BenchmarkError(f"--suite {suite} has no {' '.join(only)} on {' '.join(tasks)}")
    code = {entry.script: code_hash(script_path(entry.script)) for entry in entries}
    return [Job(suite, entry, seed, code[entry.script]) for seed in parse_seeds(seeds) for entry in entries]


def last_row(path: Path) -> list[str]:
    """The last whole row of a CSV file that is being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")[:-1]  # what follows the last newline is not whole
    return lines[-1].split(",") if lines else []


def progress(job: Job) -> int:
    """Steps that a run has done so far."""
    path = job.folder / "progress.csv"
    row = last_row(path) if path.exists() else []
    return int(row[0]) if row and row[0].isdigit() else 0


def budget(job: Job) -> int:
    """Steps that a run is to do, for the estimate of the time left."""
    flags = job.entry.flags.replace("_", "").split()
    if "--total-timesteps" in flags:
        return int(flags[flags.index("--total-timesteps") + 1])
    match = re.search(r"total_timesteps: int(?: \| float)? = ([\d_]+)", job.script.read_text())
    return int(match[1])


def write_curve(job: Job, rows: list[dict[str, str]]) -> None:
    """POINTS rows on a grid of steps: mean return of the last 100 training episodes, seconds, largest KL since.

    The KL is that of a whole iteration where the script measures it, else that of the update.
    """
    total, point, largest = int(rows[-1]["step"]), 1, 0.0
    kl = "kl_iteration" if "kl_iteration" in rows[0] else "approx_kl"
    lines = [f"step,episodic_return,seconds,largest_{kl}"]
    for row in rows:
        largest = max(largest, float(row.get(kl) or 0))
        if int(row["step"]) >= point * total / POINTS:
            lines.append(f"{row['step']},{row['episodic_return']},{row['seconds']},{largest:.5g}")
            point, largest = int(int(row["step"]) * POINTS / total) + 1, 0.0
    job.curve.parent.mkdir(parents=True, exist_ok=True)
    job.curve.write_text("\n".join(lines) + "\n")


def hardware() -> str:
    """Processor and number of cores."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        models = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        name = models[0] if models else name
    return f"{name}, {os.cpu_count()} cores".replace(",", "")


def record(job: Job, at_commit: str) -> dict[str, str]:
    """Write the curve of a finished run; -> its row of index.csv."""
    rows = list(csv.DictReader((job.folder / "progress.csv").open()))
    write_curve(job, rows)
    scores = {"eval_episodes": "0"}
    if (job.folder / "eval.json").exists():
        evaluation = json.loads((job.folder / "eval.json").read_text())
        for mode, returns in evaluation.items():
            scores |= {mode: f"{statistics.mean(returns):.2f}", f"{mode}_std": f"{statistics.pstdev(returns):.2f}"}
            scores["eval_episodes"] = str(len(returns))
    packages = ("torch", "gymnasium", "ale-py" if job.entry.task.startswith("ALE/") else "mujoco")
    packages += ("stable-baselines3", "sb3-contrib") if job.entry.script in PEERS else ()
    last100 = f"{float(rows[-1]['episodic_return']):.2f}" if rows[-1]["episodic_return"] else ""
    return {
        **{"key": job.key, "label": job.entry.label, "script": job.entry.script, "task": job.entry.task},
        **{"seed": str(job.seed), "steps": rows[-1]["step"], "last100": last100, **scores},
        **{"seconds": rows[-1]["seconds"], "code": job.code, "command": job.command},
        **{"commit": at_commit, "versions": " ".join(f"{p}=={version(p)}" for p in packages)},
        **{"hardware": hardware(), "date": time.strftime("%Y-%m-%d")},
    }


def append(suite: str, row: dict[str, str]) -> None:
    """Add a row to a suite's index.csv; a run of the same label, task and seed with another key gives way to it."""
    same = ("label", "task", "seed")
    rows = [r for r in read_index(suite) if any(r[name] != row[name] for name in same)] + [row]
    path = RESULTS / suite / "index.csv"
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(temporary, path)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    previous = {s: signal.signal(s, lambda *_: stop.set()) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for s, handler in previous.items():
            signal.signal(s, handler)


@contextmanager
def locked(suite: str) -> Iterator[int]:
    """Yield a file descriptor that holds the suite's lock, for runs to inherit, which may outlive a kill."""
    path = ROOT / "runs" / "benchmarks" / f"{suite}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            hint = "wait for it, or end it and what it started"
            raise BenchmarkError(f"--suite {suite}: runs of it are going on already; {hint} (fuser {path})") from error
        yield file.fileno()


def train(job: Job, stop: threading.Event, running: dict[Job, subprocess.Popen], lock: int) -> str | None:
    """One run to its end, in a process of its own with one thread of PyTorch's; -> why it failed, if it did."""
    if stop.is_set():
        return None
    if code_hash(job.script) != job.code:
        return f"{job.script.name} has changed since this command began: run it again"
    at_commit, code = commit(), 0
    if not (job.folder / "eval.json").exists():  # else it finished without this harness
        job.folder.parent.mkdir(parents=True, exist_ok=True)
        if job.folder.exists() and not (job.folder / "checkpoint.pt").exists():  # killed before its first checkpoint
            shutil.rmtree(job.folder)
        job.error.unlink(missing_ok=True)
        with job.log.open("w") as file:
            running[job] = subprocess.Popen(
                job.argv(job.folder), cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"OMP_NUM_THREADS": "1"},
                pass_fds=[lock], start_new_session=True,  # a Ctrl-C reaches it through the loop of `run_jobs` alone
            )  # fmt: skip
            code = running[job].wait()
        del running[job]
    if code == 0:
        with INDEX_LOCK:
            append(job.suite, record(job, at_commit))
    if code == 0 or stop.is_set():
        return None
    if code < 0:
        return f"killed by signal {-code}; the same command goes on from its checkpoint, if there is one"
    text = [*job.log.read_text().strip().splitlines(), f"exit code {code}"]
    job.error.write_text("\n".join(text) + "\n")
    return f"{' / '.join(text[-4:])}\n  all of its output: {job.log.relative_to(ROOT)}"


def say_where(suite: str) -> None:
    """Say where results lie, if there are any."""
    if read_index(suite):
        print(f"results: {(RESULTS / suite).relative_to(ROOT)}/index.csv, tables: python -m benchmarks report")


def run_jobs(jobs: list[Job], workers: int, retry: bool, ray: str | None = None) -> int:
    """Train what is not done of a suite, `workers` at a time or on the cluster `ray`; -> the exit code.

    Ctrl-C stops cleanly.
    """
    if any(job.entry.script in PEERS for job in jobs) and not find_spec("stable_baselines3"):
        raise BenchmarkError("stable_baselines3 is missing: pip install -r benchmarks/requirements.txt")
    done = {row["key"] for row in read_index(jobs[0].suite)}
    states = {job: state(job, done) for job in jobs}
    todo = [job for job, what in states.items() if what != "done" and (retry or what != "failed")]
    skipped = [job for job, what in states.items() if what == "failed" and not retry]
    print(f"{len(jobs)} runs: {len(jobs) - len(todo) - len(skipped)} done, {len(todo)} to do", end="")
    print(f", {len(skipped)} failed before (--retry tries them again)" if skipped else "")
    if ray is not None:
        if not find_spec("ray"):
            raise BenchmarkError("ray is missing: pip install -r benchmarks/requirements.txt")
        from benchmarks.on_ray import run_on_ray

        with locked(jobs[0].suite):
            for job in [job for job in todo if states[job] == "to record"]:
                append(job.suite, record(job, commit()))
                todo.remove(job)
            return run_on_ray(todo, ray)
    running, failed, finished = {}, 0, 0
    with (
        locked(jobs[0].suite) as lock,
        stop_on_signals() as stop,
        ThreadPoolExecutor(workers) as pool,
        tqdm(
            total=sum(map(budget, todo)), initial=sum(map(progress, todo)), unit="step", unit_scale=True, disable=None
        ) as bar,
    ):
        futures = {pool.submit(train, job, stop, running, lock): job for job in todo}
        told = False
        try:
            while futures:
                time.sleep(0.5)
                if stop.is_set() and not told:
                    told = True
                    tqdm.write("stopping after this iteration of each run; the same command goes on from there")
                    for process in list(running.values()):
                        process.send_signal(signal.SIGINT)
                for future in [f for f in futures if f.done()]:
                    job = futures.pop(future)
                    if why := future.result():
                        failed += 1
                        tqdm.write(f"failed: {job.command}\n  {why}")
                    elif not stop.is_set():
                        tqdm.write(f"done: {job.command}\n  {score(job)}")
                    finished += budget(job)
                bar.n = finished + sum(progress(job) for job in futures.values())
                bar.set_postfix(running=len(running), left=len(futures), refresh=True)
        finally:  # where an error ends it, too
            stop.set()
            for process in list(running.values()):
                process.send_signal(signal.SIGINT)
    say_where(jobs[0].suite)
    return 130 if told else 1 if failed else 0

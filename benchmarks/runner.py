"""The runs of a suite: what is done and what is not, and the training of the rest.

Each run is a process of its own. It leaves a run folder, a learning curve and a row of index.csv.
"""

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
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
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


class BenchmarkError(Exception):
    """Bad input or a missing package. The message is one line that says what to change."""


# ---- Jobs ----------------------------------------------------------------------------------------


def code_hash(path: Path) -> str:
    """Return a hash of a script's syntax tree. Comments, docstrings and layout do not count."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            node.body = node.body[1:]
    return hashlib.sha256(repr(plain(tree)).encode()).hexdigest()[:16]


def plain(node: object) -> object:
    """Return a syntax tree as lists and tuples. ast.dump differs between versions of Python."""
    if isinstance(node, ast.AST):
        fields = [(name, plain(x)) for name, x in ast.iter_fields(node) if x not in (None, [])]
        return type(node).__name__, fields
    if isinstance(node, list):
        return [plain(x) for x in node]
    return node


def script_path(name: str) -> Path:
    """Return the file that trains a script or a peer."""
    return ROOT / ("benchmarks/peers.py" if name in PEERS else f"{name}.py")


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
        """What to type in the repository's root, without --run-dir."""
        words = ["python", str(self.script.relative_to(ROOT))]
        if self.entry.script in PEERS:
            words += ["--peer", self.entry.script]
        words += ["--env-id", self.entry.task, "--seed", str(self.seed), *self.entry.flags.split()]
        return " ".join(words)

    @property
    def key(self) -> str:
        """The name of the run in index.csv. It changes with the command and with the code.

        In the suite `tuning` it changes with the command alone.
        """
        code = "" if self.suite == "tuning" else self.code
        return hashlib.sha256(f"{code} {self.command}".encode()).hexdigest()[:16]

    @property
    def name(self) -> str:
        return run_name(self.entry.label, self.entry.task, self.seed)

    @property
    def folder(self) -> Path:
        """Its run folder, which is not in git."""
        return ROOT / "runs" / "benchmarks" / self.suite / f"{self.name}__{self.key}"

    @property
    def log(self) -> Path:
        """The output of the run."""
        return self.folder.with_suffix(".log")

    @property
    def error(self) -> Path:
        """The output of a run that failed by itself, or its last lines."""
        return self.folder.with_suffix(".error")

    @property
    def curve(self) -> Path:
        return RESULTS / self.suite / f"{self.name}.csv"

    def argv(self, folder: Path) -> list[str]:
        """Return the command that trains into `folder`, or resumes from its checkpoint.

        A relative folder is one in the repository.
        """
        words = shlex.split(self.command)
        checkpoint = folder / "checkpoint.pt"
        if (ROOT / checkpoint).exists():
            return [sys.executable, words[1], "--resume", str(checkpoint)]
        return [sys.executable, *words[1:], "--run-dir", str(folder)]


def run_name(label: str, task: str, seed: int | str) -> str:
    """Return the name of the files of a run."""
    return f"{label}__{Path(task).name.replace(':', '-')}__s{seed}"


def parse_seeds(text: str) -> list[int]:
    """Return [1, 2, 3, 7] for '1-3,7'. Raises BenchmarkError."""
    seeds = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        numbers = range(int(match[1]), int(match[2] or match[1]) + 1) if match else []
        if len(numbers) == 0:
            raise BenchmarkError(f"--seeds {text}: write for example 1-5 or 1,3,7-9")
        seeds += numbers
    return list(dict.fromkeys(seeds))


def select(
    suite: str, seeds: str, only: tuple[str, ...] = (), tasks: tuple[str, ...] = ()
) -> list[Job]:
    """Return the jobs of a suite, those of the first seed first. Raises BenchmarkError."""
    if suite not in SUITES:
        raise BenchmarkError(f"--suite {suite}: choose from {', '.join(SUITES)}")
    check_names("only", only, {entry.label for entry in SUITES[suite]}, suite)
    check_names("tasks", tasks, {entry.task for entry in SUITES[suite]}, suite)
    entries = []
    for entry in SUITES[suite]:
        if (not only or entry.label in only) and (not tasks or entry.task in tasks):
            entries.append(entry)
    if not entries:
        raise BenchmarkError(f"--suite {suite} has no {' '.join(only)} on {' '.join(tasks)}")
    codes = {entry.script: code_hash(script_path(entry.script)) for entry in entries}
    return [
        Job(suite, entry, seed, codes[entry.script])
        for seed in parse_seeds(seeds)
        for entry in entries
    ]


def check_names(flag: str, names: tuple[str, ...], known: set[str], suite: str) -> None:
    """Raise BenchmarkError for a name that the suite does not have."""
    unknown = sorted(set(names) - known)
    if unknown:
        has = ", ".join(sorted(known))
        raise BenchmarkError(f"--{flag} {' '.join(unknown)}: {suite} has {has}")


# ---- State of a run ------------------------------------------------------------------------------


def state(job: Job, done: set[str]) -> str:
    """Return done, to record, failed, half-done or to do. `done` holds the keys of index.csv.

    A run to record has finished, but not under this harness.
    """
    if job.key in done:
        return "done"
    if (job.folder / "eval.json").exists() and (job.folder / "progress.csv").exists():
        return "to record"
    if job.error.exists():
        return "failed"
    if (job.folder / "checkpoint.pt").exists():
        return "half-done"
    return "to do"


def progress(job: Job) -> int:
    """Return the steps that a run has done so far."""
    path = job.folder / "progress.csv"
    row = last_row(path) if path.exists() else []
    return int(row[0]) if row and row[0].isdigit() else 0  # the first row is the header


def last_row(path: Path) -> list[str]:
    """Return the last whole row of a CSV file that is being written."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    whole = lines[:-1]  # what follows the last newline is not a whole row
    return whole[-1].split(",") if whole else []


def budget(job: Job) -> int:
    """Return the steps that a run is to do, for the estimate of the time left."""
    flags = job.entry.flags.replace("_", "").split()
    if "--total-timesteps" in flags:
        return int(flags[flags.index("--total-timesteps") + 1])
    match = re.search(r"total_timesteps: int(?: \| float)? = ([\d_]+)", job.script.read_text())
    return int(match[1])


def score(job: Job) -> str:
    """Return the scores of a finished run in words."""
    row = next(row for row in read_index(job.suite) if row["key"] == job.key)
    text = f"{row['last100'] or 'no episode'} in training"
    if row["deterministic"]:
        text += f", {row['deterministic']} with mean actions"
    return text


# ---- Results -------------------------------------------------------------------------------------


def read_index(suite: str) -> list[dict[str, str]]:
    """Return the rows of a suite's index.csv, one for each finished run."""
    path = RESULTS / suite / "index.csv"
    return list(csv.DictReader(path.open())) if path.exists() else []


def append(suite: str, row: dict[str, str]) -> None:
    """Add a row to index.csv. It replaces another one of the same label, task and seed."""
    same = ("label", "task", "seed")
    with INDEX_LOCK:
        rows = [old for old in read_index(suite) if any(old[name] != row[name] for name in same)]
        rows.append(row)
        path = RESULTS / suite / "index.csv"
        temporary = path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, path)


def record(job: Job, at_commit: str) -> dict[str, str]:
    """Write the learning curve of a finished run. Returns its row of index.csv."""
    rows = list(csv.DictReader((job.folder / "progress.csv").open()))
    write_curve(job, rows)
    last = rows[-1]
    evaluation = {}
    if (job.folder / "eval.json").exists():
        evaluation = json.loads((job.folder / "eval.json").read_text())
    deterministic = evaluation.get("deterministic", [])
    sampled = evaluation.get("sampled", [])
    return {
        "key": job.key,
        "label": job.entry.label,
        "script": job.entry.script,
        "task": job.entry.task,
        "seed": str(job.seed),
        "steps": last["step"],
        "last100": f"{float(last['episodic_return']):.2f}" if last["episodic_return"] else "",
        "deterministic": f"{statistics.mean(deterministic):.2f}" if deterministic else "",
        "deterministic_std": f"{statistics.pstdev(deterministic):.2f}" if deterministic else "",
        "sampled": f"{statistics.mean(sampled):.2f}" if sampled else "",
        "sampled_std": f"{statistics.pstdev(sampled):.2f}" if sampled else "",
        "eval_episodes": str(len(deterministic)),
        "seconds": last["seconds"],
        "code": job.code,
        "command": job.command,
        "commit": at_commit,
        "versions": versions(job),
        "hardware": hardware(),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_curve(job: Job, rows: list[dict[str, str]]) -> None:
    """Write POINTS rows: step, mean return of 100 training episodes, seconds, largest KL.

    `rows` are those of progress.csv. The KL is the largest one since the row before: that of a
    whole iteration where the script measures it, and that of the update otherwise.
    """
    total = int(rows[-1]["step"])
    kl = "kl_iteration" if "kl_iteration" in rows[0] else "approx_kl"
    lines = [f"step,episodic_return,seconds,largest_{kl}"]
    point = 1  # the next of the points
    largest = 0.0
    for row in rows:
        step = int(row["step"])
        largest = max(largest, float(row.get(kl) or 0))
        if step >= point * total / POINTS:
            lines.append(f"{step},{row['episodic_return']},{row['seconds']},{largest:.5g}")
            point = step * POINTS // total + 1
            largest = 0.0
    job.curve.parent.mkdir(parents=True, exist_ok=True)
    job.curve.write_text("\n".join(lines) + "\n")


def versions(job: Job) -> str:
    """Return the versions of the packages that a score depends on."""
    names = ["torch", "gymnasium", "ale-py" if job.entry.task.startswith("ALE/") else "mujoco"]
    if job.entry.script in PEERS:
        names += ["stable-baselines3", "sb3-contrib"]
    return " ".join(f"{name}=={version(name)}" for name in names)


def hardware() -> str:
    """Return the processor and the number of cores."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text())
        name = models[0].replace(",", "") if models else name
    return f"{name} {os.cpu_count()} cores"


def commit() -> str:
    """Return the commit of the working tree, or nothing where git can't tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


# ---- Training ------------------------------------------------------------------------------------


def run_jobs(jobs: list[Job], workers: int, retry: bool, ray: str | None = None) -> int:
    """Train what is not done of a suite, here or on the cluster `ray`. Returns the exit code.

    `workers` runs train at a time. With `retry` those that failed before do so again. Ctrl-C stops
    cleanly.
    """
    suite = jobs[0].suite
    if any(job.entry.script in PEERS for job in jobs) and not find_spec("stable_baselines3"):
        raise missing_package("stable_baselines3")
    if ray is not None and not find_spec("ray"):
        raise missing_package("ray")
    with locked(suite) as lock:
        done = {row["key"] for row in read_index(suite)}
        states = {job: state(job, done) for job in jobs}
        skipped = {"done"} if retry else {"done", "failed"}
        todo = [job for job in jobs if states[job] not in skipped]
        counts = f"{len(done & {job.key for job in jobs})} done, {len(todo)} to do"
        if not retry and "failed" in states.values():
            failed = list(states.values()).count("failed")
            counts += f", {failed} failed before (--retry tries them again)"
        print(f"{len(jobs)} runs: {counts}", flush=True)
        for job in list(todo):
            if states[job] == "to record":
                row = record(job, "")
                row |= {"versions": "", "hardware": ""}  # it may have run on another machine
                append(suite, row)
                todo.remove(job)
                print(f"done: {job.command}\n  {score(job)}")
        if ray is None:
            code = run_here(todo, workers, lock)
        else:
            from benchmarks.on_ray import run_on_ray

            code = run_on_ray(todo, ray)
    if read_index(suite):
        index = (RESULTS / suite / "index.csv").relative_to(ROOT)
        print(f"results: {index}, tables: python -m benchmarks report")
    return code


def missing_package(package: str) -> BenchmarkError:
    """Return the error for a package of benchmarks/requirements.txt."""
    return BenchmarkError(f"{package} is missing: pip install -r benchmarks/requirements.txt")


def run_here(jobs: list[Job], workers: int, lock: int) -> int:
    """Train these jobs, `workers` at a time. Returns the exit code."""
    running = {}
    finished = 0  # steps of the runs that have ended
    failed = False
    stopping = False
    bar = tqdm(
        total=sum(budget(job) for job in jobs),
        initial=sum(progress(job) for job in jobs),
        unit="step",
        unit_scale=True,
        disable=None,  # where there is no terminal
    )
    with stop_on_signals() as stop, ThreadPoolExecutor(workers) as pool, bar:
        waiting = {pool.submit(train, job, stop, running, lock): job for job in jobs}
        try:
            while waiting:
                ended, _ = wait(waiting, timeout=0.5, return_when=FIRST_COMPLETED)
                if stop.is_set() and not stopping:
                    stopping = True
                    hint = "the same command goes on from there"
                    tqdm.write(f"stopping after this iteration of each run; {hint}")
                    interrupt(running)
                for future in ended:
                    job = waiting.pop(future)
                    finished += progress(job) if stopping else budget(job)
                    reason = future.result()
                    if reason is not None:
                        failed = True
                        tqdm.write(f"failed: {job.command}\n  {reason}")
                    elif not stop.is_set():
                        tqdm.write(f"done: {job.command}\n  {score(job)}")
                bar.n = finished + sum(progress(job) for job in waiting.values())
                bar.set_postfix(running=len(running), left=len(waiting), refresh=True)
        finally:  # also after an error
            stop.set()
            interrupt(running)
    if stopping:
        return 130
    return 1 if failed else 0


def train(
    job: Job, stop: threading.Event, running: dict[Job, subprocess.Popen], lock: int
) -> str | None:
    """Train one run to its end, with one thread of PyTorch. Returns why it failed, if it did.

    `running` shows the caller its process. `lock` is the file descriptor of the suite's lock.
    """
    if stop.is_set():
        return None
    if code_hash(job.script) != job.code:
        return f"{job.script.name} has changed since this command began: run it again"
    at_commit = commit()
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    if job.folder.exists() and not (job.folder / "checkpoint.pt").exists():
        shutil.rmtree(job.folder)  # killed before its first checkpoint
    job.error.unlink(missing_ok=True)
    with job.log.open("w") as output:
        process = subprocess.Popen(
            job.argv(job.folder),
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=output,
            stderr=output,
            pass_fds=[lock],
            start_new_session=True,  # a Ctrl-C reaches it through `interrupt` alone
        )
        running[job] = process
        if stop.is_set():  # since the test above
            process.send_signal(signal.SIGINT)
        code = process.wait()
        del running[job]
    if code == 0:
        append(job.suite, record(job, at_commit))
    if code == 0 or stop.is_set():
        return None
    if code < 0:
        hint = "the same command goes on from its checkpoint, if there is one"
        return f"killed by signal {-code}; {hint}"
    lines = [*job.log.read_text().strip().splitlines(), f"exit code {code}"]
    job.error.write_text("\n".join(lines) + "\n")
    return f"{' / '.join(lines[-4:])}\n  all of its output: {job.log.relative_to(ROOT)}"


def interrupt(running: dict[Job, subprocess.Popen]) -> None:
    """Ask the runs to save a checkpoint and end."""
    for process in list(running.values()):
        process.send_signal(signal.SIGINT)


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set."""
    stop = threading.Event()
    signals = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, lambda *_: stop.set()) for number in signals]
    try:
        yield stop
    finally:
        for number, handler in zip(signals, previous, strict=True):
            signal.signal(number, handler)


@contextmanager
def locked(suite: str) -> Iterator[int]:
    """Hold the lock of a suite. Yields its file descriptor.

    Runs inherit the descriptor, as they may outlive this process.
    """
    path = ROOT / "runs" / "benchmarks" / f"{suite}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            hint = "wait for it, or end it and what it started"
            raise BenchmarkError(
                f"--suite {suite}: runs of it are going on already; {hint} (fuser {path})"
            ) from error
        yield file.fileno()

"""The harness: what it runs, how it goes on, and that the tables readers see are those that the stored results make."""

import csv
import json
import shutil
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import runner, speed
from benchmarks.runner import BenchmarkError, Job
from benchmarks.suites import SUITES, Entry

ROOT = Path(__file__).parents[1]


def harness(*args, folder=ROOT):
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


@pytest.fixture
def copy(tmp_path):
    """The repository without its results."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    shutil.copytree(
        ROOT / "benchmarks", tmp_path / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__")
    )
    return tmp_path


# ---- Jobs ------------------------------------------------------------------------------------------------------------


def test_seeds():
    assert runner.parse_seeds("1-3,7") == [1, 2, 3, 7]
    for text in ("", "a", "3-1", "1-", "1,,2", "-1"):
        with pytest.raises(BenchmarkError, match="--seeds"):
            runner.parse_seeds(text)


def test_every_entry_is_a_command_that_its_script_understands():
    import importlib

    import tyro

    for suite, entries in SUITES.items():
        assert len({(e.label, e.task) for e in entries}) == len(entries)  # names of files
        for entry in entries:
            job = Job(suite, entry, 1)
            python, script, *flags = job.command.split()
            assert python == "python" and (ROOT / script).exists()
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            args = tyro.cli(module.Args, args=[*flags, "--run-dir", "x"])
            assert (args.env_id, args.seed) == (entry.task, 1)
            assert runner.budget(job) == args.total_timesteps


def test_the_key_depends_on_code_and_command_not_on_comments(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    script, keys = tmp_path / "ppo_continuous.py", []
    for text in ('"""A."""\nx = 1\n', '"""B."""\n# c\nx  = 1\n', '"""A."""\nx = 2\n'):
        script.write_text(text)
        runner.code_hash.cache_clear()
        keys.append(Job("mujoco", Entry("ppo_continuous", "Hopper-v5"), 1).key)
    assert keys[0] == keys[1] != keys[2]
    assert Job("mujoco", Entry("ppo_continuous", "Hopper-v5", "--gamma 0.9"), 1).key != keys[2]
    runner.code_hash.cache_clear()


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "--suite", "nosuch"], "choose from smoke"),
        (["run", "--suite", "smoke", "--seeds", "x"], "--seeds x: write"),
        (["status", "--suite", "smoke", "--tasks", "Nosuch-v5"], "--tasks Nosuch-v5: smoke has ALE/Pong-v5"),
        (["run", "--suite", "smoke", "--only", "dqn"], "--only dqn: smoke has acer_discrete"),
        (["run", "--suite", "smoke", "--workers", "0"], "--workers 0: one or more"),
    ],
)
def test_bad_input_is_one_line(args, message):
    result = harness(*args)
    assert result.returncode == 1 and message in result.stderr and result.stderr.count("\n") == 1


def test_dry_run_prints_one_command_a_run():
    lines = harness("run", "--suite", "mujoco", "--seeds", "1-2", "--only", "ppo_continuous", "--dry-run").stdout.split(
        "\n"
    )
    assert len(lines) == 2 * 9 + 1
    assert lines[0] == "python ppo_continuous.py --env-id Ant-v5 --seed 1 --eval-episodes 100"
    assert sum("Swimmer-v5 --seed 2 --gamma 0.9999" in line for line in lines) == 1


# ---- Running ---------------------------------------------------------------------------------------------------------


def test_smoke_suite_runs_in_a_fresh_copy_and_is_not_run_again(copy):
    result = harness("run", "--suite", "smoke", "--seeds", "1", folder=copy)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = list(csv.DictReader((copy / "benchmarks/results/smoke/index.csv").open()))
    assert {row["label"] for row in rows} == {"ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete"}
    for row in rows:
        curve = list(
            csv.DictReader(
                (copy / f"benchmarks/results/smoke/{Path(row['label']).name}__{Path(row['task']).name}__s1.csv").open()
            )
        )
        assert curve[-1]["step"] == row["steps"] and row["code"] and row["versions"].startswith("torch==")
        if row["eval_episodes"] != "0":
            assert float(curve[-1]["episodic_return"]) == pytest.approx(float(row["last100"]), abs=0.01)
            assert row["deterministic"] and row["sampled"]
    assert "4 done, 0 to do" in harness("run", "--suite", "smoke", "--seeds", "1", folder=copy).stdout


SCRIPT = """
total_timesteps: int = 300
import sys, json, pathlib
resumed = "--resume" in sys.argv
folder = pathlib.Path(sys.argv[sys.argv.index("--resume") + 1]).parent if resumed else pathlib.Path(sys.argv[-1])
folder.mkdir(exist_ok=resumed)
with (folder / "progress.csv").open("a" if resumed else "w") as file:
    if not resumed:
        file.write("step,seconds,episodic_return\\n")
    for step in range(200 if resumed else 0, 300 if resumed else 200):
        file.write(f"{step + 1},{step}.0,{step}\\n")
(folder / "checkpoint.pt").write_text("")
if not resumed:
    print("one")
    sys.exit("it broke")
(folder / "eval.json").write_text(json.dumps({"deterministic": [1, 3], "sampled": [0, 0]}))
"""


def test_a_failed_run_is_told_kept_and_resumed_on_demand(copy):
    (copy / "ppo_continuous.py").write_text(SCRIPT)
    flags = ("--suite", "mujoco", "--seeds", "2", "--only", "ppo_continuous", "--tasks", "Ant-v5")
    first = harness("run", *flags, folder=copy)
    assert first.returncode == 1 and "one / it broke" in first.stdout
    status = harness("status", *flags, folder=copy).stdout
    assert status.startswith("failed") and "it broke" in status and "1 failed" in status
    again = harness("run", *flags, folder=copy)
    assert again.returncode == 0 and "0 to do, 1 failed before" in again.stdout
    assert harness("run", *flags, "--retry", folder=copy).returncode == 0
    (row,) = csv.DictReader((copy / "benchmarks/results/mujoco/index.csv").open())
    assert (row["steps"], row["last100"], row["deterministic"], row["deterministic_std"]) == (
        "300",
        "299.00",
        "2.00",
        "1.00",
    )
    curve = list(csv.DictReader((copy / "benchmarks/results/mujoco/ppo_continuous__Ant-v5__s2.csv").open()))
    assert [int(point["step"]) for point in curve] == list(range(3, 301, 3))
    assert "1 done" in harness("status", *flags, folder=copy).stdout


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(copy):
    import signal
    import time

    flags = ["run", "--suite", "smoke", "--seeds", "1", "--only", "ppo_continuous"]
    text = (copy / "benchmarks/suites.py").read_text()
    (copy / "benchmarks/suites.py").write_text(text.replace("--total-timesteps 20_480 ", "--total-timesteps 81_920 "))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *flags], cwd=copy, stdout=subprocess.PIPE, text=True
    )
    deadline = time.time() + 60
    while (
        not [p for p in copy.glob("runs/**/progress.csv") if p.read_text().count("\n") > 3] and time.time() < deadline
    ):
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert "stopping" in output and "failed" not in output and process.returncode == 130
    assert "1 half-done" in harness("status", *flags[1:], folder=copy).stdout
    done = harness(*flags, folder=copy)
    assert done.returncode == 0
    (row,) = csv.DictReader((copy / "benchmarks/results/smoke/index.csv").open())
    assert row["steps"] == "81920"
    assert len(list(copy.glob("runs/**/config-*.json"))) == 1  # it was resumed


def test_a_peer_leaves_the_same_files(tmp_path):
    pytest.importorskip("stable_baselines3")
    from benchmarks import peers

    peers.train(peers.Args(f"{tmp_path}/run", env_id="InvertedPendulum-v5", total_timesteps=4096, eval_episodes=3))
    rows = list(csv.DictReader((tmp_path / "run/progress.csv").open()))
    assert [row["step"] for row in rows] == ["2048", "4096"] and float(rows[-1]["episodic_return"]) > 0
    evaluation = json.loads((tmp_path / "run/eval.json").read_text())
    assert {mode: len(returns) for mode, returns in evaluation.items()} == {"deterministic": 3, "sampled": 3}


# ---- Results ---------------------------------------------------------------------------------------------------------


def test_every_result_has_its_curve_and_a_place_in_its_suite():
    for suite, entries in SUITES.items():
        rows = runner.read_index(suite) if suite != "smoke" else []
        assert len({(row["label"], row["task"], row["seed"]) for row in rows}) == len(rows)
        curves = {path.name for path in (runner.RESULTS / suite).glob("*__s*.csv")} if suite != "smoke" else set()
        assert curves == {f"{r['label']}__{Path(r['task']).name}__s{r['seed']}.csv" for r in rows}
        for row in rows:
            assert (row["label"], row["task"]) in {(e.label, e.task) for e in entries}
            points = list(
                csv.DictReader(
                    (runner.RESULTS / suite / f"{row['label']}__{Path(row['task']).name}__s{row['seed']}.csv").open()
                )
            )
            assert 90 <= len(points) <= runner.POINTS and points[-1]["step"] == row["steps"]
            assert float(points[-1]["episodic_return"]) == pytest.approx(float(row["last100"]), abs=0.01)


def test_tables_are_those_that_report_makes():
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    made = report.blocks()
    for path in report.READMES:
        text = path.read_text()
        assert "<!-- report: " in text and report.fill(text, made) == text, f"python -m benchmarks report ({path.name})"


def test_worst_drop_is_the_lowest_ratio_to_the_best_after_300k():
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    import numpy as np

    points = np.array([(100_000, 10.0), (200_000, 1.0), (300_000, 8.0), (400_000, 20.0), (500_000, 15.0)])
    assert report.worst_drop(points) == pytest.approx(0.75)
    assert report.worst_drop(points[:3]) == pytest.approx(0.8)


def test_speed_tables_are_made_from_the_results():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    files = sorted((ROOT / "benchmarks" / "results" / "speed").glob("*.csv"))
    assert len(files) >= 2
    for path in files:
        script, task = path.stem.split("__")
        runs = defaultdict(list)
        for row in csv.DictReader(path.open()):
            runs[row["contestant"]].append(float(row["steps_per_second"]))
        peer = runs.pop(speed.PEERS[script])
        assert len(peer) >= 3 and list(runs) == list(speed.CONTESTANTS[script])
        table = text[text.index(f"| {task} | steps/s (range) | times {speed.PEERS[script]} ") :]
        for name, ours in runs.items():
            ratio = statistics.median(a / b for a, b in zip(ours, peer, strict=True))
            row = next(x for x in table.splitlines() if x.startswith(f"| {name} |"))
            assert row.startswith(f"| {name} | {statistics.median(ours):.0f} (") and f" | {ratio:.1f} (" in row

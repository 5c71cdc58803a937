"""The harness: what it runs, how it goes on, and that the tables readers see are those that the stored results make."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from benchmarks import runner
from benchmarks.runner import BenchmarkError, Job
from benchmarks.suites import FLAGS, SUITES, Entry

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
            job = Job(suite, entry, 1, "")
            python, script, *flags = job.command.split()
            assert python == "python" and (ROOT / script).exists()
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            args = tyro.cli(module.Args, args=[*flags, "--run-dir", "x"])
            assert (args.env_id, args.seed) == (entry.task, 1)
            assert runner.budget(job) == args.total_timesteps


def test_swimmer_alone_has_flags_of_its_own():
    assert FLAGS == {"Swimmer-v5": "--gamma 0.9999"}


def test_the_key_depends_on_code_and_command_not_on_comments(tmp_path):
    script, codes = tmp_path / "script.py", []
    for text in ('"""A."""\nx = 1\n', '"""B."""\n# c\nx  = 1\n', '"""A."""\nx = 2\n', '"""A."""\nx = None\n'):
        script.write_text(text)
        codes.append(runner.code_hash(script))
    assert codes[0] == codes[1] and len(set(codes)) == 3
    assert codes[0] == "5dd0a2d7c7330240"  # on every version of Python
    jobs = [
        Job("mujoco", Entry("ppo_continuous", "Hopper-v5", flags), 1, code) for code in "ab" for flags in ("", "-x")
    ]
    assert len({job.key for job in jobs}) == 4


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "--suite", "nosuch"], "choose from smoke"),
        (["run", "--suite", "smoke", "--seeds", "x"], "--seeds x: write"),
        (["status", "--suite", "smoke", "--tasks", "Nosuch-v5"], "--tasks Nosuch-v5: smoke has ALE/Pong-v5"),
        (["run", "--suite", "smoke", "--only", "dqn"], "--only dqn: smoke has acer_discrete"),
        (["run", "--suite", "smoke", "--workers", "0"], "--workers 0: one or more"),
        (
            ["run", "--suite", "atari", "--only", "acer_discrete", "--tasks", "ALE/Breakout-v5"],
            "atari has no acer_disc",
        ),
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
    command, folder = lines[0].split(" --run-dir ")
    assert command == "python ppo_continuous.py --env-id Ant-v5 --seed 1 --eval-episodes 100"
    assert folder.startswith("runs/benchmarks/mujoco/ppo_continuous__Ant-v5__s1__")
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
    assert first.returncode == 1 and "one / it broke / exit code 1" in first.stdout
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


def test_a_run_that_was_killed_is_half_done_and_one_made_elsewhere_is_recorded(copy):
    flags = ("--suite", "mujoco", "--seeds", "2", "--only", "ppo_continuous", "--tasks", "Ant-v5")
    (copy / "ppo_continuous.py").write_text(
        SCRIPT.replace('sys.exit("it broke")', "import os; os.kill(os.getpid(), 9)")
    )
    killed = harness("run", *flags, folder=copy)
    assert killed.returncode == 1 and "killed by signal 9" in killed.stdout
    assert "1 half-done" in harness("status", *flags, folder=copy).stdout
    python, *command = harness("run", *flags, "--dry-run", folder=copy).stdout.split()
    shutil.rmtree(copy / "runs")
    (copy / "runs/benchmarks/mujoco").mkdir(parents=True)
    subprocess.run([sys.executable, *command], cwd=copy)  # as a scheduler would, and again from where it was killed
    subprocess.run([sys.executable, command[0], "--resume", f"{command[-1]}/checkpoint.pt"], cwd=copy, check=True)
    assert "1 to record" in harness("status", *flags, folder=copy).stdout
    output = harness("run", *flags, folder=copy).stdout
    (row,) = csv.DictReader((copy / "benchmarks/results/mujoco/index.csv").open())
    assert row["last100"] == "299.00"
    status = harness("status", *flags, folder=copy).stdout
    assert "1 done" in status
    for text in (output, status):
        assert "299.00 in training" in text
    assert "results: benchmarks/results/mujoco/index.csv" in output


def test_a_script_that_changes_while_others_run_is_refused(copy):
    (copy / "ppo_continuous.py").write_text(
        SCRIPT.replace(
            "import sys, json, pathlib",
            """
import sys, json, pathlib
pathlib.Path(__file__).write_text(pathlib.Path(__file__).read_text() + "x = 1\\n")
""",
        ).replace('sys.exit("it broke")', "sys.exit()")
    )
    flags = ("--suite", "mujoco", "--seeds", "1-2", "--only", "ppo_continuous", "--tasks", "Ant-v5", "--workers", "1")
    result = harness("run", *flags, folder=copy)
    assert result.returncode == 1 and "ppo_continuous.py has changed since this command began" in result.stdout
    assert len(list(csv.DictReader((copy / "benchmarks/results/mujoco/index.csv").open()))) == 1


def stop_half_done(flags, folder):
    """Ctrl-C a command of the harness after a few iterations of its run; -> its exit code and output."""
    command = [sys.executable, "-m", "benchmarks", *flags]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while time.time() < deadline:
        if any(path.read_text().count("\n") > 3 for path in folder.glob("runs/**/progress.csv")):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    return process.returncode, output


def test_ctrl_c_stops_the_runs_and_the_same_command_goes_on(copy):
    flags = ["run", "--suite", "smoke", "--seeds", "1", "--only", "ppo_continuous"]
    text = (copy / "benchmarks/suites.py").read_text()
    (copy / "benchmarks/suites.py").write_text(text.replace("--total-timesteps 20_480 ", "--total-timesteps 49_152 "))
    code, output = stop_half_done(flags, copy)
    assert "stopping" in output and "failed" not in output and code == 130
    assert "1 half-done" in harness("status", *flags[1:], folder=copy).stdout
    done = harness(*flags, folder=copy)
    assert done.returncode == 0
    (row,) = csv.DictReader((copy / "benchmarks/results/smoke/index.csv").open())
    assert row["steps"] == "49152"
    assert len(list(copy.glob("runs/**/config-*.json"))) == 1  # it was resumed


def training() -> int:
    """How many processes train in InvertedPendulum on a node of Ray."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            commands.append(path.read_bytes())
    return sum(re.search(rb"InvertedPendulum-v5\0.*--run-dir\0[^\0]*/run\0$", x) is not None for x in commands)


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_ray_cluster_that_loses_a_node_does_each_run_once(copy):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    suites = copy / "benchmarks/suites.py"
    suites.write_text(suites.read_text().replace("20_480 --eval-episodes 10", "14_336 --eval-episodes 2"))
    stop_half_done(["run", "--suite", "smoke", "--seeds", "1", "--only", "ppo_continuous"], copy)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        node = cluster.add_node(num_cpus=1)
        flags = ["--suite", "smoke", "--seeds", "1-2", "--only", "ppo_continuous", "trpo_continuous"]
        command = [sys.executable, "-m", "benchmarks", "run", *flags, "--ray", cluster.address]
        process = subprocess.Popen(command, cwd=copy, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        while training() < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        output, _ = process.communicate(timeout=180)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    rows = list(csv.DictReader((copy / "benchmarks/results/smoke/index.csv").open()))
    assert sorted((row["script"], row["seed"], row["steps"]) for row in rows) == [
        (script, seed, "14336") for script in ("ppo_continuous", "trpo_continuous") for seed in ("1", "2")
    ]
    assert output.count("done: python") == 4
    assert all(float(row["deterministic"]) > 0 for row in rows)
    assert len(list(copy.glob("runs/benchmarks/smoke/*/checkpoint.pt"))) == 4
    assert len(list(copy.glob("runs/benchmarks/smoke/*/config-*.json"))) == 1  # the half-done run went on
    assert len(list(copy.glob("benchmarks/results/smoke/*__s*.csv"))) == 4
    status = harness("status", *flags, folder=copy)
    assert "4 done" in status.stdout


@pytest.mark.parametrize(("address", "why"), [("", "write auto or HOST:PORT"), ("127.0.0.1:1", "refused")])
def test_without_a_ray_cluster_one_line_says_how_to_start_one(address, why):
    pytest.importorskip("ray")
    from benchmarks.on_ray import run_on_ray

    with pytest.raises(BenchmarkError, match=f"^--ray {address}: no cluster there .*{why}.*`ray start --head`"):
        run_on_ray([], address)


def test_a_run_that_was_killed_on_a_node_is_not_a_failed_one(monkeypatch):
    pytest.importorskip("ray")
    from benchmarks.on_ray import train

    (job,) = runner.select("smoke", "1", ("acer_discrete",))
    killed = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
    monkeypatch.setattr(runner.Job, "argv", lambda job, folder: killed)
    assert train(job, {}, "") == (-9, "exit code -9", {}, {}, "")


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
        if suite == "tuning":  # its curves are not kept
            continue
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


@pytest.fixture
def report(monkeypatch, tmp_path):
    """benchmarks.report on results of its own: random policy 10 and published 20, or -50 and -40."""
    report = pytest.importorskip("benchmarks.report", exc_type=ImportError)
    entries = tuple(Entry("ppo_continuous", task) for task in ("A-v0", "B-v0", "C-v0"))
    monkeypatch.setattr(report, "SUITES", {"mine": entries})
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    zeros, ones = {"A-v0": 10, "B-v0": -50, "C-v0": 10}, {"A-v0": 20, "B-v0": -40, "C-v0": 20}
    published = {(task, name): x for name, values in (("random", zeros), ("PPO", ones)) for task, x in values.items()}
    monkeypatch.setattr(report, "references", lambda: published)
    runs = {"A-v0": (10, 20, 30, 25), "B-v0": (-50, -40, -45, -30), "C-v0": (12,)}
    rows = [
        {"label": "ppo_continuous", "script": "ppo_continuous", "task": task, "seed": str(seed), "last100": str(score)}
        | {"deterministic": "", "key": "", "commit": "abc"}
        for task, scores in runs.items()
        for seed, score in enumerate(scores, 1)
    ]
    monkeypatch.setattr(report, "read_index", lambda suite: rows)
    return report


def test_scores_are_normalized_task_by_task(report):
    import numpy as np

    (scores,) = report.normalized("mine").values()  # C has one seed only
    np.testing.assert_allclose(scores, [[0, 0], [1, 1], [2, 0.5], [1.5, 2]])
    (scores,) = report.normalized("mine", ("B-v0",)).values()
    np.testing.assert_allclose(scores, [[0], [1], [0.5], [2]])
    assert not report.normalized("mine", ("B-v0", "D-v0"))  # D has not run


def test_interquartile_mean_and_interval(report):
    table = report.aggregate_table("mine").splitlines()
    mean = (0.5 + 1 + 1 + 1.5) / 4  # of the middle half of 0, 0, 0.5, 1, 1, 1.5, 2, 2
    label, cell, tasks, seeds = (x.strip() for x in table[2].strip("|").split("|"))
    assert (label, tasks, seeds) == ("ppo_continuous", "2", "4") and cell.startswith(f"{mean:.2f} [")
    low, high = map(float, cell.split("[")[1].rstrip("]").split(","))
    assert 0 <= low < mean < high <= 2
    assert report.aggregate_table("mine").splitlines() == table  # no chance in it


def test_peers_stand_beside_the_scripts_on_their_tasks_alone(report, monkeypatch):
    suites = {"mujoco": report.SUITES["mine"], "mujoco-peers": (Entry("sb3_ppo", "B-v0"),)}
    monkeypatch.setattr(report, "SUITES", suites)
    mine = report.read_index("mujoco")
    peers = [row | {"label": "sb3_ppo", "last100": "-49", "deterministic": "-48"} for row in mine if row["task"] == "B-v0"]
    monkeypatch.setattr(report, "read_index", {"mujoco": mine, "mujoco-peers": peers}.get)
    data = report.with_peers("mujoco")
    assert list(data) == ["ppo_continuous", "ppo_continuous, 1 tasks", "Stable-Baselines3 PPO, 1 tasks"]
    assert data["ppo_continuous, 1 tasks"].tolist() == [[0], [1], [0.5], [2]]
    assert data["Stable-Baselines3 PPO, 1 tasks"].ravel() == pytest.approx(0.1)
    head, _, *rows = report.versus_table("ppo_continuous").splitlines()
    assert head.split(" | ")[3] == "Stable-Baselines3 PPO, training"
    assert rows[1].startswith("| B-v0 | -41.2 [") and "| -49.0 [-49.0, -49.0] (4) | -48.0" in rows[1]
    assert rows[1].endswith("| -40.0 |") and rows[2].startswith("| C-v0 | 12.0 (1) |  |  |  |")


def test_mean_and_interval_of_a_cell(report):
    assert report.cell([10.0]) == "10.0 (1)" and report.cell([]) == ""
    assert report.cell([5000.0, 5000.0]) == "5,000 [5,000, 5,000] (2)"
    low, high = report.interval([float(x) for x in range(101)])  # its standard error is 2.90
    assert low == pytest.approx(50 - 1.96 * 2.9, abs=0.6) and high == pytest.approx(50 + 1.96 * 2.9, abs=0.6)


@pytest.fixture
def tuning(report, monkeypatch):
    """Results of the default, 1 and 2 above its reference at seed 101 and 102, and of a candidate 0.5 below it."""
    flags = {"ppo": "", "ppo-without-rate": "--lr 1 "}
    scores = {("ppo", 101): 1, ("ppo", 102): 2, ("ppo-without-rate", 101): 0.5, ("ppo-without-rate", 102): 1.5}
    rows = [
        {"script": "ppo_continuous", "label": label, "task": "envpool:A-v0", "seed": str(seed)}
        | {"last100": str(10 + 10 * score - 3), "deterministic": str(10 + 10 * score + 3)}
        | {"command": f"python ppo_continuous.py --env-id A --seed {seed} {flags[label]}--env-threads 1"}
        for (label, seed), score in scores.items()
    ]
    monkeypatch.setattr(report, "read_index", lambda suite: rows)
    return report


def test_candidates_are_compared_with_the_default_on_the_same_tasks_and_seeds(tuning):
    default, candidate = tuning.tuning_table().splitlines()[2:]
    assert default == "| ppo | the default | 1.50 |  | 2 |"
    assert candidate == "| ppo-without-rate | `--lr 1` | 1.00 | -0.50 [-0.50, -0.50] | 2 |"
    tuning.read_index("tuning").pop(0)  # without the default's run of seed 101 only 102 counts
    assert tuning.tuning_table().splitlines()[3].startswith("| ppo-without-rate | `--lr 1` | 1.50 | -0.50")


def test_interval_of_a_difference_is_of_pairs(report):
    import numpy as np

    default = np.arange(40.0)
    noise = np.tile([0.0, 2.0], 20)
    value, low, high = report.difference(np.stack([default + noise, default], 1))
    assert value == pytest.approx(1, abs=0.2) and 0.2 < low < value < high < 1.8  # ±11 if they were not paired


def test_picture_of_the_departures(tuning, monkeypatch):
    pictures = []
    monkeypatch.setattr(tuning, "save", lambda figure, path: pictures.append(figure))
    tuning.plot_departures()
    (axis,) = pictures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["rate"]
    _, mark = axis.lines[:2]
    assert mark.get_xdata()[0] == pytest.approx(0.5)  # what it buys


def test_picture_of_speed_has_the_median_ratio_to_the_peer_of_the_same_repetition(report, monkeypatch, tmp_path):
    (tmp_path / "speed").mkdir()
    runs = [("sb3", 1, 100), ("default", 1, 300), ("EnvPool", 1, 500)]
    runs += [("sb3", 2, 200), ("default", 2, 900), ("EnvPool", 2, 1000)]
    text = "".join(f"{name},{repetition},{speed},{9 - 3 * repetition},300\n" for name, repetition, speed in runs)
    path = tmp_path / "speed" / "ppo_continuous__Hopper-v5.csv"
    path.write_text("contestant,repetition,steps_per_second,start_up_seconds,peak_megabytes\n" + text)
    pictures = []
    monkeypatch.setattr(report, "save", lambda figure, path: pictures.append(figure))
    report.plot_speed()
    (axis,) = pictures[0].axes
    assert [bar.get_width() for bar in axis.patches] == [(3 + 4.5) / 2, 5]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["this script", "this script with EnvPool"]
    row = "| ppo_continuous, Hopper-v5 | default | 600 (300-900) | 3.8 (3.0-4.5) | 6 / 3 | 300 |"
    assert report.speed_table().splitlines()[3] == row


def test_results_of_other_code_or_flags_are_named(report, monkeypatch):
    assert report.stale_line("mine") == "Of 9 runs 9 are of an older script or flags: 9 of ppo_continuous."
    rows = report.read_index("mine")
    for row in rows:
        code = runner.code_hash(ROOT / "ppo_continuous.py")
        row["key"] = Job("mine", Entry("ppo_continuous", row["task"]), int(row["seed"]), code).key
    assert report.stale_line("mine") == "All results are of the scripts as they are."
    rows[0]["key"] = Job("mine", Entry("ppo_continuous", "A-v0", "--gamma 0.9"), 1, code).key
    assert "1 of ppo_continuous" in report.stale_line("mine")


def test_steps_to_a_bar_are_those_of_the_first_point_at_or_above_it(report, monkeypatch, tmp_path):
    monkeypatch.setattr(report, "BARS", {"A-v0": 20, "C-v0": 20})
    (tmp_path / "mine").mkdir()
    for task, seeds in (("A-v0", 4), ("C-v0", 1)):
        for seed in range(1, seeds + 1):
            points = [(100, ""), (200, 19), (300 + 100 * seed, 20 if task == "A-v0" else 19), (900, 15)]
            text = "".join(f"{step},{value},1.0,0\n" for step, value in points)
            path = tmp_path / f"mine/ppo_continuous__{task}__s{seed}.csv"
            path.write_text("step,episodic_return,seconds,largest_kl\n" + text)
    row = report.steps_table("mine").splitlines()[2]
    assert row.startswith("| ppo_continuous | 550 [") and row.endswith("(4) | 0 of 1 seeds reach it |")


def test_curves_and_the_trust_table_hold_the_kl_of_whole_iterations(report, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "references", lambda: {("A-v0", "random"): 0.0})
    monkeypatch.setitem(report.SUITES, "mine", (Entry("trpo_continuous", "A-v0"),))
    row = {"label": "trpo_continuous", "script": "trpo_continuous", "task": "A-v0", "seed": "1"}
    monkeypatch.setattr(report, "read_index", lambda suite: [row])
    job = Job("mine", Entry("trpo_continuous", "A-v0"), 1, "code")
    rows = [
        {"step": f"{i}", "episodic_return": "1", "seconds": "1", "approx_kl": "0.001", "kl_iteration": f"{kl}"}
        for i, kl in ((100, 0.002), (200, 0.009), (300, 0.003))
    ]
    runner.write_curve(job, rows)
    assert job.curve.read_text().splitlines()[0] == "step,episodic_return,seconds,largest_kl_iteration"
    assert report.trust_table("mine").splitlines()[2].startswith("| A-v0 | 0.00900 |")
    for row_of_update in rows:
        del row_of_update["kl_iteration"]
    runner.write_curve(job, rows)
    assert "0.001" in job.curve.read_text() and report.trust_table("mine") == ""


def test_worst_drop_is_the_lowest_ratio_to_the_best_after_300k(report):
    import numpy as np

    points = np.array([(100_000, 10.0), (200_000, 1.0), (300_000, 8.0), (400_000, 20.0), (500_000, 15.0)])
    assert report.worst_drop(points, 0.0) == pytest.approx(0.75)
    assert report.worst_drop(points[:3], 0.0) == pytest.approx(0.8)
    below = np.array([(300_000, -4.0), (400_000, -22.0)])
    assert report.worst_drop(below, -40.0) == pytest.approx(0.5)  # half of the way back to a random policy

"""The harness: what it runs, how it goes on, and that its tables are those of the results."""

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
from benchmarks.suites import SUITES, TASK_FLAGS, Entry

ROOT = Path(__file__).parents[1]


def harness(*args, folder=ROOT):
    command = [sys.executable, "-m", "benchmarks", *args]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=180)


def read_csv(path):
    return list(csv.DictReader(path.open()))


def index_of(folder, suite):
    return read_csv(folder / "benchmarks/results" / suite / "index.csv")


@pytest.fixture
def copy(tmp_path):
    """The repository without its results."""
    for path in ROOT.glob("*.py"):
        shutil.copy(path, tmp_path)
    left_out = shutil.ignore_patterns("results", "__pycache__")
    shutil.copytree(ROOT / "benchmarks", tmp_path / "benchmarks", ignore=left_out)
    return tmp_path


# ---- Jobs ----------------------------------------------------------------------------------------


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
    assert TASK_FLAGS == {"Swimmer-v5": "--gamma 0.9999"}


def test_the_key_depends_on_code_and_command_not_on_comments(tmp_path):
    script = tmp_path / "script.py"
    codes = []
    for body in ("x = 1", "# c\nx  = 1", "x = 2", "x = None"):
        script.write_text(f'"""About {body[0]}."""\n{body}\n')
        codes.append(runner.code_hash(script))
    assert codes[0] == codes[1] and len(set(codes)) == 3
    assert codes[0] == "5dd0a2d7c7330240"  # on every version of Python
    entries = [Entry("ppo_continuous", "Hopper-v5", flags) for flags in ("", "-x")]
    jobs = [Job("mujoco", entry, 1, code) for code in "ab" for entry in entries]
    assert len({job.key for job in jobs}) == 4


@pytest.mark.parametrize(
    "args, message",
    [
        (["run", "--suite", "nosuch"], "choose from smoke"),
        (["run", "--suite", "smoke", "--seeds", "x"], "--seeds x: write"),
        (
            ["status", "--suite", "smoke", "--tasks", "No-v5"],
            "--tasks No-v5: smoke has ALE/Pong-v5",
        ),
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


def test_dry_run_prints_one_command_a_run(copy):
    flags = ("--suite", "mujoco", "--seeds", "1-2", "--only", "ppo_continuous", "--dry-run")
    lines = harness("run", *flags, folder=copy).stdout.splitlines()
    assert len(lines) == 2 * 9
    command, folder = lines[0].split(" --run-dir ")
    assert command == "python ppo_continuous.py --env-id Ant-v5 --seed 1 --eval-episodes 100"
    assert folder.startswith("runs/benchmarks/mujoco/ppo_continuous__Ant-v5__s1__")
    assert sum("Swimmer-v5 --seed 2 --gamma 0.9999" in line for line in lines) == 1


# ---- Running -------------------------------------------------------------------------------------


def test_smoke_suite_runs_in_a_fresh_copy_and_is_not_run_again(copy):
    result = harness("run", "--suite", "smoke", "--seeds", "1", folder=copy)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = index_of(copy, "smoke")
    scripts = {"ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete"}
    assert {row["label"] for row in rows} == scripts
    for row in rows:
        name = runner.run_name(row["label"], row["task"], 1)
        last = read_csv(copy / f"benchmarks/results/smoke/{name}.csv")[-1]
        assert last["step"] == row["steps"]
        assert row["code"] and row["versions"].startswith("torch==")
        if row["eval_episodes"] != "0":
            assert float(last["episodic_return"]) == pytest.approx(float(row["last100"]), abs=0.01)
            assert row["deterministic"] and row["sampled"]
    assert (
        "4 done, 0 to do" in harness("run", "--suite", "smoke", "--seeds", "1", folder=copy).stdout
    )


ANT = ("--suite", "mujoco", "--seeds", "2", "--only", "ppo_continuous", "--tasks", "Ant-v5")
# A script that fails after 200 steps, and reaches 300 when it is resumed
SCRIPT = """
total_timesteps: int = 300
import sys, json, pathlib
resumed = "--resume" in sys.argv
folder = pathlib.Path(sys.argv[-1])  # of --run-dir, or the checkpoint
folder = folder.parent if resumed else folder
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
    first = harness("run", *ANT, folder=copy)
    assert first.returncode == 1 and "one / it broke / exit code 1" in first.stdout
    status = harness("status", *ANT, folder=copy).stdout
    assert status.startswith("failed") and "it broke" in status and "1 failed" in status
    again = harness("run", *ANT, folder=copy)
    assert again.returncode == 0 and "0 to do, 1 failed before" in again.stdout
    assert harness("run", *ANT, "--retry", folder=copy).returncode == 0
    (row,) = index_of(copy, "mujoco")
    assert (row["steps"], row["last100"]) == ("300", "299.00")
    assert (row["deterministic"], row["deterministic_std"]) == ("2.00", "1.00")
    curve = read_csv(copy / "benchmarks/results/mujoco/ppo_continuous__Ant-v5__s2.csv")
    assert [int(point["step"]) for point in curve] == list(range(3, 301, 3))
    assert "1 done" in harness("status", *ANT, folder=copy).stdout


def test_a_run_that_was_killed_is_half_done_and_one_made_elsewhere_is_recorded(copy):
    killing = SCRIPT.replace('sys.exit("it broke")', "import os; os.kill(os.getpid(), 9)")
    (copy / "ppo_continuous.py").write_text(killing)
    killed = harness("run", *ANT, folder=copy)
    assert killed.returncode == 1 and "killed by signal 9" in killed.stdout
    assert "1 half-done" in harness("status", *ANT, folder=copy).stdout
    python, *command = harness("run", *ANT, "--dry-run", folder=copy).stdout.split()
    subprocess.run([sys.executable, *command], cwd=copy, check=True)  # as a scheduler would
    assert harness("run", *ANT, "--dry-run", folder=copy).stdout == ""
    assert "1 to record" in harness("status", *ANT, folder=copy).stdout
    output = harness("run", *ANT, folder=copy).stdout
    (row,) = index_of(copy, "mujoco")
    assert row["last100"] == "299.00" and row["hardware"] == ""
    status = harness("status", *ANT, folder=copy).stdout
    assert "1 done" in status
    for text in (output, status):
        assert "299.00 in training" in text
    assert "results: benchmarks/results/mujoco/index.csv" in output


def test_a_script_that_changes_while_others_run_is_refused(copy):
    change = "path = pathlib.Path(__file__); path.write_text(path.read_text() + 'x = 1')"
    script = SCRIPT.replace('sys.exit("it broke")', f"{change}; sys.exit()")
    (copy / "ppo_continuous.py").write_text(script)
    flags = ["--suite", "mujoco", "--seeds", "1-2", "--only", "ppo_continuous"]
    flags += ["--tasks", "Ant-v5", "--workers", "1"]
    result = harness("run", *flags, folder=copy)
    reason = "ppo_continuous.py has changed since this command began"
    assert result.returncode == 1 and reason in result.stdout
    assert len(index_of(copy, "mujoco")) == 1


def stop_half_done(flags, folder):
    """Interrupt a command after a few iterations of its run. Returns its exit code and output."""
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
    suites = copy / "benchmarks/suites.py"
    suites.write_text(suites.read_text().replace("20_480 --eval", "49_152 --eval"))
    code, output = stop_half_done(flags, copy)
    assert "stopping" in output and "failed" not in output and code == 130
    assert "1 half-done" in harness("status", *flags[1:], folder=copy).stdout
    done = harness(*flags, folder=copy)
    assert done.returncode == 0
    (row,) = index_of(copy, "smoke")
    assert row["steps"] == "49152"
    assert len(list(copy.glob("runs/**/config-*.json"))) == 1  # it was resumed


def training() -> int:
    """Return how many processes train in InvertedPendulum on a node of Ray."""
    pattern = re.compile(rb"InvertedPendulum-v5\0.*--run-dir\0[^\0]*/run\0$")
    count = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            count += pattern.search(path.read_bytes()) is not None
    return count


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
def test_a_ray_cluster_that_loses_a_node_does_each_run_once(copy):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    suites = copy / "benchmarks/suites.py"
    shorter = suites.read_text().replace("20_480 --eval-episodes 10", "14_336 --eval-episodes 2")
    suites.write_text(shorter)
    stop_half_done(["run", "--suite", "smoke", "--seeds", "1", "--only", "ppo_continuous"], copy)
    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        node = cluster.add_node(num_cpus=1)
        flags = [
            "--suite",
            "smoke",
            "--seeds",
            "1-2",
            "--only",
            "ppo_continuous",
            "trpo_continuous",
        ]
        command = [sys.executable, "-m", "benchmarks", "run", *flags, "--ray", cluster.address]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        process = subprocess.Popen(command, cwd=copy, **pipes)
        while training() < 2:
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        output, _ = process.communicate(timeout=180)
    finally:
        cluster.shutdown()
    assert process.returncode == 0, output
    rows = index_of(copy, "smoke")
    found = sorted((row["script"], row["seed"]) for row in rows)
    scripts = ("ppo_continuous", "trpo_continuous")
    assert found == [(script, seed) for script in scripts for seed in ("1", "2")]
    assert all(row["steps"] == "14336" for row in rows)
    assert output.count("done: python") == 4
    assert all(float(row["deterministic"]) > 0 for row in rows)
    assert len(list(copy.glob("runs/benchmarks/smoke/*/checkpoint.pt"))) == 4
    resumed = list(copy.glob("runs/benchmarks/smoke/*/config-*.json"))
    assert len(resumed) == 1  # the half-done run
    assert len(list(copy.glob("benchmarks/results/smoke/*__s*.csv"))) == 4
    status = harness("status", *flags, folder=copy)
    assert "4 done" in status.stdout


@pytest.mark.parametrize(
    ("address", "why"), [("", "write auto or HOST:PORT"), ("127.0.0.1:1", "refused")]
)
def test_without_a_ray_cluster_one_line_says_how_to_start_one(address, why):
    pytest.importorskip("ray")
    from benchmarks.on_ray import run_on_ray

    pattern = f"^--ray {address}: no cluster there .*{why}.*`ray start --head`"
    with pytest.raises(BenchmarkError, match=pattern):
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

    flags = {"env_id": "InvertedPendulum-v5", "total_timesteps": 4096, "eval_episodes": 3}
    peers.train(peers.Args(f"{tmp_path}/run", **flags))
    rows = read_csv(tmp_path / "run/progress.csv")
    assert [row["step"] for row in rows] == ["2048", "4096"]
    assert float(rows[-1]["episodic_return"]) > 0
    evaluation = json.loads((tmp_path / "run/eval.json").read_text())
    assert sorted(evaluation) == ["deterministic", "sampled"]
    assert all(len(returns) == 3 for returns in evaluation.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--contestants", "nosuch"), "--contestants nosuch: once each of default"),
        (("--contestants", "default", "default"), "--contestants default: once each of"),
        (("--script", "ppo_atari", "--contestants", "peer + EnvPool"), "once each of default"),
        (("--repetitions", "0"), "--repetitions 0: one or more"),
        (("--against", "0000000"), "--against 0000000: no commit with a ppo_continuous.py"),
        (("--against", "HEAD", "--contestants", "default"), "leave out --contestants"),
    ],
)
def test_speed_refuses_bad_flags_in_one_line_and_keeps_stored_results(flags, message, tmp_path):
    out = tmp_path / "speed.csv"
    out.write_text("stored")
    command = [sys.executable, "benchmarks/speed.py", "--out", str(out), *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and message in result.stderr
    assert result.stderr.count("\n") == 1 and out.read_text() == "stored"


# ---- Results -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", [suite for suite in SUITES if suite not in ("smoke", "tuning")])
def test_every_result_has_its_curve_and_a_place_in_its_suite(suite):
    rows = runner.read_index(suite)
    entries = {(entry.label, entry.task) for entry in SUITES[suite]}
    names = set()
    for row in rows:
        assert (row["label"], row["task"]) in entries
        name = runner.run_name(row["label"], row["task"], row["seed"])
        points = read_csv(runner.RESULTS / suite / f"{name}.csv")
        assert 90 <= len(points) <= runner.POINTS and points[-1]["step"] == row["steps"]
        last = float(points[-1]["episodic_return"])
        assert last == pytest.approx(float(row["last100"]), abs=0.01)
        names.add(name)
    assert len(names) == len(rows)
    assert {path.stem for path in (runner.RESULTS / suite).glob("*__s*.csv")} == names


def test_the_candidates_of_tuning_have_one_run_for_each_task_and_seed():
    rows = runner.read_index("tuning")
    assert len({(row["label"], row["task"], row["seed"]) for row in rows}) == len(rows)


def test_tables_are_those_that_report_makes():
    tables = pytest.importorskip("benchmarks.tables", exc_type=ImportError)
    made = tables.blocks()
    for path in tables.READMES:
        text = path.read_text()
        assert "<!-- report: " in text
        assert tables.fill(text, made) == text, f"{path}: python -m benchmarks report"


@pytest.fixture
def tables(monkeypatch, tmp_path):
    """benchmarks.tables on results of its own. A published score is 10 above a random one."""
    tables = pytest.importorskip("benchmarks.tables", exc_type=ImportError)
    entries = tuple(Entry("ppo_continuous", task) for task in ("A-v0", "B-v0", "C-v0"))
    monkeypatch.setattr(tables, "SUITES", {"mine": entries})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    published = {}
    for task, zero in (("A-v0", 10), ("B-v0", -50), ("C-v0", 10)):
        published[task, "random"] = zero
        published[task, "PPO"] = zero + 10
    monkeypatch.setattr(tables, "references", lambda: published)
    runs = {"A-v0": (10, 20, 30, 25), "B-v0": (-50, -40, -45, -30), "C-v0": (12,)}
    rows = []
    for task, scores in runs.items():
        for seed, score in enumerate(scores, 1):
            row = {"label": "ppo_continuous", "script": "ppo_continuous", "task": task}
            row |= {"seed": str(seed), "last100": str(score), "deterministic": "", "key": ""}
            rows.append(row)
    monkeypatch.setattr(tables, "read_index", lambda suite: rows)
    return tables


def test_scores_are_normalized_task_by_task(tables):
    import numpy as np

    (scores,) = tables.normalized("mine", ("A-v0", "B-v0")).values()
    np.testing.assert_allclose(scores, [[0, 0], [1, 1], [2, 0.5], [1.5, 2]])
    (scores,) = tables.normalized("mine").values()  # C has one seed
    np.testing.assert_allclose(scores, [[0, 0, 0.2]])
    (scores,) = tables.normalized("mine", ("B-v0",)).values()
    np.testing.assert_allclose(scores, [[0], [1], [0.5], [2]])
    assert not tables.normalized("mine", ("B-v0", "D-v0"))  # D has not run


def test_interquartile_mean_and_interval(tables):
    tables.read_index("mine").pop()  # C
    table = tables.aggregate_table("mine").splitlines()
    mean = (0.5 + 1 + 1 + 1.5) / 4  # of the middle half of 0, 0, 0.5, 1, 1, 1.5, 2, 2
    label, cell, tasks, seeds = (x.strip() for x in table[2].strip("|").split("|"))
    assert (label, tasks, seeds) == ("ppo_continuous", "2", "4")
    assert cell.startswith(f"{mean:.2f} [")
    low, high = map(float, cell.split("[")[1].rstrip("]").split(","))
    assert 0 <= low < mean < high <= 2
    assert tables.aggregate_table("mine").splitlines() == table  # no chance in it


def test_peers_stand_beside_the_scripts_on_their_tasks_alone(tables, monkeypatch):
    suites = {"mujoco": tables.SUITES["mine"], "mujoco-peers": (Entry("sb3_ppo", "B-v0"),)}
    monkeypatch.setattr(tables, "SUITES", suites)
    mine = tables.read_index("mujoco")
    scores = {"label": "sb3_ppo", "last100": "-49", "deterministic": "-48"}
    peers = [row | scores for row in mine if row["task"] == "B-v0"]
    monkeypatch.setattr(tables, "read_index", {"mujoco": mine, "mujoco-peers": peers}.get)
    data = tables.on_peer_tasks()
    assert list(data) == ["ppo_continuous, 1 tasks", "Stable-Baselines3 PPO, 1 tasks"]
    assert data["ppo_continuous, 1 tasks"].tolist() == [[0], [1], [0.5], [2]]
    assert data["Stable-Baselines3 PPO, 1 tasks"].ravel() == pytest.approx(0.1)
    head, _, *rows = tables.versus_table("ppo_continuous").splitlines()
    assert head.split(" | ")[3] == "Stable-Baselines3 PPO, training"
    assert rows[1].startswith("| B-v0 | -41.2 [") and rows[1].endswith("| -40.0 |")
    assert "| -49.0 [-49.0, -49.0] (4) | -48.0" in rows[1]
    assert rows[2].startswith("| C-v0 | 12.0 (1) |  |  |  |")


def test_the_gain_of_flags_is_that_on_the_same_seeds(tables, monkeypatch):
    flags = (Entry("ppo_continuous", "A-v0", "--gamma 1 --eval-episodes 100"),)
    suites = {"mujoco": tables.SUITES["mine"], "mujoco-flags": flags}
    monkeypatch.setattr(tables, "SUITES", suites)
    default = tables.read_index("mujoco")
    mine = [row | {"last100": "40"} for row in default if row["seed"] in ("2", "4")]
    mine.append(mine[0] | {"seed": "7"})  # the default did not run it
    mine = [row for row in mine if row["task"] == "A-v0"]
    monkeypatch.setattr(tables, "read_index", {"mujoco": default, "mujoco-flags": mine}.get)
    row = tables.flags_table().splitlines()[2]
    assert row.startswith("| ppo_continuous | A-v0 | `--gamma 1` | 40.0 [40.0, 40.0] (2) | 22.5 [")
    assert "| 17.5 [" in row and row.endswith("(2) |")


def test_mean_and_interval_of_a_cell(tables):
    assert tables.cell([10.0]) == "10.0 (1)" and tables.cell([]) == ""
    assert tables.cell([5000.0, 5000.0]) == "5,000 [5,000, 5,000] (2)"
    low, high = tables.interval([float(x) for x in range(101)])
    margin = 1.96 * 2.9  # standard errors
    assert low == pytest.approx(50 - margin, abs=0.6)
    assert high == pytest.approx(50 + margin, abs=0.6)


@pytest.fixture
def tuning(tables, monkeypatch):
    """Normalized scores 1 and 2 of the default at seeds 101 and 102, 0.5 and 1.5 of a candidate."""
    command = "python ppo_continuous.py --env-id A --seed"
    rows = []
    for label, flags, scores in (("ppo", "", (1, 2)), ("ppo-without-rate", "--lr 1 ", (0.5, 1.5))):
        for seed, score in zip((101, 102), scores, strict=True):
            row = {"script": "ppo_continuous", "label": label, "task": "envpool:A-v0"}
            row["seed"] = str(seed)
            row["last100"] = str(10 + 10 * score - 3)
            row["deterministic"] = str(10 + 10 * score + 3)
            row["command"] = f"{command} {seed} {flags}--env-threads 1"
            rows.append(row)
    monkeypatch.setattr(tables, "read_index", lambda suite: rows)
    return tables


def test_candidates_are_compared_with_the_default_on_the_same_tasks_and_seeds(tuning):
    default, candidate = tuning.tuning_table().splitlines()[2:]
    assert default == "| ppo | the default then | 1.50 |  | 2 |"
    assert candidate == "| ppo-without-rate | `--lr 1` | 1.00 | -0.50 [-0.50, -0.50] | 2 |"
    rows = tuning.read_index("tuning")
    command = rows[3]["command"].replace("--lr 1", "--lr 1 --gamma 1")  # the flag of a task
    rows.append(rows[3] | {"task": "envpool:B-v0", "command": command})
    assert tuning.tuning_table().splitlines()[3] == candidate
    rows.pop(0)  # without the default's run of seed 101 only 102 counts
    candidate = tuning.tuning_table().splitlines()[3]
    assert candidate.startswith("| ppo-without-rate | `--lr 1` | 1.50 | -0.50")


def test_interval_of_a_difference_is_of_pairs(tables):
    import numpy as np

    default = np.arange(40.0)
    noise = np.tile([0.0, 2.0], 20)
    value, low, high = tables.difference(np.stack([default + noise, default], 1))
    assert value == pytest.approx(1, abs=0.2)
    assert 0.2 < low < value < high < 1.8  # ±11 if they were not paired


@pytest.fixture
def figures(monkeypatch):
    """The figures that benchmarks.pictures would save."""
    from benchmarks import pictures

    figures = []
    monkeypatch.setattr(pictures, "save", lambda figure, path: figures.append(figure))
    return figures


def test_picture_of_the_departures(tuning, figures):
    from benchmarks import pictures

    pictures.plot_departures()
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["rate"]
    _, mark = axis.lines[:2]
    assert mark.get_xdata()[0] == pytest.approx(0.5)  # what it buys


def test_speed_is_the_median_ratio_to_the_peer_in_the_same_repetition(tables, figures, tmp_path):
    from benchmarks import pictures

    (tmp_path / "speed").mkdir()
    lines = ["contestant,repetition,steps_per_second,start_up_seconds,peak_megabytes"]
    lines += ["sb3,1,100,6,300", "default,1,300,6,300", "EnvPool,1,500,6,300"]
    lines += ["sb3,2,200,3,300", "default,2,900,3,300", "EnvPool,2,1000,3,300"]
    path = tmp_path / "speed" / "ppo_continuous__Hopper-v5.csv"
    path.write_text("\n".join(lines))
    pictures.plot_speed()
    (axis,) = figures[0].axes
    assert [bar.get_width() for bar in axis.patches] == [(3 + 4.5) / 2, 5]
    legend = [text.get_text() for text in axis.get_legend().get_texts()]
    assert legend == ["this script", "this script with EnvPool"]
    row = "| ppo_continuous, Hopper-v5 | default | 600 (300-900) | 3.8 (3.0-4.5) | 6 / 3 | 300 |"
    assert tables.speed_table().splitlines()[3] == row


def test_results_of_other_code_or_flags_are_named(tables, monkeypatch):
    line = tables.older_line("mine")
    assert line == "All 9 results are of an older script or flags."
    rows = tables.read_index("mine")
    code = runner.code_hash(ROOT / "ppo_continuous.py")
    for row in rows:
        row["key"] = Job("mine", Entry("ppo_continuous", row["task"]), int(row["seed"]), code).key
        if row is rows[0]:
            line = tables.older_line("mine")
            assert line == "Of 9 runs 8 are of an older script or flags: 8 of ppo_continuous."
    assert tables.older_line("mine") == "All results are of the scripts as they are."
    rows[0]["key"] = Job("mine", Entry("ppo_continuous", "A-v0", "--gamma 0.9"), 1, code).key
    assert "1 of ppo_continuous" in tables.older_line("mine")


def test_steps_to_a_bar_are_those_of_the_first_point_at_or_above_it(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(tables, "BARS", {"A-v0": 20, "C-v0": 20})
    (tmp_path / "mine").mkdir()
    for task, seeds in (("A-v0", 4), ("C-v0", 1)):
        for seed in range(1, seeds + 1):
            best = 20 if task == "A-v0" else 19
            points = [(100, ""), (200, 19), (300 + 100 * seed, best), (900, 15)]
            text = "".join(f"{step},{value},1.0,0\n" for step, value in points)
            path = tmp_path / f"mine/ppo_continuous__{task}__s{seed}.csv"
            path.write_text("step,episodic_return,seconds,largest_kl\n" + text)
    row = tables.steps_table("mine").splitlines()[2]
    assert row.startswith("| ppo_continuous | 550 [")
    assert row.endswith("(4) | 0 of 1 seeds reach it |")


def test_curves_and_the_trust_table_hold_the_kl_of_whole_iterations(tables, monkeypatch, tmp_path):
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    monkeypatch.setattr(tables, "references", lambda: {("A-v0", "random"): 0.0})
    monkeypatch.setitem(tables.SUITES, "mine", (Entry("trpo_continuous", "A-v0"),))
    row = {"label": "trpo_continuous", "script": "trpo_continuous", "task": "A-v0", "seed": "1"}
    monkeypatch.setattr(tables, "read_index", lambda suite: [row])
    job = Job("mine", Entry("trpo_continuous", "A-v0"), 1, "code")
    rows = []
    for step, kl in ((100, 0.002), (200, 0.009), (300, 0.003)):
        point = {"step": f"{step}", "episodic_return": "1", "seconds": "1"}
        rows.append(point | {"approx_kl": "0.001", "kl_iteration": f"{kl}"})
    runner.write_curve(job, rows)
    head = job.curve.read_text().splitlines()[0]
    assert head == "step,episodic_return,seconds,largest_kl_iteration"
    assert tables.trust_table("mine").splitlines()[2].startswith("| A-v0 | 0.00900 |")
    for row_of_update in rows:
        del row_of_update["kl_iteration"]
    runner.write_curve(job, rows)
    assert "0.001" in job.curve.read_text() and tables.trust_table("mine") == ""


def test_worst_drop_is_the_lowest_ratio_to_the_best_after_300k(tables):
    import numpy as np

    steps = [100_000, 200_000, 300_000, 400_000, 500_000]
    points = np.stack([steps, [10.0, 1.0, 8.0, 20.0, 15.0]], 1)
    assert tables.worst_drop(points, 0.0) == pytest.approx(0.75)
    assert tables.worst_drop(points[:3], 0.0) == pytest.approx(0.8)
    below = np.array([(300_000, -4.0), (400_000, -22.0)])
    drop = tables.worst_drop(below, -40.0)
    assert drop == pytest.approx(0.5)  # half of the way back to a random policy

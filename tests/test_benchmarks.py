"""The tables that readers see are those that the stored results make."""

import csv
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from benchmarks import learning, speed

ROOT = Path(__file__).parents[1]


each_script = pytest.mark.parametrize("script", [script for script in learning.TASKS if learning.index(script)])


@each_script
@pytest.mark.parametrize("readme", ["README.md", "benchmarks/README.md"])
def test_score_tables_are_made_from_the_results(script, readme):
    rows = learning.table(script).splitlines()
    assert len(rows) == 2 + len(learning.TASKS[script])
    text = (ROOT / readme).read_text()
    for row in rows[2:]:
        assert row.removesuffix(" |") in text, row


@each_script
def test_every_result_has_its_curve_and_command(script):
    rows = learning.index(script)
    assert sorted((row["task"], int(row["seed"])) for row in rows) == sorted(
        (task, seed) for task in learning.TASKS[script] for seed in learning.SEEDS[script]
    )
    assert len({row["script_sha256"] for row in rows}) == 1  # all of one version of the script
    for row in rows:
        flags = learning.TASKS[script][row["task"]]
        command = f"python {script}.py --env-id {row['task']} --seed {row['seed']} {flags}"
        assert row["command"] == command.strip()
        curve = learning.curve(row)
        assert 90 <= len(curve) <= 130 and curve[-1][0] == int(row["steps"]) >= 999424
        assert curve[-1][1] == pytest.approx(float(row["last100"]), abs=0.01)


def test_worst_drop_is_the_lowest_ratio_to_the_best_after_300k():
    points = [
        (100_000, 10.0, 0.0),
        (200_000, 1.0, 0.0),
        (300_000, 8.0, 0.0),
        (400_000, 20.0, 0.0),
        (500_000, 15.0, 0.0),
    ]
    assert learning.worst_drop(points) == pytest.approx(0.75)
    assert learning.worst_drop(points[:3]) == pytest.approx(0.8)


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

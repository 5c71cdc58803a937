"""The tables that readers see are those that the stored results make."""

import csv
import statistics
from pathlib import Path

import pytest

from benchmarks import learning

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("readme", ["README.md", "benchmarks/README.md"])
def test_score_tables_are_made_from_the_results(readme):
    rows = learning.table().splitlines()
    assert len(rows) == 2 + len(learning.TASKS)
    text = (ROOT / readme).read_text()
    for row in rows[2:]:
        assert row.removesuffix(" |") in text, row


def test_every_result_has_its_curve_and_command():
    rows = learning.index()
    assert sorted((row["task"], row["seed"]) for row in rows) == sorted(
        (task, seed) for task in learning.TASKS for seed in "123"
    )
    assert len({row["script_sha256"] for row in rows}) == 1  # all of one version of the script
    for row in rows:
        assert row["command"] == f"python ppo_continuous.py --env-id {row['task']} --seed {row['seed']}"
        curve = list(csv.DictReader((learning.RESULTS / f"ppo_continuous__{row['task']}__s{row['seed']}.csv").open()))
        assert 90 <= len(curve) <= 130 and curve[-1]["step"] == row["steps"] == "999424"
        assert float(curve[-1]["episodic_return"]) == pytest.approx(float(row["last100"]), abs=0.01)


def test_speed_tables_are_made_from_the_results():
    for task in ("HalfCheetah-v5", "Hopper-v5"):
        runs = list(csv.DictReader((ROOT / "benchmarks" / "results" / "speed" / f"{task}.csv").open()))
        sb3 = [float(r["steps_per_second"]) for r in runs if r["contestant"] == "sb3"]
        ours = [float(r["steps_per_second"]) for r in runs if r["contestant"] == "default"]
        ratio = statistics.median(a / b for a, b in zip(ours, sb3, strict=True))
        assert len(sb3) >= 3
        text = (ROOT / "benchmarks" / "README.md").read_text()
        row = next(x for x in text[text.index(f"| {task} | steps/s") :].splitlines() if x.startswith("| default |"))
        assert row.startswith(f"| default | {statistics.median(ours):.0f} (") and f" | {ratio:.1f} (" in row

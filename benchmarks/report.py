"""Tables and pictures from the stored results, and nothing else."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mode

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from rliable import library as rly
from rliable import metrics
from scipy.stats import bootstrap, trim_mean
from tqdm import tqdm

from benchmarks.runner import RESULTS, ROOT, Job, code_hash, read_index, script_path
from benchmarks.suites import NINE, SUITES

RESAMPLES = 1000
PAPERS = {"PPO": "1707.06347", "TRPO": "1502.05477", "ACER": "1611.01224"}
PEER_OF = {"ppo_continuous": "sb3_ppo", "trpo_continuous": "sb3_trpo"}
PEER_NAMES = {"sb3_ppo": "Stable-Baselines3 PPO", "sb3_trpo": "sb3-contrib TRPO"}
BARS = {"CartPole-v1": 475, "Acrobot-v1": -100, "ALE/Pong-v5": 18}  # Gymnasium's reward_threshold; Pong ends at 21
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's, for all eyes
SPEED_NAMES = {"default": "this script", "16 x 128": "this script", "bf16": "in bfloat16"}
SPEED_NAMES |= {"EnvPool": "this script with EnvPool", "peer + EnvPool": "the peer with EnvPool"}
STYLES = ("-", "--", "-.", ":")
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
READMES += (RESULTS / "speed" / "README.md", RESULTS / "tuning" / "README.md")


def references() -> dict[tuple[str, str], float]:
    """(task, algorithm) -> score, of references.csv; the algorithm `random` too."""
    rows = csv.DictReader((ROOT / "benchmarks" / "references.csv").open())
    return {(row["task"], row["algorithm"]): float(row["score"]) for row in rows}


def algorithm(label: str) -> str:
    """PPO, TRPO or ACER: whose published results a label is held against."""
    return next(name for name in ("TRPO", "PPO", "ACER") if name.lower() in label)


def scores(suite: str, column: str = "last100") -> dict[str, dict[str, list[float]]]:
    """label -> task -> score of each seed, in the order of the suite."""
    rows = read_index(suite)
    order = dict.fromkeys((e.label, e.task) for e in SUITES[suite])
    found = defaultdict(dict)
    for label, task in order:
        mine = sorted((r for r in rows if (r["label"], r["task"]) == (label, task)), key=lambda r: int(r["seed"]))
        if values := [float(r[column]) for r in mine if r[column]]:
            found[label][task] = values
    return dict(found)


def interval(values: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the mean over seeds; of three seeds it is their range, and covers less than 95 %."""
    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap((values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def cell(values: list[float] | None) -> str:
    """mean [interval] (number of seeds), with one decimal below 100."""
    if not values:
        return ""
    digits = 0 if abs(np.mean(values)) >= 100 else 1
    low, high = interval(values)
    spread = f" [{low:,.{digits}f}, {high:,.{digits}f}]" if len(values) > 1 else ""
    return f"{np.mean(values):,.{digits}f}{spread} ({len(values)})"


def versus_table(ours: str) -> str:
    """Markdown: a row for each task of `mujoco`: a script, its peer, and the best published score."""
    theirs, published = PEER_OF[ours], references()
    columns = [
        scores(suite, column).get(label, {})
        for suite, label in (("mujoco", ours), ("mujoco-peers", theirs))
        for column in ("last100", "deterministic")
    ]
    names = [f"{name}, {what}" for name in (f"`{ours}.py`", PEER_NAMES[theirs]) for what in ("training", "mean actions")]
    lines = [f"| task | {' | '.join(names)} | published |", "|---" * 6 + "|"]
    for task in columns[0]:
        cells = [cell(column.get(task)) for column in columns]
        value = published[task, algorithm(ours)]
        lines.append(f"| {task} | {' | '.join(cells)} | {value:,.{0 if abs(value) >= 100 else 1}f} |")
    return "\n".join(lines) if columns[0] else ""


def runs_table(suite: str) -> str:
    """Markdown: a row for each run, for suites of few and long ones that differ in steps."""
    lines = ["| command | steps | last 100 training episodes | deterministic | sampled | hours |", "|---" * 6 + "|"]
    for row in read_index(suite):
        scores = [f"{float(row[mode]):.1f}" if row[mode] else "" for mode in ("last100", "deterministic", "sampled")]
        hours = f"{float(row['seconds']) / 3600:.1f}"
        lines.append(f"| `{row['command']}` | {int(row['steps']):,} | {' | '.join(scores)} | {hours} |")
    return "\n".join(lines)


def worst_drop(rows: np.ndarray, zero: float) -> float:
    """The lowest ratio of the return to its best so far, both above `zero`, a random policy's, from step 300,000 on.

    rows (points, 2) -> 1 where it never fell.
    """
    rows = rows[~np.isnan(rows[:, 1])]
    gained = rows[:, 1] - zero
    ratios = gained / np.maximum.accumulate(gained)
    return min([1.0, *ratios[rows[:, 0] >= 300_000].tolist()])


def trust_table(suite: str) -> str:
    """Markdown, for TRPO: the largest mean KL of any iteration and the lowest return as a share of its best so far.

    Runs that did not measure the KL of the iteration are left out.
    """
    lines = ["| task | largest mean KL of an iteration | lowest / best so far, after step 300,000 |", "|---|---|---|"]
    for task in dict.fromkeys(e.task for e in SUITES[suite]):
        runs = [r for r in read_index(suite) if r["task"] == task and r["script"] == "trpo_continuous"]
        if runs:
            curves = [curve(suite, r["label"], task, int(r["seed"])) for r in runs]
            curves = [c for c in curves if not np.isnan(c[:, 2]).any()]
            if not curves:
                continue
            zero = references()[task, "random"]
            kl, drop = max(c[:, 2].max() for c in curves), min(worst_drop(c[:, :2], zero) for c in curves)
            lines.append(f"| {task} | {kl:.5f} | {drop:.2f} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def steps_table(suite: str) -> str:
    """Markdown: steps after which the mean of the last 100 training episodes first reached the bar of BARS."""
    tasks = [task for task in dict.fromkeys(e.task for e in SUITES[suite]) if task in BARS]
    lines = [f"| | {' | '.join(f'steps to {BARS[t]} on {t}' for t in tasks)} |", "|---" * (len(tasks) + 1) + "|"]
    for label, runs in scores(suite).items():
        cells = []
        for task in tasks:
            seeds = [r["seed"] for r in read_index(suite) if (r["label"], r["task"]) == (label, task)]
            curves = [curve(suite, label, task, int(seed)) for seed in seeds]
            reached = [c[c[:, 1] >= BARS[task], 0][0] for c in curves if (c[:, 1] >= BARS[task]).any()]
            some = f"{len(reached)} of {len(curves)} seeds reach it"
            cells.append((cell(reached) if len(reached) == len(curves) else some) if task in runs else "")
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) if tasks else ""


def normalized(suite: str, tasks: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """label -> (seeds, tasks): random policy 0, published reference 1; of tasks with as many seeds as most, or more.

    With `tasks`: of these alone, and of labels that have run all of them.
    """
    published, result = references(), {}
    for label, found in scores(suite).items():
        kept = [t for t in found if (t, algorithm(label)) in published and (t, "random") in published]
        kept = [t for t in kept if not tasks or t in tasks]
        if kept:
            seeds = mode([len(found[t]) for t in kept])
            kept = [t for t in kept if len(found[t]) >= seeds]
            if tasks and len(kept) < len(tasks):
                continue
            zero, one = (np.array([published[t, a] for t in kept]) for a in ("random", algorithm(label)))
            raw = np.array([found[t][:seeds] for t in kept]).T
            result[label] = (raw - zero) / (one - zero)
    return result


def peer_tasks() -> tuple[str, ...]:
    """The tasks that the peers run."""
    return tuple(dict.fromkeys(entry.task for entry in SUITES["mujoco-peers"]))


def with_peers(suite: str) -> dict[str, np.ndarray]:
    """`normalized`; for `mujoco` also the peers, and the scripts on the peers' tasks alone."""
    data = normalized(suite)
    if suite != "mujoco":
        return data
    tasks, peers = peer_tasks(), normalized("mujoco-peers")
    few = normalized(suite, tasks)
    for ours, theirs in PEER_OF.items():
        if ours in few and theirs in peers:
            data[f"{ours}, {len(tasks)} tasks"] = few[ours]
            data[f"{PEER_NAMES[theirs]}, {len(tasks)} tasks"] = peers[theirs]
    return data


def estimates(data: dict, function: Callable) -> tuple[dict, dict]:
    """Values of a function of the scores and their 95 % stratified bootstrap intervals, the same in every run."""
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever its argument random_state says
    return rly.get_interval_estimates(data, function, reps=RESAMPLES)


def aggregate_table(suite: str) -> str:
    """Markdown: interquartile mean over all runs, 95 % stratified bootstrap intervals."""
    data = with_peers(suite)
    if not data:
        return ""
    lines = ["| | IQM [95 % interval] | tasks | seeds |", "|---|---|---|---|"]
    points, intervals = estimates(data, lambda x: np.array([metrics.aggregate_iqm(x)]))
    for label, x in data.items():
        low, high = intervals[label][:, 0]
        spread = f" [{low:.2f}, {high:.2f}]" if len(x) > 1 else ""
        lines.append(f"| {label} | {points[label][0]:.2f}{spread} | {x.shape[1]} | {x.shape[0]} |")
    return "\n".join(lines)


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Interquartile mean: the mean of the middle half."""
    return trim_mean(values, 0.25, axis)


def candidates() -> dict[str, list[tuple[str, np.ndarray]]]:
    """script -> (label, scores (pairs, 2)) of each candidate of the suite `tuning`, sorted by label: the default first.

    A row has the scores of the candidate and of the default for one task and seed. A run's score is the mean of its
    training and its deterministic score, normalized: random policy 0, published reference 1.
    """
    published, runs = references(), defaultdict(dict)
    for row in read_index("tuning"):
        task = row["task"].removeprefix("envpool:")
        zero, one = published[task, "random"], published[task, algorithm(row["label"])]
        score = (float(row["last100"]) + float(row["deterministic"])) / 2
        runs[row["script"], row["label"]][task, row["seed"]] = (score - zero) / (one - zero)
    found = defaultdict(list)
    for script, label in sorted(runs):
        mine, default = runs[script, label], runs[script, algorithm(script).lower()]
        pairs = sorted(mine.keys() & default.keys())
        if pairs:
            found[script].append((label, np.array([[mine[pair], default[pair]] for pair in pairs])))
    return dict(found)


def difference(pairs: np.ndarray) -> tuple[float, float, float]:
    """IQM of a candidate less that of the default, with its 95 % bootstrap interval over pairs. pairs (n, 2)."""
    mine, default = pairs.T
    value = float(iqm(mine) - iqm(default))
    if len(pairs) == 1 or np.array_equal(mine, default):
        return value, value, value
    found = bootstrap(
        (mine, default),
        lambda a, b, axis: iqm(a, axis) - iqm(b, axis),
        n_resamples=RESAMPLES,
        paired=True,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return value, float(found.confidence_interval.low), float(found.confidence_interval.high)


def tuning_table() -> str:
    """Markdown: the IQM of each candidate, and its difference from the default's on the same tasks and seeds."""
    lines = ["| candidate | flags | IQM | less the default's [95 % interval] | runs |", "|---|---|---|---|---|"]
    pattern = re.compile(r" --seed \d+ (.*)--env-threads")
    flags = {row["label"]: pattern.search(row["command"])[1].strip() for row in read_index("tuning")}
    for rows in candidates().values():
        for label, pairs in rows:
            value, low, high = difference(pairs)
            less = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if flags[label] else ""
            shown = f"`{flags[label]}`" if flags[label] else "the default"
            lines.append(f"| {label} | {shown} | {iqm(pairs[:, 0]):.2f} | {less} | {len(pairs)} |")
    return "\n".join(lines)


def plot_departures() -> None:
    """What each departure of PPO from the paper buys: the IQM with all of them less the IQM without this one."""
    rows = candidates().get("ppo_continuous", [])
    rows = [(label, pairs) for label, pairs in rows if "-without-" in label and not label.endswith("-average")]
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(7, 0.3 * len(rows) + 1), layout="constrained")
    for i, (_, pairs) in enumerate(rows):
        value, low, high = (-x for x in difference(pairs))
        axis.plot([low, high], [i, i], color=COLOURS[0], linewidth=8, alpha=0.4, solid_capstyle="butt")
        axis.plot([value], [i], "|", color=COLOURS[0], markersize=14, markeredgewidth=2)
    axis.set_yticks(range(len(rows)), [label.split("-without-")[1] for label, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color="#888888", linewidth=0.8)
    axis.set_xlabel("gain in normalized score (interquartile mean, 95 % interval)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    save(figure, RESULTS / "tuning" / "departures")


def improvement_lines(ours: str, theirs: str) -> list[str]:
    """Probability that a run of a script scores higher than one of its peer on the same task."""
    a, b = scores(ours), scores(theirs)
    lines = []
    for mine, other in PEER_OF.items():
        tasks = [t for t in b.get(other, {}) if t in a.get(mine, {})]
        if tasks:
            sizes = [min(len(x[t]) for t in tasks) for x in (a[mine], b[other])]
            pair = [np.array([x[t][:n] for t in tasks]).T for x, n in zip((a[mine], b[other]), sizes, strict=True)]
            name = f"{mine},{other}"
            point, bounds = estimates({name: tuple(pair)}, metrics.probability_of_improvement)
            low, high = np.ravel(bounds[name])
            text = f"- P({mine} > {other}) = {float(np.ravel(point[name])[0]):.2f} [{low:.2f}, {high:.2f}]"
            lines.append(f"{text}, {len(tasks)} tasks, {sizes[0]} against {sizes[1]} seeds")
    return lines


def stale_line(suite: str) -> str:
    """How many results come from another version of a script, or of its flags, than those in the tree."""
    entries = {(e.label, e.task): e for e in SUITES[suite]}
    hashes = {script: code_hash(script_path(script)) for script in {e.script for e in SUITES[suite]}}
    old, runs = defaultdict(int), read_index(suite)
    for row in runs:
        entry = entries[row["label"], row["task"]]
        if Job(suite, entry, int(row["seed"]), hashes[entry.script]).key != row["key"]:
            old[row["label"]] += 1
    if not old:
        return "All results are of the scripts as they are."
    listed = ", ".join(f"{number} of {label}" for label, number in old.items())
    return f"Of {len(runs)} runs {sum(old.values())} are of an older script or flags: {listed}."


def curve(suite: str, label: str, task: str, seed: int) -> np.ndarray:
    """(points, 3): step, mean return of the last 100 training episodes, largest mean KL of an iteration since or NaN."""
    path = RESULTS / suite / f"{label}__{Path(task).name}__s{seed}.csv"
    rows = list(csv.DictReader(path.open()))
    columns = ("step", "episodic_return", "largest_kl_iteration")
    return np.array([[row.get(name) or "nan" for name in columns] for row in rows], float)


def style(i: int) -> dict[str, str]:
    """Colour and line of the i-th label."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def save(figure, path: Path) -> None:
    """SVG and PNG, the same bytes for the same data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    figure.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None}, bbox_inches="tight")
    plt.close(figure)


def plot_curves(suite: str) -> None:
    """Learning curves: mean over seeds, and the 95 % bootstrap interval as a band; the published reference dotted.

    Those of `mujoco` have the peers', too.
    """
    published = references()
    suites = ("mujoco", "mujoco-peers") if suite == "mujoco" else (suite,)
    runs = defaultdict(list)  # (suite, label, task) -> seeds
    for name in suites:
        for row in read_index(name):
            runs[name, row["label"], row["task"]].append(int(row["seed"]))
    tasks = [t for t in dict.fromkeys(e.task for e in SUITES[suite]) if any(t == task for _, _, task in runs)]
    entries = dict.fromkeys((name, e.label) for name in suites for e in SUITES[name])
    labels = [(name, label) for name, label in entries if any((name, label) == key[:2] for key in runs)]
    columns = min(3, len(tasks))
    height = -(-len(tasks) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(3.4 * columns, 2.5 * height), squeeze=False, layout="constrained"
    )
    for axis, task in zip(axes.flat, tasks, strict=False):
        for i, (name, label) in enumerate(labels):
            curves = [curve(name, label, task, seed)[:, :2] for seed in runs.get((name, label, task), ())]
            curves = [c for c in curves if not np.isnan(c[:, 1]).all()]  # no episode ended
            if not curves:
                continue
            start = max(c[~np.isnan(c[:, 1]), 0][0] for c in curves)
            grid = np.linspace(start, min(c[-1, 0] for c in curves), 100)
            values = np.array([np.interp(grid, *c[~np.isnan(c[:, 1])].T) for c in curves])
            axis.plot(grid / 1e6, values.mean(0), label=PEER_NAMES.get(label, label), linewidth=1.4, **style(i))
            if len(values) > 1:
                low, high = np.array([interval(list(v)) for v in values.T]).T
                axis.fill_between(grid / 1e6, low, high, color=style(i)["color"], alpha=0.2, linewidth=0)
            if label not in PEER_NAMES and (task, algorithm(label)) in published:
                line = {"color": style(i)["color"], "linestyle": ":", "linewidth": 0.9}
                axis.axhline(published[task, algorithm(label)], label=f"best published {algorithm(label)}", **line)
        axis.set_title(task, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    figure.supxlabel("environment steps, millions", fontsize=9)
    figure.supylabel("return, mean of 100 episodes", fontsize=9)
    lines = {name: line for axis in axes.flat for line, name in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(lines.values(), lines.keys(), loc="outside upper center", ncols=min(len(lines), 3), fontsize=8)
    save(figure, RESULTS / suite / "curves")


def plot_aggregate(suite: str) -> None:
    """Left, interquartile means with intervals; right, performance profiles."""
    data = with_peers(suite)
    if not data:
        return
    points, intervals = estimates(data, lambda x: np.array([metrics.aggregate_iqm(x)]))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.3 * len(data) + 1.6))
    for i, label in enumerate(data):
        low, high = intervals[label][:, 0]
        left.plot([low, high], [i, i], color=style(i)["color"], linewidth=8, alpha=0.4, solid_capstyle="butt")
        left.plot(points[label], [i], "|", color=style(i)["color"], markersize=16, markeredgewidth=2)
    left.set_yticks(range(len(data)), list(data), fontsize=8)
    left.set_ylim(len(data) - 0.5, -0.5)
    left.set_xlim(left=0)
    left.set_xlabel("interquartile mean of normalized scores\n(random policy 0, best published 1)", fontsize=8)
    levels = np.linspace(0, 1.6, 81)
    np.random.seed(0)
    whole = {label: x for label, x in data.items() if " tasks" not in label}
    profiles, bands = rly.create_performance_profile(whole, levels, reps=RESAMPLES)
    for i, (label, profile) in enumerate(profiles.items()):
        right.plot(levels, profile, label=label, linewidth=1.4, **style(i))
        right.fill_between(levels, *bands[label], color=style(i)["color"], alpha=0.2, linewidth=0)
    right.set_xlabel("normalized score τ", fontsize=8)
    right.set_ylabel("share of runs above τ", fontsize=8)
    right.legend(fontsize=7)
    for axis in (left, right):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=7)
    figure.tight_layout()
    save(figure, RESULTS / suite / "aggregate")


def speed_files() -> dict[tuple[str, str], list[dict[str, str]]]:
    """(script, task) -> rows of results/speed, PPO first."""
    folder = RESULTS / "speed"
    files = {path.stem: path for path in folder.glob("*__*.csv")}
    order = ("ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete")
    stems = sorted(files, key=lambda stem: (order.index(stem.split("__")[0]), "HalfCheetah" not in stem, stem))
    return {tuple(stem.split("__")): list(csv.DictReader(files[stem].open())) for stem in stems}


def speed_ratios(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """contestant -> steps/s as a multiple of the peer's, the first contestant's, of each repetition."""
    runs = defaultdict(dict)
    for row in rows:
        runs[row["contestant"]][row["repetition"]] = float(row["steps_per_second"])
    peer = next((runs[name] for name in ("sb3", "sb3-contrib", "ppo_atari") if name in runs), {})
    return {name: [speed / peer[i] for i, speed in found.items() if i in peer] for name, found in runs.items()}


def speed_table() -> str:
    """Markdown: medians over repetitions, and their ranges."""
    lines = ["| script, task | contestant | steps/s (range) | times the peer (range) | start-up cold / warm, s | MB |"]
    lines.append("|---" * 6 + "|")
    for (script, task), rows in speed_files().items():
        for name, ratios in speed_ratios(rows).items():
            mine = [row for row in rows if row["contestant"] == name]
            speeds = [float(row["steps_per_second"]) for row in mine]
            cold, *warm = [float(row["start_up_seconds"]) for row in mine]
            memory = max(int(row["peak_megabytes"]) for row in mine)
            spread = f"{np.median(speeds):,.0f} ({min(speeds):,.0f}-{max(speeds):,.0f})"
            ratio = f"{np.median(ratios):.1f} ({min(ratios):.1f}-{max(ratios):.1f})"
            start = f"{cold:.0f} / {np.median(warm):.0f}"
            lines.append(f"| {script}, {task} | {name} | {spread} | {ratio} | {start} | {memory:,} |")
    return "\n".join(lines)


def plot_speed() -> None:
    """Bars of steps/s as a multiple of the peer's: median over repetitions, and their range. From results/speed."""
    bars = []  # (script and task, contestant, ratio to the peer in each repetition)
    for (script, task), rows in speed_files().items():
        ratios = speed_ratios(rows)
        for name in ("default", "16 x 128", "bf16", "EnvPool", "peer + EnvPool"):
            if name in ratios:
                bars.append((f"{script}, {task}", SPEED_NAMES[name], ratios[name]))
    if not bars:
        return
    figure, axis = plt.subplots(figsize=(7.5, 0.28 * len(bars) + 1), layout="constrained")
    colours = dict(zip(dict.fromkeys(SPEED_NAMES.values()), COLOURS, strict=False))
    heads = {}  # script and task -> height of its first bar
    for i, (head, name, ratios) in enumerate(bars):
        y = i + len(heads.keys() - {head}) / 2  # half a bar between two tasks
        heads.setdefault(head, y)
        median = np.median(ratios)
        spread = [[median - min(ratios)], [max(ratios) - median]]
        axis.barh(y, median, xerr=spread, color=colours[name], label=name, capsize=2, height=0.8)
        axis.text(max(ratios) + 0.1, y, f"{median:.1f}", va="center", fontsize=8)
    axis.set_yticks(list(heads.values()), list(heads), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * max(max(ratios) for _, _, ratios in bars))
    axis.axvline(1, color="#888888", linewidth=0.8)
    axis.set_xlabel("steps per second, times those of Stable-Baselines3's PPO or sb3-contrib's TRPO", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    handles, labels = axis.get_legend_handles_labels()
    found = dict(zip(labels, handles, strict=True))
    names = [name for name in colours if name in found]
    axis.legend([found[name] for name in names], names, fontsize=8, loc="lower right")
    save(figure, RESULTS / "speed" / "speed")


def front_table() -> str:
    """Markdown: what a script is, how good and how fast it is beside its peer, and how long."""
    head = "| script | paper | score, 9 tasks | score on 4 tasks: script, peer | times the peer's steps/s | with EnvPool"
    lines = [f"{head} | lines to read |", "|---" * 7 + "|"]
    whole, few, peers = normalized("mujoco", NINE), normalized("mujoco", peer_tasks()), normalized("mujoco-peers")
    speeds = speed_files()
    for script in ("ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete"):
        score, pair = "", ""
        if script in whole:
            score = f"{iqm(whole[script].ravel()):.2f}"
        if script in few and PEER_OF[script] in peers:
            pair = ", ".join(f"{iqm(x.ravel()):.2f}" for x in (few[script], peers[PEER_OF[script]]))
        task = "Breakout-v5" if script == "ppo_atari" else "HalfCheetah-v5"
        ratios = speed_ratios(speeds.get((script, task), []))
        medians = {name: f"{np.median(values):.1f}" for name, values in ratios.items()}
        speed = medians.get("default", medians.get("16 x 128", ""))
        upper, _ = script_path(script).read_text().split("# The algorithm ends here")
        name = algorithm(script)
        cells = [f"[`{script}.py`]({script}.py)", f"[{name}](https://arxiv.org/abs/{PAPERS[name]})"]
        cells += [score, pair, speed, medians.get("EnvPool", ""), f"{len(upper.splitlines()):,}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def blocks() -> dict[str, str]:
    """name -> Markdown between `<!-- report: name -->` and `<!-- end -->` in the README files."""
    made = {}
    if read_index("tuning"):
        made["tuning"] = tuning_table()
    for suite in SUITES:
        if suite != "tuning" and read_index(suite):
            made[f"{suite} runs"] = runs_table(suite)
            if aggregate := aggregate_table(suite):
                made[f"{suite} aggregate"] = aggregate
            if steps := steps_table(suite):
                made[f"{suite} steps"] = steps
            if trust := trust_table(suite):
                made[f"{suite} trust region"] = trust
            made[f"{suite} older"] = stale_line(suite)
    for ours in PEER_OF:
        made[f"{ours} and its peer"] = versus_table(ours)
    made["speed"] = speed_table()
    made["front"] = front_table()
    if lines := improvement_lines("mujoco", "mujoco-peers"):
        made["improvement"] = "\n".join(lines)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """A README with its blocks as `made` has them."""
    pattern = re.compile(r"(<!-- report: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n{made.get(m[2], 'No runs yet.')}\n\n{m[3]}", text)


def write_report() -> list[Path]:
    """Pictures of every suite that has results, and the tables in the README files; -> what was written."""
    matplotlib.use("Agg")
    plt.rcParams |= {"svg.hashsalt": "trust-region", "axes.spines.top": False, "axes.spines.right": False}
    pictures = [plot_departures, plot_speed]
    for suite in SUITES:
        if suite not in ("tuning", "mujoco-peers") and read_index(suite):
            pictures += [partial(plot_curves, suite), partial(plot_aggregate, suite)]
    for draw in tqdm(pictures, desc="pictures", disable=None):
        draw()
    made = blocks()
    for path in READMES:
        path.write_text(fill(path.read_text(), made))
    return [*READMES, *sorted(RESULTS.glob("*/*.svg"))]

"""The tables of the README files, made from the stored results alone."""

import csv
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from rliable import library as rly
from rliable import metrics
from scipy.stats import bootstrap, trim_mean

from benchmarks.runner import RESULTS, ROOT, Job, code_hash, read_index, run_name, script_path
from benchmarks.suites import NINE, SUITES

RESAMPLES = 1000  # of each bootstrap
PAPERS = {"PPO": "1707.06347", "TRPO": "1502.05477", "ACER": "1611.01224"}
SCRIPTS = ("ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete")
PEER_OF = {"ppo_continuous": "sb3_ppo", "trpo_continuous": "sb3_trpo"}
PEER_NAMES = {"sb3_ppo": "Stable-Baselines3 PPO", "sb3_trpo": "sb3-contrib TRPO"}
# Gymnasium's reward_threshold. Pong ends at 21
BARS = {"CartPole-v1": 475, "Acrobot-v1": -100, "ALE/Pong-v5": 18}
SCORES_ELSEWHERE = {  # for the front page
    "ppo_atari": "[Atari](benchmarks/README.md#atari)",
    "acer_discrete": "[CartPole, Acrobot](benchmarks/README.md#cartpole-and-acrobot)",
}
READMES = (
    ROOT / "README.md",
    ROOT / "benchmarks" / "README.md",
    RESULTS / "mujoco" / "README.md",
    RESULTS / "atari" / "README.md",
    RESULTS / "speed" / "README.md",
    RESULTS / "tuning" / "README.md",
)


# ---- Stored results ------------------------------------------------------------------------------


def references() -> dict[tuple[str, str], float]:
    """Return references.csv: (task, algorithm) -> score. The algorithm `random` is there too."""
    rows = csv.DictReader((ROOT / "benchmarks" / "references.csv").open())
    return {(row["task"], row["algorithm"]): float(row["score"]) for row in rows}


def algorithm(label: str) -> str:
    """Return the algorithm whose published scores a label is held against."""
    return next(name for name in ("TRPO", "PPO", "ACER") if name.lower() in label)


def by_seed(suite: str, label: str, task: str) -> dict[int, dict[str, str]]:
    """Return seed -> row of index.csv, sorted by seed."""
    rows = [row for row in read_index(suite) if (row["label"], row["task"]) == (label, task)]
    return {int(row["seed"]): row for row in sorted(rows, key=lambda row: int(row["seed"]))}


def scores(suite: str, column: str = "last100") -> dict[str, dict[str, list[float]]]:
    """Return label -> task -> score of each seed, in the order of the suite."""
    found = defaultdict(dict)
    for entry in SUITES[suite]:
        rows = by_seed(suite, entry.label, entry.task).values()
        values = [float(row[column]) for row in rows if row[column]]
        if values:
            found[entry.label][entry.task] = values
    return dict(found)


def curves(suite: str, label: str, task: str) -> list[np.ndarray]:
    """Return the learning curve (points, 3) of each seed.

    The columns are the step, the mean return of the last 100 training episodes, and the largest
    mean KL of an iteration since the point before. NaN where there is none.
    """
    found = []
    for seed in by_seed(suite, label, task):
        rows = csv.DictReader((RESULTS / suite / f"{run_name(label, task, seed)}.csv").open())
        columns = ("step", "episodic_return", "largest_kl_iteration")
        points = [[row.get(name) or "nan" for name in columns] for row in rows]
        found.append(np.array(points, float))
    return found


def speed_files() -> dict[tuple[str, str], list[dict[str, str]]]:
    """Return (script, task) -> rows of results/speed. HalfCheetah is a script's first task."""
    found = {}
    for script in SCRIPTS:
        paths = sorted((RESULTS / "speed").glob(f"{script}__*.csv"))
        for path in sorted(paths, key=lambda path: "HalfCheetah" not in path.name):
            _, task = path.stem.split("__")
            found[script, task] = list(csv.DictReader(path.open()))
    return found


def speed_ratios(rows: list[dict[str, str]]) -> dict[str, list[float]]:
    """Return contestant -> its steps/s in each repetition, divided by the peer's in the same."""
    runs = defaultdict(dict)  # contestant -> repetition -> steps/s
    for row in rows:
        runs[row["contestant"]][row["repetition"]] = float(row["steps_per_second"])
    if not runs:
        return {}
    peer = runs[rows[0]["contestant"]]  # the peer starts the first repetition
    ratios = defaultdict(list)
    for name, found in runs.items():
        for repetition, speed in found.items():
            if repetition in peer:
                ratios[name].append(speed / peer[repetition])
    return dict(ratios)


# ---- Statistics ----------------------------------------------------------------------------------


def interval(values: list[float]) -> tuple[float, float]:
    """Return the 95 % bootstrap interval of the mean over seeds.

    Of three seeds it is their range, and covers less than 95 %.
    """
    if len(set(values)) == 1:
        return values[0], values[0]
    found = bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def iqm(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return the interquartile mean: the mean of the middle half."""
    return trim_mean(values, 0.25, axis)


def normalized(
    suite: str, tasks: Sequence[str] = (), column: str = "last100"
) -> dict[str, np.ndarray]:
    """Return label -> scores (seeds, tasks): a random policy is 0, the published reference 1.

    With `tasks`: of these alone, and of the labels that have run all of them. If some tasks have
    more seeds than others, their last seeds are left out.
    """
    published = references()
    result = {}
    for label, found in scores(suite, column).items():
        name = algorithm(label)
        kept = [t for t in found if (t, name) in published and (t, "random") in published]
        if tasks:
            kept = [t for t in kept if t in tasks]
        if not kept or len(kept) < len(tasks):
            continue
        seeds = min(len(found[t]) for t in kept)
        raw = np.array([found[t][:seeds] for t in kept]).T  # (seeds, tasks)
        zero = np.array([published[t, "random"] for t in kept])
        one = np.array([published[t, name] for t in kept])
        result[label] = (raw - zero) / (one - zero)
    return result


def peer_tasks() -> list[str]:
    """Return the tasks that the peers run."""
    return list(dict.fromkeys(entry.task for entry in SUITES["mujoco-peers"]))


def on_peer_tasks() -> dict[str, np.ndarray]:
    """Return the scripts and their peers on the peers' tasks, with names that say so."""
    tasks = peer_tasks()
    ours = normalized("mujoco", tasks)
    peers = normalized("mujoco-peers", tasks)
    data = {}
    for script, peer in PEER_OF.items():
        if script in ours and peer in peers:
            data[f"{script}, {len(tasks)} tasks"] = ours[script]
            data[f"{PEER_NAMES[peer]}, {len(tasks)} tasks"] = peers[peer]
    return data


def estimates(data: dict, function: Callable) -> tuple[dict, dict]:
    """Return values of a function of the scores and their 95 % stratified bootstrap intervals.

    They are the same in every run.
    """
    np.random.seed(0)  # rliable draws from NumPy's global generator, whatever its argument says
    return rly.get_interval_estimates(data, function, reps=RESAMPLES)


def iqm_estimates(data: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Return label -> interquartile mean over all runs, and the ends of its interval."""
    points, bounds = estimates(data, lambda x: np.array([iqm(x.ravel())]))
    return {label: (float(points[label][0]), *map(float, bounds[label][:, 0])) for label in data}


def candidates() -> dict[str, list[tuple[str, np.ndarray]]]:
    """Return script -> (label, scores (pairs, 2)) of each candidate of the suite `tuning`.

    A row has the scores of the candidate and of the default for one task and seed. A run's score is
    the mean of its training and its deterministic score, normalized. Sorted by label: the default
    is first.
    """
    published = references()
    runs = defaultdict(dict)  # (script, label) -> (task, seed) -> score
    for row in read_index("tuning"):
        task = row["task"].removeprefix("envpool:")
        zero = published[task, "random"]
        one = published[task, algorithm(row["label"])]
        score = (float(row["last100"]) + float(row["deterministic"])) / 2
        runs[row["script"], row["label"]][task, row["seed"]] = (score - zero) / (one - zero)
    found = defaultdict(list)
    for script, label in sorted(runs):
        mine = runs[script, label]
        default = runs[script, algorithm(script).lower()]
        both = sorted(mine.keys() & default.keys())
        if both:
            pairs = np.array([[mine[pair], default[pair]] for pair in both])
            found[script].append((label, pairs))
    return dict(found)


def difference(pairs: np.ndarray) -> tuple[float, float, float]:
    """Return the IQM of a candidate less that of the default, and the ends of its 95 % interval.

    pairs (n, 2). The bootstrap draws pairs.
    """
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


def worst_drop(rows: np.ndarray, zero: float) -> float:
    """Return the lowest ratio of the return to its best so far, from step 300,000 on.

    Both are counted from `zero`, a random policy's return. rows (points, 2). 1 if it never fell.
    """
    rows = rows[~np.isnan(rows[:, 1])]
    gained = rows[:, 1] - zero
    ratios = gained / np.maximum.accumulate(gained)
    return min([1.0, *ratios[rows[:, 0] >= 300_000].tolist()])


# ---- Tables --------------------------------------------------------------------------------------


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown, or nothing if there are no rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    rule = "|---" * len(head) + "|"
    return "\n".join([f"| {' | '.join(head)} |", rule, *lines]) if lines else ""


def number(value: float) -> str:
    """Return a score with one decimal below 100."""
    return f"{value:,.{0 if abs(value) >= 100 else 1}f}"


def cell(values: list[float] | None) -> str:
    """Return mean [interval] (number of seeds), with one decimal if the mean is below 100."""
    if not values:
        return ""
    digits = 0 if abs(np.mean(values)) >= 100 else 1
    text = f"{np.mean(values):,.{digits}f}"
    if len(values) > 1:
        low, high = interval(values)
        text += f" [{low:,.{digits}f}, {high:,.{digits}f}]"
    return f"{text} ({len(values)})"


def versus_table(ours: str) -> str:
    """A row for each task of `mujoco`: a script, its peer, and the published score."""
    peer = PEER_OF[ours]
    published = references()
    head = ["task"]
    columns = []  # task -> scores, for each column of the table but the first and the last
    for suite, label, name in (
        ("mujoco", ours, f"`{ours}.py`"),
        ("mujoco-peers", peer, PEER_NAMES[peer]),
    ):
        for column, what in (("last100", "training"), ("deterministic", "mean actions")):
            head.append(f"{name}, {what}")
            columns.append(scores(suite, column).get(label, {}))
    rows = []
    for task in columns[0]:
        cells = [cell(column.get(task)) for column in columns]
        best = published.get((task, algorithm(ours)))
        rows.append([task, *cells, "" if best is None else number(best)])
    return markdown([*head, "published"], rows)


def flags_table() -> str:
    """Training scores with flags that help one task, and those of `mujoco` on the same seeds."""
    head = ["script", "task", "flags", "training", "default flags", "gain"]
    rows = []
    for entry in SUITES["mujoco-flags"]:
        mine = by_seed("mujoco-flags", entry.label, entry.task)
        above = by_seed("mujoco", entry.script, entry.task)
        seeds = [seed for seed in mine if seed in above]
        if seeds:
            a = [float(mine[seed]["last100"]) for seed in seeds]
            b = [float(above[seed]["last100"]) for seed in seeds]
            gain = [x - y for x, y in zip(a, b, strict=True)]
            flags = entry.flags.partition(" --eval-episodes")[0]
            cells = [cell(values) for values in (a, b, gain)]
            rows.append([entry.script, entry.task, f"`{flags}`", *cells])
    return markdown(head, rows)


def runs_table(suite: str) -> str:
    """A row for each run, for suites of few and long ones that differ in steps."""
    head = ["command", "steps", "last 100 training episodes", "deterministic", "sampled", "hours"]
    rows = []
    for row in read_index(suite):
        columns = ("last100", "deterministic", "sampled")
        found = [f"{float(row[name]):.1f}" if row[name] else "" for name in columns]
        hours = f"{float(row['seconds']) / 3600:.1f}"
        rows.append([f"`{row['command']}`", f"{int(row['steps']):,}", *found, hours])
    return markdown(head, rows)


def trust_table(suite: str) -> str:
    """For TRPO: the largest mean KL of any iteration, and the lowest return after its best.

    Runs that did not measure the KL of the iteration are left out.
    """
    head = ["task", "largest mean KL of an iteration", "lowest / best so far, after step 300,000"]
    rows = []
    for task in dict.fromkeys(entry.task for entry in SUITES[suite]):
        found = curves(suite, "trpo_continuous", task)
        found = [points for points in found if not np.isnan(points[:, 2]).any()]
        zero = references().get((task, "random"))
        if found and zero is not None:
            largest = max(points[:, 2].max() for points in found)
            drop = min(worst_drop(points[:, :2], zero) for points in found)
            rows.append([task, f"{largest:.5f}", f"{drop:.2f}"])
    return markdown(head, rows)


def steps_table(suite: str) -> str:
    """The steps after which the mean of 100 training episodes first reached the score in BARS."""
    tasks = dict.fromkeys(entry.task for entry in SUITES[suite] if entry.task in BARS)
    head = ["", *[f"steps to {BARS[task]} on {task}" for task in tasks]]
    rows = []
    for label, runs in scores(suite).items():
        cells = []
        for task in tasks:
            found = curves(suite, label, task)
            above = [points[points[:, 1] >= BARS[task], 0] for points in found]
            first = [steps[0] for steps in above if len(steps) > 0]
            text = cell(first)
            if len(first) < len(found):
                text = f"{len(first)} of {len(found)} seeds reach it"
            cells.append(text if task in runs else "")
        rows.append([label, *cells])
    return markdown(head, rows) if tasks else ""


def aggregate_table(suite: str) -> str:
    """Interquartile means over all runs."""
    data = normalized(suite)
    if suite == "mujoco":
        data |= on_peer_tasks()
    rows = []
    for label, (value, low, high) in iqm_estimates(data).items() if data else ():
        seeds, tasks = data[label].shape
        spread = f" [{low:.2f}, {high:.2f}]" if seeds > 1 else ""
        rows.append([label, f"{value:.2f}{spread}", str(tasks), str(seeds)])
    return markdown(["", "IQM [95 % interval]", "tasks", "seeds"], rows)


def improvement_lines(ours: str, theirs: str) -> str:
    """The probability that a run of a script scores higher than one of its peer on the same task.

    `ours` and `theirs` are suites.
    """
    lines = []
    for script, peer in PEER_OF.items():
        mine = scores(ours).get(script, {})
        other = scores(theirs).get(peer, {})
        tasks = [task for task in other if task in mine]
        if not tasks:
            continue
        sizes = [min(len(found[task]) for task in tasks) for found in (mine, other)]
        a = np.array([mine[task][: sizes[0]] for task in tasks]).T
        b = np.array([other[task][: sizes[1]] for task in tasks]).T
        points, bounds = estimates({"pair": (a, b)}, metrics.probability_of_improvement)
        value = float(np.ravel(points["pair"])[0])
        low, high = np.ravel(bounds["pair"])
        text = f"- P({script} > {PEER_NAMES[peer]}) = {value:.2f} [{low:.2f}, {high:.2f}]"
        lines.append(f"{text}, {len(tasks)} tasks, {sizes[0]} against {sizes[1]} seeds")
    return "\n".join(lines)


def older_line(suite: str) -> str:
    """How many results are of another version of a script, or of other flags, than in the tree."""
    entries = {(entry.label, entry.task): entry for entry in SUITES[suite]}
    names = {entry.script for entry in SUITES[suite]}
    codes = {name: code_hash(script_path(name)) for name in names}
    old = defaultdict(int)
    rows = read_index(suite)
    for row in rows:
        entry = entries.get((row["label"], row["task"]))
        seed = int(row["seed"])
        if entry is None or Job(suite, entry, seed, codes[entry.script]).key != row["key"]:
            old[row["label"]] += 1
    if not old:
        return "All results are of the scripts as they are."
    if sum(old.values()) == len(rows):
        return f"All {len(rows)} results are of an older script or flags."
    listed = ", ".join(f"{count} of {label}" for label, count in old.items())
    return f"Of {len(rows)} runs {sum(old.values())} are of an older script or flags: {listed}."


def tuning_table() -> str:
    """The IQM of each candidate, and its difference from the default on the same runs."""
    head = ["candidate", "flags", "IQM", "less the default's [95 % interval]", "runs"]
    pattern = re.compile(r" --seed \d+ (.*)--env-threads")
    flags = {}  # label -> those of its first run. Later ones may have --gamma for Swimmer
    for row in read_index("tuning"):
        flags.setdefault(row["label"], pattern.search(row["command"])[1])
    rows = []
    for found in candidates().values():
        for label, pairs in found:
            shown = flags[label].strip()
            value, low, high = difference(pairs)
            less = f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if shown else ""
            shown = f"`{shown}`" if shown else "the default then"
            rows.append([label, shown, f"{iqm(pairs[:, 0]):.2f}", less, str(len(pairs))])
    return markdown(head, rows)


def speed_table() -> str:
    """Medians over repetitions, and their ranges."""
    head = ["script, task", "contestant", "steps/s (range)", "times the peer (range)"]
    head += ["start-up cold / warm, s", "MB"]
    rows = []
    for (script, task), runs in speed_files().items():
        for name, ratios in speed_ratios(runs).items():
            mine = [row for row in runs if row["contestant"] == name]
            speeds = [float(row["steps_per_second"]) for row in mine]
            cold, *warm = [float(row["start_up_seconds"]) for row in mine]
            start = f"{cold:.0f} / {np.median(warm):.0f}" if warm else f"{cold:.0f}"
            memory = max(int(row["peak_megabytes"]) for row in mine)
            figures = [with_range(speeds, 0), with_range(ratios, 1), start, f"{memory:,}"]
            rows.append([f"{script}, {task}", name, *figures])
    return markdown(head, rows)


def with_range(values: list[float], digits: int) -> str:
    """Return median (lowest-highest)."""
    median, low, high = (f"{x:,.{digits}f}" for x in (np.median(values), min(values), max(values)))
    return f"{median} ({low}-{high})"


def front_table() -> str:
    """What a script is, how good and how fast it is beside its peer, and how long."""
    head = ["script", "paper", "score, 9 tasks (seeds)", "4 tasks: script, peer"]
    head += ["4 tasks, mean actions: script, peer", "times the peer's steps/s", "with EnvPool"]
    head += ["lines to read"]
    on_nine = normalized("mujoco", NINE)
    speeds = speed_files()
    rows = []
    for script in SCRIPTS:
        name = algorithm(script)
        score = SCORES_ELSEWHERE.get(script, "")
        if script in on_nine:
            score = f"{iqm(on_nine[script].ravel()):.2f} ({len(on_nine[script])})"
        pairs = [beside_peer(script, column) for column in ("last100", "deterministic")]
        task = "Breakout-v5" if script == "ppo_atari" else "HalfCheetah-v5"
        ratios = speed_ratios(speeds.get((script, task), []))
        medians = {contestant: f"{np.median(values):.1f}" for contestant, values in ratios.items()}
        speed = medians.get("default", medians.get("16 x 128", ""))
        upper, _ = script_path(script).read_text().split("# The algorithm ends here")
        rows.append(
            [
                f"[`{script}.py`]({script}.py)",
                f"[{name}](https://arxiv.org/abs/{PAPERS[name]})",
                score,
                *pairs,
                speed,
                medians.get("EnvPool", ""),
                f"{len(upper.splitlines()):,}",
            ]
        )
    return markdown(head, rows)


def beside_peer(script: str, column: str) -> str:
    """Return the IQMs of a script and of its peer on the peer's tasks, or nothing."""
    ours = normalized("mujoco", peer_tasks(), column)
    peers = normalized("mujoco-peers", peer_tasks(), column)
    peer = PEER_OF.get(script)
    if script not in ours or peer not in peers:
        return ""
    return ", ".join(f"{iqm(x.ravel()):.2f}" for x in (ours[script], peers[peer]))


# ---- README files --------------------------------------------------------------------------------


def blocks() -> dict[str, str]:
    """Return name -> Markdown, for the lines between `<!-- report: name -->` and `<!-- end -->`."""
    made = {
        "front": front_table(),
        "speed": speed_table(),
        "tuning": tuning_table(),
        "flags": flags_table(),
        "improvement": improvement_lines("mujoco", "mujoco-peers"),
    }
    for script in PEER_OF:
        made[f"{script} and its peer"] = versus_table(script)
    for suite in SUITES:
        if suite != "tuning" and read_index(suite):
            made[f"{suite} runs"] = runs_table(suite)
            made[f"{suite} aggregate"] = aggregate_table(suite)
            made[f"{suite} steps"] = steps_table(suite)
            made[f"{suite} trust region"] = trust_table(suite)
            made[f"{suite} older"] = older_line(suite)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """Return a README with its blocks as `made` has them."""
    pattern = re.compile(r"(<!-- report: (.*?) -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda m: f"{m[1]}\n{made.get(m[2]) or 'No runs yet.'}\n\n{m[3]}", text)


def write_tables() -> tuple[Path, ...]:
    """Write the tables into the README files. Returns the files."""
    made = blocks()
    for path in READMES:
        path.write_text(fill(path.read_text(), made))
    return READMES

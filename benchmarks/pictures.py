"""The pictures of the README files, made from the stored results alone."""

import math
from functools import partial
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from rliable import library as rly
from tqdm import tqdm

from benchmarks.runner import RESULTS, read_index
from benchmarks.suites import SUITES
from benchmarks.tables import (
    PEER_NAMES,
    RESAMPLES,
    algorithm,
    candidates,
    curves,
    difference,
    interval,
    iqm_estimates,
    normalized,
    on_peer_tasks,
    references,
    speed_files,
    speed_ratios,
)

SPEED_NAMES = {  # contestants of speed.py that the picture shows
    "default": "this script",
    "16 x 128": "this script",
    "EnvPool": "this script with EnvPool",
    "peer + EnvPool": "the peer with EnvPool",
}
# Okabe and Ito's colours, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GREY = "#888888"
WITHOUT_PICTURES = ("tuning", "mujoco-peers", "mujoco-flags")  # of their own
STYLES = ("-", "--", "-.", ":")


def style(i: int) -> dict[str, str]:
    """Return colour and line of the i-th label."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[i % len(STYLES)]}


def save(figure, path: Path) -> None:
    """Write SVG and PNG, the same bytes for the same data."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None}, bbox_inches="tight")
    png = {"metadata": {"Software": None}, "dpi": 110}
    figure.savefig(path.with_suffix(".png"), bbox_inches="tight", **png)
    plt.close(figure)


def draw_interval(axis, y: int, value: float, low: float, high: float, colour: str) -> None:
    """Draw a value as a mark, and its interval as a bar, in row y."""
    axis.plot([low, high], [y, y], color=colour, linewidth=8, alpha=0.4, solid_capstyle="butt")
    axis.plot([value], [y], "|", color=colour, markersize=15, markeredgewidth=2)


def plot_curves(suite: str) -> None:
    """Learning curves: mean over seeds, and its 95 % bootstrap interval as a band.

    A dotted line is the published score. The curves of `mujoco` have the peers' beside them.
    """
    suites = ("mujoco", "mujoco-peers") if suite == "mujoco" else (suite,)
    run = {(name, row["label"], row["task"]) for name in suites for row in read_index(name)}
    entries = [(name, entry) for name in suites for entry in SUITES[name]]
    entries = [(name, e) for name, e in entries if (name, e.label, e.task) in run]
    labels = list(dict.fromkeys((name, entry.label) for name, entry in entries))
    tasks = list(dict.fromkeys(entry.task for _, entry in entries))
    width = min(3, len(tasks))
    height = math.ceil(len(tasks) / width)
    size = (3.4 * width, 2.5 * height)
    figure, axes = plt.subplots(height, width, figsize=size, squeeze=False, layout="constrained")
    for axis, task in zip(axes.flat, tasks, strict=False):
        for i, (name, label) in enumerate(labels):
            plot_label(axis, name, label, task, style(i))
        axis.set_title(task, fontsize=9)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.25)
    for axis in axes.flat[len(tasks) :]:
        axis.remove()
    figure.supxlabel("environment steps, millions", fontsize=9)
    figure.supylabel("return, mean of 100 episodes", fontsize=9)
    legend = {}  # name -> line
    for axis in figure.axes:
        lines, names = axis.get_legend_handles_labels()
        legend |= dict(zip(names, lines, strict=True))
    place = {"loc": "outside upper center", "ncols": min(len(legend), 3)}
    figure.legend(legend.values(), legend.keys(), fontsize=8, **place)
    save(figure, RESULTS / suite / "curves")


def plot_label(axis, suite: str, label: str, task: str, look: dict[str, str]) -> None:
    """One label's curve in one task's panel."""
    found = [points[~np.isnan(points[:, 1]), :2] for points in curves(suite, label, task)]
    found = [points for points in found if len(points) > 0]  # those in which an episode ended
    if not found:
        return
    start = max(points[0, 0] for points in found)
    end = min(points[-1, 0] for points in found)
    steps = np.linspace(start, end, 100)
    values = np.array([np.interp(steps, *points.T) for points in found])  # (seeds, 100)
    name = PEER_NAMES.get(label, label)
    axis.plot(steps / 1e6, values.mean(0), label=name, linewidth=1.4, **look)
    if len(values) > 1:
        low, high = np.array([interval(list(column)) for column in values.T]).T
        axis.fill_between(steps / 1e6, low, high, color=look["color"], alpha=0.2, linewidth=0)
    published = references().get((task, algorithm(label)))
    if label not in PEER_NAMES and published is not None:
        line = {"color": look["color"], "linestyle": ":", "linewidth": 0.9}
        axis.axhline(published, label=f"published {algorithm(label)}", **line)


def plot_aggregate(suite: str) -> None:
    """Left, interquartile means with intervals. Right, performance profiles."""
    whole = normalized(suite)
    if not whole:
        return
    data = whole | on_peer_tasks() if suite == "mujoco" else whole
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 0.3 * len(data) + 1.6))
    for i, (value, low, high) in enumerate(iqm_estimates(data).values()):
        draw_interval(left, i, value, low, high, style(i)["color"])
    left.set_yticks(range(len(data)), list(data), fontsize=8)
    left.set_ylim(len(data) - 0.5, -0.5)
    left.set_xlim(left=0)
    scale = "random policy 0, published score 1"
    left.set_xlabel(f"interquartile mean of normalized scores\n({scale})", fontsize=8)
    levels = np.linspace(0, 1.6, 81)
    np.random.seed(0)
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


def plot_departures() -> None:
    """What each departure of PPO from the paper buys: the default's IQM less the one without it."""
    rows = []
    for label, pairs in candidates().get("ppo_continuous", []):
        _, _, name = label.partition("-without-")
        if name and not name.endswith("-average"):
            rows.append((name, difference(pairs)))
    if not rows:
        return
    figure, axis = plt.subplots(figsize=(7, 0.3 * len(rows) + 1), layout="constrained")
    for i, (_, (value, low, high)) in enumerate(rows):
        draw_interval(axis, i, -value, -high, -low, COLOURS[0])
    axis.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axis.invert_yaxis()
    axis.axvline(0, color=GREY, linewidth=0.8)
    axis.set_xlabel("gain in normalized score (interquartile mean, 95 % interval)", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    save(figure, RESULTS / "tuning" / "departures")


def plot_speed() -> None:
    """Steps/s as a multiple of the peer's: median over repetitions, and their range."""
    groups = []  # ("script, task", [(name of the contestant, ratios)])
    for (script, task), rows in speed_files().items():
        ratios = speed_ratios(rows)
        bars = [(SPEED_NAMES[name], ratios[name]) for name in SPEED_NAMES if name in ratios]
        if bars:
            groups.append((f"{script}, {task}", bars))
    if not groups:
        return
    colours = dict(zip(dict.fromkeys(SPEED_NAMES.values()), COLOURS, strict=False))
    count = sum(len(bars) for _, bars in groups)
    figure, axis = plt.subplots(figsize=(7.5, 0.28 * count + 1), layout="constrained")
    legend = {}  # name of the contestant -> bar
    heads = {}  # "script, task" -> height of its first bar
    y = 0.0
    longest = 0.0
    for head, bars in groups:
        heads[head] = y
        for name, ratios in bars:
            median = np.median(ratios)
            spread = [[median - min(ratios)], [max(ratios) - median]]
            look = {"color": colours[name], "capsize": 2, "height": 0.8}
            legend[name] = axis.barh(y, median, xerr=spread, **look)
            axis.text(max(ratios) + 0.1, y, f"{median:.1f}", va="center", fontsize=8)
            longest = max(longest, *ratios)
            y += 1
        y += 0.5  # half a bar between two tasks
    axis.set_yticks(list(heads.values()), list(heads), fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.1 * longest)
    axis.axvline(1, color=GREY, linewidth=0.8)
    peers = "Stable-Baselines3's PPO or sb3-contrib's TRPO"
    axis.set_xlabel(f"steps per second, times those of {peers}", fontsize=8)
    axis.tick_params(axis="x", labelsize=8)
    axis.grid(axis="x", alpha=0.25)
    names = [name for name in colours if name in legend]
    axis.legend([legend[name] for name in names], names, fontsize=8, loc="lower right")
    save(figure, RESULTS / "speed" / "speed")


def draw_pictures() -> list[Path]:
    """Draw what has results. Returns the pictures that there are then."""
    matplotlib.use("Agg")
    plt.rcParams["svg.hashsalt"] = "trust-region"
    plt.rcParams["axes.spines.top"] = False
    plt.rcParams["axes.spines.right"] = False
    pictures = [plot_departures, plot_speed]
    for suite in SUITES:
        if suite not in WITHOUT_PICTURES and read_index(suite):
            pictures += [partial(plot_curves, suite), partial(plot_aggregate, suite)]
    for draw in tqdm(pictures, desc="pictures", disable=None):
        draw()
    return sorted(RESULTS.glob("*/*.svg"))

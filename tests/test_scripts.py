"""What every script promises: standalone, documented, in the same order, and the same code where it does the same."""

import ast
import dataclasses
import importlib
import io
import re
import shutil
import subprocess
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    p for n in ("ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete") if (p := ROOT / f"{n}.py").exists()
]
SMOKE = {
    **dict.fromkeys(
        ("ppo_continuous", "trpo_continuous"), "--env-id Pendulum-v1 --total-timesteps 4096 --eval-episodes 1"
    ),
    "acer_discrete": "--total-timesteps 2048 --eval-episodes 1",
    "ppo_atari": "--env-id ALE/Freeway-v5 --total-timesteps 99 --num-steps 4 --max-episode-frames 99 --eval-episodes 1",
}
BANNERS = ["Args", "Equations", "Networks", "Environments", "Rollout", "Update", "Train"]
MAY_DIFFER = {
    *("Args", "Policy", "make_envs", "Rollout", "collect", "Minibatch", "minibatch_gradient", "minibatch_step"),
    *("update", "train", "evaluate_policy", "pick_device", "check_spaces", "main"),
}
CODE_LINES = {"acer_discrete": 750}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def top_level(path):
    """{name: (source, node)} of the functions and classes at the top level."""
    text = path.read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    first = {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}
    return {n.name: ("\n".join(text.splitlines()[first[n.name] - 1 : n.end_lineno]), n) for n in nodes}


def section(path, name):
    """Source of one banner section."""
    return re.search(rf"^# ---- {name} -+\n(.*?)^# (?:----|====)", path.read_text(), re.MULTILINE | re.DOTALL)[1]


def code_lines(text):
    """Lines that hold code: neither blank, nor only comment, nor docstring."""
    docstrings = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            docstrings.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    skip = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    held = [range(t.start[0], t.end[0] + 1) for t in tokens if t.type not in skip]
    return len({line for lines in held for line in lines} - docstrings)


def run(command, folder, **options):
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, **options)


@each_script
def test_runs_alone_in_an_empty_folder(path, tmp_path):
    shutil.copy(path, tmp_path)
    result = run([sys.executable, path.name, *SMOKE[path.stem].split()], tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w.-]+__{path.stem}__s1__[\w-]+", run_dir.name)
    names = {re.sub(r"events.*", "events", p.name) for p in run_dir.iterdir()}
    assert names == {"config.json", "progress.csv", "events", "checkpoint.pt", "eval.json"}
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "runs"}  # nothing is written elsewhere
    assert "settotalmass" not in result.stderr and "\r" not in result.stderr  # quiet when not a terminal


@each_script
def test_help_is_complete_and_without_warnings(path):
    result = run([sys.executable, "-W", "error", path, "--help"], ROOT)
    assert result.returncode == 0 and result.stderr == ""
    args = importlib.import_module(path.stem).Args
    text = re.sub(r"[│\s]+", " ", result.stdout)
    for field in dataclasses.fields(args):
        flag = "--" + field.name.replace("_", "-")
        help_text = re.search(rf" {flag}[ ,](.*?)\(default", text)
        assert help_text and re.search(
            r"[a-zA-Zγλεβσ]{2,}.* ", re.sub(r"\{.*?\}|--no-[\w-]+|[A-Z|]{3,}", "", help_text[1])
        ), flag


@each_script
def test_import_has_no_side_effects(path, tmp_path):
    check = f"""
import sys, os, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
before = torch.get_num_threads(), torch.initial_seed(), dict(os.environ), threading.active_count()
import {path.stem}
assert before == (torch.get_num_threads(), torch.initial_seed(), dict(os.environ), threading.active_count())
assert not torch.cuda.is_initialized()
assert "torch.utils.tensorboard" not in sys.modules and "mujoco" not in sys.modules
"""
    result = run([sys.executable, "-B", "-c", check], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


@each_script
def test_imports_nothing_of_the_project(path):
    names = {p.stem for p in SCRIPTS} | {"tests", "benchmarks"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not names & {module.split(".")[0] for module in modules}


@each_script
def test_inline_metadata_agrees_with_requirements(path):
    block = re.search(r"^# /// script\n(.*?)^# ///$", path.read_text(), re.MULTILINE | re.DOTALL)[1]
    inline = set(re.findall(r'"([\w\[\]-]+==[\d.]+)"', block))
    assert len(inline) >= 5 and inline <= set((ROOT / "requirements.txt").read_text().splitlines())


@each_script
def test_sections_are_in_order(path):
    text = path.read_text()
    assert re.findall(r"^# ---- (\w+) -+$", text, re.MULTILINE) == BANNERS
    end = "# The algorithm ends here. Below: evaluation, checkpoints, logging, run folder, signals, input checks, main."
    assert text.count(end) == 1 and text.index(end) > text.index("\ndef train(")
    assert text.index(end) < text.index("\ndef evaluate(") < text.index("\ndef main(")


@each_script
def test_equation_map_names_every_equation_and_each_has_a_test(path):
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    table = re.search(r"Equation map.*?\n((?: {4}.*\n)+)", docstring)[1]
    mapped = {re.split(r" {2,}", line.strip())[1] for line in table.splitlines()}
    equations = {n.name for n in ast.parse(section(path, "Equations")).body if isinstance(n, ast.FunctionDef)}
    assert equations and equations <= mapped <= set(top_level(path))
    own = (ROOT / "tests" / f"test_{path.stem}.py").read_text()
    all_tests = "".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py"))  # duplicates are tested once
    for name in mapped - {"train"}:
        assert f".{name}" in (own if name in MAY_DIFFER else all_tests), name


@each_script
def test_equations_are_short_and_pure(path):
    for name, (source, node) in top_level(path).items():
        if source not in section(path, "Equations"):
            continue
        assert node.end_lineno - node.body[1].lineno < 15, name
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not used & {"args", "print", "device", "policy"}, name
        attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        assert not {a for a in attributes if a.endswith("_") and not a.startswith("_")}, f"{name} changes in place"
        assert re.search(r"(eq\.|eqs\.|section|appendix|PPO|TRPO|GAE|ACER|Retrace)", ast.get_docstring(node)), name


@each_script
def test_departures_name_flags_that_exist(path):
    module = importlib.import_module(path.stem)
    fields = {f.name for f in dataclasses.fields(module.Args)}
    departures = module.__doc__[module.__doc__.index("Departures") :]
    flags = re.findall(r"--([a-z][\w-]+)", departures)
    assert len(flags) >= 5 and {re.sub("^no_", "", flag.replace("-", "_")) for flag in flags} <= fields


@each_script
def test_every_public_name_has_a_docstring(path):
    for name, (_, node) in top_level(path).items():
        assert name in ("Args", "Minibatch") or ast.get_docstring(node), name


@each_script
def test_length(path):
    text = path.read_text()
    assert code_lines(text) <= CODE_LINES.get(path.stem, 650)
    algorithm = text[: text.index("# =====")]
    assert code_lines(algorithm) - code_lines(section(path, "Args")) <= 350


@pytest.mark.skipif(len(SCRIPTS) < 2, reason="needs two scripts")
def test_same_name_means_same_code():
    versions = defaultdict(lambda: defaultdict(list))
    for path in SCRIPTS:
        for name, (source, _) in top_level(path).items():
            versions[name][source].append(path.name)
    drift = {name: list(v.values()) for name, v in versions.items() if name not in MAY_DIFFER and len(v) > 1}
    assert not drift
    shared = [name for name, v in versions.items() if any(len(paths) > 1 for paths in v.values())]
    assert len(shared) >= 15


def test_readme_commands_use_flags_that_exist():
    commands = re.findall(r"python (\w+)\.py([^\n`#|]*)", (ROOT / "README.md").read_text())
    assert len(commands) >= 3
    for script, flags in commands:
        fields = {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
        assert {re.sub("^no_", "", flag.replace("-", "_")) for flag in re.findall(r"--([a-z][\w-]+)", flags)} <= fields

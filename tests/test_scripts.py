"""What every script promises: standalone, documented, plain, and the same code for the same job."""

import ast
import dataclasses
import importlib
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from conftest import ROOT

SCRIPTS = [ROOT / "ppo_continuous.py"]
FIRST_EDITION = [ROOT / f"{name}.py" for name in ("trpo_continuous", "ppo_atari", "acer_discrete")]
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 4096 --eval-episodes 1"
FREEWAY = "--env-id ALE/Freeway-v5 --total-timesteps 99 --num-steps 4 --max-episode-frames 99"
SMOKE = {
    "ppo_continuous": PENDULUM,
    "trpo_continuous": PENDULUM,
    "acer_discrete": "--total-timesteps 2048 --eval-episodes 1",
    "ppo_atari": f"{FREEWAY} --eval-episodes 1",
}
HEADINGS = [
    "Args",
    "Equations",
    "Networks",
    "Loss and update",
    "Environments and rollout",
    "Algorithm",
]
END = "# The algorithm ends here. Below is what runs it: files, progress, evaluation, command line."
BANNER = f"# {'=' * 98}\n{END}\n# {'=' * 98}\n"
MAY_DIFFER = {  # of the first edition
    *("Args", "Policy", "make_envs", "Rollout", "collect", "Minibatch", "minibatch_gradient"),
    *(
        "minibatch_step",
        "update",
        "train",
        "evaluate_policy",
        "pick_device",
        "check_spaces",
        "main",
    ),
}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
every_script = pytest.mark.parametrize("path", SCRIPTS + FIRST_EDITION, ids=lambda path: path.stem)
each_first = pytest.mark.parametrize("path", FIRST_EDITION, ids=lambda path: path.stem)


def top_level(path):
    """{name: node} of the functions and classes at the top level."""
    nodes = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {node.name: node for node in nodes if isinstance(node, kinds)}


def without_docstrings(node):
    """The syntax tree as text, without docstrings."""
    tree = ast.parse(ast.unparse(node))
    for inner in ast.walk(tree):
        kinds = (ast.FunctionDef, ast.ClassDef)
        if isinstance(inner, kinds) and ast.get_docstring(inner) is not None:
            inner.body = inner.body[1:] or [ast.Pass()]
    return ast.dump(tree)


def halves(path):
    upper, lower = path.read_text(encoding="utf-8").split(BANNER)
    return upper, lower


def equation_map(path):
    """Names of the functions in the equation map."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    table = re.search(r"Equation map.*?\n((?: {4}.*\n)+)", docstring)[1]
    cells = [re.split(r" {2,}", line.strip())[1] for line in table.splitlines()]
    names = {name for cell in cells for name in cell.split(", ")}
    return names - {"function"}


def run(command, folder, **options):
    options = {"capture_output": True, "text": True, "timeout": 120} | options
    return subprocess.run(command, cwd=folder, **options)


# ---- Standalone ----


@every_script
def test_runs_alone_in_an_empty_folder(path, tmp_path):
    shutil.copy(path, tmp_path)
    result = run([sys.executable, path.name, *SMOKE[path.stem].split()], tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w.-]+__{path.stem}__s1__[\w-]+", run_dir.name)
    names = {re.sub(r"events.*", "events", p.name) for p in run_dir.iterdir()}
    assert names == {"config.json", "progress.csv", "events", "checkpoint.pt", "eval.json"}
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "runs"}  # nothing elsewhere
    assert "\r" not in result.stderr  # no progress bar where there is no terminal


@each_script
def test_mujoco_writes_no_log_and_no_warning(path, tmp_path):
    flags = "--env-id HalfCheetah-v5 --total-timesteps 2048 --eval-episodes 1 --compile off"
    result = run([sys.executable, path, *flags.split()], tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@every_script
def test_help_is_complete_and_without_warnings(path):
    result = run([sys.executable, "-W", "error", path, "--help"], ROOT)
    assert result.returncode == 0 and result.stderr == ""
    args = importlib.import_module(path.stem).Args
    text = re.sub(r"[│\s]+", " ", result.stdout)
    for field in dataclasses.fields(args):
        flag = "--" + field.name.replace("_", "-")
        help_text = re.search(rf" {flag}[ ,](.*?)\(default", text)
        words = re.sub(r"\{.*?\}|--no-[\w-]+|[A-Z|]{3,}", "", help_text[1])
        assert re.search(r"[a-zA-Zγλεβσ]{2,}.* ", words), flag


@every_script
def test_import_has_no_side_effects(path, tmp_path):
    check = f"""
import sys, os, threading
sys.path.insert(0, {str(ROOT)!r})
import torch
def state():
    threads = torch.get_num_threads(), threading.active_count()
    return threads, torch.initial_seed(), dict(os.environ)
before = state()
import {path.stem}
assert before == state()
assert not torch.cuda.is_initialized()
assert "torch.utils.tensorboard" not in sys.modules and "mujoco" not in sys.modules
"""
    result = run([sys.executable, "-B", "-c", check], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and not list(tmp_path.iterdir())


@every_script
def test_imports_nothing_of_the_project(path):
    names = {p.stem for p in SCRIPTS + FIRST_EDITION} | {"tests", "benchmarks"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not names & {module.split(".")[0] for module in modules}


@every_script
def test_inline_metadata_agrees_with_requirements(path):
    block = re.search(
        r"^# /// script\n(.*?)^# ///$", path.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )[1]
    inline = set(re.findall(r'"([\w\[\]-]+==[\d.]+)"', block))
    assert len(inline) >= 5 and inline <= set(
        (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    )
    assert 'requires-python = ">=3.11"' in block


@each_script
def test_inline_metadata_names_every_package_that_is_imported(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name for node in imports for alias in node.names if isinstance(node, ast.Import)}
    names |= {node.module for node in imports if isinstance(node, ast.ImportFrom)}
    packages = {name.split(".")[0] for name in names} - sys.stdlib_module_names
    packages = {{"PIL": "pillow"}.get(name, name) for name in packages}
    block = path.read_text(encoding="utf-8").partition("# ///\n")[0]
    declared = set(re.findall(r'"([a-z]+)(?:\[\w+\])?==', block))
    assert packages <= declared and declared - packages <= {"tensorboard"}


# ---- Two halves ----


@each_script
def test_headings_are_in_order(path):
    text = path.read_text(encoding="utf-8")
    headings = [line for line in text.splitlines() if re.match(r"# ?[-=]{3,}", line)]
    expected = [f"# ---- {name} ".ljust(100, "-") for name in HEADINGS] + [f"# {'=' * 98}"] * 2
    assert headings == expected
    assert text.count(BANNER) == 1


@each_script
def test_the_upper_half_runs_alone(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    upper, _ = halves(path)
    module = importlib.import_module(path.stem)
    lines = f"""
args = Args(env_id="Pendulum-v1", num_envs=2, num_steps=32, num_minibatches=2, total_timesteps=192)
state = {{}}
steps = [state["step"] for _ in {module.GENERATOR.__name__}(args, state)]
"""
    names = {"__name__": "upper"}
    exec(compile(upper + lines, "upper", "exec"), names)
    assert names["steps"] == [64, 128, 192]
    assert not list(tmp_path.iterdir())  # files belong to the lower half


@each_script
def test_plainness(path, capsys):
    """Nothing below is a matter of taste alone: each makes a line that has to be read twice."""
    text = path.read_text(encoding="utf-8")
    upper, lower = halves(path)
    tree = ast.parse(text)
    nodes = list(ast.walk(tree))
    wide = [line for line in text.splitlines() if len(line) > 100]
    joined = [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Tuple)
        and isinstance(node.value, ast.Tuple)
    ]
    walrus = [ast.unparse(node) for node in nodes if isinstance(node, ast.NamedExpr)]
    comprehensions = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
    several = [
        ast.unparse(node)
        for node in nodes
        if isinstance(node, comprehensions)
        and sum(1 + len(clause.ifs) for clause in node.generators) > 2
    ]
    below = {node.name for node in ast.parse(lower).body if hasattr(node, "name")}
    for node in ast.parse(lower).body:
        if isinstance(node, ast.Assign):
            below |= {name.id for name in node.targets if isinstance(name, ast.Name)}
    names = [node for node in ast.walk(ast.parse(upper)) if isinstance(node, ast.Name)]
    used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
    flags = len(dataclasses.fields(importlib.import_module(path.stem).Args))
    with capsys.disabled():
        sizes = [
            f"{len(half):,} characters, {half.count(chr(10))} lines" for half in (upper, lower)
        ]
        print(f"\n{path.stem}: upper half {sizes[0]}, lower half {sizes[1]}, {flags} flags")
    assert not wide and not joined and not walrus and not several and not below & used
    assert flags <= 36


@each_script
def test_an_equation_stands_near_its_use(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    nodes = top_level(path)
    distances = {}
    for name in equation_map(path) - {"ppo", "update"}:  # the algorithm itself
        inside = range(nodes[name].lineno, nodes[name].end_lineno + 1)
        calls = [
            i
            for i, line in enumerate(lines, 1)
            if re.search(rf"\b{name}\(", line) and i not in inside
        ]
        if calls and isinstance(nodes[name], ast.FunctionDef):
            distances[name] = min(abs(i - nodes[name].lineno) for i in calls)
    assert max(distances.values()) <= 210, distances
    assert distances.get("clipped_surrogate", 0) <= 150


# ---- Equations ----


@every_script
def test_equation_map_names_every_equation_and_each_has_a_test(path):
    mapped = equation_map(path)
    section = re.search(
        r"^# ---- Equations -+\n(.*?)^# (?:----|====)",
        path.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )[1]
    body = ast.parse(section).body
    equations = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert equations and equations <= mapped <= set(top_level(path))
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for name in mapped - {"train"}:
        assert f".{name}" in tests, name


@every_script
def test_equations_are_short_pure_and_cite_their_paper(path):
    for name in equation_map(path):
        node = top_level(path)[name]
        if isinstance(node, ast.ClassDef) or "args" in {arg.arg for arg in node.args.args}:
            continue
        assert node.end_lineno - node.body[1].lineno < 15, name
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not used & {"print", "device", "policy"} or name == "fisher_operator", name
        attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        in_place = {a for a in attributes if a.endswith("_") and not a.startswith("_")}
        assert not in_place or name == "update_average", f"{name} changes in place"
        cites = r"(eq\.|eqs\.|section|appendix|Algorithm|PPO|TRPO|GAE|ACER|Retrace)"
        assert re.search(cites, ast.get_docstring(node)), name


@every_script
def test_every_public_name_has_a_docstring(path):
    for name, node in top_level(path).items():
        assert name.endswith("Args") or name == "Minibatch" or ast.get_docstring(node), name


@each_first
def test_departures_name_flags_that_exist(path):
    module = importlib.import_module(path.stem)
    fields = {f.name for f in dataclasses.fields(module.Args)}
    departures = module.__doc__[module.__doc__.index("Departures") :]
    flags = {
        re.sub("^no_", "", f.replace("-", "_")) for f in re.findall("--([a-z][-a-z]+)", departures)
    }
    assert len(flags) >= 5 and flags <= fields


@each_script
def test_every_departure_from_the_paper_is_in_its_table_or_in_the_docstring(path):
    module = importlib.import_module(path.stem)
    fields = {f.name for f in dataclasses.fields(module.Args)}
    assert set(module.PAPER) <= fields and len(module.PAPER) >= 8
    assert "Departures" in module.__doc__ and "--" not in module.__doc__.partition("Departures")[2]


# ---- The same name, the same code ----


def test_same_name_means_same_code():
    versions = defaultdict(lambda: defaultdict(list))
    for path in FIRST_EDITION:
        for name, node in top_level(path).items():
            versions[name][without_docstrings(node)].append(path.name)
    drift = {
        name: list(by_code.values())
        for name, by_code in versions.items()
        if name not in MAY_DIFFER and len(by_code) > 1
    }
    assert not drift
    shared = [name for name, v in versions.items() if any(len(paths) > 1 for paths in v.values())]
    assert len(shared) >= 15


# ---- README ----


def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_commands_use_flags_that_exist():
    commands = re.findall(r"python (\w+)\.py([^\n`#|]*)", readme())
    assert len(commands) >= 3
    for script, text in commands:
        fields = {f.name for f in dataclasses.fields(importlib.import_module(script).Args)}
        flags = re.findall(r"--([a-z][\w-]+)", text)
        assert {re.sub("^no_", "", flag.replace("-", "_")) for flag in flags} <= fields


def test_workflow_runs_the_test_command_of_the_readme():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    assert "python -m pytest -q" in workflow and "python -m pytest -q" in readme()
    assert (
        Path(ROOT / ".ci" / "run")
        .read_text(encoding="utf-8")
        .strip()
        .endswith("python -m pytest -q")
    )
    for version in ("3.11", "3.12", "3.13"):
        assert f'"{version}"' in workflow
    for system in ("ubuntu-latest", "macos-latest", "windows-latest"):
        assert system in workflow

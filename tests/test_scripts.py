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

NAMES = ("ppo_continuous", "trpo_continuous", "ppo_atari", "acer_discrete")
SCRIPTS = [ROOT / f"{name}.py" for name in NAMES]
PENDULUM = "--env-id Pendulum-v1 --total-timesteps 4096 --eval-episodes 1"
FREEWAY = (
    "--env-id ALE/Freeway-v5 --total-timesteps 16 --num-envs 2 --num-steps 8 --eval-episodes 0"
)
SMOKE = {
    "ppo_continuous": PENDULUM,
    "trpo_continuous": PENDULUM,
    "ppo_atari": FREEWAY,
    "acer_discrete": "--total-timesteps 2048 --eval-episodes 1",
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
MAY_DIFFER = {
    # flags and their defaults
    *("RunArgs", "EnvironmentArgs", "AlgorithmArgs", "Args", "fill_defaults"),
    # networks: σ on a line or learned, V or Q
    *("Policy", "ActorCritic"),
    # the algorithm
    *("Batch", "ppo_loss", "minibatch_step", "advantages", "update", "prepare", "collect", "ppo"),
    # environments: continuous actions or discrete ones, games of ALE
    *("describe_spaces", "make_envs", "check_spaces", "env_options"),
    # torchrun: what is of all processes
    *("Rollout", "RunningMeanStd"),
    # below the banner
    *("evaluate_policy", "make_film_env", "load_policy", "check_args", "check_algorithm_args"),
}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def top_level(source):
    """{name: node} of the functions and classes at the top level."""
    nodes = ast.parse(source).body
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


@each_script
def test_runs_alone_in_an_empty_folder(path, tmp_path):
    shutil.copy(path, tmp_path)
    result = run([sys.executable, path.name, *SMOKE[path.stem].split()], tmp_path)
    assert result.returncode == 0, result.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"[\w.-]+__{path.stem}__s1__[\w-]+", run_dir.name)
    names = {re.sub(r"events.*", "events", p.name) for p in run_dir.iterdir()}
    expected = {"config.json", "progress.csv", "events", "checkpoint.pt", "eval.json"}
    assert names == expected - ({"eval.json"} if "--eval-episodes 0" in SMOKE[path.stem] else set())
    assert {p.name for p in tmp_path.iterdir()} == {path.name, "runs"}  # nothing elsewhere
    assert "\r" not in result.stderr  # no progress bar where there is no terminal


@pytest.mark.parametrize("path", SCRIPTS[:2], ids=lambda path: path.stem)
def test_mujoco_writes_no_log_and_no_warning(path, tmp_path):
    flags = "--env-id HalfCheetah-v5 --total-timesteps 2048 --eval-episodes 1 --compile off"
    result = run([sys.executable, path, *flags.split()], tmp_path)
    assert result.returncode == 0 and result.stderr == ""
    assert [p.name for p in tmp_path.iterdir()] == ["runs"]


@each_script
def test_help_is_complete_and_without_warnings(path):
    result = run([sys.executable, "-W", "error", path, "--help"], ROOT)
    assert result.returncode == 0 and result.stderr == ""
    args = importlib.import_module(path.stem).Args
    suppressed = {"images"} & {field.name for field in dataclasses.fields(args)}
    assert not suppressed or "--images" not in result.stdout
    text = re.sub(r"[│\s]+", " ", result.stdout)
    for field in dataclasses.fields(args):
        if field.name in suppressed:
            continue
        flag = "--" + field.name.replace("_", "-")
        help_text = re.search(rf" {flag}[ ,](.*?)\(default", text)
        words = re.sub(r"\{.*?\}|--no-[\w-]+|[A-Z|]{3,}", "", help_text[1])
        assert re.search(r"[a-zA-Zγλεβσ]{2,}.* ", words), flag


@each_script
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


@each_script
def test_imports_nothing_of_the_project(path):
    names = {*NAMES, "tests", "benchmarks"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not names & {module.split(".")[0] for module in modules}


@each_script
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
    renamed = {"PIL": "pillow", "ale_py": "ale-py"}
    packages = {renamed.get(name, name) for name in packages}
    block = path.read_text(encoding="utf-8").partition("# ///\n")[0]
    declared = re.findall(r'"([a-z-]+)(?:\[(\w+)\])?==', block)
    declared = {name for pair in declared for name in pair if name}  # extras too
    assert packages - {"envpool"} <= declared  # which is optional
    assert declared - packages <= {"tensorboard", "pygame"}  # others import them


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
    env_id = "Pendulum-v1" if "continuous" in path.stem else "CartPole-v1"
    lines = f"""
args = Args(env_id={env_id!r}, num_envs=2, num_steps=32, total_timesteps=192)
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
    assert flags <= 37


@each_script
def test_an_equation_stands_near_its_use(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    nodes = top_level(path.read_text(encoding="utf-8"))
    distances = {}
    for name in equation_map(path) - {"ppo", "trpo", "acer", "update"}:  # the algorithm
        inside = range(nodes[name].lineno, nodes[name].end_lineno + 1)
        calls = [
            i
            for i, line in enumerate(lines, 1)
            if re.search(rf"\b{name}\(", line) and i not in inside
        ]
        if calls and isinstance(nodes[name], ast.FunctionDef):
            distances[name] = min(abs(i - nodes[name].lineno) for i in calls)
    assert max(distances.values()) <= 240, distances
    assert distances.get("clipped_surrogate", 0) <= 170


# ---- Equations ----


@each_script
def test_equation_map_names_every_equation_and_each_has_a_test(path):
    mapped = equation_map(path)
    section = re.search(
        r"^# ---- Equations -+\n(.*?)^# (?:----|====)",
        path.read_text(encoding="utf-8"),
        re.MULTILINE | re.DOTALL,
    )[1]
    body = ast.parse(section).body
    equations = {node.name for node in body if isinstance(node, ast.FunctionDef)}
    assert equations and equations <= mapped <= set(top_level(path.read_text(encoding="utf-8")))
    tests = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "tests").glob("test_*.py"))
    for name in mapped:
        assert f".{name}" in tests, name


@each_script
def test_equations_are_short_pure_and_cite_their_paper(path):
    for name in equation_map(path) - {"nature_cnn"}:  # a network
        node = top_level(path.read_text(encoding="utf-8"))[name]
        if isinstance(node, ast.ClassDef) or "args" in {arg.arg for arg in node.args.args}:
            continue
        statements = ast.unparse(node.body[1:]).splitlines()
        assert len(statements) <= 18, name
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not used & {"print", "device", "policy"} or name == "fisher_operator", name
        attributes = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
        in_place = {a for a in attributes if a.endswith("_") and not a.startswith("_")}
        assert not in_place or name == "update_average", f"{name} changes in place"
        cites = r"(eq\.|eqs\.|section|appendix|Algorithm|PPO|TRPO|GAE|ACER|Retrace)"
        assert re.search(cites, ast.get_docstring(node)), name


@each_script
def test_every_public_name_has_a_docstring(path):
    for name, node in top_level(path.read_text(encoding="utf-8")).items():
        assert name.endswith("Args") or name == "Minibatch" or ast.get_docstring(node), name


@each_script
def test_every_departure_from_the_paper_is_in_its_table_or_in_the_docstring(path):
    module = importlib.import_module(path.stem)
    fields = {f.name for f in dataclasses.fields(module.Args)}
    assert set(module.PAPER) <= fields and len(module.PAPER) >= 5
    departures = re.search(r"^Departures .*\n((?: {4}.*\n)+)", module.__doc__, re.MULTILINE)[1]
    assert len(departures.splitlines()) >= 4 and "--" not in departures


# ---- The same name, the same code ----


def versions_of(sources):
    """{name: {code: [scripts]}} of the functions and classes at the top level."""
    versions = defaultdict(lambda: defaultdict(list))
    for script, source in sources.items():
        for name, node in top_level(source).items():
            versions[name][without_docstrings(node)].append(script)
    return versions


def drift(versions):
    """{name: groups of scripts} of the names that have more than one version."""
    return {name: list(by.values()) for name, by in versions.items() if len(by) > 1}


def test_same_name_means_same_code():
    found = drift(versions_of({path.stem: path.read_text(encoding="utf-8") for path in SCRIPTS}))
    assert not {name: scripts for name, scripts in found.items() if name not in MAY_DIFFER}
    assert found.keys() == MAY_DIFFER  # no name is on the list in vain


def test_the_lower_halves_are_the_same():
    """All of them define the same names, in the same order, but for those that may differ."""
    orders = {}
    for path in SCRIPTS:
        orders[path.stem] = []
        for node in ast.parse(halves(path)[1]).body:
            if isinstance(node, ast.Assign):
                orders[path.stem] += [target.id for target in node.targets]
            else:
                orders[path.stem].append(getattr(node, "name", without_docstrings(node)))
    of_discrete = {"say_defaults"}
    plain = [[name for name in order if name not in of_discrete] for order in orders.values()]
    assert all(order == plain[0] for order in plain)
    assert orders["ppo_atari"] == orders["acer_discrete"]

    constants = defaultdict(set)
    for path in SCRIPTS:
        for node in ast.parse(halves(path)[1]).body:
            if isinstance(node, ast.Assign):
                constants[node.targets[0].id].add(ast.dump(node.value))
    differ = {name for name, values in constants.items() if len(values) > 1}
    own = {"ALGORITHM", "GENERATOR", "WHY_AUTO", "SHOWN", "RANGES"}
    assert differ == own | {"FIXED_ON_EVALUATION", "FIXED_ON_RESUME"}
    lower = versions_of({path.stem: halves(path)[1] for path in SCRIPTS})
    same = [name for name, by in lower.items() if len(by) == 1 and len(*by.values()) == 4]
    assert len(same) >= 25 and drift(lower).keys() <= MAY_DIFFER


def diff_size(first, second, folder):
    """How many lines `diff` marks with < or >."""
    paths = []
    for name, text in (("first", first), ("second", second)):
        paths.append(folder / name)
        paths[-1].write_text(text, encoding="utf-8")
    result = subprocess.run(["diff", *paths], capture_output=True, encoding="utf-8")
    return sum(line[0] in "<>" for line in result.stdout.splitlines())


PAIRS = [("ppo_continuous", "trpo_continuous"), ("ppo_continuous", "ppo_atari")]
PAIRS += [("ppo_atari", "acer_discrete")]


@pytest.mark.skipif(shutil.which("diff") is None, reason="needs diff")
@pytest.mark.parametrize("first, second", PAIRS)
def test_a_diff_shows_the_difference_of_two_papers(first, second, tmp_path, capsys):
    pairs = zip(halves(ROOT / f"{first}.py"), halves(ROOT / f"{second}.py"), strict=True)
    upper, lower = [diff_size(*pair, tmp_path) for pair in pairs]
    with capsys.disabled():
        print(f"\ndiff {first} {second}: {upper} lines in the upper half, {lower} in the lower")
    assert 0 < lower < 100 and 0 < upper < 1000


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


def test_pdoc_makes_the_page_that_the_readme_names(tmp_path):
    pytest.importorskip("pdoc")
    command = re.search(r"pdoc --math (\w+\.py)", readme())
    result = run([sys.executable, "-m", "pdoc", "--math", ROOT / command[1], "-o", tmp_path], ROOT)
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "ppo_continuous.html").read_text(encoding="utf-8")
    assert "PPO eq. 7: L^CLIP(θ) = Ê[min(r_t Â_t" in page


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

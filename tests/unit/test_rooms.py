"""The laws of the tree: light below heavy, no import runs upward, no circle."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.record.folder import CONFIG, GRID, IMAGES, RunFolder

ROOT = Path(__file__).resolve().parents[2]
FLOORS = (
    "core.errors",
    "core.io",
    "core.config",
    "core.privacy.keys",
    "core.privacy.accounting",
    "core.privacy.plan",
    "core.record",
    "core.privacy.ledger",
    "core.seeds",
    "core.distributed",
    "core.device",
    "core.data",
    "core.diffusion",
    "core.privacy.mechanisms",
    "core.training",
    "core.generation",
    "core.evaluation",
    "core.pipeline",
    "core.publish",
    "core.commands",
    "core.__main__",
    "sweep.config",
    "sweep.results",
    "sweep.costs",
    "sweep.search",
    "sweep.trials",
    "sweep.tracking",
    "sweep.report",
    "sweep.driver",
    "sweep.__main__",
    "sweep.run",
)
"""Rooms from the ground up: each imports only from those before it."""
LIGHT = FLOORS[: FLOORS.index("core.seeds")]
"""Rooms that drivers, trials and commands that only look may load: never torch."""


def modules() -> list[str]:
    paths = [path for name in ("core", "sweep") for path in (ROOT / name).rglob("*.py")]
    return sorted(".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths)


MODULES = modules()


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / (module.replace(".", "/") + ".py")).read_text())


def room_of(module: str) -> str:
    """The longest floor that the module lies in; empty for the packages themselves."""
    parts = module.removesuffix(".__init__").split(".")
    names = (".".join(parts[:size]) for size in range(len(parts), 0, -1))
    return next((name for name in names if name in FLOORS), "")


def imported(source: str) -> Iterator[str]:
    """Every module of the project that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they go"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in MODULES else node.module or ""


def arrows(module: str) -> set[str]:
    path = ROOT / (module.replace(".", "/") + ".py")
    own = {name for name in imported(path.read_text()) if name.split(".")[0] in ("core", "sweep")}
    return own - {module}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_has_a_room_and_imports_run_downward(module):
    room = room_of(module)
    assert room or module in ("core.__init__", "core.privacy.__init__", "sweep.__init__"), (
        f"{module} has no room: give it one, or add its room to FLOORS"
    )
    for target in arrows(module):
        if (other := room_of(target)) and room:
            assert FLOORS.index(other) <= FLOORS.index(room), f"{module} imports {target}: upward"


def test_an_upward_import_is_seen():
    found = set(imported("def f():\n    from core.pipeline import run\nimport sweep.run"))
    assert found == {"core.pipeline.run", "sweep.run"}
    assert room_of("core.privacy.plan.releases") == "core.privacy.plan"
    assert room_of("core.flat") == ""


def test_no_circle_of_modules():
    graph = {module: arrows(module) for module in MODULES}
    state: dict[str, str] = {}

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert state.get(module) != "open", " -> ".join((*path, module))
        if module in state or module not in graph:
            return
        state[module] = "open"
        for target in graph[module]:
            visit(target, (*path, module))
        state[module] = "done"

    for module in MODULES:
        visit(module, ())


@pytest.mark.parametrize("room", LIGHT)
def test_light_rooms_never_load_torch(room):
    names = [module for module in MODULES if room_of(module) == room]
    assert names
    code = f"import sys, {', '.join(names)}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=120)
    assert done.returncode == 0, f"{room} loads torch"


@pytest.mark.parametrize(("package", "most"), [("core", 6), ("sweep", 4)])
def test_few_files_lie_at_the_top(package, most):
    assert len(list((ROOT / package).glob("*.py"))) <= most


def test_no_two_modules_of_a_room_differ_only_by_their_ending():
    stems: dict[tuple[str, str], str] = {}
    for module in MODULES:
        *parents, leaf = module.split(".")
        stem = leaf.rstrip("s").removesuffix("ing").removesuffix("er")
        key = (".".join(parents), stem)
        assert key not in stems, f"{module} beside {stems[key]}"
        stems[key] = module


@pytest.mark.parametrize("module", [each for each in MODULES if each != "core.io.files"])
def test_one_module_writes_files_whole_or_not_at_all(module):
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            of_path = node.func.attr in ("replace", "rename") and len(node.args) == 1
            of_os = ast.unparse(node.func) in ("os.replace", "os.rename", "os.link")
            by_hand = of_path or of_os
            assert not by_hand, f"{module}:{node.lineno}: use core.io.files"


NAMES = {path.name for path in vars(RunFolder(Path("run"))).values() if path.suffix} - {
    GRID,
    IMAGES,
}
"""Of files in a run's folder that nothing else has; pictures and images stand in bundles, too."""


@pytest.mark.parametrize("module", [each for each in MODULES if each != "core.record.folder"])
def test_one_class_names_the_files_of_a_run(module):
    assert {CONFIG, "evaluation.json", "metrics.jsonl", "privacy.json", "model.pt"} <= NAMES
    tree = tree_of(module)
    spelled = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    ends = [Path(each).name for each in spelled if isinstance(each, str) and "\n" not in each]
    assert not NAMES & set(ends), f"{module}: ask core.record.folder.RunFolder"


MOST_LINES = 60


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function but for its docstring."""
    lines = (function.end_lineno or 0) - function.lineno + 1
    if ast.get_docstring(function) is not None:
        lines -= (function.body[0].end_lineno or 0) - function.body[0].lineno + 1
    return lines


@pytest.mark.parametrize("module", MODULES)
def test_functions_are_short(module):
    tree = tree_of(module)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert length(node) <= MOST_LINES, f"{module}.{node.name} has {length(node)} lines"


def test_a_docstring_does_not_count():
    (function,) = ast.parse('def f():\n    """Two\n    lines."""\n    return 1').body
    assert isinstance(function, ast.FunctionDef)
    assert length(function) == 2


RIDDLES = ("What", "How", "Who", "Where", "Why", "When", "Which")


@pytest.mark.parametrize("module", MODULES)
def test_modules_say_what_they_are_by_a_noun(module):
    text = ast.get_docstring(tree_of(module)) or ""
    assert text, f"{module} has no docstring"
    assert text.split()[0] not in RIDDLES

"""The digest of the code covers all that decides what a run releases, and a new module at once."""

import ast
import shutil
from pathlib import Path

import pytest

from core.io import code_digest
from core.io.code_digest import SHOW_ALONE, deciding_sources, digest_of

CORE = Path(code_digest.__file__).parents[1]


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(CORE.parent).with_suffix("").parts).removesuffix(".__init__")


FILES = {module_of(path): path for path in CORE.rglob("*.py")}


def imported(path: Path) -> set[str]:
    """Modules of the project that a file imports, anywhere in it, and the packages around them.

    But for type checkers alone, as the public names of `core`, which a run asks for none of.
    """
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    tree.body = [
        node for node in tree.body if not ast.unparse(node).startswith("if TYPE_CHECKING:")
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    around = {".".join(name.split(".")[:end]) for name in names for end in range(1, 5)}
    return (names | around) & FILES.keys()


def closure(root: str) -> set[str]:
    found: set[str] = set()
    todo = {root}
    while todo:
        name = todo.pop()
        found.add(name)
        todo |= imported(FILES[name]) - found
    return found


def test_all_that_a_run_imports_is_in_the_digest():
    needed = {FILES[name] for name in closure("core.pipeline.run")}
    names = {path.relative_to(CORE).as_posix() for path in needed}
    # Also what is imported within functions, and packages themselves.
    assert {
        "privacy/mechanisms/dp_sgd.py",
        "diffusion/loss.py",
        "privacy/accounting/exact.py",
        "__init__.py",
    } < names
    assert {"data/parquet.py", "data/__init__.py", "evaluation/metrics.py"} < names
    assert needed <= set(deciding_sources())
    left = {path.relative_to(CORE).as_posix() for path in set(FILES.values()) - needed}
    assert all(name.startswith(SHOW_ALONE) for name in left), left


def test_what_is_left_out_exists():
    assert all((CORE / name).exists() for name in SHOW_ALONE)


@pytest.fixture
def copy(tmp_path) -> Path:
    return Path(shutil.copytree(CORE, tmp_path / "core"))


def now(root: Path) -> str:
    return digest_of(deciding_sources(root), root)


def test_the_digest_is_of_content_and_of_nothing_else(copy):
    assert now(copy) == code_digest.code_digest()
    loss = copy / "diffusion" / "loss.py"
    text = loss.read_bytes()
    loss.write_bytes(text.replace(b"\n", b"\r\n"))
    (copy / "publish" / "release.py").write_text("")
    assert now(copy) == code_digest.code_digest()
    loss.write_bytes(text + b"#")
    changed = now(copy)
    (copy / "diffusion" / "new.py").write_text("")
    loss.write_bytes(text)
    assert len({changed, now(copy), code_digest.code_digest()}) == 3


def test_a_file_that_changes_under_a_process_changes_nothing(monkeypatch):
    """It computes with what it loaded."""
    before = code_digest.code_digest()
    monkeypatch.setattr(code_digest, "deciding_sources", lambda: [])
    assert code_digest.code_digest() == before

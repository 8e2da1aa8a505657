"""The house rules that a tool or a look at the syntax tree can check."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "spalf"
MODULES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FUNCTION = 60
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def functions(path: Path) -> Iterator[FUNCTIONS]:
    return (node for node in ast.walk(tree(path)) if isinstance(node, FUNCTIONS))


def public_definitions(body: list[ast.stmt], where: str) -> Iterator[tuple[str, ast.AST]]:
    """Functions and classes whose whole dotted name is public, methods included."""
    for node in body:
        if not isinstance(node, FUNCTIONS | ast.ClassDef) or node.name.startswith("_"):
            continue
        yield f"{where}.{node.name}", node
        if isinstance(node, ast.ClassDef):
            yield from public_definitions(node.body, f"{where}.{node.name}")


def test_imports_go_one_way() -> None:
    """The layers of docs/architecture.md, as import-linter's contracts state them."""
    done = subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_function_prints(path: Path) -> None:
    calls = (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call))
    names = [call.func.id for call in calls if isinstance(call.func, ast.Name)]
    assert not {"print", "breakpoint"} & set(names)


def body_lines(function: FUNCTIONS) -> int:
    """Lines of code, without signature and docstring."""
    body = function.body[1:] if ast.get_docstring(function) else function.body
    return (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_no_function_is_long(path: Path) -> None:
    lengths = {f.name: body_lines(f) for f in functions(path)}
    assert not {name: n for name, n in lengths.items() if n > LONGEST_FUNCTION}


def test_most_functions_are_short() -> None:
    lengths = [body_lines(f) for path in MODULES for f in functions(path)]
    assert sum(n <= 20 for n in lengths) / len(lengths) >= 0.9


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_whatever_is_public_says_what_it_is(path: Path) -> None:
    module = tree(path)
    assert ast.get_docstring(module)
    if "bundled" in path.parts:
        return
    silent = [
        name
        for name, node in public_definitions(module.body, path.stem)
        if ast.get_docstring(node) is None  # type: ignore[arg-type]
    ]
    assert not [name for name in silent if not overrides_a_documented_method(name)]


def overrides_a_documented_method(name: str) -> bool:
    """``update`` and ``close`` of the two progress displays; their protocol documents them."""
    return name in {f"progress.{c}.{m}" for c in ("_Bar", "_Lines") for m in ("update", "close")}


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_is_decided_at_import(path: Path) -> None:
    """Library modules define things; they call no function that sets the process up."""
    setters = {
        "manual_seed",
        "set_num_threads",
        "set_default_dtype",
        "set_float32_matmul_precision",
        "basicConfig",
        "device",
    }
    for statement in tree(path).body:
        if isinstance(statement, FUNCTIONS | ast.ClassDef | ast.If):
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                assert node.func.attr not in setters, f"line {node.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_device_names_are_left_to_the_command_line(path: Path) -> None:
    """No ``"cuda"`` handed to a call outside `spalf.cli`; asking where a tensor is, is fine."""
    if "cli" in path.parts or "bundled" in path.parts:
        return
    for call in (node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)):
        given = [*call.args, *(keyword.value for keyword in call.keywords)]
        literals = [a.value for a in given if isinstance(a, ast.Constant)]
        found = [v for v in literals if isinstance(v, str) and v.split(":")[0] == "cuda"]
        assert not found, f"line {call.lineno}"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_nothing_is_left_to_do(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]


def test_pages_of_the_documentation_link_to_files_that_exist() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for target in links(page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_index_links_every_page() -> None:
    index = ROOT / "docs" / "index.md"
    linked = set(links(index.read_text(encoding="utf-8")))
    pages = {p.relative_to(index.parent).as_posix() for p in index.parent.rglob("*.md")}
    assert pages - {"index.md"} <= linked


def test_the_method_page_names_tests_that_exist() -> None:
    """Each invariant is followed by the tests that check it."""
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text))
    for number in range(1, 11):
        assert f"**I{number}**" in text
    assert len(named) >= 10
    for path, name in named:
        assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8"), f"{path}::{name}"


def links(text: str) -> list[str]:
    found = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return [target for target in found if "://" not in target]

"""Numbers and habits that keep the code small: sizes, no reflection, no hidden imports, no side effects."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "src" / "bitmill").rglob("*.py"))
LIBRARY = [path for path in FILES if path.parent.name != "cli"]
LINES_OF_A_FILE = 500
LINES_OF_A_FUNCTION = 80
DEPENDENCIES = {
    "gguf", "huggingface_hub", "jinja2", "numba", "numpy", "rich",
    "safetensors", "tokenizers", "torch", "transformers", "typer",
}  # fmt: skip
FORBIDDEN_CALLS = {"hasattr", "setattr", "delattr", "print", "eval", "exec", "torch.load", "os.system"}
FORBIDDEN_MODULES = {"pickle", "logging", "marshal", "shelve", "dill"}


def name(path: Path) -> str:
    """The path as a reader says it."""
    return str(path.relative_to(ROOT))


def tree(path: Path) -> ast.Module:
    """The parsed file."""
    return ast.parse(path.read_text(encoding="utf-8"))


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of the file."""
    return [n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def imported(node: ast.AST) -> list[str]:
    """First names of the modules that one statement imports."""
    if isinstance(node, ast.ImportFrom):
        return [(node.module or "").partition(".")[0]]
    if isinstance(node, ast.Import):
        return [alias.name.partition(".")[0] for alias in node.names]
    return []


@pytest.mark.parametrize("path", FILES, ids=name)
def test_sizes(path: Path) -> None:
    lines = path.read_text(encoding="utf-8").count("\n")
    assert lines <= LINES_OF_A_FILE, f"{name(path)} has {lines} lines; split it"
    for function in functions(path):
        length = (function.end_lineno or 0) - function.lineno + 1
        assert length <= LINES_OF_A_FUNCTION, f"{name(path)}: {function.name} has {length} lines"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_no_reflection_no_printing_no_pickles(path: Path) -> None:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in FORBIDDEN_CALLS, f"{name(path)}:{node.lineno}: {called}"
        for module in imported(node):
            assert module not in FORBIDDEN_MODULES, f"{name(path)}: imports {module}"


@pytest.mark.parametrize("path", LIBRARY, ids=name)
def test_imports_stand_at_the_top(path: Path) -> None:
    """Inside a function only what is optional may be imported: not ours, not Python's, not a dependency."""
    for function in functions(path):
        for node in ast.walk(function):
            for module in imported(node):
                required = module == "bitmill" or module in DEPENDENCIES or module in sys.stdlib_module_names
                assert not required, f"{name(path)}: {function.name} imports {module}"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_nothing_is_left_for_later(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", text), name(path)
    for node in ast.walk(tree(path)):
        assert not (isinstance(node, ast.Raise) and "NotImplementedError" in ast.unparse(node)), name(path)
        if isinstance(node, ast.ExceptHandler):
            caught = ast.unparse(node.type) if node.type is not None else "everything"
            assert caught not in ("everything", "Exception", "BaseException"), f"{name(path)}:{node.lineno}"
            hidden = len(node.body) == 1 and isinstance(node.body[0], ast.Pass)
            assert not hidden, f"{name(path)}:{node.lineno}: an error is swallowed without a word"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_public_signature_is_annotated(path: Path) -> None:
    for function in functions(path):
        if function.name.startswith("_") and function.name != "__init__":
            continue
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
        assert not bare and function.returns is not None, f"{name(path)}: {function.name}({', '.join(bare)})"


PROBE = """
import json, os, sys
before = dict(os.environ)
import bitmill
light = "torch" not in sys.modules
import torch
threads, grad, dtype = torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())
from bitmill.core import registry
for axis in registry.AXES:
    registry.members(axis)
import bitmill.mill
after = torch.get_num_threads(), torch.is_grad_enabled(), str(torch.get_default_dtype())
changed = sorted(k for k in before.keys() | os.environ.keys() if before.get(k) != os.environ.get(k))
print(json.dumps({"light": light, "changed": changed, "same": after == (threads, grad, dtype)}))
"""


def test_importing_has_no_side_effects() -> None:
    run = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"light": True, "changed": [], "same": True}
    assert not run.stderr, "importing says something"

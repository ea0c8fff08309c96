"""docs/methods.md and docs/methods/: every member has its page, and no page promises what is refused."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

from bitmill.core import registry
from bitmill.recipe import parse

DOCS = Path(__file__).parent.parent / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted((DOCS / "methods").glob("*.md"))}
PARTS = ["transforms", "grids", "solvers", "allocation"]


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(DOCS))
    return importlib.import_module("method_pages")


@pytest.mark.parametrize("axis", PARTS)
def test_every_member_is_on_a_page(axis: str) -> None:
    for name in registry.names(axis):
        link = f"](../{axis}.md#{name.replace('_', '-')})"
        assert any(link in page for page in PAGES.values()), f"add {axis}/{name} to docs/methods.toml"


def test_every_page_is_in_the_index() -> None:
    index = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(methods/([\w-]+)\.md\)", index)) == set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_a_page_answers_its_questions(page: str) -> None:
    text = PAGES[page]
    for section in ("Recipe", "When to use it", "What it costs"):
        assert re.search(rf"^## {section}\n\n\S", text, re.MULTILINE), section
    assert text.count("## Its figure") in (0, 2)


def test_a_recipe_that_would_be_refused_is_an_error(generator: ModuleType) -> None:
    generator.checked(parse("gptq : int4-g128-sym > gptq"))
    for line in ("hqq : int4-g128-sym > gptq", "nearest : nf4-b64 > gptq", "nearest : int4-g64-fz > awq"):
        with pytest.raises(ValueError, match=re.escape(line)):
            generator.checked(parse(line))


def test_an_entry_without_recipes_takes_the_known_ones(generator: ModuleType) -> None:
    said = {"title": "T", "use": "u", "when": "w", "cost": "c", "paper": "p"}
    entry = generator.Method(name="lattice", members=("grids/lattice", "solvers/to_come"), **said)
    page = generator.method_page(generator.complete(entry))
    assert entry.here == ("grids/lattice",)
    assert "hadamard + gptq : e8p > bitmill" in page and "| `e8p` |" in page and "Not measured yet." in page


def test_mixtures_are_counted_as_llama_cpp_counts_them(generator: ModuleType) -> None:
    """Sizes of Llama 3 8B, of which test_mixture.py has more."""
    for name, bits in (("Q4_K_M", 4.89), ("Q6_K", 6.56), ("Q8_0", 8.50), ("Q4_0", 4.63)):
        assert f"{generator.mixture_bits(name):.2f}" == f"{bits:.2f}", name


def test_a_row_that_is_not_there_is_an_error(generator: ModuleType) -> None:
    said = {"title": "T", "use": "u", "when": "w", "cost": "c", "paper": "p", "members": ()}
    assert generator.figures(generator.Method(name="x", evidence=(("to-come", "."),), **said)) == [
        "Not measured yet."
    ]
    with pytest.raises(ValueError, match="no row"):
        generator.figures(generator.Method(name="x", evidence=(("gptq", "no such row"),), **said))

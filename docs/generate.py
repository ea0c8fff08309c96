"""Write the pages of docs/ that come from docstrings, so that they cannot say what the code does not; those
of methods come from docs/methods.toml and docs/evidence as well.

python docs/generate.py            write them
python docs/generate.py --check    say which are out of date, and fail
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

from method_pages import method_pages
from page_parts import marked, page, table
from worked_examples import worked_examples

import bitmill
from bitmill.cli.advise import advise
from bitmill.cli.bench import bench
from bitmill.cli.budget import budget
from bitmill.cli.convert import convert
from bitmill.cli.doctor import doctor
from bitmill.cli.finetune import finetune
from bitmill.cli.imatrix import imatrix
from bitmill.cli.inspect import inspect as inspect_file
from bitmill.cli.measure import measure
from bitmill.cli.merge import merge
from bitmill.cli.names import names
from bitmill.cli.plan import plan
from bitmill.cli.plots import plots
from bitmill.cli.publish import publish
from bitmill.cli.quantize import quantize
from bitmill.cli.recipes import SENTENCE, recipes
from bitmill.cli.run import run
from bitmill.cli.studio import studio
from bitmill.cli.summarize import summarize
from bitmill.cli.sweep import sweep
from bitmill.cli.train_ternary import train_ternary
from bitmill.cli.verify import verify
from bitmill.core import registry
from bitmill.core.axes import Container, Grid
from bitmill.core.inputs import CACHES, EXAMPLES
from bitmill.known import KNOWN
from bitmill.recipe import ROLES, parse

DOCS = Path(__file__).parent
MADE = "<!-- Written by docs/generate.py from docstrings: edit those. -->"
TOML = """```toml
transforms = ["awq"]
solver = "gptq(damp=0.02)"
grid = "int4-g64-asym"
keep = ["v"]

[roles]
head = "int8-channel-sym"
```

With one of llama.cpp's mixtures, `pure = true` and a table of patterns, searched in this order:

```toml
grid = "Q4_K_M"

[tensors]
'blk\\.[0-3]\\.ffn_down' = "q8_0"
'ffn_(gate|up)' = "q5_k"
```"""
VERBS: tuple[Callable[..., None], ...] = (
    quantize, measure, convert, run, summarize, plan, inspect_file, verify, budget, sweep, bench, publish,
    plots, advise, imatrix, finetune, merge, train_ternary, studio, names, recipes, doctor,
)  # fmt: skip
AXES = {
    "transforms": "A change of basis that makes weights easier to store. It is folded into the model, so "
    "that nothing has to be undone when the model runs.",
    "grids": "What can be stored: the set of values and their parameters.",
    "solvers": "Which codes: how a weight is put on its grid.",
    "allocation": "Which grid where.",
    "containers": "How bytes are laid out for somebody's runtime.",
}


INPUTS = """A `token` or a group (`g128`) of its channels has a scale of its own; `tensor` is one for a
whole sequence. `static` takes it from calibration, which the plan then asks for. NVFP4 fixes one gain a layer
and takes block scales from the tokens. The names W8A8, W4A8, W4A4, NVFP4, MXFP4 and MXFP8 mean what
llm-compressor means by them, inputs included; A16 is the weights alone, and so are `fp8`, `fp8-tensor` and
`fp8-block`.

`measure`, `bitmill.load` and the calibrating walk round these inputs as the compressed-tensors package does
in float32. Kernels round in their own way in the last places. Files that tell a runtime of it:
`> compressed-tensors` and `> bitmill`; with any other the plan is refused."""


def axis_page(axis: str) -> str:
    """One axis: a section a member, from its module's and its class' docstring."""
    parts = [f"# {axis.capitalize()}", AXES[axis]]
    for name, cls in registry.members(axis).items():
        module = (sys.modules[cls.__module__].__doc__ or "").strip()
        about = inspect.cleandoc(cls.__doc__ or "")
        parts += [f"## {name.replace('_', '-')}", marked(module)]
        parts += [marked(about)] if about != module else []
        if issubclass(cls, Grid):
            spelled = [str(grid) for grid in cls.examples()]
            parts.append("Spelled " + ", ".join(f"`{text}`" for text in spelled if len(text) < 40) + ".")
        if issubclass(cls, Container):
            parts.append("Output: one file." if cls.single_file else "Output: a folder.")
        options = [f for f in dataclasses.fields(cls) if f.default is not dataclasses.MISSING]
        options = [f for f in options if axis != "containers" or f.type in ("int", "float", "bool", "str")]
        if options and axis in ("transforms", "solvers", "containers"):
            parts.append("Options: " + ", ".join(f"`{f.name}={f.default}`" for f in options) + ".")
    parts.append(f"A new one is one new file in `src/bitmill/{axis}/`: the file's name is its public name.")
    return page(MADE, parts)


def recipes_page() -> str:
    """The grammar and the known names."""
    known = [[f"`{name}`", f"`{parse(text)}`"] for name, text in sorted(KNOWN.items())]
    parts = [
        "# Recipes",
        f"A recipe is one line: `{SENTENCE}`.",
        marked((sys.modules["bitmill.recipe"].__doc__ or "").split("\n\n", 1)[1]),
        "Options after the grid:",
        table(
            ["option", "what it does"],
            [
                ["`ROLE=GRID`", f"a grid of its own for one role: {', '.join(f'`{r}`' for r in ROLES)}"],
                [
                    "`/REGEX/=GRID`",
                    "a grid for the tensors in whose name the pattern is found, as `--tensor-type`: in GGUF "
                    "llama.cpp's name (`blk.0.ffn_down.weight`), elsewhere the model's own "
                    "(`model.layers.0.mlp.down_proj.weight`); the first found decides, after `ROLE=GRID`. "
                    "Linears of the blocks, embedding and head; a router goes by its role",
                ],
                ["`pure`", "with a mixture: its default type for every tensor, embedding and head too"],
                ["`keep=v+down`", "leaves these roles as they are"],
                ["`fallback=GRID`", "for shapes that the grid refuses; without it the plan is refused"],
                [
                    "`input=GRID`",
                    "what the inputs of the quantized linears in the blocks are rounded to at run time; "
                    "embedding, head and what is kept are left: see below",
                ],
                [
                    "`cache=GRID`",
                    "what keys and values are rounded to on their way into the cache: by scales that "
                    f"calibration fixes, {', '.join(f'`{text}`' for text in CACHES)} (`fp8` is short for the "
                    "first); or by those of each token's head, as input grids of whole numbers say, such as "
                    "`int4-token-asym`. In compressed-tensors folders and Bitmill's own; there alone any "
                    "[way to store a cache](caches.md) that looks at one token, such as `q4_0-rot` or "
                    "`turboquant-3`",
                ],
                ["`dtype=bf16`", "precision of what is kept and of scales: `f32`, `f16` or `bf16`"],
            ],
        ),
        "## Input grids",
        marked((sys.modules["bitmill.core.inputs"].__doc__ or "").strip()),
        "Spelled " + ", ".join(f"`{text}`" for text in EXAMPLES) + ".",
        INPUTS,
        "## Known names",
        "In any case, with `-` or `_`.",
        table(["name", "stands for"], known),
        "## Recipe files",
        'A `.toml` file holds either `recipe = "…"` or the parts by name. Unknown keys are errors.',
        TOML,
    ]
    return page(MADE, parts)


def commands_page() -> str:
    """Every verb with its arguments, options and their other spellings."""
    from bitmill.cli import exits

    parts = ["# Commands", exits.LEGEND]
    for verb in VERBS:
        name = verb.__name__
        parts += [f"## bitmill {name}", marked(inspect.cleandoc(verb.__doc__ or "")), parameters(verb)]
    return page(MADE, parts)


def parameters(verb: Callable[..., None]) -> str:
    """The table of one verb's parameters."""
    hints = get_type_hints(verb, include_extras=True)
    rows = []
    for name, parameter in inspect.signature(verb).parameters.items():
        _, *metadata = get_args(hints[name]) or (hints[name],)
        info = next((m for m in metadata if "param_decls" in vars(m)), None)
        if info is None:
            continue
        first = (
            info.default if isinstance(info.default, str) else None
        )  # typer keeps the first spelling there
        flags = [flag for flag in (first, *(info.param_decls or ())) if flag]
        spelled = " ".join(f"`{flag}`" for flag in flags) or f"`{info.metavar or name.upper()}`"
        default = parameter.default
        empty = default is inspect.Parameter.empty or default is None or default is False
        rows.append(
            [
                spelled,
                (info.help or "").replace("[default: 128]", "").strip(),
                "" if empty else "on" if default is True else f"`{default}`",
            ]
        )
    return table(["", "what it does", "default"], rows)


def python_page() -> str:
    """The public names of the package."""
    parts = ["# Python", marked((bitmill.__doc__ or "").strip())]
    for name in sorted(bitmill.__all__):
        public: Any = bitmill.__getattr__(name)
        about = marked(inspect.cleandoc(public.__doc__ or ""))
        signature = (
            f"({inspect.signature(public)})" if inspect.isclass(public) else str(inspect.signature(public))
        )
        shown = f"class bitmill.{name}" if inspect.isclass(public) else f"bitmill.{name}{signature}"
        parts += [f"## {name}", f"```python\n{tidy(shown)}\n```", about]
    return page(MADE, parts)


def tidy(signature: str) -> str:
    """A signature with one parameter a line where it is long."""
    signature = re.sub(r"'([^']*)'(?=[,)\s=]|$)", r"\1", signature)
    signature = re.sub(r"<function [^>]*>* at 0x[0-9a-f]+>", "…", signature)
    if len(signature) <= 100:
        return signature
    head, _, rest = signature.partition("(")
    body, _, tail = rest.rpartition(") ->")
    depth, parts, word = 0, [], ""
    for char in body:
        depth += (char in "[(") - (char in "])")
        if char == "," and depth == 0:
            parts.append(word.strip())
            word = ""
        else:
            word += char
    parts.append(word.strip())
    return f"{head}(\n" + "".join(f"    {p},\n" for p in parts) + f") ->{tail}"


def pages() -> Iterator[tuple[Path, str]]:
    """Every generated page and what it should hold."""
    yield DOCS / "recipes.md", recipes_page()
    yield DOCS / "commands.md", commands_page()
    yield DOCS / "python.md", python_page()
    for axis in AXES:
        yield DOCS / f"{axis}.md", axis_page(axis)
    yield DOCS / "worked_examples.md", worked_examples()
    yield from method_pages()


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail when a page is out of date")
    check = parser.parse_args().check
    wanted = dict(pages())
    stale = [path for path, text in wanted.items() if not path.exists() or path.read_text("utf-8") != text]
    left = [path for path in sorted((DOCS / "methods").glob("*.md")) if path not in wanted]
    for path in stale:
        if not check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(wanted[path], encoding="utf-8")
        print(f"{'out of date' if check else 'written'}: {path.relative_to(DOCS.parent)}")
    for path in left:
        if not check:
            path.unlink()
        print(f"{'of no method' if check else 'removed'}: {path.relative_to(DOCS.parent)}")
    if check and (stale or left):
        print("`make docs` writes them", file=sys.stderr)
    return 1 if check and (stale or left) else 0


if __name__ == "__main__":
    sys.exit(main())

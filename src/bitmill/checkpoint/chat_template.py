"""Chat templates are programs from strangers: what one may do is read off its syntax, before it is run.

A template runs in jinja2's immutable sandbox wherever transformers runs it, but not in every server
(CVE-2024-34359, CVE-2026-5760), so what reaches for Python's internals is refused here whoever would run it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from jinja2 import nodes
from jinja2.exceptions import TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 256 << 10
"""Characters of a template."""

GIVEN = frozenset(
    {
        "messages", "tools", "documents", "add_generation_prompt", "bos_token", "eos_token", "unk_token",
        "pad_token", "sep_token", "cls_token", "mask_token", "additional_special_tokens", "enable_thinking",
        "thinking", "thinking_budget", "reasoning_effort", "builtin_tools", "tools_in_user_message",
        "date_string", "custom_tools", "model_identity", "xml_tools", "python_tools", "preserve_thinking",
        "strftime_now", "raise_exception", "range", "dict", "namespace", "loop", "caller", "true", "false",
        "none", "True", "False", "None", "chat_template_kwargs", "continue_final_message", "controls",
        "available_tools", "json_tools", "tool_choice", "add_vision_id", "image_token", "video_token",
    }
)  # fmt: skip
"""Names that chat templates are given by those who render them, as far as they are usual."""

_GADGETS = frozenset(
    {"lipsum", "cycler", "joiner", "self", "config", "request", "url_for", "get_flashed_messages"}
)
_MOST_LOOPS = 3
_LONGEST_RANGE = 10_000
_LARGEST_NUMBER = 1_000_000
_PADDING = frozenset({"center", "ljust", "rjust", "zfill", "indent", "expandtabs"})
_UNDER = re.compile(r"__|^_")


@dataclass(frozen=True)
class Remark:
    """What a template does that its reader should know.

    Attributes:
        grave: whether no honest template does it.
        what: a sentence.
        line: where, from 1; 0 for the whole.
    """

    grave: bool
    what: str
    line: int = 0


@final
class _Generation(Extension):
    """The block that marks what an assistant said, for training: read like the text in it."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """What is inside."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def sandbox() -> ImmutableSandboxedEnvironment:
    """The environment that templates are read in; transformers renders them in its like."""
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )


def scan(template: str) -> tuple[Remark, ...]:
    """What a template does that an honest one would not, or that costs without bound; nothing is run."""
    if len(template) > LONGEST:
        return (Remark(True, f"it has {len(template):,} characters; {LONGEST:,} are allowed"),)
    try:
        tree = sandbox().parse(template)
        found = [remark for node in tree.find_all(nodes.Node) for remark in _of_node(node)]
        found += [*_loops(tree, 0), *_names(tree)]
    except TemplateSyntaxError as error:
        return (Remark(True, f"it is no template: {error.message}", error.lineno),)
    except RecursionError:
        return (Remark(True, "it is nested too deeply"),)
    return tuple(dict.fromkeys(sorted(found, key=lambda remark: (not remark.grave, remark.line))))


def words_looked_for(template: str) -> tuple[str, ...]:
    """Texts that the template looks for in what it is given: where a hidden instruction would wait."""
    found = []
    try:
        for compare in sandbox().parse(template).find_all(nodes.Compare):
            looks = any(operand.op in ("in", "notin") for operand in compare.ops)
            if looks and isinstance(compare.expr, nodes.Const):
                found.append(compare.expr.value)
    except (TemplateSyntaxError, RecursionError):
        return ()
    return tuple(dict.fromkeys(text for text in found if isinstance(text, str)))


def _of_node(node: nodes.Node) -> Iterator[Remark]:
    if isinstance(node, nodes.Getattr) and _UNDER.search(node.attr):
        yield Remark(True, f"it reaches for the attribute {node.attr!r}, inside Python", node.lineno)
    elif isinstance(node, nodes.Getitem):
        yield from _of_key(node)
    elif isinstance(node, nodes.Filter):
        yield from _of_filter(node)
    elif isinstance(node, nodes.Include | nodes.Import | nodes.FromImport | nodes.Extends):
        yield Remark(True, "it loads another template from a file", node.lineno)
    elif isinstance(node, nodes.Call):
        yield from _of_call(node)
    elif isinstance(node, nodes.Pow):
        yield Remark(False, "it raises to a power, which can make a number of any length", node.lineno)
    elif isinstance(node, nodes.Mul):
        sizes = [_number(side) for side in (node.left, node.right)]
        if any(size is not None and size > _LARGEST_NUMBER for size in sizes):
            yield Remark(True, "it multiplies by more than a million: a text of any length", node.lineno)
    elif isinstance(node, nodes.For) and node.recursive:
        yield Remark(
            False, "a loop calls itself (recursive): how deep depends on what it is given", node.lineno
        )


def _of_key(node: nodes.Getitem) -> Iterator[Remark]:
    key = _constant(node.arg)
    if isinstance(key, str) and "__" in key:
        yield Remark(True, f"it reaches for {key!r}, inside Python", node.lineno)
    elif key is None and isinstance(node.arg, nodes.Concat | nodes.Add):
        yield Remark(True, "it puts the name of what it reaches for together from pieces", node.lineno)


def _of_filter(node: nodes.Filter) -> Iterator[Remark]:
    texts = [_constant(argument) for argument in (*node.args, *(pair.value for pair in node.kwargs))]
    if node.name == "attr":
        yield Remark(True, "it uses the filter attr, which goes around the checks of attributes", node.lineno)
    if any(isinstance(text, str) and "__" in text for text in texts):
        yield Remark(True, f"the filter {node.name} is given a name inside Python", node.lineno)
    if node.name in _PADDING and any(_is_large(text) for text in texts):
        yield Remark(True, f"the filter {node.name} pads to more than a million characters", node.lineno)


def _of_call(node: nodes.Call) -> Iterator[Remark]:
    called = node.node
    numbers = [_number(argument) for argument in node.args]
    if isinstance(called, nodes.Name) and called.name == "range":
        if any(number is not None and number > _LONGEST_RANGE for number in numbers):
            yield Remark(True, f"a range of more than {_LONGEST_RANGE:,} numbers", node.lineno)
    elif isinstance(called, nodes.Getattr):
        if called.attr in ("format", "format_map"):
            yield Remark(False, f"it calls {called.attr}, whose fields can reach into objects", node.lineno)
        if called.attr in _PADDING and any(_is_large(number) for number in numbers):
            yield Remark(True, f"{called.attr} pads to more than a million characters", node.lineno)


def _loops(node: nodes.Node, depth: int) -> Iterator[Remark]:
    """Loops inside loops inside loops: what they cost is the product of their lengths."""
    for child in node.iter_child_nodes():
        inner = depth + isinstance(child, nodes.For)
        if isinstance(child, nodes.For) and inner == _MOST_LOOPS + 1:
            yield Remark(False, f"{inner} loops stand inside each other", child.lineno)
        yield from _loops(child, inner)


def _names(tree: nodes.Template) -> Iterator[Remark]:
    """Names that are read and never set: what the template expects to be given."""
    known = {name.name for name in tree.find_all(nodes.Name) if name.ctx in ("store", "param")}
    known |= {macro.name for macro in tree.find_all(nodes.Macro)}
    unknown: dict[str, int] = {}
    for name in tree.find_all(nodes.Name):
        if name.ctx == "load" and name.name not in known and name.name not in GIVEN:
            unknown.setdefault(name.name, name.lineno)
    for text, line in unknown.items():
        if text in _GADGETS or text.startswith("_"):
            yield Remark(True, f"it uses {text!r}, a way out of unsafe environments", line)
        else:
            yield Remark(False, f"it reads {text!r}, which few who render templates give it", line)


def _constant(node: nodes.Expr) -> Any:
    """The value of an expression without names; None where it has any, or is too large to work out."""
    if any(
        isinstance(part, nodes.Mul | nodes.Pow | nodes.Call | nodes.Filter)
        for part in node.find_all(nodes.Expr)
    ):
        return None
    try:
        return node.as_const(nodes.EvalContext(sandbox()))
    except nodes.Impossible:
        return None


def _number(node: nodes.Expr) -> float | None:
    value = _constant(node)
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _is_large(value: Any) -> bool:
    return isinstance(value, int | float) and value > _LARGEST_NUMBER

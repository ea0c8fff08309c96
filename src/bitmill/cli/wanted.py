"""From the words of a command line to a recipe: names, widths and what to keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bitmill.core.errors import BadRecipe

if TYPE_CHECKING:
    from bitmill.recipe import Recipe

MODULES = {
    "embed_tokens": "embed",
    "lm_head": "head",
    "output": "head",
    "q_proj": "q",
    "k_proj": "k",
    "v_proj": "v",
    "o_proj": "o",
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
}
"""Module names people know, and the role each stands for."""


@dataclass(frozen=True)
class Types:
    """What llama.cpp's tools let one say about single tensors, and about parts of the output.

    Attributes:
        tensors: ``REGEX=TYPE``, in the order of the command line.
        output, embedding: types of the head and of the embedding.
        pure: one type for all.
        split_size, split_tensors: the most that a part of the output may hold.
        pre_tokenizer: how text is cut into words.
    """

    tensors: Sequence[str] = ()
    output: str | None = None
    embedding: str | None = None
    pure: bool = False
    split_size: str | None = None
    split_tensors: int | None = None
    pre_tokenizer: str | None = None


def wanted(
    text: str | None,
    keep: Sequence[str],
    bits: int | None = None,
    group: int | None = None,
    types: Types | None = None,
) -> Recipe:
    """The recipe that a command line asks for.

    Args:
        text: the recipe argument, if it was given.
        keep: roles or module names to leave as they are, each may list several with ``,`` or ``+``.
        bits, group: ``--bits`` and ``--group-size``, which stand for a recipe.
        types: what is said about single tensors; it goes before what the recipe says.

    Raises:
        BadRecipe: nothing, or two things, were asked for; or what was asked for does not exist.
    """
    from bitmill.recipe import parse

    if text is None and bits is None:
        raise BadRecipe("no recipe is given", fix="for example Q4_K_M; `bitmill recipes` lists what there is")
    if text is not None and (bits is not None or group is not None):
        raise BadRecipe(
            f"{text!r} and --bits or --group-size are two answers to one question",
            fix="say the width in the recipe: gptq : int4-g64",
        )
    if text is None:
        text = f"gptq : int{bits}-{'channel' if group == -1 else f'g{group or 128}'}"
    recipe = _typed(parse(text), types or Types())
    names = [part.strip() for word in keep for part in word.replace("+", ",").split(",") if part.strip()]
    roles = _roles(names)
    return replace(recipe, keep=tuple(dict.fromkeys((*recipe.keep, *roles)))) if roles else recipe


def _typed(recipe: Recipe, types: Types) -> Recipe:
    from bitmill.core.registry import parse_grid
    from bitmill.core.sizes import size_of
    from bitmill.gguf_options import pre_tokenizer, tensor_type

    said = {"embed": types.embedding, "head": types.output}
    roles = {role: str(parse_grid(grid)) for role, grid in said.items() if grid is not None}
    if roles and recipe.container != "gguf":
        raise BadRecipe(
            "--output-tensor-type and --token-embedding-type are for GGUF",
            where=str(recipe),
            fix="say head=GRID or embed=GRID in the recipe",
        )
    tensors = []
    for word in types.tensors:
        pattern, equals, kind = word.partition("=")
        if not equals:
            raise BadRecipe(
                f"--tensor-type {word!r} names no type", fix="write REGEX=TYPE, e.g. ffn_down=q6_k"
            )
        tensors.append(tensor_type(pattern, kind))
    words = None if types.pre_tokenizer is None else pre_tokenizer(types.pre_tokenizer)
    size = None if types.split_size is None else size_of(types.split_size)
    return replace(
        recipe,
        split_max_size=size or recipe.split_max_size,
        split_max_tensors=types.split_tensors or recipe.split_max_tensors,
        pre_tokenizer=words or recipe.pre_tokenizer,
        roles=tuple({**dict(recipe.roles), **roles}.items()),
        tensors=(*tensors, *recipe.tensors),
        pure=recipe.pure or types.pure,
    )


def _roles(names: Sequence[str]) -> list[str]:
    from bitmill.recipe import ROLES

    found = []
    for name in names:
        role = MODULES.get(name.lower().replace("-", "_"), name.lower())
        if role not in ROLES:
            raise BadRecipe(
                f"--keep {name!r} is neither a role nor a module name",
                fix=f"one of: {', '.join([*ROLES, *MODULES])}",
            )
        found.append(role)
    return found

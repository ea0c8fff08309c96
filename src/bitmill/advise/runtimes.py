"""How runtimes hold a model: in what steps a cache grows, what a window keeps, what they need besides.

What a program takes for itself is no part of any model, and is exact nowhere: each says where it comes from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from bitmill.advise.cache_types import GGML, CacheType, joined
from bitmill.advise.shape import Kept
from bitmill.core.errors import Refused
from bitmill.trust.contracts import method_of, target

ALIGNMENT = 32
"""llama.cpp starts every tensor of a buffer in memory at a multiple of this."""


@dataclass(frozen=True)
class Runtime:
    """What a program does with a model's memory.

    Attributes:
        name: as people call it.
        types: what it stores keys and values as; the first is what it does unasked.
        ram_bytes, vram_bytes: the program itself, where the model is in main memory or on a card.
        source: where those come from.
        page: tokens by which a sequence's cache grows.
        step: tokens that go through the model at once; 0: a whole prompt.
        width: bytes of a number while computing.
        every_logit: whether a step has room for the logits of all its tokens.
        spare: whether a window's cache holds a step beside the window.
        latent: whether an MLA block keeps its latent, and not the keys and values made from it.
        exact: whether the sizes of caches are this program's own, to the byte.
        spills: what becomes of blocks that find no room on a card: the processor ``computes`` them, their
            weights ``stream`` over the bus for every token, or nothing of the kind (empty).
        packs: whether its caches are those of :mod:`bitmill.run.cache`, to the byte.
    """

    name: str
    types: tuple[str, ...]
    ram_bytes: int
    vram_bytes: int
    source: str
    page: int = 1
    step: int = 0
    width: int = 2
    every_logit: bool = False
    spare: bool = False
    latent: bool = True
    exact: bool = False
    spills: str = ""
    packs: bool = False

    def cells(self, context: int, window: int | None, full: bool = False) -> int:
        """Tokens a sequence that one block has room for.

        Args:
            full: whether blocks with a window keep the whole context nevertheless.
        """
        whole = _up(context, self.page)
        if window is None or full:
            return whole
        return _up(min(whole, window + self.spare * min(self.step, whole)), self.page)

    def cache_bytes(
        self,
        block: Kept,
        context: int,
        parallel: int,
        kinds: tuple[CacheType, CacheType],
        full: bool,
        place: tuple[int, int] = (0, 1),
    ) -> int:
        """Bytes of one block's keys and values; ``place`` is its number, and how many there are."""
        choice = joined(kinds) if self.packs else None
        if choice is not None and block.head and block.value_head:
            heads, sizes = block.keys // block.head, (block.head, block.value_head)
            return choice.layer_bytes(*place, heads, sizes, context, None if full else block.window, parallel)
        cells = self.cells(context, block.window, full) * parallel
        return cells * (kinds[0].size(block.keys) + kinds[1].size(block.values))

    def state_bytes(self, block: Kept, parallel: int) -> int:
        """Bytes of one block's recurrent state."""
        return sum(_up(4 * numbers * parallel, ALIGNMENT) for numbers in block.states)

    def check(self, kinds: tuple[CacheType, CacheType], blocks: tuple[Kept, ...]) -> None:
        """Refuse types of a cache that this program does not have, or whose blocks do not divide a head.

        Raises:
            Refused: with what would work.
        """
        for kind in kinds:
            if self.packs and kind.choice is not None:
                continue
            if kind.name not in self.types and kind.name.partition("-")[0] not in self.types:
                ours = "" if kind.choice is None else "; or --runtime bitmill, which has it"
                raise Refused(
                    f"{self.name} does not store keys and values as {kind.name}",
                    fix=f"one of: {', '.join(self.types)}{ours}",
                )
        for block in blocks:
            for kind, head in zip(kinds, (block.head, block.value_head), strict=True):
                why = kind.refuses(head)
                if why is not None:
                    raise Refused(why, where=f"--kv {kind.name}", fix="--kv f16 works for every model")


_INTEGERS = tuple(f"int{bits}" for bits in range(2, 9))
_ALL = (
    Runtime(
        "llama.cpp",
        GGML,
        page=256,
        step=512,
        width=4,
        every_logit=True,
        spare=True,
        exact=True,
        spills="computes",
        ram_bytes=64 << 20,
        vram_bytes=512 << 20,
        source="modelled: in main memory the process beside its buffers, on a card a CUDA context",
    ),
    Runtime(
        "transformers",
        ("bf16", "f16", "f32", *_INTEGERS),
        latent=False,
        spills="streams",
        ram_bytes=450 << 20,
        vram_bytes=700 << 20,
        source="modelled: in main memory Python with torch loaded, on a card a context and libraries",
    ),
    Runtime(
        "bitmill",
        ("f16", "bf16", "f32", "q8_0", "q4_0", "fp8", *_INTEGERS, "kivi", "turboquant", "qjl", "polarquant"),
        latent=False,
        spills="streams",
        packs=True,
        ram_bytes=450 << 20,
        vram_bytes=700 << 20,
        source="modelled, as transformers: bitmill run is that, with packed caches",
    ),
    Runtime(
        "vllm",
        ("bf16", "f16", "fp8", "nvfp4", "int8", "int4"),
        page=16,
        step=8192,
        spills="streams",
        ram_bytes=2 << 30,
        vram_bytes=2 << 30,
        source="modelled: CUDA graphs, workspaces and a profiled step",
    ),
    Runtime(
        "mlx",
        ("bf16", "f16", *_INTEGERS),
        page=256,
        step=2048,
        ram_bytes=256 << 20,
        vram_bytes=256 << 20,
        source="modelled: Python with mlx loaded",
    ),
)
RUNTIMES: Mapping[str, Runtime] = MappingProxyType({runtime.name: runtime for runtime in _ALL})
_OF_CONTAINER = {"gguf": "llama.cpp", "mlx": "mlx"}


def runtime_of(container: str, card: bool) -> Runtime:
    """The program that files of a container are usually run with, with a card or without: by the tables of
    what each loads (:mod:`bitmill.trust.contracts`)."""
    serving = target("vllm")
    method = serving.contract.method(method_of(container), serving.version)
    plain = method is not None and method.level == "note" and not method.needs and method.name != "dense"
    return RUNTIMES[_OF_CONTAINER.get(container, "vllm" if card and plain else "transformers")]


def runtime_named(name: str) -> Runtime:
    """The program of that name.

    Raises:
        Refused: there is none.
    """
    if name not in RUNTIMES:
        raise Refused(f"there is no runtime {name!r} here", fix=f"one of: {', '.join(RUNTIMES)}")
    return RUNTIMES[name]


def _up(number: int, step: int) -> int:
    return -(-number // step) * step

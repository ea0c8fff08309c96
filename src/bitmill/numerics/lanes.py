"""Eight float32 values side by side in compiled loops, where the compiler does not find them by itself.

Such a value lives only inside functions that numba compiles. The operations are those of LLVM's vectors,
hence of any processor; none is contracted or reordered, so that each lane holds the very float32 of a scalar
loop. Arrays are contiguous; offsets count their elements as if they were flat, and are not checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, models, register_model

LANES = 8

_operation: Any = intrinsic
_FLOAT, _BYTE, _WORD = ir.FloatType(), ir.IntType(8), ir.IntType(32)
_FLOATS, _BYTES, _WORDS = (ir.VectorType(kind, LANES) for kind in (_FLOAT, _BYTE, _WORD))


class _Eight(types.Type):
    """Numba's name for such a value."""

    def __init__(self) -> None:
        super().__init__("Eight")


@register_model(_Eight)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _FLOATS)


EIGHT = _Eight()
"""The type of such a value, for functions that add operations."""


def place(context: Any, builder: Any, kind: Any, vector: Any, array: Any, offset: Any) -> Any:
    """Where element ``offset`` of ``array`` is, as a pointer to ``vector``."""
    first = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(first, [offset]), vector.as_pointer())


@_operation
def spread(typing: Any, value: Any) -> Any:
    """One number in all lanes."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), args[0], ir.Constant(_WORD, 0))
        return builder.shuffle_vector(one, one, ir.Constant(_WORDS, None))

    return EIGHT(types.float32), lower


@_operation
def load(typing: Any, array: Any, offset: Any) -> Any:
    """Eight neighbours of a float32 array."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(place(context, builder, signature.args[0], _FLOATS, *args), align=4)

    return EIGHT(array, types.intp), lower


@_operation
def load_bytes(typing: Any, array: Any, offset: Any) -> Any:
    """Eight neighbours of a uint8 array, as floats."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        small = builder.load(place(context, builder, signature.args[0], _BYTES, *args), align=1)
        return builder.uitofp(small, _FLOATS)

    return EIGHT(array, types.intp), lower


@_operation
def store(typing: Any, array: Any, offset: Any, value: Any) -> Any:
    """Write eight neighbours of a float32 array."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, offset, value = args
        builder.store(value, place(context, builder, signature.args[0], _FLOATS, array, offset), align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, EIGHT), lower


@_operation
def plus(typing: Any, a: Any, b: Any) -> Any:
    """Sums of lanes."""
    return EIGHT(EIGHT, EIGHT), lambda context, builder, signature, args: builder.fadd(*args)


@_operation
def minus(typing: Any, a: Any, b: Any) -> Any:
    """Differences of lanes."""
    return EIGHT(EIGHT, EIGHT), lambda context, builder, signature, args: builder.fsub(*args)


@_operation
def times(typing: Any, a: Any, b: Any) -> Any:
    """Products of lanes."""
    return EIGHT(EIGHT, EIGHT), lambda context, builder, signature, args: builder.fmul(*args)


@_operation
def over(typing: Any, a: Any, b: Any) -> Any:
    """Quotients of lanes."""
    return EIGHT(EIGHT, EIGHT), lambda context, builder, signature, args: builder.fdiv(*args)


@_operation
def where_less(typing: Any, a: Any, b: Any, yes: Any, no: Any) -> Any:
    """``yes`` in lanes where ``a < b``, ``no`` in the others and where either is not a number."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, yes, no = args
        return builder.select(builder.fcmp_ordered("<", a, b), yes, no)

    return EIGHT(EIGHT, EIGHT, EIGHT, EIGHT), lower


@_operation
def least(typing: Any, value: Any) -> Any:
    """The smallest lane; all must be numbers."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(_FLOAT, [_FLOATS])
        name = f"llvm.vector.reduce.fmin.v{LANES}f32"
        reduce = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
        return builder.call(reduce, args, fastmath=("nnan", "nsz"))

    return types.float32(EIGHT), lower

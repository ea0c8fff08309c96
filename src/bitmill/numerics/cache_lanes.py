"""Eight codes side by side in compiled loops: out of a stream of bits, through a table, to floats. The codes
are whole numbers in lanes of their own; what they become are the values of :mod:`bitmill.numerics.lanes`."""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba.core import config, types
from numba.extending import intrinsic, models, register_model

from bitmill.numerics.lanes import EIGHT, LANES, place

_operation: Any = intrinsic
_config: Any = config
_FLOAT, _BYTE, _WORD, _LONG = ir.FloatType(), ir.IntType(8), ir.IntType(32), ir.IntType(64)
_FLOATS, _BYTES, _WORDS, _LONGS = (ir.VectorType(k, LANES) for k in (_FLOAT, _BYTE, _WORD, _LONG))


class _Codes(types.Type):
    """Numba's name for eight codes."""

    def __init__(self) -> None:
        super().__init__("EightCodes")


@register_model(_Codes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _WORDS)


_CODES = _Codes()


def _knows(feature: str) -> bool:
    """Whether numba compiles for a processor with this feature, as far as it can be known."""
    plain = not _config.CPU_NAME and _config.CPU_FEATURES is None and _config.ENABLE_AVX
    return bool(plain and binding.get_host_cpu_features().get(feature, False))


def _all(builder: Any, kind: Any, value: Any) -> Any:
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(_WORD, 0))
    return builder.shuffle_vector(one, one, ir.Constant(_WORDS, None))


def _called(builder: Any, name: str, kinds: list[Any], args: Any, result: Any = _FLOATS, **how: Any) -> Any:
    kind = ir.FunctionType(result, kinds)
    function = builder.module.globals.get(name) or ir.Function(builder.module, kind, name)
    return builder.call(function, args, **how)


def _codes(kind: Any, element: Any) -> Any:
    """Eight codes of ``bits`` each out of one word, lowest first."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, bits = (builder.trunc(arg, element) if element is _WORD else arg for arg in args)
        steps = builder.mul(_all(builder, kind, bits), ir.Constant(kind, list(range(LANES))))
        mask = builder.sub(builder.shl(ir.Constant(element, 1), bits), ir.Constant(element, 1))
        found = builder.and_(builder.lshr(_all(builder, kind, word), steps), _all(builder, kind, mask))
        return found if element is _WORD else builder.trunc(found, _WORDS)

    return lower


@_operation
def short_codes(typing: Any, word: Any, bits: Any) -> Any:
    """Eight codes of at most four bits, out of the lowest bits of a word."""
    return _CODES(types.int64, types.int64), _codes(_WORDS, _WORD)


@_operation
def long_codes(typing: Any, word: Any, bits: Any) -> Any:
    """Eight codes of at most eight bits."""
    return _CODES(types.int64, types.int64), _codes(_LONGS, _LONG)


@_operation
def load_word(typing: Any, array: Any, offset: Any) -> Any:
    """Eight bytes of a uint8 array as one number, the first the lowest."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(place(context, builder, signature.args[0], _LONG, *args), align=1)

    return types.int64(array, types.intp), lower


@_operation
def load_byte(typing: Any, array: Any, offset: Any) -> Any:
    """One byte of a uint8 array."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(builder.load(place(context, builder, signature.args[0], _BYTE, *args)), _LONG)

    return types.int64(array, types.intp), lower


@_operation
def load_codes(typing: Any, array: Any, offset: Any) -> Any:
    """Eight neighbours of a uint8 array, a code each."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.zext(
            builder.load(place(context, builder, signature.args[0], _BYTES, *args), align=1), _WORDS
        )

    return _CODES(array, types.intp), lower


@_operation
def load_signed(typing: Any, array: Any, offset: Any) -> Any:
    """Eight neighbours of a uint8 array that holds int8 numbers, as floats."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        small = builder.load(place(context, builder, signature.args[0], _BYTES, *args), align=1)
        return builder.sitofp(builder.sext(small, _WORDS), _FLOATS)

    return EIGHT(array, types.intp), lower


@_operation
def lower_half(typing: Any, codes: Any) -> Any:
    """The lower four bits."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.and_(args[0], ir.Constant(_WORDS, [15] * LANES))

    return _CODES(_CODES), lower


@_operation
def upper_half(typing: Any, codes: Any) -> Any:
    """What is above the lower four bits."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.lshr(args[0], ir.Constant(_WORDS, [4] * LANES))

    return _CODES(_CODES), lower


@_operation
def with_fifth(typing: Any, codes: Any, fifth: Any) -> Any:
    """Codes of four bits, and a fifth bit above them."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.or_(args[0], builder.shl(args[1], ir.Constant(_WORDS, [4] * LANES)))

    return _CODES(_CODES, _CODES), lower


@_operation
def floats(typing: Any, codes: Any) -> Any:
    """The codes themselves."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(args[0], _FLOATS)

    return EIGHT(_CODES), lower


def _places(context: Any, builder: Any, kind: Any, table: Any, codes: Any) -> Any:
    first = context.make_array(kind)(context, builder, table).data
    found = ir.Constant(_FLOATS, ir.Undefined)
    for lane in range(LANES):
        at = ir.Constant(_WORD, lane)
        index = builder.zext(builder.extract_element(codes, at), _LONG)
        found = builder.insert_element(found, builder.load(builder.gep(first, [index])), at)
    return found


@_operation
def looked_up(typing: Any, table: Any, codes: Any) -> Any:
    """What stands in a float32 array at these places; codes are not checked."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _places(context, builder, signature.args[0], *args)

    return EIGHT(table, _CODES), lower


@_operation
def of_sixteen(typing: Any, low: Any, high: Any, table: Any, codes: Any) -> Any:
    """What stands in a table of 16 at these places: its halves are in registers already, ``table`` is for
    processors that do not look up there."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        low, high, table, codes = args
        if _knows("avx512vl"):
            name = "llvm.x86.avx512.vpermi2var.ps.256"
            return _called(builder, name, [_FLOATS, _WORDS, _FLOATS], (low, codes, high))
        if _knows("avx2"):
            kinds = [_FLOATS, _WORDS]
            parts = [_called(builder, "llvm.x86.avx2.permps", kinds, (half, codes)) for half in (low, high)]
            above = builder.icmp_unsigned(">", codes, ir.Constant(_WORDS, [7] * LANES))
            return builder.select(above, parts[1], parts[0])
        return _places(context, builder, signature.args[2], table, codes)

    return EIGHT(EIGHT, EIGHT, table, _CODES), lower


@_operation
def half_at(typing: Any, array: Any, offset: Any) -> Any:
    """The half-precision number whose two bytes stand there in a uint8 array; it must be finite."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        small = builder.load(place(context, builder, signature.args[0], ir.IntType(16), *args), align=1)
        wide = builder.zext(small, _WORD)
        size = builder.shl(builder.and_(wide, ir.Constant(_WORD, 0x7FFF)), ir.Constant(_WORD, 13))
        size = builder.fmul(builder.bitcast(size, _FLOAT), ir.Constant(_FLOAT, 2.0**112))
        sign = builder.shl(builder.and_(wide, ir.Constant(_WORD, 0x8000)), ir.Constant(_WORD, 16))
        return builder.bitcast(builder.or_(builder.bitcast(size, _WORD), sign), _FLOAT)

    return types.float32(array, types.intp), lower


@_operation
def fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """``a · b + c``, rounded once or twice."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _called(builder, f"llvm.fmuladd.v{LANES}f32", [_FLOATS] * 3, args)

    return EIGHT(EIGHT, EIGHT, EIGHT), lower


@_operation
def total(typing: Any, value: Any) -> Any:
    """The sum of all lanes, in any order."""

    def lower(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        name, kinds = f"llvm.vector.reduce.fadd.v{LANES}f32", [_FLOAT, _FLOATS]
        zero = ir.Constant(_FLOAT, 0.0)
        return _called(builder, name, kinds, (zero, args[0]), _FLOAT, fastmath=("reassoc",))

    return types.float32(EIGHT), lower

"""Vectors for numba: a kernel says what the lanes of the processor's vector registers do.

numba knows only scalars and arrays, and leaves it to LLVM to find loops that can be computed several elements at
a time. Here it learns a type whose machine form is an LLVM vector, and the few operations on it that kernels need:

    +  -  *  /           of floats; + and * of integers, which wrap; a scalar stands for a vector of copies of it
    &  ^  << >>          of integers; >> fills with zeros
    <  <=  >  >=         -> mask
    load, store          a vector from or to an array, by the place of its first element in the flat array
    load_first, store_first    the same for its first n lanes; the other lanes are 0, or not stored
    load_rows, store_rows, zero_rows    a tuple of vectors
    spread, lanes        copies of a scalar; 0, 1, 2, ... as integers
    select, sqrt, bits, floats, total    see there
    axpy, axpy_rows, repeat, transposed    of a tuple of vectors: see there

Floats are float32 and integers int32. LLVM may join a product and a sum to one operation with one rounding, and
changes nothing else: NaN and infinities are as in NumPy. Operations that make a vector of nothing have a width:
see `of_width`, and W for the width of this processor.
"""

import operator
from types import SimpleNamespace
from typing import Any

from baby_xp_backends.simd_width import W
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

KINDS = {"float32": ir.FloatType(), "int32": ir.IntType(32), "mask": ir.IntType(1)}
SCALARS = {"float32": types.float32, "int32": types.int32}
I32 = ir.IntType(32)
JOINED = ("contract",)
"""The freedom that LLVM has with floats."""


class Vector(types.Type):
    """`width` lanes of float32 or int32, or a mask of one bit each."""

    def __init__(self, kind: str, width: int):
        self.kind, self.width = kind, width
        self.machine = ir.VectorType(KINDS[kind], width)
        super().__init__(f"Vector({kind}, {width})")


@register_model(Vector)
class VectorModel(models.PrimitiveModel):
    """Its machine form."""

    def __init__(self, dmm, fe_type):
        super().__init__(dmm, fe_type, fe_type.machine)


# operators ----------------------------------------------------------------------------------------------


def _joint(a, b) -> Vector | None:
    """The type of the vectors of an operation whose operands are vectors, or a vector and a scalar."""
    vectors = [one for one in (a, b) if isinstance(one, Vector)]
    scalar = any(isinstance(one, types.Number) for one in (a, b))
    return vectors[0] if (len(vectors) == 2 and a == b) or (len(vectors) == 1 and scalar) else None


def _operator(symbol, code, kinds, makes_mask: bool = False) -> None:
    """Teach numba an operator: code(builder, a, b, kind) -> result, for vectors of these kinds."""

    @type_callable(symbol)
    def typed(context):
        def result(a, b):
            joint = _joint(a, b)
            if joint is None or joint.kind not in kinds:
                return None
            return Vector("mask", joint.width) if makes_mask else joint

        return result

    def lower(context, builder, signature, arguments):
        (joint,) = {one for one in signature.args if isinstance(one, Vector)}
        a, b = (
            value if isinstance(kind, Vector) else _spread(context, builder, joint, kind, value)
            for value, kind in zip(arguments, signature.args, strict=True)
        )
        return code(builder, a, b, joint.kind)

    for operands in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *operands)(lower)


def _spread(context, builder, vector: Vector, kind, value):
    """A scalar of a numba type in all lanes."""
    one = context.cast(builder, value, kind, SCALARS[vector.kind])
    first = builder.insert_element(ir.Constant(vector.machine, ir.Undefined), one, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, vector.width), None)
    return builder.shuffle_vector(first, ir.Constant(vector.machine, ir.Undefined), zeros)


def _arithmetic(floats: str, integers: str = ""):
    def code(builder, a, b, kind):
        if kind == "float32":
            return getattr(builder, floats)(a, b, flags=JOINED)
        return getattr(builder, integers)(a, b)

    return code


def _compared(symbol: str):
    def code(builder, a, b, kind):
        return builder.fcmp_ordered(symbol, a, b) if kind == "float32" else builder.icmp_signed(symbol, a, b)

    return code


_operator(operator.add, _arithmetic("fadd", "add"), ("float32", "int32"))
_operator(operator.sub, _arithmetic("fsub", "sub"), ("float32", "int32"))
_operator(operator.mul, _arithmetic("fmul", "mul"), ("float32", "int32"))
_operator(operator.truediv, _arithmetic("fdiv"), ("float32",))
_operator(operator.and_, lambda builder, a, b, kind: builder.and_(a, b), ("int32", "mask"))
_operator(operator.xor, lambda builder, a, b, kind: builder.xor(a, b), ("int32",))
_operator(operator.lshift, lambda builder, a, b, kind: builder.shl(a, b), ("int32",))
_operator(operator.rshift, lambda builder, a, b, kind: builder.lshr(a, b), ("int32",))
for _symbol, _text in ((operator.lt, "<"), (operator.le, "<="), (operator.gt, ">"), (operator.ge, ">=")):
    _operator(_symbol, _compared(_text), ("float32", "int32"), makes_mask=True)


# within registers ---------------------------------------------------------------------------------------


def _call(builder, name: str, result, *arguments):
    """Call a function of LLVM's. Its own declare_intrinsic knows no vector types."""
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments)


@intrinsic
def select(typing, mask, a, b):
    """a in the lanes where the mask is set, else b; a or b may be a scalar."""
    joint: Any = _joint(a, b)

    def code(context, builder, signature, arguments):
        values = (
            value if isinstance(kind, Vector) else _spread(context, builder, joint, kind, value)
            for value, kind in zip(arguments[1:], signature.args[1:], strict=True)
        )
        return builder.select(arguments[0], *values)

    return joint(mask, types.unliteral(a), types.unliteral(b)), code


@intrinsic
def sqrt(typing, x):
    """The square root of each lane, correctly rounded."""

    def code(context, builder, signature, arguments):
        return _call(builder, f"llvm.sqrt.v{x.width}f32", x.machine, *arguments)

    return x(x), code


@intrinsic
def bits(typing, x):
    """The bits of floats, as integers."""
    result = Vector("int32", x.width)
    return result(x), lambda context, builder, signature, arguments: builder.bitcast(*arguments, result.machine)


@intrinsic
def floats(typing, x):
    """The floats that have these bits."""
    result = Vector("float32", x.width)
    return result(x), lambda context, builder, signature, arguments: builder.bitcast(*arguments, result.machine)


def halves_joined(builder, x, width: int, join):
    """What is left when the upper half of the lanes is joined to the lower half, again and again."""
    while width > 1:
        width //= 2
        nothing = ir.Constant(x.type, ir.Undefined)
        low, high = (
            builder.shuffle_vector(x, nothing, ir.Constant(ir.VectorType(I32, width), list(part)))
            for part in (range(width), range(width, 2 * width))
        )
        x = join(low, high)
    return builder.extract_element(x, I32(0))


@intrinsic
def total(typing, x):
    """The sum of all lanes."""

    def code(context, builder, signature, arguments):
        return halves_joined(builder, arguments[0], x.width, lambda a, b: builder.fadd(a, b))

    return types.float32(x), code


# memory -------------------------------------------------------------------------------------------------


def _pointer(context, builder, array, value, at, element, offset: int = 0):
    """Where element `at` + offset of an array lies, as a pointer to `element`."""
    data = context.make_array(array)(context, builder, value).data
    place = builder.gep(data, [at]) if offset == 0 else builder.gep(data, [builder.add(at, at.type(offset))])
    return builder.bitcast(place, element.as_pointer())


def _load(builder, pointer):
    loaded = builder.load(pointer)
    loaded.align = 4
    return loaded


def _element(context, builder, array, value, at, offset: int, vector: Vector):
    """Element `at` + offset in all lanes."""
    one = _load(builder, _pointer(context, builder, array, value, at, KINDS["float32"], offset))
    return _spread(context, builder, vector, types.float32, one)


def _first_lanes(context, builder, width: int, n):
    """The mask of the first n lanes."""
    lanes = ir.Constant(ir.VectorType(I32, width), list(range(width)))
    count = _spread(context, builder, Vector("int32", width), types.intp, n)
    return builder.icmp_signed("<", lanes, count)


@intrinsic
def store(typing, array, at, x):
    """Put the lanes at array[at], array[at + 1], ..."""

    def code(context, builder, signature, arguments):
        value, at, x = arguments
        builder.store(x, _pointer(context, builder, array, value, at, x.type)).align = 4
        return context.get_dummy_value()

    return types.void(array, types.intp, x), code


@intrinsic
def store_first(typing, array, at, x, n):
    """As store, but the first n lanes alone."""

    def code(context, builder, signature, arguments):
        value, at, lanes, n = arguments
        pointer = _pointer(context, builder, array, value, at, lanes.type)
        mask, name = _first_lanes(context, builder, x.width, n), f"llvm.masked.store.v{x.width}{SUFFIX[x.kind]}.p0"
        _call(builder, name, ir.VoidType(), lanes, pointer, I32(4), mask)
        return context.get_dummy_value()

    return types.void(array, types.intp, x, types.intp), code


SUFFIX = {"float32": "f32", "int32": "i32"}


@intrinsic
def store_rows(typing, array, at, step, rows):
    """Put the vectors of a tuple at array[at], array[at + step], ..."""

    def code(context, builder, signature, arguments):
        value, at, step, rows = arguments
        for row in cgutils.unpack_tuple(builder, rows):
            builder.store(row, _pointer(context, builder, array, value, at, row.type)).align = 4
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, rows), code


# tuples of vectors --------------------------------------------------------------------------------------


@intrinsic
def axpy(typing, x, array, at, rows):
    """A tuple: rows[d] + x times the number array[at + d]."""

    def code(context, builder, signature, arguments):
        x, value, at, rows_ = arguments
        return cgutils.pack_array(builder, [
            builder.fadd(
                row,
                builder.fmul(x, _element(context, builder, array, value, at, d, rows.dtype), flags=JOINED),
                flags=JOINED,
            )
            for d, row in enumerate(cgutils.unpack_tuple(builder, rows_))
        ])  # fmt: skip

    return rows(x, array, types.intp, rows), code


@intrinsic
def axpy_rows(typing, x, array, at, step, rows):
    """As axpy, with the numbers array[at + d step]."""

    def code(context, builder, signature, arguments):
        x, value, at, step, rows_ = arguments
        sums = []
        for row in cgutils.unpack_tuple(builder, rows_):
            product = builder.fmul(x, _element(context, builder, array, value, at, 0, rows.dtype), flags=JOINED)
            sums.append(builder.fadd(row, product, flags=JOINED))
            at = builder.add(at, step)
        return cgutils.pack_array(builder, sums)

    return rows(x, array, types.intp, types.intp, rows), code


@intrinsic(prefer_literal=True)
def repeat(typing, x, number):
    """A tuple of copies of a vector. `number` is a constant."""
    result = types.UniTuple(x, number.literal_value)

    def code(context, builder, signature, arguments):
        return cgutils.pack_array(builder, [arguments[0]] * number.literal_value)

    return result(x, number), code


@intrinsic
def transposed(typing, rows):
    """W vectors of W lanes -> lane i of each, for all i: W vectors."""

    def code(context, builder, signature, arguments):
        width, vectors = rows.dtype.width, cgutils.unpack_tuple(builder, *arguments)
        kind, half = ir.VectorType(I32, width), width // 2
        low, high = (
            [place for lane in range(start, start + half) for place in (lane, width + lane)] for start in (0, half)
        )
        for _ in range(width.bit_length() - 1):  # each turn interleaves the lanes of the two halves of the rows
            vectors = [
                builder.shuffle_vector(*pair, ir.Constant(kind, part))
                for pair in zip(vectors[:half], vectors[half:], strict=True)
                for part in (low, high)
            ]
        return cgutils.pack_array(builder, vectors)

    return rows(rows), code


@intrinsic(prefer_literal=True)
def prefetch_rows(typing, array, at, step, number):
    """Begin to bring the elements array[at], array[at + step], ... to the cache. `number` is a constant."""

    def code(context, builder, signature, arguments):
        value, at, step, _ = arguments
        BYTES = ir.IntType(8).as_pointer()
        for _ in range(number.literal_value):
            place = _pointer(context, builder, array, value, at, ir.IntType(8))
            kind = ir.FunctionType(ir.VoidType(), [BYTES, I32, I32, I32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
            builder.call(function, [place, I32(0), I32(3), I32(1)])
            at = builder.add(at, step)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, number), code


# what has a width ----------------------------------------------------------------------------------------


def of_width(width: int) -> SimpleNamespace:
    """The operations that make a vector of nothing, for vectors of this width: load, spread, lanes and so on."""

    def vector_in(array) -> Vector:
        return Vector(array.dtype.name, width)

    @intrinsic
    def load(typing, array, at):
        """The elements array[at], array[at + 1], ... of a flat array."""
        result = vector_in(array)

        def code(context, builder, signature, arguments):
            value, at = arguments
            return _load(builder, _pointer(context, builder, array, value, at, result.machine))

        return result(array, types.intp), code

    @intrinsic
    def load_first(typing, array, at, n):
        """As load, but the first n lanes alone; 0 in the others."""
        result = vector_in(array)

        def code(context, builder, signature, arguments):
            value, at, n = arguments
            pointer = _pointer(context, builder, array, value, at, result.machine)
            mask, zeros = _first_lanes(context, builder, width, n), ir.Constant(result.machine, None)
            name = f"llvm.masked.load.v{width}{SUFFIX[result.kind]}.p0"
            return _call(builder, name, result.machine, pointer, I32(4), mask, zeros)

        return result(array, types.intp, types.intp), code

    @intrinsic(prefer_literal=True)
    def load_rows(typing, array, at, step, number):
        """A tuple of vectors: those at array[at], array[at + step], ... `number` is a constant."""
        result = types.UniTuple(vector_in(array), number.literal_value)

        def code(context, builder, signature, arguments):
            value, at, step, _ = arguments
            rows = []
            for _ in range(number.literal_value):
                rows.append(_load(builder, _pointer(context, builder, array, value, at, result.dtype.machine)))
                at = builder.add(at, step)
            return cgutils.pack_array(builder, rows)

        return result(array, types.intp, types.intp, number), code

    @intrinsic(prefer_literal=True)
    def zero_rows(typing, number):
        """A tuple of vectors of zeros. `number` is a constant."""
        result = types.UniTuple(Vector("float32", width), number.literal_value)

        def code(context, builder, signature, arguments):
            zeros = ir.Constant(result.dtype.machine, None)
            return cgutils.pack_array(builder, [zeros] * number.literal_value)

        return result(number), code

    @intrinsic
    def spread(typing, x):
        """A scalar in all lanes: a float as float32, an integer as int32."""
        x = types.unliteral(x)
        result = Vector("float32" if isinstance(x, types.Float) else "int32", width)

        def code(context, builder, signature, arguments):
            return _spread(context, builder, result, x, *arguments)

        return result(x), code

    @intrinsic
    def lanes(typing):
        """The integers 0, 1, 2, ..."""
        result = Vector("int32", width)
        return result(), lambda *_: ir.Constant(result.machine, list(range(width)))

    return SimpleNamespace(
        load=load, load_first=load_first, load_rows=load_rows, zero_rows=zero_rows, spread=spread,
        lanes=lanes,
    )  # fmt: skip


_own = of_width(W)
load, load_first, load_rows, zero_rows = _own.load, _own.load_first, _own.load_rows, _own.zero_rows
spread, lanes = _own.spread, _own.lanes

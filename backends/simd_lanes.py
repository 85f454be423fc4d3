"""More operations on the vectors of simd.py: those that move numbers from lane to lane."""

from baby_xp_backends.simd import I32, halves_joined
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


@intrinsic
def highest(typing, x):
    """The largest of all lanes, none of which is NaN."""

    def code(context, builder, signature, arguments):
        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return halves_joined(builder, arguments[0], x.width, larger)

    return types.float32(x), code


@intrinsic
def halves(typing, x):
    """The 16-bit halves of integers, from 0 to 65535, in the order of memory: two vectors of integers."""

    def code(context, builder, signature, arguments):
        both = builder.bitcast(arguments[0], ir.VectorType(ir.IntType(16), 2 * x.width))
        parts = (
            builder.shuffle_vector(both, both, ir.Constant(ir.VectorType(I32, x.width), list(part)))
            for part in (range(x.width), range(x.width, 2 * x.width))
        )
        return cgutils.pack_array(builder, [builder.zext(part, x.machine) for part in parts])

    return types.UniTuple(x, 2)(x), code

"""More operations on the vectors of simd.py: those that move numbers from lane to lane."""

from baby_xp_backends.simd import halves_joined
from numba import types
from numba.extending import intrinsic


@intrinsic
def highest(typing, x):
    """The largest of all lanes, none of which is NaN."""

    def code(context, builder, signature, arguments):
        def larger(a, b):
            return builder.select(builder.fcmp_ordered(">", a, b), a, b)

        return halves_joined(builder, arguments[0], x.width, larger)

    return types.float32(x), code

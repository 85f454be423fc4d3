"""GELU: x times the probability that a standard normal number lies below x (Hendrycks and Gimpel 2016).

Two forms: `tanh`, the approximation that GPT-2 and The Little Baby use, and `erf`, the definition. Either
computes its derivative in the forward pass, where the tanh or the density is at hand; backward is one product.
"""

import math

from baby_xp.arrays.namespace import replaceable

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBIC = 0.044715
INPUTS = 1  # channels that go in for each that comes out

# Chebyshev coefficients of erfcx, computed with 40 digits from its values at 60 Chebyshev nodes; the next
# would be below 2e-18
ERFCX_SERIES = (
    0.37737609962585944, -0.4825091196506807, 0.12232459533097705, -0.017831149719276792,
    0.00032117365249439837, 0.0003503952564796157, -2.243880650620326e-05, -1.0537433119356064e-05,
    5.671331132647568e-07, 4.2976815766659026e-07, 5.104952512868694e-09, -1.8899699318175314e-08,
    -2.2427555298514003e-09, 6.855254370600479e-10, 2.148795952623291e-10, -5.515409713811486e-12,
    -1.347749504396148e-11, -2.0863894639063965e-12, 4.481881468398491e-13, 2.2684175899718627e-13,
    1.850586756537013e-14, -1.150961252626023e-14, -4.009892386870835e-15, -1.3983168344824832e-16,
    2.6353404307752233e-16, 7.953525836555073e-17,
)


def forward(xp, p, x, form: str = "tanh"):
    """x, any shape -> y, of the same shape. `form` is "tanh" or "erf"."""
    y, derivative = FORMS[form](xp, x)
    return y, (derivative,)


def backward(xp, p, saved, dy):
    """dy, shaped as x -> dp, dx."""
    (derivative,) = saved
    return {}, derivative * dy


@replaceable
def tanh_form(xp, x):
    """y = x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), and dy/dx."""
    square = x * x                                                 # `x ** 3` is slow
    tanh = xp.tanh(ROOT_2_OVER_PI * x * (1 + CUBIC * square))
    cdf = 0.5 * (1 + tanh)
    du = ROOT_2_OVER_PI * (1 + 3 * CUBIC * square)
    return x * cdf, cdf + 0.5 * x * (1 - tanh * tanh) * du


@replaceable
def erf_form(xp, x):
    """y = x Phi(x), and dy/dx = Phi(x) + x phi(x)."""
    cdf = 0.5 * (1 + erf(xp, x / math.sqrt(2)))
    density = xp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)
    return x * cdf, cdf + x * density


FORMS = {"tanh": tanh_form, "erf": erf_form}


@replaceable
def erf(xp, x):
    """Error function, which the Array API lacks, to 2e-16: 1 - exp(-z^2) * erfcx(z) for z = |x|.

    erfcx(z) = exp(z^2) (1 - erf(z)) is smooth and varies slowly, so that a short Chebyshev series in
    u = (z - 2) / (z + 2), which maps [0, inf) to [-1, 1), approximates it.
    """
    z = xp.abs(x)
    u = (z - 2) / (z + 2)
    b, before = xp.zeros_like(x), xp.zeros_like(x)                 # Clenshaw's recurrence
    for coefficient in reversed(ERFCX_SERIES[1:]):
        b, before = coefficient + 2 * u * b - before, b
    erfcx = ERFCX_SERIES[0] + u * b - before
    return xp.sign(x) * (1 - xp.exp(-z * z) * erfcx)

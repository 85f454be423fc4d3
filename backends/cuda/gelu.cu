// GELU, its value and derivative in one launch instead of sixteen.
#include "common.cuh"

#define ROOT_2_OVER_PI ((real)0.7978845608028654)
#define CUBIC ((real)0.044715)
#define ROOT_HALF ((real)0.7071067811865476)
#define ONE_OVER_ROOT_2_PI ((real)0.3989422804014327)

extern "C" __global__ void gelu_tanh(
        const real* __restrict__ x, real* __restrict__ y, real* __restrict__ derivative, i64 size) {
    EACH(i, size) {
        real at = x[i], square = at * at;
        real t = tanh(ROOT_2_OVER_PI * at * (1 + CUBIC * square));
        real cdf = (real)0.5 * (1 + t);
        real du = ROOT_2_OVER_PI * (1 + 3 * CUBIC * square);
        y[i] = at * cdf;
        derivative[i] = cdf + (real)0.5 * at * (1 - t * t) * du;
    }
}

extern "C" __global__ void gelu_erf(
        const real* __restrict__ x, real* __restrict__ y, real* __restrict__ derivative, i64 size) {
    EACH(i, size) {
        real at = x[i];
        real cdf = (real)0.5 * (1 + erf(at * ROOT_HALF));
        real density = exp((real)-0.5 * at * at) * ONE_OVER_ROOT_2_PI;
        y[i] = at * cdf;
        derivative[i] = cdf + at * density;
    }
}

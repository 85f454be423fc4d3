// Softmax over the last axis, for the gates of mixtures: one warp per row.
#include "common.cuh"

extern "C" __global__ void softmax_forward(const real* __restrict__ x, real* __restrict__ y, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    x += n * C; y += n * C;
    real top = x[0], sum = 0;
    COLUMNS(c, C) top = x[c] > top ? x[c] : top;
    top = warp_max(top);
    COLUMNS(c, C) sum += exp(x[c] - top);
    sum = warp_sum(sum);
    COLUMNS(c, C) y[c] = exp(x[c] - top) / sum;
}

extern "C" __global__ void softmax_backward(
        const real* __restrict__ y, const real* __restrict__ dy, real* __restrict__ dx, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    y += n * C; dy += n * C; dx += n * C;
    real along = 0;
    COLUMNS(c, C) along += dy[c] * y[c];
    along = warp_sum(along);
    COLUMNS(c, C) dx[c] = y[c] * (dy[c] - along);
}

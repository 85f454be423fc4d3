// Layer norm. One warp per row: the row's three passes find it in the cache, and nothing but results is written.
#include "common.cuh"

#define LAYERNORM_EPS ((real)1e-5)

extern "C" __global__ void layernorm_forward(
        const real* __restrict__ x, const real* __restrict__ gain, const real* __restrict__ bias,
        real* __restrict__ y, real* __restrict__ xhat, real* __restrict__ rstd, i64 N, int C) {
    i64 n = ROW;
    if (n >= N) return;
    x += n * C; y += n * C; xhat += n * C;
    real sum = 0, squares = 0;
    COLUMNS(c, C) sum += x[c];
    real mean = warp_sum(sum) / C;
    COLUMNS(c, C) squares += (x[c] - mean) * (x[c] - mean);
    real scale = 1 / sqrt(warp_sum(squares) / C + LAYERNORM_EPS);
    COLUMNS(c, C) {
        real normed = (x[c] - mean) * scale;
        xhat[c] = normed;
        y[c] = gain[c] * normed + bias[c];
    }
    if (threadIdx.x % 32 == 0) rstd[n] = scale;
}

// dx, and the gradients of gain and bias: sums over all rows. A block computes `rows` rows of dx, a warp each, and
// then their sums, a thread for each column; the last block adds up what all found, parts (gridDim.x, 2, C).
extern "C" __global__ void layernorm_backward(
        const real* __restrict__ xhat, const real* __restrict__ rstd, const real* __restrict__ gain,
        const real* __restrict__ dy, real* __restrict__ dx, volatile real* parts, int* done,
        real* __restrict__ dgain, real* __restrict__ dbias, i64 N, int C, int rows) {
    i64 begin = (i64)blockIdx.x * rows, end = begin + rows < N ? begin + rows : N;
    int warps = blockDim.x / 32;
    for (i64 n = begin + threadIdx.x / 32; n < end; n += warps) {
        i64 at = n * C;
        real along_one = 0, along_xhat = 0;
        COLUMNS(c, C) {
            real dxhat = gain[c] * dy[at + c];
            along_one += dxhat;
            along_xhat += dxhat * xhat[at + c];
        }
        along_one = warp_sum(along_one) / C;
        along_xhat = warp_sum(along_xhat) / C;
        COLUMNS(c, C) dx[at + c] = rstd[n] * (gain[c] * dy[at + c] - along_one - along_xhat * xhat[at + c]);
    }
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        real sum = 0, product = 0;
        for (i64 n = begin; n < end; n++) {
            sum += dy[n * C + c];
            product += dy[n * C + c] * xhat[n * C + c];
        }
        parts[(i64)blockIdx.x * 2 * C + c] = sum;
        parts[((i64)blockIdx.x * 2 + 1) * C + c] = product;
    }
    if (!block_is_last(done, gridDim.x)) return;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        real sum = 0, product = 0;
        for (int part = 0; part < gridDim.x; part++) {
            sum += parts[(i64)part * 2 * C + c];
            product += parts[((i64)part * 2 + 1) * C + c];
        }
        dbias[c] = sum;
        dgain[c] = product;
    }
}

// Sums over columns, for gradients of biases and gains, which add up over all tokens.
#include "common.cuh"

// Of a (N, C), whose rows are `stride` elements apart -> sums (C,). A block adds `rows` rows of 32 columns; the last
// block of these columns adds up what the others found, parts (gridDim.y, C).
extern "C" __global__ void column_sums(
        const real* __restrict__ a, volatile real* parts, int* done, real* __restrict__ sums,
        i64 N, int C, i64 stride, int rows) {
    __shared__ real of_rows[8][32];
    int x = threadIdx.x, y = threadIdx.y, c = blockIdx.x * 32 + x, blocks = gridDim.y;
    i64 begin = (i64)blockIdx.y * rows, end = begin + rows < N ? begin + rows : N;
    for (int stage = 0; stage < 2; stage++) {
        real sum = 0;
        if (c < C && stage == 0) {
            for (i64 n = begin + y; n < end; n += 8) sum += a[n * stride + c];
        } else if (c < C) {
            for (int part = y; part < blocks; part += 8) sum += parts[(i64)part * C + c];
        }
        of_rows[y][x] = sum;
        __syncthreads();
        for (int other = 1; y == 0 && other < 8; other++) sum += of_rows[other][x];
        bool whole = stage == 1 || blocks == 1;
        if (y == 0 && c < C) (whole ? sums[c] : parts[(i64)blockIdx.y * C + c]) = sum;
        if (whole || !block_is_last(done + blockIdx.x, blocks)) return;
    }
}

// The root of the sum of squares -> y (1,). A block adds up its share, the last one what the others found.
extern "C" __global__ void global_norm(
        const real* __restrict__ x, volatile real* parts, int* done, real* __restrict__ y, i64 size) {
    __shared__ real of_warps[32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    real sum = 0;
    EACH(i, size) sum += x[i] * x[i];
    sum = warp_sum(sum);
    if (lane == 0) of_warps[warp] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int other = 1; other < blockDim.x / 32; other++) sum += of_warps[other];
        parts[blockIdx.x] = sum;
    }
    if (!block_is_last(done, gridDim.x) || warp > 0) return;
    sum = 0;
    COLUMNS(part, gridDim.x) sum += parts[part];
    sum = warp_sum(sum);
    if (lane == 0) y[0] = sqrt(sum);
}

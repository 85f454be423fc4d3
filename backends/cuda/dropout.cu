// Dropout and its random bits, the same as those of rng.py on every backend.
#include "common.cuh"

extern "C" __global__ void streams(
        const int* __restrict__ seed, const int* __restrict__ step, const int* __restrict__ samples,
        int* __restrict__ keys, int places, int B) {
    u32 key = fold((u32)seed[0], (u32)step[0]);
    EACH(i, (i64)places * B) keys[i] = (int)fold(fold(key, (u32)(i / B)), (u32)samples[i % B]);
}

extern "C" __global__ void keep_mask(
        const int* __restrict__ stream, bool* __restrict__ keep, int B, i64 size, u32 threshold) {
    for (int b = blockIdx.y; b < B; b += gridDim.y) {
        EACH(i, size) keep[b * size + i] = survives((u32)stream[b], i, threshold);
    }
}

extern "C" __global__ void drop(
        const real* __restrict__ x, const int* __restrict__ stream, real* __restrict__ y, bool* __restrict__ keep,
        int B, i64 size, u32 threshold, real scale) {
    for (int b = blockIdx.y; b < B; b += gridDim.y) {
        EACH(i, size) {
            bool kept = survives((u32)stream[b], i, threshold);
            keep[b * size + i] = kept;
            y[b * size + i] = kept ? x[b * size + i] * scale : 0;
        }
    }
}

extern "C" __global__ void scale_kept(
        const bool* __restrict__ keep, const real* __restrict__ x, real* __restrict__ y, i64 size, real scale) {
    EACH(i, size) y[i] = keep[i] ? x[i] * scale : 0;
}

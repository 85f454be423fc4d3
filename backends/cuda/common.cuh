// What the kernels share. `real` is float, or double where DOUBLE is defined.
//
// Each .cu file can be read and compiled alone, as it includes this one; cupy_kernels.py joins them all.
#ifndef BABY_XP_COMMON
#define BABY_XP_COMMON

typedef unsigned int u32;
typedef long long i64;

#ifdef DOUBLE
typedef double real;
#define LOWEST (-1.7976931348623157e308)
#else
typedef float real;
#define LOWEST (-3.4028234663852886e38f)
#endif

// the elements of a thread: neighbours in a warp read neighbours in memory
#define EACH(i, size) \
    for (i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x; i < (size); i += (i64)gridDim.x * blockDim.x)
// the row of a warp, and the columns of a thread
#define ROW ((i64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32)
#define COLUMNS(c, width) for (int c = threadIdx.x % 32; c < (width); c += 32)

// every thread of the warp gets the sum, and each the same one: the order of two summands does not matter
__device__ real warp_sum(real value) {
    for (int far = 16; far > 0; far /= 2) value += __shfl_xor_sync(0xffffffffu, value, far);
    return value;
}

__device__ real warp_max(real value) {
    for (int far = 16; far > 0; far /= 2) {
        real other = __shfl_xor_sync(0xffffffffu, value, far);
        value = value > other ? value : other;
    }
    return value;
}

// Whether this block is the last one of `blocks` to come here, with all that the others wrote before in sight. It
// may then add up their partial sums, in a fixed order: one launch for both stages. *done is 0 before and after.
__device__ bool block_is_last(int* done, int blocks) {
    __shared__ int last;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0 && threadIdx.y == 0) {
        last = atomicAdd(done, 1) == blocks - 1;
        if (last) *done = 0;
    }
    __syncthreads();
    __threadfence();
    return last;
}

// rng.py's hash, in unsigned numbers, whose shift is the logical one and whose overflow is defined. A hash is
// computed for each element, though two share one: arithmetic is cheap beside memory.
#define GOLDEN 0x9e3779b9u
#define FIRST 0x7feb352du
#define SECOND 0x846ca68bu

__device__ u32 mix(u32 x) {
    x += GOLDEN;
    x = (x ^ (x >> 16)) * FIRST;
    x = (x ^ (x >> 15)) * SECOND;
    return x ^ (x >> 16);
}

__device__ u32 fold(u32 key, u32 data) { return mix(mix(key) ^ data); }

__device__ bool survives(u32 stream, i64 element, u32 threshold) {
    u32 bits = mix(stream ^ mix((u32)(element >> 1)));
    return ((bits >> (16 * (element & 1))) & 0xffffu) >= threshold;
}

#endif

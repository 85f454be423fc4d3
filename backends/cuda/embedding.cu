// Gradients of embeddings: rows of dy that belong to the same id are added up, always in the same order.
#include "common.cuh"

// For few ids, a product with one-hot rows (N, V) is the cheaper way; these are they.
extern "C" __global__ void one_hot(const int* __restrict__ ids, real* __restrict__ y, i64 size, int V) {
    EACH(i, size) y[i] = ids[i / V] == i % V;
}

// For many: `order` sorts the ids and keeps equal ones as they come. The block of the first token of an id adds up
// the rows of all; the others have nothing to do.
extern "C" __global__ void sum_sorted(
        const i64* __restrict__ order, const int* __restrict__ ids, const real* __restrict__ dy,
        real* __restrict__ sums, int N, int C) {
    int first = blockIdx.x, id = ids[order[first]];
    if (first > 0 && ids[order[first - 1]] == id) return;
    for (int c = threadIdx.x; c < C; c += blockDim.x) {
        real sum = 0;
        for (int n = first; n < N && ids[order[n]] == id; n++) sum += dy[order[n] * C + c];
        sums[(i64)id * C + c] = sum;
    }
}

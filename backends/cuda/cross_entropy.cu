// Cross-entropy. One warp per token, one pass over its logits: where a larger one turns up, the sum so far is scaled
// down. The largest logit and the sum are kept, two numbers per token, not the probabilities: a step's largest array
// if the vocabulary is large. The first `top` is finite, so that a logit of -inf adds nothing.
//
// Rows of logits and of their gradients are `stride` elements apart.
#include "common.cuh"

extern "C" __global__ void cross_entropy_forward(
        const real* __restrict__ logits, const int* __restrict__ targets, real* __restrict__ losses,
        real* __restrict__ tops, real* __restrict__ sums, i64 N, int V, i64 stride) {
    i64 n = ROW;
    if (n >= N) return;
    logits += n * stride;
    real top = LOWEST, sum = 0;
    COLUMNS(c, V) {
        real logit = logits[c];
        if (logit > top) {
            sum = sum * exp(top - logit) + 1;
            top = logit;
        } else {
            sum += exp(logit - top);
        }
    }
    real highest = warp_max(top);
    sum = warp_sum(sum * exp(top - highest));
    if (threadIdx.x % 32 == 0) {
        losses[n] = log(sum) - (logits[targets[n]] - highest);
        tops[n] = highest;
        sums[n] = sum;
    }
}

extern "C" __global__ void cross_entropy_backward(
        const real* __restrict__ logits, const int* __restrict__ targets, const real* __restrict__ tops,
        const real* __restrict__ sums, const real* __restrict__ dy, real* __restrict__ dlogits, i64 N, int V,
        i64 stride) {
    i64 n = ROW;
    if (n >= N) return;
    logits += n * stride; dlogits += n * stride;
    COLUMNS(c, V) dlogits[c] = (exp(logits[c] - tops[n]) / sums[n] - (c == targets[n])) * dy[n];
}

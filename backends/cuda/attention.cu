// Causal attention of all heads, in two ways.
//
// For narrow heads, one launch each way (the idea of FlashAttention, Dao et al. 2022): scores live in registers, tile
// by tile, and the matrix of all scores is never in memory. The backward pass computes them again.
//
// For wide heads, cuBLAS's products are faster. All that happens to a row of scores between two products happens in
// one launch: causal mask, softmax and dropout, in place. Scores that the mask hides are never read. The dropout mask
// is not kept: the hash gives it again in the backward pass.
#include "common.cuh"

#define WARPS 8
#define WIDEST 64         // of heads, in the forward pass
#define WIDEST_BACKWARD 32

// A block computes WARPS queries of one head, a warp each, and shares tiles of 32 keys and values. Scores are computed
// with a key for each thread, their weighted sum with a channel for each, two where a head is wider than a warp.
//
// The queries are part of qkv (N, 3 S). They come after `past` tokens; keys and values of these and of their own lie
// where the strides say. y (N, S). For the backward pass, tops and sums (B, H, T): the largest score of each query,
// and the sum of its exponentials. Their logarithm in one number would lose digits where scores are large.
extern "C" __global__ void attention_forward(
        const real* __restrict__ qkv, const real* __restrict__ k, const real* __restrict__ v,
        i64 sample_stride, i64 head_stride, i64 token_stride, const int* __restrict__ stream,
        real* __restrict__ y, real* __restrict__ tops, real* __restrict__ sums, int T, int past, int H, int D,
        u32 threshold, real scale) {
    __shared__ real keys[32][WIDEST + 1], values[32][WIDEST + 1], queries[WARPS][WIDEST], weights[WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, b = blockIdx.x / H, h = blockIdx.x % H;
    int t = blockIdx.y * WARPS + warp, end = blockIdx.y * WARPS + WARPS < T ? blockIdx.y * WARPS + WARPS : T;
    i64 n = (i64)b * T + t, S = (i64)H * D, row = ((i64)h * T + t) * (past + T);
    k += b * sample_stride + h * head_stride;
    v += b * sample_stride + h * head_stride;
    COLUMNS(d, D) queries[warp][d] = t < T ? qkv[n * 3 * S + h * D + d] / sqrt((real)D) : 0;
    u32 key = stream ? (u32)stream[b] : 0;
    real top = LOWEST, sum = 0, y0 = 0, y1 = 0;
    for (int first = 0; first < past + end; first += 32) {
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * D; i += blockDim.x) {
            int j = i / D, d = i % D;
            bool there = first + j < past + end;
            keys[j][d] = there ? k[(first + j) * token_stride + d] : 0;
            values[j][d] = there ? v[(first + j) * token_stride + d] : 0;
        }
        __syncthreads();
        bool seen = t < T && first + lane <= past + t;  // a token sees itself and those before it
        real score = 0;
        for (int d = 0; d < D; d++) score += queries[warp][d] * keys[lane][d];
        real highest = warp_max(seen ? score : LOWEST);
        highest = highest > top ? highest : top;
        real weight = seen ? exp(score - highest) : 0, shrink = exp(top - highest);
        sum = sum * shrink + warp_sum(weight);
        if (stream) weight = survives(key, row + first + lane, threshold) ? weight * scale : 0;
        weights[warp][lane] = weight;
        __syncwarp();
        y0 *= shrink;
        y1 *= shrink;
        for (int j = 0; j < 32; j++) {
            y0 += weights[warp][j] * values[j][lane];
            if (D > 32) y1 += weights[warp][j] * values[j][lane + 32];
        }
        top = highest;
    }
    if (t >= T) return;
    if (lane < D) y[n * S + h * D + lane] = y0 / sum;
    if (lane + 32 < D) y[n * S + h * D + lane + 32] = y1 / sum;
    if (lane == 0) {
        tops[((i64)b * H + h) * T + t] = top;
        sums[((i64)b * H + h) * T + t] = sum;
    }
}

// dqkv (N, 3 S), of a forward pass without `past`. Half of the blocks give a warp to each query, whose gradient is a
// sum over keys; the other half to each key, for the gradients of it and its value, which are sums over queries.
// Scores are computed by the forward pass's operations, so that they have the same bits.
extern "C" __global__ void attention_backward(
        const real* __restrict__ qkv, const real* __restrict__ y, const real* __restrict__ tops,
        const real* __restrict__ sums, const real* __restrict__ dy, const int* __restrict__ stream, real* __restrict__ dqkv,
        int T, int H, int D, u32 threshold, real scale) {
    __shared__ real firsts[32][WIDEST_BACKWARD + 1], seconds[32][WIDEST_BACKWARD + 1];  // keys, values; queries, dy
    __shared__ real own[2][WARPS][WIDEST_BACKWARD], weights[2][WARPS][32];
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32, b = blockIdx.x / H, h = blockIdx.x % H;
    int t = blockIdx.y * WARPS + warp, S = H * D;
    bool of_keys = blockIdx.z;
    i64 head = (i64)b * T * 3 * S + h * D, out = (i64)b * T * S + h * D;
    real root = sqrt((real)D), delta = 0, sum0 = 0, sum1 = 0;
    u32 key = stream ? (u32)stream[b] : 0;
    qkv += head; dqkv += head; y += out; dy += out;
    tops += ((i64)b * H + h) * T; sums += ((i64)b * H + h) * T;
    COLUMNS(d, D) {
        i64 at = (i64)t * 3 * S + d;
        own[0][warp][d] = t < T ? (of_keys ? qkv[at + S] : qkv[at] / root) : 0;
        own[1][warp][d] = t < T ? (of_keys ? qkv[at + 2 * S] : dy[(i64)t * S + d]) : 0;
    }
    __syncwarp();
    // what the softmax's backward subtracts, the sum of weights times their gradients, is dy y as well. It is added up
    // as those gradients are: where one weight is 1, the difference is 0
    for (int d = 0; d < D && t < T && !of_keys; d++) delta += own[1][warp][d] * y[(i64)t * S + d];
    real top = t < T ? tops[t] : 0, sum = t < T ? sums[t] : 1;
    int end = of_keys || blockIdx.y * WARPS + WARPS > T ? T : blockIdx.y * WARPS + WARPS;
    for (int first = of_keys ? blockIdx.y * WARPS / 32 * 32 : 0; first < end; first += 32) {
        __syncthreads();
        for (int i = threadIdx.x; i < 32 * D; i += blockDim.x) {
            int j = i / D, d = i % D;
            i64 at = (i64)(first + j) * 3 * S + d;
            bool there = first + j < end;
            firsts[j][d] = there ? (of_keys ? qkv[at] / root : qkv[at + S]) : 0;
            seconds[j][d] = there ? (of_keys ? dy[(i64)(first + j) * S + d] : qkv[at + 2 * S]) : 0;
        }
        __syncthreads();
        int other = first + lane, query = of_keys ? other : t, seen_key = of_keys ? t : other;
        bool seen = t < T && other < end && seen_key <= query;
        if (of_keys && seen) {
            delta = 0;
            for (int d = 0; d < D; d++) delta += seconds[lane][d] * y[(i64)other * S + d];
            top = tops[other];
            sum = sums[other];
        }
        real score = 0, gradient = 0;
        for (int d = 0; d < D; d++) {
            score += own[0][warp][d] * firsts[lane][d];
            gradient += own[1][warp][d] * seconds[lane][d];
        }
        real weight = seen ? exp(score - top) / sum : 0, dropped = weight;
        if (stream && !survives(key, ((i64)h * T + query) * T + seen_key, threshold)) {
            gradient = dropped = 0;
        } else if (stream) {
            gradient *= scale;
            dropped *= scale;
        }
        weights[0][warp][lane] = seen ? weight * (gradient - delta) : 0;
        weights[1][warp][lane] = dropped;
        __syncwarp();
        for (int j = 0; j < 32 && lane < D; j++) {
            sum0 += weights[0][warp][j] * firsts[j][lane];
            if (of_keys) sum1 += weights[1][warp][j] * seconds[j][lane];
        }
        __syncwarp();
    }
    if (t >= T || lane >= D) return;
    i64 at = (i64)t * 3 * S + lane;
    dqkv[of_keys ? at + S : at] = of_keys ? sum0 : sum0 / root;
    if (of_keys) dqkv[at + 2 * S] = sum1;
}

// From (N, P H D) to (P, B, H, T, D) if `apart`, else back: one block per token.
extern "C" __global__ void move_heads(
        const real* __restrict__ from, real* __restrict__ to, int T, int H, int D, int P, int apart) {
    i64 n = blockIdx.x, N = gridDim.x, b = n / T, t = n % T;
    int S = H * D;
    for (int c = threadIdx.x; c < P * S; c += blockDim.x) {
        int part = c / S, h = c % S / D, d = c % D;
        i64 together = n * P * S + c, by_head = part * N * S + ((b * H + h) * T + t) * D + d;
        to[apart ? by_head : together] = from[apart ? together : by_head];
    }
}

// scores (B, H, T, T) become weights; `dropped` gets what dropout leaves of them, unless `stream` is null
extern "C" __global__ void causal_softmax(
        real* __restrict__ scores, const int* __restrict__ stream, real* __restrict__ dropped,
        i64 N, int H, int T, u32 threshold, real scale) {
    i64 n = ROW;
    if (n >= N) return;
    scores += n * T;
    int seen = n % T + 1;
    real top = scores[0], sum = 0;
    COLUMNS(c, seen) top = scores[c] > top ? scores[c] : top;
    top = warp_max(top);
    COLUMNS(c, seen) sum += exp(scores[c] - top);
    sum = warp_sum(sum);
    i64 of_sample = (i64)H * T, row = n % of_sample * T;
    u32 key = stream ? (u32)stream[n / of_sample] : 0;
    COLUMNS(c, T) {
        real weight = c < seen ? exp(scores[c] - top) / sum : 0;
        scores[c] = weight;
        if (stream) dropped[n * T + c] = survives(key, row + c, threshold) ? weight * scale : 0;
    }
}

// gradients of what dropout left become those of the scores
extern "C" __global__ void causal_softmax_backward(
        const real* __restrict__ weights, const int* __restrict__ stream, real* __restrict__ gradients,
        i64 N, int H, int T, u32 threshold, real scale) {
    i64 n = ROW;
    if (n >= N) return;
    weights += n * T; gradients += n * T;
    int seen = n % T + 1;
    i64 of_sample = (i64)H * T, row = n % of_sample * T;
    u32 key = stream ? (u32)stream[n / of_sample] : 0;
    real along = 0;
    COLUMNS(c, seen) {
        real gradient = gradients[c];
        if (stream) gradient = survives(key, row + c, threshold) ? gradient * scale : 0;
        gradients[c] = gradient;  // this thread's own from here on
        along += gradient * weights[c];
    }
    along = warp_sum(along);
    COLUMNS(c, T) gradients[c] = c < seen ? weights[c] * (gradients[c] - along) : 0;
}

// AdamW on all parameters, and the numbers that change from step to step, which never leave the device.
#include "common.cuh"

#define ADAMW_EPS ((real)1e-8)
#define COSINE 1
#define LINEAR 2

extern "C" __global__ void adamw(
        const real* __restrict__ w, const real* __restrict__ g, const real* __restrict__ m,
        const real* __restrict__ v, const real* __restrict__ decays,
        const real* __restrict__ scale, const real* __restrict__ lr,
        const real* __restrict__ bias1, const real* __restrict__ bias2,
        real* __restrict__ new_w, real* __restrict__ new_m, real* __restrict__ new_v,
        i64 size, real keep1, real in1, real keep2, real in2, real weight_decay) {
    EACH(i, size) {
        real gradient = scale[0] * g[i];
        real first = keep1 * m[i] + in1 * gradient;
        real second = keep2 * v[i] + in2 * gradient * gradient;
        real step = (first / bias1[0]) / (sqrt(second / bias2[0]) + ADAMW_EPS);
        new_w[i] = w[i] - lr[0] * (step + weight_decay * decays[i] * w[i]);
        new_m[i] = first;
        new_v[i] = second;
    }
}

// numbers (4,): the factor that clips the gradients, the learning rate, and the two bias corrections. One thread.
extern "C" __global__ void rates(
        const real* __restrict__ norm, const int* __restrict__ step, real* __restrict__ numbers, int schedule,
        real peak, real lowest, real warmup, real begin, real span, real limit, real log_beta1, real log_beta2) {
    real t = step[0], lr = peak, done = (t - begin) / span, scale = limit / (norm[0] + (real)1e-6);
    done = done < 0 ? 0 : done > 1 ? 1 : done;
    if (schedule == COSINE) lr = lowest + (real)0.5 * (peak - lowest) * (1 + cos((real)3.141592653589793 * done));
    if (schedule == LINEAR) lr = peak + (lowest - peak) * done;
    numbers[0] = limit == 0 || scale > 1 ? 1 : scale;  // NaN stays NaN
    numbers[1] = t < warmup ? peak * (t + 1) / (warmup + 1) : lr;
    numbers[2] = -expm1((t + 1) * log_beta1);
    numbers[3] = -expm1((t + 1) * log_beta2);
}

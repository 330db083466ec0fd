// What is read from logits and written over them: log-probabilities of chosen tokens, and their gradient. bfloat16 logits, float32 within.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "vectors.h"

namespace {

// f(column, lanes) for all columns of a row.
template <typename F> inline void each_vector(int columns, F f) {
    int c = 0;
    for (; c + LANES <= columns; c += LANES) f(c, (__mmask16)0xffff);
    if (c < columns) f(c, first_lanes(columns - c));
}

inline float value(bf16 x) { return _mm512_cvtss_f32(to_float(_mm256_set1_epi16((short)x))); }

}  // namespace

extern "C" {

// With l = scale z [rows, columns]: norm = log sum_v exp l_v, logprob = l_target - norm, entropy = -sum_v p_v log p_v (null: not wanted).
// keep (null: nothing is kept): the weights w = exp(l - max l) are written over z, and of each row keep = 1 / sum_v w_v, so that p = keep w.
void head_forward(
    bf16* z, const int64_t* targets, float scale, int rows, int columns, float* logprobs, float* norms, float* entropies, float* keep
) {
    const __m512 factor = _mm512_set1_ps(scale), least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        bf16* row = z + (long)i * columns;
        const float chosen = value(row[targets[i]]) * scale;
        __m512 top = least, sum = _mm512_setzero_ps(), mean = _mm512_setzero_ps();
        each_vector(columns, [&](int c, __mmask16 lanes) {
            top = _mm512_mask_max_ps(top, lanes, top, _mm512_mul_ps(load(row + c, lanes), factor));
        });
        const float highest = _mm512_reduce_max_ps(top);
        const __m512 high = _mm512_set1_ps(highest);
        each_vector(columns, [&](int c, __mmask16 lanes) {
            const __m512 below = _mm512_fmsub_ps(load(row + c, lanes), factor, high), w = _mm512_maskz_mov_ps(lanes, exponential(below));
            sum = _mm512_add_ps(sum, w);
            if (entropies) mean = _mm512_mask3_fmadd_ps(below, w, mean, _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_GT_OQ));
            if (keep) store(row + c, w, lanes);
        });
        const float total = _mm512_reduce_add_ps(sum), log_total = std::log(total);
        norms[i] = highest + log_total;
        logprobs[i] = chosen - norms[i];
        if (entropies) entropies[i] = log_total - _mm512_reduce_add_ps(mean) / total;
        if (keep) keep[i] = 1 / total;
    }
}

// The gradient of sum_i pull_i logprob_i, written over the weights that head_forward kept: slope pull (1[v = target] - keep w_v).
void head_backward(
    bf16* z, const int64_t* targets, const float* logprobs, const float* keep, const float* pull, float slope, int rows, int columns
) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        bf16* row = z + (long)i * columns;
        const __m512 factor = _mm512_set1_ps(-pull[i] * slope * keep[i]);
        each_vector(columns, [&](int c, __mmask16 lanes) { store(row + c, _mm512_mul_ps(load(row + c, lanes), factor), lanes); });
        // exactly: where the probability is near 1, what is left of it would be lost to rounding
        const float chosen = -std::expm1(logprobs[i]) * pull[i] * slope;
        store(row + targets[i], _mm512_set1_ps(chosen), first_lanes(1));
    }
}
}

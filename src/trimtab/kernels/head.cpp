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
// keep: the probabilities p are written over z.
void head_forward(
    bf16* z, const int64_t* targets, float scale, int rows, int columns, int keep, float* logprobs, float* norms, float* entropies
) {
    const __m512 factor = _mm512_set1_ps(scale), least = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
#pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        bf16* row = z + (long)i * columns;
        __m512 top = least, sum = _mm512_setzero_ps(), mean = _mm512_setzero_ps();
        each_vector(columns, [&](int c, __mmask16 lanes) {
            top = _mm512_mask_max_ps(top, lanes, top, _mm512_mul_ps(load(row + c, lanes), factor));
        });
        const float highest = _mm512_reduce_max_ps(top);
        const __m512 high = _mm512_set1_ps(highest);
        each_vector(columns, [&](int c, __mmask16 lanes) {
            const __m512 below = _mm512_fmsub_ps(load(row + c, lanes), factor, high), e = _mm512_maskz_mov_ps(lanes, exponential(below));
            sum = _mm512_add_ps(sum, e);
            if (entropies) mean = _mm512_mask3_fmadd_ps(below, e, mean, _mm512_cmp_ps_mask(e, _mm512_setzero_ps(), _CMP_GT_OQ));
        });
        const float total = _mm512_reduce_add_ps(sum), log_total = std::log(total);
        norms[i] = highest + log_total;
        logprobs[i] = value(row[targets[i]]) * scale - norms[i];
        if (entropies) entropies[i] = log_total - _mm512_reduce_add_ps(mean) / total;
        if (!keep) continue;
        const __m512 share = _mm512_set1_ps(1 / total);
        each_vector(columns, [&](int c, __mmask16 lanes) {
            const __m512 e = exponential(_mm512_fmsub_ps(load(row + c, lanes), factor, high));
            store(row + c, _mm512_mul_ps(e, share), lanes);
        });
    }
}

// The gradient of sum_i pull_i logprob_i, written over the probabilities that head_forward kept: slope pull (1[v = target] - p_v).
void head_backward(bf16* z, const int64_t* targets, const float* logprobs, const float* pull, float slope, int rows, int columns) {
#pragma omp parallel for schedule(static)
    for (int i = 0; i < rows; i++) {
        bf16* row = z + (long)i * columns;
        const __m512 factor = _mm512_set1_ps(-pull[i] * slope);
        each_vector(columns, [&](int c, __mmask16 lanes) { store(row + c, _mm512_mul_ps(load(row + c, lanes), factor), lanes); });
        // exactly: where the probability is near 1, what is left of it would be lost to rounding
        const float chosen = -std::expm1(logprobs[i]) * pull[i] * slope;
        store(row + targets[i], _mm512_set1_ps(chosen), first_lanes(1));
    }
}
}

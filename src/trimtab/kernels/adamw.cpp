// AdamW on weights in bfloat16 of which the float32 value is kept in two halves.
#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace {

constexpr long BLOCK = 1 << 14;  // weights that are a thread's task

}  // namespace

extern "C" {

// The bits of a float32 weight are 65536 upper + lower, lower signed: `upper` is the weight rounded to the nearest bfloat16.
//     g = scale grad,  m += new1 (g - m),  v = old2 v + new2 g^2,  w = keep w - rate m / (sqrt(v) / root + eps),  grad = 0
void adamw_step(bf16* upper, int16_t* lower, float* grad, float* m, float* v, long count, float scale, float new1, float old2, float new2, float keep,
                float rate, float root, float eps) {
#pragma omp parallel for schedule(static)
    for (long block = 0; block < (count + BLOCK - 1) / BLOCK; block++)
        for (long i = block * BLOCK; i < std::min(count, (block + 1) * BLOCK); i += LANES) {
            const __mmask16 real = first_lanes((int)std::min<long>(LANES, count - i));
            const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, upper + i)), 16);
            __m512 w = _mm512_castsi512_ps(_mm512_add_epi32(high, _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(real, lower + i))));
            const __m512 g = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, grad + i), _mm512_set1_ps(scale));
            __m512 first = _mm512_maskz_loadu_ps(real, m + i), second = _mm512_maskz_loadu_ps(real, v + i);
            first = _mm512_fmadd_ps(_mm512_set1_ps(new1), _mm512_sub_ps(g, first), first);
            second = _mm512_fmadd_ps(_mm512_set1_ps(old2), second, _mm512_mul_ps(_mm512_set1_ps(new2), _mm512_mul_ps(g, g)));
            const __m512 below = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(second), _mm512_set1_ps(root)), _mm512_set1_ps(eps));
            w = _mm512_fnmadd_ps(_mm512_set1_ps(rate), _mm512_div_ps(first, below), _mm512_mul_ps(w, _mm512_set1_ps(keep)));
            const __m512i bits = _mm512_castps_si512(w), rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
            _mm256_mask_storeu_epi16(upper + i, real, _mm512_cvtepi32_epi16(rounded));
            _mm256_mask_storeu_epi16(lower + i, real, _mm512_cvtepi32_epi16(bits));
            _mm512_mask_storeu_ps(m + i, real, first);
            _mm512_mask_storeu_ps(v + i, real, second);
            _mm512_mask_storeu_ps(grad + i, real, _mm512_setzero_ps());
        }
}
}

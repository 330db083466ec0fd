// AdamW on weights in bfloat16 of which the float32 value is kept in two halves.
#include <omp.h>

#include <algorithm>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

constexpr long BLOCK = 1 << 14;  // weights that are a thread's task

// The bits of a float32 weight are 65536 upper + lower, lower signed: `upper` is the weight rounded to the nearest bfloat16.
struct Weights {
    bf16* upper;
    int16_t* lower;
    float *grad, *m, *v;
    long count;
    float rate, root;
};

// What is the same for all weights.
struct Rule {
    float scale, new1, old2, new2, keep, eps;
};

void step(const Weights& x, long from, long to, const Rule& rule) {
    for (long i = from; i < to; i += LANES) {
        const __mmask16 real = first_lanes((int)std::min<long>(LANES, to - i));
        const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(real, x.upper + i)), 16);
        __m512 w = _mm512_castsi512_ps(_mm512_add_epi32(high, _mm512_cvtepi16_epi32(_mm256_maskz_loadu_epi16(real, x.lower + i))));
        const __m512 g = _mm512_mul_ps(_mm512_maskz_loadu_ps(real, x.grad + i), _mm512_set1_ps(rule.scale));
        __m512 first = _mm512_maskz_loadu_ps(real, x.m + i), second = _mm512_maskz_loadu_ps(real, x.v + i);
        first = _mm512_fmadd_ps(_mm512_set1_ps(rule.new1), _mm512_sub_ps(g, first), first);
        second = _mm512_fmadd_ps(_mm512_set1_ps(rule.old2), second, _mm512_mul_ps(_mm512_set1_ps(rule.new2), _mm512_mul_ps(g, g)));
        const __m512 below = _mm512_add_ps(_mm512_div_ps(_mm512_sqrt_ps(second), _mm512_set1_ps(x.root)), _mm512_set1_ps(rule.eps));
        w = _mm512_fnmadd_ps(_mm512_set1_ps(x.rate), _mm512_div_ps(first, below), _mm512_mul_ps(w, _mm512_set1_ps(rule.keep)));
        const __m512i bits = _mm512_castps_si512(w), rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x8000)), 16);
        _mm256_mask_storeu_epi16(x.upper + i, real, _mm512_cvtepi32_epi16(rounded));
        _mm256_mask_storeu_epi16(x.lower + i, real, _mm512_cvtepi32_epi16(bits));
        _mm512_mask_storeu_ps(x.m + i, real, first);
        _mm512_mask_storeu_ps(x.v + i, real, second);
        _mm512_mask_storeu_ps(x.grad + i, real, _mm512_setzero_ps());
    }
}

double squares(const Weights& x, long from, long to) {
    __m512 sum = _mm512_setzero_ps();
    for (long i = from; i < to; i += LANES) {
        const __m512 g = _mm512_maskz_loadu_ps(first_lanes((int)std::min<long>(LANES, to - i)), x.grad + i);
        sum = _mm512_fmadd_ps(g, g, sum);
    }
    return _mm512_reduce_add_ps(sum);
}

// Runs f(weights, first, end, block) for blocks of all weights, of which a thread takes the next when it is done with one: a core that is
// disturbed holds nobody up. begin(blocks) is called before. False if memory ran out.
template <typename B, typename F> bool each_block(const Weights* weights, int count, B begin, F f) {
    std::vector<long> ends;  // blocks up to each
    try {
        for (int w = 0; w < count; w++) ends.push_back((w ? ends[w - 1] : 0) + (weights[w].count + BLOCK - 1) / BLOCK);
        begin(count ? ends.back() : 0);
    } catch (const std::bad_alloc&) {
        return false;
    }
#pragma omp parallel for schedule(dynamic, 1)
    for (long block = 0; block < (count ? ends.back() : 0); block++) {
        const long w = std::upper_bound(ends.begin(), ends.end(), block) - ends.begin(), from = (block - (w ? ends[w - 1] : 0)) * BLOCK;
        f(weights[w], from, std::min(weights[w].count, from + BLOCK), block);
    }
    return true;
}

}  // namespace

// Both return 0, or 1 if memory ran out.
extern "C" {

//     g = scale grad,  m += new1 (g - m),  v = old2 v + new2 g^2,  w = keep w - rate m / (sqrt(v) / root + eps),  grad = 0
int adamw_step(const Weights* weights, int count, const Rule* rule) {
    return !each_block(weights, count, [](long) {}, [&](const Weights& x, long from, long to, long) { step(x, from, to, *rule); });
}

// The sum of the squares of all gradients, added up in one order.
int adamw_squares(const Weights* weights, int count, double* sum) {
    std::vector<double> parts;
    const auto begin = [&](long blocks) { parts.resize(blocks); };
    if (!each_block(weights, count, begin, [&](const Weights& x, long from, long to, long block) { parts[block] = squares(x, from, to); })) return 1;
    *sum = std::accumulate(parts.begin(), parts.end(), 0.0);
    return 0;
}
}

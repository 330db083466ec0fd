// What stands between the matrix products of a layer, forward and backward: RMS norm, gated SiLU, rotary embedding. bfloat16 in and out,
// float32 within. Rows are handed out in blocks of a fixed size, so the result does not depend on the number of threads.
#include <omp.h>

#include <algorithm>
#include <cmath>

#include "parts.h"

namespace {

template <typename F> void each_block(int rows, F f) {
    const int blocks = (rows + NORM_BLOCK - 1) / NORM_BLOCK;
#pragma omp parallel for schedule(dynamic, 1)
    for (int b = 0; b < blocks; b++) f(b, b * NORM_BLOCK, std::min(rows, (b + 1) * NORM_BLOCK));
}

}  // namespace

extern "C" {

// y = x / sqrt(mean(x^2) + eps) * w for rows of `width` (a multiple of 16); inverse [rows]: what x was multiplied by.
void rms_norm_forward(const bf16* x, const bf16* w, float eps, int rows, int width, bf16* y, float* inverse) {
    each_block(rows, [&](int, int from, int to) {
        for (int i = from; i < to; i++) {
            const bf16* row = x + (long)i * width;
            __m512 sum = _mm512_setzero_ps();
            for (int d = 0; d < width; d += LANES) {
                const __m512 a = load(row + d);
                sum = _mm512_fmadd_ps(a, a, sum);
            }
            const float scale = inverse[i] = 1 / std::sqrt(_mm512_reduce_add_ps(sum) / width + eps);
            for (int d = 0; d < width; d += LANES)
                store(y + (long)i * width + d, _mm512_mul_ps(_mm512_mul_ps(load(row + d), _mm512_set1_ps(scale)), load(w + d)));
        }
    });
}

// With n = x * inverse and g = grad * w:  dx = inverse * (g - n mean(g n)) + plus,  dw = sum over rows of grad * n.
// plus [rows, width] may be null. grad_w [blocks of 32 rows, width] holds the sums of each block, or is null.
void rms_norm_backward(const bf16* x, const bf16* w, const float* inverse, const bf16* grad, const bf16* plus, int rows, int width, bf16* grad_x,
                       float* grad_w) {
    each_block(rows, [&](int block, int from, int to) {
        float* sums = grad_w ? grad_w + (long)block * width : nullptr;
        for (int d = 0; sums && d < width; d += LANES) _mm512_storeu_ps(sums + d, _mm512_setzero_ps());
        for (int i = from; i < to; i++) {
            const bf16 *row = x + (long)i * width, *g = grad + (long)i * width;
            const __m512 scale = _mm512_set1_ps(inverse[i]);
            __m512 dot = _mm512_setzero_ps();
            for (int d = 0; d < width; d += LANES) {
                const __m512 n = _mm512_mul_ps(load(row + d), scale), a = load(g + d);
                dot = _mm512_fmadd_ps(_mm512_mul_ps(a, load(w + d)), n, dot);
                if (sums) _mm512_storeu_ps(sums + d, _mm512_fmadd_ps(a, n, _mm512_loadu_ps(sums + d)));
            }
            const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(dot) / width);
            for (int d = 0; d < width; d += LANES) {
                const __m512 n = _mm512_mul_ps(load(row + d), scale);
                const __m512 more = plus ? load(plus + (long)i * width + d) : _mm512_setzero_ps();
                const __m512 pulled = _mm512_fmsub_ps(load(g + d), load(w + d), _mm512_mul_ps(n, mean));
                store(grad_x + (long)i * width + d, _mm512_fmadd_ps(scale, pulled, more));
            }
        }
    });
}

// y = silu(gate) * up.
void swiglu_forward(const bf16* gate, const bf16* up, int rows, int width, bf16* y) {
    each_block(rows, [&](int, int from, int to) {
        for (long d = (long)from * width; d < (long)to * width; d += LANES) {
            store(y + d, _mm512_mul_ps(silu(load(gate + d)), load(up + d)));
        }
    });
}

// dgate = grad up s (1 + gate (1 - s)),  dup = grad gate s,  with s = sigmoid(gate); and y once more, unless it is null.
void swiglu_backward(const bf16* gate, const bf16* up, const bf16* grad, int rows, int width, bf16* grad_gate, bf16* grad_up, bf16* y) {
    const __m512 one = _mm512_set1_ps(1);
    each_block(rows, [&](int, int from, int to) {
        for (long d = (long)from * width; d < (long)to * width; d += LANES) {
            const __m512 g = load(gate + d), a = load(grad + d), s = sigmoid(g), silu = _mm512_mul_ps(g, s);
            const __m512 slope = _mm512_mul_ps(s, _mm512_fmadd_ps(g, _mm512_sub_ps(one, s), one));
            const __m512 u = load(up + d);
            store(grad_gate + d, _mm512_mul_ps(_mm512_mul_ps(a, u), slope));
            store(grad_up + d, _mm512_mul_ps(a, silu));
            if (y) store(y + d, _mm512_mul_ps(silu, u));
        }
    });
}

// With x = (a, b) in halves of `dim` (a multiple of 32): y = (a cos - b sin, b cos + a sin); backward: turned the other way.
// x [tokens, heads, dim] with a stride from token to token, cos and sin [tokens, dim], y [tokens, heads, dim].
void rotate(const bf16* x, long stride, const bf16* cos, const bf16* sin, int tokens, int heads, int dim, int backward, bf16* y) {
    const int half = dim / 2;
    each_block(tokens, [&](int, int from, int to) {
        for (int t = from; t < to; t++)
            for (int d = 0; d < half; d += LANES) {
                const __m512 c1 = load(cos + (long)t * dim + d), c2 = load(cos + (long)t * dim + half + d);
                __m512 s1 = load(sin + (long)t * dim + d), s2 = load(sin + (long)t * dim + half + d);
                if (backward) {  // the transpose
                    const __m512 kept = s1;
                    s1 = _mm512_sub_ps(_mm512_setzero_ps(), s2);
                    s2 = _mm512_sub_ps(_mm512_setzero_ps(), kept);
                }
                for (int h = 0; h < heads; h++) {
                    const bf16* in = x + t * stride + (long)h * dim + d;
                    bf16* out = y + ((long)t * heads + h) * dim + d;
                    const __m512 a = load(in), b = load(in + half);
                    store(out, _mm512_fmsub_ps(a, c1, _mm512_mul_ps(b, s1)));
                    store(out + half, _mm512_fmadd_ps(b, c2, _mm512_mul_ps(a, s2)));
                }
            }
    });
}
}

// Attention over a packed batch, forward and backward, in bfloat16: softmax(scale q k^T) v.
//
// A group is a prompt and the responses behind it. Prompt tokens see their prompt up to themselves, response tokens the whole prompt
// and their own response up to themselves. A task is one group and one key head: its keys and values are laid out for products once,
// then queries are taken a tile at a time against all that they see. Nothing is padded beyond 16 lanes and nothing is shared between
// tasks, so the result does not depend on the number of threads. Scores, softmax and sums are float32.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "parts.h"

namespace {

// Keys and values of one sequence, laid out as right sides of products; `width` is its length in whole vectors.
struct Keys {
    int start, length, width;
    uint32_t *key_t, *value_t, *key, *value;
    float *grad_key, *grad_value;  // [dim, width]
};

// Queries that are taken at once, an even number: fewer where they see so much that their scores would leave the cache.
constexpr int MOST = TILES ? 64 : 48;
int tile_of(int seen) { return seen <= 1024 ? MOST : seen <= 2048 ? MOST / 2 : MOST / 4; }

// What a row sees: columns from .. to.
struct Span {
    int from, to;
};

Span seen_prompt(const Attention& p, int prompt, int t) { return {p.window ? std::max(0, prompt + t - p.window + 1) : 0, prompt}; }
Span seen_own(const Attention& p, int t) { return {p.window ? std::max(0, t - p.window + 1) : 0, t + 1}; }

inline __mmask16 lanes_of(Span span, int column) { return first_lanes(span.to - column) & ~first_lanes(span.from - column); }

// One group and key head.
class Task {
  public:
    Task(const Attention& problem, Scratch& scratch, int group, int head, bool backward) : p(problem), head_(head) {
        const int first = p.first[group], count = p.first[group + 1] - first;
        size_t bytes = 0;
        int longest = 0;
        for (int i = 0; i < count; i++) {
            const int width = round_up(p.lengths[first + i], FILLED);
            longest = std::max(longest, width + (i ? round_up(p.lengths[first], FILLED) : 0));
            const size_t packed = Scratch::padded<uint32_t>((size_t)width * p.dim / 2);
            bytes += backward ? 3 * packed + 2 * Scratch::padded<float>((size_t)width * p.dim) : 2 * packed;
        }
        const size_t scores = (size_t)MOST * longest;
        bytes += 2 * Scratch::padded<float>(scores) + Scratch::padded<float>(longest);
        bytes += Scratch::padded<bf16>(scores) + 2 * Scratch::padded<uint32_t>(scores / 2);
        bytes += Scratch::padded<float>((size_t)MOST * p.dim) + 2 * Scratch::padded<bf16>((size_t)MOST * p.dim);
        scratch.begin(bytes);
        for (int i = 0; i < count; i++) {
            Keys keys{p.starts[first + i], p.lengths[first + i], round_up(p.lengths[first + i], FILLED)};
            const size_t packed = (size_t)keys.width * p.dim / 2;
            const bf16 *k = p.k + keys.start * p.k_stride + head * p.dim, *v = p.v + keys.start * p.v_stride + head * p.dim;
            keys.key_t = scratch.take<uint32_t>(packed);
            pack_transposed(k, p.k_stride, keys.length, p.dim, keys.width, keys.key_t);
            if (backward) {
                keys.value_t = scratch.take<uint32_t>(packed);
                keys.key = scratch.take<uint32_t>(packed);
                pack_transposed(v, p.v_stride, keys.length, p.dim, keys.width, keys.value_t);
                pack_rows(k, p.k_stride, keys.length, p.dim, keys.width, keys.key);
                keys.grad_key = scratch.take<float>((size_t)keys.width * p.dim);
                keys.grad_value = scratch.take<float>((size_t)keys.width * p.dim);
                std::memset(keys.grad_key, 0, (size_t)keys.width * p.dim * sizeof(float));
                std::memset(keys.grad_value, 0, (size_t)keys.width * p.dim * sizeof(float));
            } else {
                keys.value = scratch.take<uint32_t>(packed);
                pack_rows(v, p.v_stride, keys.length, p.dim, keys.width, keys.value);
            }
            sequences_.push_back(keys);
        }
        scores_ = scratch.take<float>(scores);
        pull_ = scratch.take<float>(scores);
        steep_ = scratch.take<float>(longest);
        weights_ = scratch.take<bf16>(scores);
        weight_pairs_ = scratch.take<uint32_t>(scores / 2);
        pull_pairs_ = scratch.take<uint32_t>(scores / 2);
        out_ = scratch.take<float>((size_t)MOST * p.dim);
        query_t_ = scratch.take<bf16>((size_t)MOST * p.dim);
        grad_t_ = scratch.take<bf16>((size_t)MOST * p.dim);
    }

    void forward(bf16* out, float* lse) {
        each_tile([&](const Keys& own, const Keys* prompt, int t0, int m, int h) {
            const bf16* q = p.q + (own.start + t0) * p.q_stride + h * p.dim;
            const int left = prompt ? prompt->width : 0, n = left + round_up(t0 + m, FILLED);
            score(q, p.q_stride, own, prompt, t0, m, n);
            float scale[MOST];
            for (int i = 0; i < m; i++) {
                float* row = scores_ + (long)i * n;
                const float top = highest(row, prompt, t0 + i, n);
                const float sum = exponentials(row, top, n, weights_ + (long)i * n);
                scale[i] = 1 / sum;
                lse[(long)h * p.tokens + own.start + t0 + i] = top + std::log(sum);
            }
            if (prompt) product(m, p.dim, left / 2, weights_, n, prompt->value, p.dim, out_, p.dim, false);
            product(m, p.dim, (n - left) / 2, weights_ + left, n, own.value, p.dim, out_, p.dim, prompt != nullptr);
            for (int i = 0; i < m; i++)
                for (int d = 0; d < p.dim; d += LANES)
                    store(out + ((long)(own.start + t0 + i) * p.heads + h) * p.dim + d,
                          _mm512_mul_ps(_mm512_loadu_ps(out_ + (long)i * p.dim + d), _mm512_set1_ps(scale[i])));
        });
    }

    // dV = W^T dO, dS = W * (dO V^T - rowsum(W * dO V^T)), dQ = scale dS K, dK = scale dS^T Q.
    void backward(const bf16* grad, long grad_stride, const float* lse, bf16* grad_q, bf16* grad_k, bf16* grad_v) {
        each_tile([&](const Keys& own, const Keys* prompt, int t0, int m, int h) {
            const bf16 *q = p.q + (own.start + t0) * p.q_stride + h * p.dim, *g = grad + (own.start + t0) * grad_stride + h * p.dim;
            const int left = prompt ? prompt->width : 0, n = left + round_up(t0 + m, FILLED);
            score(q, p.q_stride, own, prompt, t0, m, n);
            if (prompt) product(m, left, p.dim / 2, g, grad_stride, prompt->value_t, left, pull_, n, false);
            product(m, n - left, p.dim / 2, g, grad_stride, own.value_t, own.width, pull_ + left, n, false);
            for (int i = 0; i < m; i++) slope(i, n, lse[(long)h * p.tokens + own.start + t0 + i], prompt, t0 + i);
            const int even = round_up(m, TILES ? FILLED : 2);
            std::memset(scores_ + (long)m * n, 0, (size_t)(even - m) * n * sizeof(float));
            std::memset(pull_ + (long)m * n, 0, (size_t)(even - m) * n * sizeof(float));
            pair_up(scores_, even, n, weight_pairs_, nullptr);
            pair_up(pull_, even, n, pull_pairs_, weights_);
            if (prompt) product(m, p.dim, left / 2, weights_, n, prompt->key, p.dim, out_, p.dim, false);
            product(m, p.dim, (n - left) / 2, weights_ + left, n, own.key, p.dim, out_, p.dim, prompt != nullptr);
            for (int i = 0; i < m; i++)
                for (int d = 0; d < p.dim; d += LANES)
                    store(grad_q + ((long)(own.start + t0 + i) * p.heads + h) * p.dim + d, _mm512_loadu_ps(out_ + (long)i * p.dim + d));
            transpose_rows(q, p.q_stride, m, even, query_t_);
            transpose_rows(g, grad_stride, m, even, grad_t_);
            if (prompt) {
                product(p.dim, left, even / 2, query_t_, even, pull_pairs_, n, prompt->grad_key, left, true);
                product(p.dim, left, even / 2, grad_t_, even, weight_pairs_, n, prompt->grad_value, left, true);
            }
            product(p.dim, n - left, even / 2, query_t_, even, pull_pairs_ + left, n, own.grad_key, own.width, true);
            product(p.dim, n - left, even / 2, grad_t_, even, weight_pairs_ + left, n, own.grad_value, own.width, true);
        });
        for (const Keys& keys : sequences_) {
            give(keys.grad_key, keys, grad_k);
            give(keys.grad_value, keys, grad_v);
        }
    }

  private:
    template <typename F> void each_tile(F f) {
        const int rep = p.heads / p.kv;
        for (size_t s = 0; s < sequences_.size(); s++) {
            const Keys& own = sequences_[s];
            const Keys* prompt = s && sequences_[0].length ? &sequences_[0] : nullptr;
            const int tile = tile_of(own.width + (prompt ? prompt->width : 0));
            for (int h = head_ * rep; h < (head_ + 1) * rep; h++)
                for (int t0 = 0; t0 < own.length; t0 += tile) f(own, prompt, t0, std::min(tile, own.length - t0), h);
        }
    }

    void score(const bf16* q, long stride, const Keys& own, const Keys* prompt, int t0, int m, int n) {
        const int left = prompt ? prompt->width : 0;
        if (prompt) product(m, left, p.dim / 2, q, stride, prompt->key_t, left, scores_, n, false);
        product(m, n - left, p.dim / 2, q, stride, own.key_t, own.width, scores_ + left, n, false);
    }

    // f(column, lanes that row t sees) for all columns.
    template <typename F> void each_vector(const Keys* prompt, int t, int n, F f) {
        const int left = prompt ? prompt->width : 0;
        if (prompt) {
            const Span span = seen_prompt(p, prompt->length, t);
            for (int c = 0; c < left; c += LANES) f(c, lanes_of(span, c));
        }
        const Span span = seen_own(p, t);
        for (int c = left; c < n; c += LANES) f(c, lanes_of(span, c - left));
    }

    // Scaled, capped and masked scores in place; their maximum.
    float highest(float* row, const Keys* prompt, int t, int n) {
        const __m512 scale = _mm512_set1_ps(p.softcap ? p.scale / p.softcap : p.scale), cap = _mm512_set1_ps(p.softcap);
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 top = hidden;
        each_vector(prompt, t, n, [&](int c, __mmask16 seen) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + c), scale);
            if (p.softcap) x = _mm512_mul_ps(hyperbolic_tangent(x), cap);
            x = _mm512_mask_blend_ps(seen, hidden, x);
            _mm512_storeu_ps(row + c, x);
            top = _mm512_max_ps(top, x);
        });
        return _mm512_reduce_max_ps(top);
    }

    float exponentials(const float* row, float top, int n, bf16* weights) {
        __m512 sum = _mm512_setzero_ps();
        for (int c = 0; c < n; c += LANES) {
            const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + c), _mm512_set1_ps(top)));
            store(weights + c, e);
            sum = _mm512_add_ps(sum, e);
        }
        return _mm512_reduce_add_ps(sum);
    }

    // Row i: scores become weights, what is pulled at the weights becomes what is pulled at the products q k.
    void slope(int i, int n, float lse, const Keys* prompt, int t) {
        float *row = scores_ + (long)i * n, *pull = pull_ + (long)i * n;
        const __m512 scale = _mm512_set1_ps(p.softcap ? p.scale / p.softcap : p.scale);
        const __m512 cap = _mm512_set1_ps(p.softcap), one = _mm512_set1_ps(1);
        __m512 sum = _mm512_setzero_ps();
        each_vector(prompt, t, n, [&](int c, __mmask16 seen) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + c), scale), g = _mm512_loadu_ps(pull + c), steep = one;
            if (p.softcap) {
                const __m512 bent = hyperbolic_tangent(x);
                steep = _mm512_fnmadd_ps(bent, bent, one);
                x = _mm512_mul_ps(bent, cap);
            }
            const __m512 w = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(x, _mm512_set1_ps(lse))));
            sum = _mm512_fmadd_ps(w, g, sum);
            _mm512_storeu_ps(row + c, w);
            if (p.softcap) {
                _mm512_storeu_ps(pull + c, _mm512_mul_ps(g, steep));
                _mm512_storeu_ps(steep_ + c, steep);
            }
        });
        const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum)), factor = _mm512_set1_ps(p.scale);
        for (int c = 0; c < n; c += LANES) {
            const __m512 w = _mm512_mul_ps(_mm512_loadu_ps(row + c), factor), g = _mm512_loadu_ps(pull + c);
            const __m512 offset = p.softcap ? _mm512_mul_ps(mean, _mm512_loadu_ps(steep_ + c)) : mean;
            _mm512_storeu_ps(pull + c, _mm512_mul_ps(w, _mm512_sub_ps(g, offset)));
        }
    }

    // Rows in pairs, and plain if asked.
    void pair_up(const float* x, int rows, int n, uint32_t* pairs, bf16* plain) {
        for (int i = 0; i < rows; i += 2)
            for (int c = 0; c < n; c += LANES) {
                const __m256i even = to_bf16(_mm512_loadu_ps(x + (long)i * n + c));
                const __m256i odd = to_bf16(_mm512_loadu_ps(x + (long)(i + 1) * n + c));
                _mm512_storeu_si512(pairs + (long)i / 2 * n + c, interleave(even, odd));
                if (plain) {
                    _mm256_storeu_si256((__m256i*)(plain + (long)i * n + c), even);
                    _mm256_storeu_si256((__m256i*)(plain + (long)(i + 1) * n + c), odd);
                }
            }
    }

    // [m, dim] -> [dim, even], with zeros beyond m.
    void transpose_rows(const bf16* x, long stride, int m, int even, bf16* to) {
        for (int i = 0; i < even; i += 2 * LANES)
            for (int d = 0; d < p.dim; d += LANES) {
                __m512i r[16];
                column_pairs(x + d, stride, i, m, r);
                for (int c = 0; c < LANES; c++) _mm512_mask_storeu_epi32(to + (long)(d + c) * even + i, first_lanes((even - i) / 2), r[c]);
            }
    }

    void give(const float* from, const Keys& keys, bf16* to) {
        for (int i = 0; i < keys.length; i++) {
            bf16* row = to + ((long)(keys.start + i) * p.kv + head_) * p.dim;
            const __m512i step = multiples(keys.width);
            for (int d = 0; d < p.dim; d += LANES) store(row + d, _mm512_i32gather_ps(step, from + (long)d * keys.width + i, 4));
        }
    }

    const Attention& p;
    int head_;
    std::vector<Keys> sequences_;
    float *scores_, *pull_, *steep_, *out_;
    bf16 *weights_, *query_t_, *grad_t_;
    uint32_t *weight_pairs_, *pull_pairs_;
};

thread_local Scratch scratch;

// Runs f(group, key head) for all; false if memory ran out.
template <typename F> bool all_tasks(const Attention& p, F f) {
    bool failed = false;
#pragma omp parallel
    {
        const Tiles tiles;
#pragma omp for schedule(dynamic, 1)
        for (int i = 0; i < p.groups * p.kv; i++) {
            try {
                f(i / p.kv, i % p.kv);
            } catch (const std::bad_alloc&) {
#pragma omp atomic write
                failed = true;
            }
        }
    }
    return !failed;
}

}  // namespace

extern "C" {

// out [tokens, heads, dim]; lse [heads, tokens]. Returns 0, or 1 if memory ran out.
int attention_forward(const Attention* p, bf16* out, float* lse) {
    return !all_tasks(*p, [&](int group, int head) { Task(*p, scratch, group, head, false).forward(out, lse); });
}

// grad [tokens, heads, dim] with a stride from token to token; grad_q [tokens, heads, dim], grad_k, grad_v [tokens, kv, dim].
int attention_backward(const Attention* p, const bf16* grad, long stride, const float* lse, bf16* grad_q, bf16* grad_k, bf16* grad_v) {
    return !all_tasks(*p, [&](int group, int head) {
        Task(*p, scratch, group, head, true).backward(grad, stride, lse, grad_q, grad_k, grad_v);
    });
}
}

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

// Rows that are taken at once: queries of some heads that read the same keys, of each so many (an even number), fewer where they see so much
// that their scores would leave the cache. With more heads and fewer queries of each, fewer scores are made of what comes later and is not seen.
constexpr int TOGETHER = TILES ? 4 : 1, MOST = TILES ? 128 : 48;
int queries_of(int heads, int seen) {
    const int most = heads > 1 ? MOST / TOGETHER : TILES ? MOST / 2 : MOST;
    return seen <= 1024 ? most : seen <= 2048 ? most / 2 : most / 4;
}

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
        bytes += 2 * Scratch::padded<float>(scores) + Scratch::padded<float>(2 * longest);
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
        steep_ = scratch.take<float>(2 * longest);
        weights_ = scratch.take<bf16>(scores);
        weight_pairs_ = scratch.take<uint32_t>(scores / 2);
        pull_pairs_ = scratch.take<uint32_t>(scores / 2);
        out_ = scratch.take<float>((size_t)MOST * p.dim);
        query_t_ = scratch.take<bf16>((size_t)MOST * p.dim);
        grad_t_ = scratch.take<bf16>((size_t)MOST * p.dim);
    }

    void forward(bf16* out, float* lse) {
        each_tile([&](const Tile& t) {
            score(t);
            float scale[MOST];
            t.each_row([&](int i, int h, int token) {
                float* row = scores_ + (long)i * t.seen;
                const float top = highest(row, t, token);
                const float sum = exponentials(row, top, t.seen, weights_ + (long)i * t.seen);
                scale[i] = 1 / sum;
                lse[(long)h * p.tokens + t.own->start + token] = top + std::log(sum);
            });
            sums(t, &Keys::value);
            t.each_row([&](int i, int h, int token) { give_row(i, scale[i], out + ((long)(t.own->start + token) * p.heads + h) * p.dim); });
        });
    }

    // dV = W^T dO, dS = W * (dO V^T - rowsum(W * dO V^T)), dQ = scale dS K, dK = scale dS^T Q.
    void backward(const bf16* grad, long grad_stride, const float* lse, bf16* grad_q, bf16* grad_k, bf16* grad_v) {
        each_tile([&](const Tile& t) {
            score(t);
            each_sight(t, grad, grad_stride, &Keys::value_t, pull_);
            const int even = round_up(t.rows(), TILES ? FILLED : 2);
            for (int i = 0; i < even; i += 2) slope(i, t, lse);
            sums(t, &Keys::key);
            t.each_row([&](int i, int h, int token) { give_row(i, 1, grad_q + ((long)(t.own->start + token) * p.heads + h) * p.dim); });
            transpose_rows(t, p.q, p.q_stride, even, query_t_);
            transpose_rows(t, grad, grad_stride, even, grad_t_);
            const int left = t.left();
            if (t.prompt) {
                product(p.dim, left, even / 2, query_t_, even, pull_pairs_, t.seen, t.prompt->grad_key, left, true);
                product(p.dim, left, even / 2, grad_t_, even, weight_pairs_, t.seen, t.prompt->grad_value, left, true);
            }
            product(p.dim, t.seen - left, even / 2, query_t_, even, pull_pairs_ + left, t.seen, t.own->grad_key, t.own->width, true);
            product(p.dim, t.seen - left, even / 2, grad_t_, even, weight_pairs_ + left, t.seen, t.own->grad_value, t.own->width, true);
        });
        for (const Keys& keys : sequences_) {
            give(keys.grad_key, keys, grad_k);
            give(keys.grad_value, keys, grad_v);
        }
    }

  private:
    // Queries from .. from + count - 1 of a sequence, of heads first .. first + heads - 1: a row for every query of the first head, then of the next.
    struct Tile {
        const Keys *own, *prompt;  // prompt: null if there is none
        int from, count, first, heads;
        int seen = left() + round_up(from + count, FILLED);  // columns: of the prompt, then of the sequence

        int left() const { return prompt ? prompt->width : 0; }
        int rows_of_head() const { return round_up(count, 2); }
        int rows() const { return heads * rows_of_head(); }
        bool real(int row) const { return row < rows() && row % rows_of_head() < count; }
        int token(int row) const { return from + row % rows_of_head(); }
        int head(int row) const { return first + row / rows_of_head(); }
        // f(row, head, token) for all queries.
        template <typename F> void each_row(F f) const {
            for (int row = 0; row < rows(); row++)
                if (real(row)) f(row, head(row), token(row));
        }
    };

    template <typename F> void each_tile(F f) {
        const int rep = p.heads / p.kv, end = (head_ + 1) * rep;
        for (size_t s = 0; s < sequences_.size(); s++) {
            const Keys& own = sequences_[s];
            const Keys* prompt = s && sequences_[0].length ? &sequences_[0] : nullptr;
            for (int h = head_ * rep; h < end; h += TOGETHER) {
                const int heads = std::min(TOGETHER, end - h), count = queries_of(heads, own.width + (prompt ? prompt->width : 0));
                for (int from = 0; from < own.length; from += count) f(Tile{&own, prompt, from, std::min(count, own.length - from), h, heads});
            }
        }
    }

    // to [rows, seen] = the tile's rows of x [tokens, heads, dim] times the keys or values of all that is seen, head by head.
    void each_sight(const Tile& t, const bf16* x, long stride, uint32_t* Keys::*side, float* to) {
        for (int j = 0; j < t.heads; j++) {
            const bf16* rows = x + (t.own->start + t.from) * stride + (long)(t.first + j) * p.dim;
            float* here = to + (long)j * t.rows_of_head() * t.seen;
            if (t.prompt) product(t.count, t.left(), p.dim / 2, rows, stride, t.prompt->*side, t.left(), here, t.seen, false);
            product(t.count, t.seen - t.left(), p.dim / 2, rows, stride, t.own->*side, t.own->width, here + t.left(), t.seen, false);
        }
    }

    void score(const Tile& t) { each_sight(t, p.q, p.q_stride, &Keys::key_t, scores_); }

    // out_ [rows, dim] = weights_ [rows, seen] times the keys or values.
    void sums(const Tile& t, uint32_t* Keys::*side) {
        if (t.prompt) product(t.rows(), p.dim, t.left() / 2, weights_, t.seen, t.prompt->*side, p.dim, out_, p.dim, false);
        product(t.rows(), p.dim, (t.seen - t.left()) / 2, weights_ + t.left(), t.seen, t.own->*side, p.dim, out_, p.dim, t.prompt != nullptr);
    }

    void give_row(int row, float scale, bf16* to) {
        for (int d = 0; d < p.dim; d += LANES) store(to + d, _mm512_mul_ps(_mm512_loadu_ps(out_ + (long)row * p.dim + d), _mm512_set1_ps(scale)));
    }

    // f(column, lanes that the token sees) for all columns.
    template <typename F> void each_vector(const Tile& t, int token, F f) {
        const int left = t.left();
        if (t.prompt) {
            const Span span = seen_prompt(p, t.prompt->length, token);
            for (int c = 0; c < left; c += LANES) f(c, lanes_of(span, c));
        }
        const Span span = seen_own(p, token);
        for (int c = left; c < t.seen; c += LANES) f(c, lanes_of(span, c - left));
    }

    // Scaled, capped and masked scores in place; their maximum.
    float highest(float* row, const Tile& t, int token) {
        const __m512 scale = _mm512_set1_ps(p.softcap ? p.scale / p.softcap : p.scale), cap = _mm512_set1_ps(p.softcap);
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        __m512 top = hidden;
        each_vector(t, token, [&](int c, __mmask16 seen) {
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

    // Rows i and i + 1, zeros where there is no query: scores become weights, what is pulled at the weights becomes what is pulled at the products
    // q k. Both in pairs, and the latter in plain rows, in weights_, too.
    void slope(int i, const Tile& t, const float* lse) {
        const __m512 scale = _mm512_set1_ps(p.scale);
        __m512 mean[2];
        for (int r = 0; r < 2; r++)
            if (t.real(i + r)) mean[r] = _mm512_set1_ps(weigh(i + r, t, lse[(long)t.head(i + r) * p.tokens + t.own->start + t.token(i + r)], steep_ + r * t.seen));
        for (int c = 0; c < t.seen; c += LANES) {
            __m256i weights[2], pulls[2];
            for (int r = 0; r < 2; r++) {
                weights[r] = pulls[r] = _mm256_setzero_si256();
                if (!t.real(i + r)) continue;
                const long place = (long)(i + r) * t.seen + c;
                const __m512 w = _mm512_loadu_ps(scores_ + place), g = _mm512_loadu_ps(pull_ + place);
                const __m512 offset = p.softcap ? _mm512_mul_ps(mean[r], _mm512_loadu_ps(steep_ + r * t.seen + c)) : mean[r];
                weights[r] = to_bf16(w);
                pulls[r] = to_bf16(_mm512_mul_ps(_mm512_mul_ps(w, scale), _mm512_sub_ps(g, offset)));
            }
            _mm512_storeu_si512(weight_pairs_ + (long)i / 2 * t.seen + c, interleave(weights[0], weights[1]));
            _mm512_storeu_si512(pull_pairs_ + (long)i / 2 * t.seen + c, interleave(pulls[0], pulls[1]));
            for (int r = 0; r < 2; r++) _mm256_storeu_si256((__m256i*)(weights_ + (long)(i + r) * t.seen + c), pulls[r]);
        }
    }

    // The weights of a row, in place of its scores; their mean pull. steep: slopes of the cap, by which its pulls are multiplied.
    float weigh(int row, const Tile& t, float lse, float* steep) {
        float *scores = scores_ + (long)row * t.seen, *pull = pull_ + (long)row * t.seen;
        const __m512 scale = _mm512_set1_ps(p.softcap ? p.scale / p.softcap : p.scale);
        const __m512 cap = _mm512_set1_ps(p.softcap), one = _mm512_set1_ps(1);
        __m512 sum = _mm512_setzero_ps();
        each_vector(t, t.token(row), [&](int c, __mmask16 seen) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + c), scale), g = _mm512_loadu_ps(pull + c);
            if (p.softcap) {
                const __m512 bent = hyperbolic_tangent(x), slope = _mm512_fnmadd_ps(bent, bent, one);
                x = _mm512_mul_ps(bent, cap);
                _mm512_storeu_ps(pull + c, _mm512_mul_ps(g, slope));
                _mm512_storeu_ps(steep + c, slope);
            }
            const __m512 w = _mm512_maskz_mov_ps(seen, exponential(_mm512_sub_ps(x, _mm512_set1_ps(lse))));
            sum = _mm512_fmadd_ps(w, g, sum);
            _mm512_storeu_ps(scores + c, w);
        });
        return _mm512_reduce_add_ps(sum);
    }

    // The tile's rows of x [tokens, heads, dim] -> [dim, even], with zeros where there is no query.
    void transpose_rows(const Tile& t, const bf16* x, long stride, int even, bf16* to) {
        for (int j = 0; j < t.heads; j++) {
            const bf16* rows = x + (t.own->start + t.from) * stride + (long)(t.first + j) * p.dim;
            const int place = j * t.rows_of_head(), width = j + 1 < t.heads ? t.rows_of_head() : even - place;
            for (int i = 0; i < width; i += 2 * LANES)
                for (int d = 0; d < p.dim; d += LANES) {
                    __m512i r[16];
                    column_pairs(rows + d, stride, i, t.count, r);
                    for (int c = 0; c < LANES; c++) _mm512_mask_storeu_epi32(to + (long)(d + c) * even + place + i, first_lanes((width - i) / 2), r[c]);
                }
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

// One decoding step of a Llama-like trunk in bfloat16, the output layer, and the draw of a token: everything between two tokens.
//
//     x <- x + O attend(rope(Q n(x)), rope(K n(x)), V n(x)),    x <- x + D (silu(G m(x)) * U m(x)),    n, m: RMS norms
//
// All layers run in one parallel region. Weights lie in panels of 48 outputs, in the order in which they are read; while one panel
// is multiplied the next is fetched. Products are summed in float32, and what does not enter a further product stays float32: the sums x,
// queries and keys until they are turned, gates. An output is computed by one thread, rows do not meet in any sum: the result depends
// neither on the number of threads nor on the company of a row.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

#include "vectors.h"

namespace {

constexpr int PANEL = 48, ROWS_AT_ONCE = 8, CHUNK = 8;

// y = x W^T + b; panel j holds outputs 48 j .. 48 j + 47 (zeros beyond the last): [in / 2, 48] pairs of neighbouring inputs.
struct Matrix {
    const uint32_t* panels;
    const float* bias;  // [panels * 48] or null
    int in, out;
    int count() const { return (out + PANEL - 1) / PANEL; }
    const uint32_t* panel(int j) const { return panels + (long)j * (in / 2) * PANEL; }
};

struct Layer {
    Matrix qkv, out, gate_up, down;  // gate_up: panels of gate and up by turns
    const float *before, *between, *query_norm, *key_norm;  // weights of the norms; the last two may be null
    float before_eps, between_eps, query_eps, key_eps;
};

struct Trunk {
    const Layer* layers;
    const float* norm;
    float eps;
    int count, width, heads, kv, dim, inner;
};

// What a layer keeps, and how it attends.
struct Stored {
    bf16 *own_keys, *own_values;  // [rows, kv, room, dim]
    const bf16 *prompt_keys, *prompt_values;  // [places, kv, prompt_room, dim]
    float scale, softcap;  // softcap 0: none
    int window;            // 0: unlimited
};

struct Step {
    const Stored* stored;
    const int32_t *places, *lengths, *times;  // [rows]: its prompt, the prompt's length, response tokens read before this one
    const float *cos, *sin;                   // [rows, dim]
    int rows, room, prompt_room;
};

struct Range {
    int from, to;
};

Range share(int total) {
    const long me = omp_get_thread_num(), count = omp_get_num_threads();
    return {(int)(total * me / count), (int)(total * (me + 1) / count)};
}

// c [n, 48] (+)= a [n, in] W^T + b for one panel; meanwhile the panel `next` of as many bytes is fetched.
void multiply_panel(const Matrix& m, int j, const uint32_t* next, const bf16* a, long lda, int n, float* c, long ldc, bool add) {
    if (m.bias) {
        for (int i = 0; i < n; i++)
            for (int l = 0; l < PANEL; l++) c[i * ldc + l] = (add ? c[i * ldc + l] : 0) + m.bias[j * PANEL + l];
        add = true;
    }
    const int pairs = m.in / 2;
    const uint32_t* b = m.panel(j);
    const char* ahead = (const char*)next;
    if (TILES && m.in % TILE_DEPTH == 0) {
        for (int i = 0; i < n; i += 32)
            for (int l = 0; l < PANEL; l += 32) {
                const TileLeft rows = TileLeft::rows(a + i * lda, lda);
                const TileRight columns = TileRight::rows(b + l, PANEL);
                tile_product(std::min(32, n - i), std::min(32, PANEL - l), m.in / TILE_DEPTH, rows, columns, c + i * ldc + l, ldc, add, [&](int, int) INLINE {
                    for (int line = 0; i == 0 && line < 24 / SLOTS; line++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
                });
            }
        return;
    }
    int left = 3;  // parts of `pairs` lines that the next panel has
    const int lines = n >= 3 * ROWS_AT_ONCE ? 1 : 3;
    in_tiles<ROWS_AT_ONCE>(n, [&](auto count, int i) {
        const int now = std::min(left, lines);
        product_block<count(), 3>(pairs, a + i * lda, lda, b, PANEL, c + i * ldc, ldc, add, [&]() {
            for (int l = 0; l < now; l++, ahead += 64) _mm_prefetch(ahead, _MM_HINT_T1);
        });
        left -= now;
    });
}

// A thread's panels, `together` at a time: f(j, the panel that follows). After its last comes its first of the matrix `then`.
template <typename F> void my_panels(const Matrix& m, const Matrix* then, int together, F f) {
    const Range mine = share(m.count() / together);
    const uint32_t* last = then ? then->panel(share(then->count()).from) : m.panel(0);
    for (int j = mine.from * together; j < mine.to * together; j++) f(j, j + 1 < mine.to * together ? m.panel(j + 1) : last);
}

// c [n, out in whole panels] (+)= a W^T + b
void multiply(const Matrix& m, const Matrix* then, const bf16* a, long lda, int n, float* c, long ldc, bool add) {
    my_panels(m, then, 1, [&](int j, const uint32_t* next) { multiply_panel(m, j, next, a, lda, n, c + j * PANEL, ldc, add); });
}

float inverse_root(const float* x, int width, float eps) {
    __m512 sum = _mm512_setzero_ps();
    for (int d = 0; d < width; d += LANES) sum = _mm512_fmadd_ps(_mm512_loadu_ps(x + d), _mm512_loadu_ps(x + d), sum);
    return 1 / std::sqrt(_mm512_reduce_add_ps(sum) / width + eps);
}

// y = x / sqrt(mean(x^2) + eps) * weight
void norm(const float* x, int width, const float* weight, float eps, bf16* y) {
    const __m512 scale = _mm512_set1_ps(inverse_root(x, width, eps));
    for (int d = 0; d < width; d += LANES) store(y + d, _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(x + d), scale), _mm512_loadu_ps(weight + d)));
}

// The head's norm if there is one, then turned by its position.
void turn(float* x, int dim, const float* weight, float eps, const float* cos, const float* sin, bf16* y) {
    if (weight) {
        const float scale = inverse_root(x, dim, eps);
        for (int d = 0; d < dim; d++) x[d] *= scale * weight[d];
    }
    for (int d = 0, h = dim / 2; d < h; d += LANES) {
        const __m512 low = _mm512_loadu_ps(x + d), high = _mm512_loadu_ps(x + h + d);
        store(y + d, _mm512_fnmadd_ps(high, _mm512_loadu_ps(sin + d), _mm512_mul_ps(low, _mm512_loadu_ps(cos + d))));
        store(y + h + d, _mm512_fmadd_ps(low, _mm512_loadu_ps(sin + h + d), _mm512_mul_ps(high, _mm512_loadu_ps(cos + h + d))));
    }
}

// Rows that share a prompt: places first .. first + count - 1 of the order.
struct Chunk {
    int first, count;
};

class Attention {
  public:
    Attention(const Trunk& trunk, const Step& step) : t(trunk), s(step), rep_(t.heads / t.kv) {
        order_.resize(s.rows);
        std::iota(order_.begin(), order_.end(), 0);
        std::stable_sort(order_.begin(), order_.end(), [&](int a, int b) { return s.places[a] < s.places[b]; });
        for (int i = 0; i < s.rows; i++) {
            const bool along = i && s.places[order_[i]] == s.places[order_[i - 1]] && chunks_.back().count < CHUNK;
            along ? (void)chunks_.back().count++ : chunks_.push_back({i, 1});
            prompt_ = std::max(prompt_, round_up(s.lengths[i], FILLED));
            own_ = std::max(own_, round_up(s.times[i] + 1, FILLED));
        }
    }

    int tasks() const { return (int)chunks_.size() * t.kv; }

    size_t bytes() const {
        const size_t m = CHUNK * rep_, n = prompt_ + own_, sides = (size_t)n * t.dim / 2;
        return 2 * Scratch::padded<uint32_t>(sides) + 2 * Scratch::padded<bf16>(m * t.dim) + Scratch::padded<float>(m * t.dim) +
               Scratch::padded<float>(m * n) + Scratch::padded<bf16>(m * n);
    }

    // One chunk and key head: its new keys and values are stored, and its queries attend. qkv [rows, stride], out [rows, heads * dim].
    void run(int task, const Layer& layer, const Stored& kept, float* qkv, long stride, bf16* out, Scratch& scratch) const {
        const Chunk chunk = chunks_[task / t.kv];
        const int head = task % t.kv, m = chunk.count * rep_, dim = t.dim;
        const int* rows = order_.data() + chunk.first;
        const int length = s.lengths[rows[0]], left = round_up(length, FILLED), n = left + own_;
        scratch.begin(bytes());
        bf16* query = scratch.take<bf16>((size_t)m * dim);
        bf16* weights = scratch.take<bf16>((size_t)m * n);
        float* scores = scratch.take<float>((size_t)m * n);
        float* sums = scratch.take<float>((size_t)m * dim);
        uint32_t* keys = scratch.take<uint32_t>((size_t)n * dim / 2);
        uint32_t* values = scratch.take<uint32_t>((size_t)n * dim / 2);

        const long prompt = ((long)s.places[rows[0]] * t.kv + head) * s.prompt_room * dim;
        pack_transposed(kept.prompt_keys + prompt, dim, length, dim, left, keys);
        pack_rows(kept.prompt_values + prompt, dim, length, dim, left, values);
        for (int i = 0; i < chunk.count; i++) {
            const int row = rows[i];
            float* mine = qkv + row * stride;
            const float *cos = s.cos + (long)row * dim, *sin = s.sin + (long)row * dim;
            const long new_one = (((long)row * t.kv + head) * s.room + s.times[row]) * dim;
            for (int h = 0; h < rep_; h++)
                turn(mine + (head * rep_ + h) * dim, dim, layer.query_norm, layer.query_eps, cos, sin, query + (i * rep_ + h) * dim);
            turn(mine + (t.heads + head) * dim, dim, layer.key_norm, layer.key_eps, cos, sin, kept.own_keys + new_one);
            for (int d = 0; d < dim; d += LANES)
                store(kept.own_values + new_one + d, _mm512_loadu_ps(mine + (t.heads + t.kv + head) * dim + d));
        }
        product(m, left, dim / 2, query, dim, keys, left, scores, n, false);
        for (int i = 0; i < chunk.count; i++) {
            const int time = s.times[rows[i]], width = round_up(time + 1, FILLED);
            const long own = ((long)rows[i] * t.kv + head) * s.room * dim;
            pack_transposed(kept.own_keys + own, dim, time + 1, dim, width, keys);
            product(rep_, width, dim / 2, query + i * rep_ * dim, dim, keys, width, scores + (long)i * rep_ * n + left, n, false);
        }
        float scale[CHUNK * 64];
        for (int i = 0; i < m; i++) scale[i] = 1 / softmax(scores + (long)i * n, weights + (long)i * n, kept, length, left, s.times[rows[i / rep_]]);
        product(m, dim, left / 2, weights, n, values, dim, sums, dim, false);
        for (int i = 0; i < chunk.count; i++) {
            const int time = s.times[rows[i]], width = round_up(time + 1, FILLED);
            const long own = ((long)rows[i] * t.kv + head) * s.room * dim;
            pack_rows(kept.own_values + own, dim, time + 1, dim, width, values);
            product(rep_, dim, width / 2, weights + (long)i * rep_ * n + left, n, values, dim, sums + (long)i * rep_ * dim, dim, true);
        }
        for (int i = 0; i < m; i++) {
            bf16* to = out + ((long)rows[i / rep_] * t.heads + head * rep_ + i % rep_) * dim;
            for (int d = 0; d < dim; d += LANES) store(to + d, _mm512_mul_ps(_mm512_loadu_ps(sums + (long)i * dim + d), _mm512_set1_ps(scale[i])));
        }
    }

  private:
    // Scores of a prompt's `left` columns and of the response's after them become unnormalised weights; returns their sum.
    float softmax(float* row, bf16* weights, const Stored& kept, int length, int left, int time) const {
        const __m512 scale = _mm512_set1_ps(kept.softcap ? kept.scale / kept.softcap : kept.scale), cap = _mm512_set1_ps(kept.softcap);
        const __m512 hidden = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        const int n = left + round_up(time + 1, FILLED);
        const int from = kept.window ? std::max(0, length + time + 1 - kept.window) : 0;  // counted through prompt and response
        const auto seen = [&](int c) {
            const int first = c < left ? from : left + std::max(0, from - length), last = c < left ? length : left + time + 1;
            return (__mmask16)(first_lanes(last - c) & ~first_lanes(first - c));
        };
        __m512 top = hidden, sum = _mm512_setzero_ps();
        for (int c = 0; c < n; c += LANES) {
            __m512 x = _mm512_mul_ps(_mm512_loadu_ps(row + c), scale);
            if (kept.softcap) x = _mm512_mul_ps(hyperbolic_tangent(x), cap);
            x = _mm512_mask_blend_ps(seen(c), hidden, x);
            _mm512_storeu_ps(row + c, x);
            top = _mm512_max_ps(top, x);
        }
        const __m512 highest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
        for (int c = 0; c < n; c += LANES) {
            const __m512 e = exponential(_mm512_sub_ps(_mm512_loadu_ps(row + c), highest));
            store(weights + c, e);
            sum = _mm512_add_ps(sum, e);
        }
        return _mm512_reduce_add_ps(sum);
    }

    const Trunk& t;
    const Step& s;
    int rep_, prompt_ = 0, own_ = 0;
    std::vector<int> order_;
    std::vector<Chunk> chunks_;
};

thread_local Scratch scratch, shared_scratch;

// Runs f in all threads, each with `bytes` of scratch; false if memory ran out.
template <typename F> bool in_parallel(size_t bytes, F f) {
    bool failed = false;
#pragma omp parallel
    {
        try {
            scratch.begin(bytes);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp barrier
        const Tiles tiles;
        if (!failed) f();
    }
    return !failed;
}

void all_layers(const Trunk& t, const Step& s, const Attention& attention, const bf16* in, bf16* out, Scratch& memory) {
    const int n = s.rows, width = round_up(t.width, PANEL), mixed = round_up((t.heads + 2 * t.kv) * t.dim, PANEL), inner = round_up(t.inner, PANEL);
    const size_t sums = (size_t)n * width, projected = (size_t)n * mixed, narrow = (size_t)n * std::max(t.width, t.heads * t.dim), gates = (size_t)n * inner;
    memory.begin(Scratch::padded<float>(sums) + Scratch::padded<float>(projected) + Scratch::padded<bf16>(narrow) + Scratch::padded<bf16>(gates));
    float *x = memory.take<float>(sums), *qkv = memory.take<float>(projected);
    bf16 *read = memory.take<bf16>(narrow), *gated = memory.take<bf16>(gates);
    const size_t tile = (size_t)2 * n * PANEL;
    const bool done = in_parallel(std::max(attention.bytes(), Scratch::padded<float>(tile)), [&]() {
        const Range rows = share(n);
        for (int i = rows.from; i < rows.to; i++)
            for (int d = 0; d < t.width; d += LANES) _mm512_storeu_ps(x + (long)i * width + d, load(in + (long)i * t.width + d));
        for (int l = 0; l < t.count; l++) {
            const Layer& layer = t.layers[l];
            for (int i = rows.from; i < rows.to; i++) norm(x + (long)i * width, t.width, layer.before, layer.before_eps, read + (long)i * t.width);
#pragma omp barrier
            multiply(layer.qkv, &layer.out, read, t.width, n, qkv, mixed, false);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1)
            for (int i = 0; i < attention.tasks(); i++) attention.run(i, layer, s.stored[l], qkv, mixed, read, scratch);
            multiply(layer.out, &layer.gate_up, read, t.heads * t.dim, n, x, width, true);
#pragma omp barrier
            for (int i = rows.from; i < rows.to; i++) norm(x + (long)i * width, t.width, layer.between, layer.between_eps, read + (long)i * t.width);
            scratch.begin(0);
            float* pair = scratch.take<float>(tile);
#pragma omp barrier
            my_panels(layer.gate_up, &layer.down, 2, [&](int j, const uint32_t* next) {
                multiply_panel(layer.gate_up, j, next, read, t.width, n, pair + j % 2 * PANEL, 2 * PANEL, false);
                if (j % 2 == 0) return;
                for (int i = 0; i < n; i++)
                    for (int c = 0; c < PANEL; c += LANES) {
                        const __m512 gate = _mm512_loadu_ps(pair + 2 * i * PANEL + c), up = _mm512_loadu_ps(pair + (2 * i + 1) * PANEL + c);
                        store(gated + (long)i * inner + j / 2 * PANEL + c, _mm512_mul_ps(silu(gate), up));
                    }
            });
#pragma omp barrier
            multiply(layer.down, l + 1 < t.count ? &t.layers[l + 1].qkv : nullptr, gated, inner, n, x, width, true);
#pragma omp barrier
        }
        for (int i = rows.from; i < rows.to; i++) norm(x + (long)i * width, t.width, t.norm, t.eps, out + (long)i * t.width);
    });
    if (!done) throw std::bad_alloc();
}

// Logits of one row, as the policy has them.
struct Logits {
    const bf16* z;
    int count;
    float scale, cap;  // cap 0: scale z, else cap tanh(scale z)

    __m512 at(int c) const {
        const __mmask16 real = first_lanes(count - c);
        __m512 x = _mm512_mul_ps(load(z + c, real), _mm512_set1_ps(scale));
        if (cap) x = _mm512_mul_ps(hyperbolic_tangent(x), _mm512_set1_ps(cap));
        return _mm512_mask_blend_ps(real, _mm512_set1_ps(-std::numeric_limits<float>::infinity()), x);
    }
    float highest() const {
        __m512 top = at(0);
        for (int c = LANES; c < count; c += LANES) top = _mm512_max_ps(top, at(c));
        return _mm512_reduce_max_ps(top);
    }
};

// The token i with sum(w[:i]) <= uniform * sum(w) < sum(w[:i + 1]), w = exp(logits); sums in blocks, added in float64.
void draw(const Logits& logits, double uniform, std::vector<double>& sums, int64_t* token, float* logprob) {
    constexpr int BLOCK = 256;
    const float top = logits.highest();
    const __m512 highest = _mm512_set1_ps(top);
    double total = 0;
    const int blocks = (logits.count + BLOCK - 1) / BLOCK;
    for (int b = 0; b < blocks; b++) {
        __m512 sum = _mm512_setzero_ps();
        for (int c = b * BLOCK; c < std::min((b + 1) * BLOCK, logits.count); c += LANES) sum = _mm512_add_ps(sum, exponential(_mm512_sub_ps(logits.at(c), highest)));
        sums[b] = total += _mm512_reduce_add_ps(sum);
    }
    const double target = uniform * total;
    const auto end = sums.begin() + blocks;  // rounding may reach the total: beyond it nothing has weight
    const int b = (int)(std::min(std::upper_bound(sums.begin(), end, target), std::lower_bound(sums.begin(), end, total)) - sums.begin());
    float weights[BLOCK];
    const int inside = std::min(BLOCK, logits.count - b * BLOCK);
    for (int c = 0; c < inside; c += LANES) _mm512_storeu_ps(weights + c, exponential(_mm512_sub_ps(logits.at(b * BLOCK + c), highest)));
    // rounding may step past the block's end, or onto a token of weight zero there: take its last possible token
    int found = 0;
    double before = b ? sums[b - 1] : 0;
    for (int i = 0; i < inside; i++) {
        if (weights[i] > 0) found = i;
        if ((before += weights[i]) > target) break;
    }
    *token = b * BLOCK + found;
    *logprob = std::log(weights[found] / (float)total);
}

}  // namespace

extern "C" {

// A token of each row of logits [rows, count] (scale z, or cap tanh(scale z) where cap is not 0), and its log-probability.
int decode_draw(const bf16* z, int rows, int count, float scale, float cap, const double* uniform, int64_t* tokens, float* logprobs) {
    bool failed = false;
#pragma omp parallel
    try {
        std::vector<double> sums((count + 255) / 256);
        const Range mine = share(rows);
        for (int i = mine.from; i < mine.to; i++) draw({z + (long)i * count, count, scale, cap}, uniform[i], sums, tokens + i, logprobs + i);
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
    }
    return failed;
}

// Weights [out, in] as panels; panel j becomes panel j * step + first of `to`.
void decode_pack(const bf16* weight, int out, int in, int step, int first, uint32_t* to) {
    const int pairs = in / 2;
#pragma omp parallel for schedule(static)
    for (int j = 0; j < (out + PANEL - 1) / PANEL; j++) {
        const int count = std::min(PANEL, out - j * PANEL);
        uint32_t* panel = to + ((long)j * step + first) * pairs * PANEL;
        pack_transposed(weight + (long)j * PANEL * in, in, count, in, PANEL, panel);
    }
}

// Embedded tokens in [rows, width] become final states out [rows, width]. Returns 0, or 1 if memory ran out.
int decode_step(const Trunk* trunk, const Step* step, const bf16* in, bf16* out) {
    try {
        all_layers(*trunk, *step, Attention(*trunk, *step), in, out, shared_scratch);
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

// out [rows, m.out] = in [rows, m.in] W^T + b. Returns 0, or 1 if memory ran out.
int decode_linear(const Matrix* m, const bf16* in, int rows, bf16* out) {
    return !in_parallel(Scratch::padded<float>((size_t)rows * PANEL), [&]() {
        float* tile = scratch.take<float>((size_t)rows * PANEL);
        my_panels(*m, nullptr, 1, [&](int j, const uint32_t* next) {
            multiply_panel(*m, j, next, in, m->in, rows, tile, PANEL, false);
            for (int i = 0; i < rows; i++)
                for (int c = 0; c < PANEL; c += LANES)
                    store(out + (long)i * m->out + j * PANEL + c, _mm512_loadu_ps(tile + i * PANEL + c), first_lanes(m->out - j * PANEL - c));
        });
    });
}
}

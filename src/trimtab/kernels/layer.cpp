// A whole layer of a Llama-like trunk, forward and backward, of the kernels for its parts:
//
//     u = x + O attend(R Q n(x), R K n(x), V n(x)),    y = u + D (silu(G m(u)) * U m(u)),    n, m: RMS norms, R: rotary embedding
//
// What is needed only within a call lies in one piece of memory, which is used again.
#include <algorithm>
#include <utility>

#include "parts.h"

namespace {

enum { QUERY, KEY, VALUE, OUT, GATE, UP, DOWN, PROJECTIONS };
enum { BEFORE, BETWEEN, QUERY_NORM, KEY_NORM, NORMS };

thread_local Scratch scratch;

// weight null: there is none; sums of its gradient: null if not wanted.
struct Norm {
    const bf16* weight;
    float* sums;
    float eps;
};

// A layer and `rows` tokens. Rows of the projections are what comes out of each: queries and keys as they are before their norms, where they have
// such, else turned; u; null for gate and up that are not kept; y. Sums and bias_sums [out] of gradients: null if not wanted.
struct Layer {
    Linear linear[PROJECTIONS];
    float* bias_sums[PROJECTIONS];
    Norm norms[NORMS];
    int rows, width, dim;
    const bf16 *x, *cos, *sin;
    bf16 *q, *k;  // turned
    bf16* attended;
    float* lse;
    Attention seen;

    int heads(int projection) const { return linear[projection].out / dim; }
};

// Pieces of one region, one after the other.
class Pieces {
  public:
    explicit Pieces(bf16* region) : next_(region) {}
    bf16* take(size_t count) { return std::exchange(next_, next_ + size(count)); }
    static size_t size(size_t count) { return (count + 31) / 32 * 32; }

  private:
    bf16* next_;
};

// Sums [columns] += those of x [rows, columns], in the order of the rows.
template <typename T> void add_rows(const T* x, int rows, int columns, float* sums) {
#pragma omp parallel for schedule(static)
    for (int c = 0; c < columns; c += LANES) {
        __m512 sum = _mm512_setzero_ps();
        for (int i = 0; i < rows; i++) {
            if constexpr (sizeof(T) == sizeof(float))
                sum = _mm512_add_ps(sum, _mm512_loadu_ps(x + (long)i * columns + c));
            else
                sum = _mm512_add_ps(sum, load(x + (long)i * columns + c));
        }
        _mm512_storeu_ps(sums + c, _mm512_add_ps(_mm512_loadu_ps(sums + c), sum));
    }
}

// Adds to the sums of `count` projections from `first` on, which read x [rows, in], with the gradients of what came out.
int learn(const Layer& layer, int first, int count, bf16* const* grads, const bf16* x, int in) {
    Linear wanted[PROJECTIONS];
    int n = 0;
    for (int i = 0; i < count; i++) {
        const Linear& linear = layer.linear[first + i];
        if (linear.sums) wanted[n] = linear, wanted[n++].rows = grads[i];
        if (layer.bias_sums[first + i]) add_rows(grads[i], layer.rows, linear.out, layer.bias_sums[first + i]);
    }
    return n ? linear_weight(wanted, n, x, layer.rows, in) : 0;
}

// found [rows, in] = sum_i g_i W_i of `count` projections from `first` on.
int input(const Layer& layer, int first, int count, bf16* const* grads, int in, bf16* found) {
    Linear with[PROJECTIONS];
    for (int i = 0; i < count; i++) with[i] = layer.linear[first + i], with[i].rows = grads[i];
    return linear_input(with, count, layer.rows, in, found);
}

// by_x = plus + the gradient of x [rows, width] before a norm; adds to the sums of its weight. blocks: room for sums of every NORM_BLOCK rows.
void norm_gradients(const Norm& norm, const bf16* x, const float* inverse, const bf16* grad, const bf16* plus, int rows, int width, bf16* by_x,
                    float* blocks) {
    rms_norm_backward(x, norm.weight, inverse, grad, plus, rows, width, by_x, norm.sums ? blocks : nullptr);
    if (norm.sums) add_rows(blocks, (rows + NORM_BLOCK - 1) / NORM_BLOCK, width, norm.sums);
}

}  // namespace

// All return 0, or 1 if memory ran out.
extern "C" {

// Queries and keys, turned, and values.
int layer_before(const Layer* l) {
    const int heads = l->heads(QUERY);
    try {
        scratch.begin(Scratch::padded<bf16>((size_t)l->rows * l->width) + Scratch::padded<float>((size_t)l->rows * heads));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    bf16* read = scratch.take<bf16>((size_t)l->rows * l->width);
    float* inverse = scratch.take<float>((size_t)l->rows * heads);
    rms_norm_forward(l->x, l->norms[BEFORE].weight, l->norms[BEFORE].eps, l->rows, l->width, read, inverse);
    if (linear_forward(read, l->rows, l->width, l->linear + QUERY, 3, nullptr)) return 1;
    const auto turn = [&](int projection, const Norm& norm, bf16* to) {
        const int count = l->heads(projection);
        if (norm.weight) rms_norm_forward(l->linear[projection].rows, norm.weight, norm.eps, l->rows * count, l->dim, to, inverse);
        rotate(to, (long)count * l->dim, l->cos, l->sin, l->rows, count, l->dim, 0, to);
    };
    turn(QUERY, l->norms[QUERY_NORM], l->q);
    turn(KEY, l->norms[KEY_NORM], l->k);
    return 0;
}

// u and y, of what attention gave.
int layer_after(const Layer* l) {
    const Linear &gate = l->linear[GATE], &up = l->linear[UP];
    try {
        scratch.begin(Scratch::padded<bf16>((size_t)l->rows * l->width) + Scratch::padded<float>(l->rows) + Scratch::padded<bf16>((size_t)l->rows * gate.out));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    bf16 *read = scratch.take<bf16>((size_t)l->rows * l->width), *inner = scratch.take<bf16>((size_t)l->rows * gate.out), *u = l->linear[OUT].rows;
    if (linear_forward(l->attended, l->rows, l->linear[QUERY].out, l->linear + OUT, 1, l->x)) return 1;
    rms_norm_forward(u, l->norms[BETWEEN].weight, l->norms[BETWEEN].eps, l->rows, l->width, read, scratch.take<float>(l->rows));
    if (!gate.rows) {
        if (linear_gated(read, l->rows, l->width, &gate, inner)) return 1;
    } else {
        if (linear_forward(read, l->rows, l->width, &gate, 2, nullptr)) return 1;
        swiglu_forward(gate.rows, up.rows, l->rows, gate.out, inner);
    }
    return linear_forward(inner, l->rows, gate.out, l->linear + DOWN, 1, u);
}

int layer_forward(const Layer* l) { return layer_before(l) || attention_forward(&l->seen, l->attended, l->lse) || layer_after(l); }

// by_x = the gradient of x, of that of y; adds to all sums. Norms and the gated product are made again.
int layer_backward(const Layer* l, const bf16* grad, bf16* by_x) {
    const int rows = l->rows, width = l->width, inner = l->linear[GATE].out, queries = l->linear[QUERY].out, keys = l->linear[KEY].out;
    const auto of = [&](int columns) { return Pieces::size((size_t)rows * columns); };
    const size_t region = std::max(3 * of(inner), 2 * of(queries) + 2 * of(keys)), inverses = (size_t)rows * l->heads(QUERY);
    const size_t blocks_each = std::max((size_t)((rows + NORM_BLOCK - 1) / NORM_BLOCK) * width, (inverses + NORM_BLOCK - 1) / NORM_BLOCK * l->dim);
    try {
        scratch.begin(Scratch::padded<bf16>(region) + 3 * Scratch::padded<bf16>((size_t)rows * width) + Scratch::padded<float>(inverses) + Scratch::padded<float>(blocks_each));
    } catch (const std::bad_alloc&) {
        return 1;
    }
    bf16* both = scratch.take<bf16>(region);
    bf16 *read = scratch.take<bf16>((size_t)rows * width), *by_read = scratch.take<bf16>((size_t)rows * width), *by_u = scratch.take<bf16>((size_t)rows * width);
    float *inverse = scratch.take<float>(inverses), *blocks = scratch.take<float>(blocks_each);
    bf16* from_y = const_cast<bf16*>(grad);
    const bf16* u = l->linear[OUT].rows;

    Pieces second(both);
    bf16 *product = second.take((size_t)rows * inner), *by_gate = second.take((size_t)rows * inner), *by_up = second.take((size_t)rows * inner);
    if (input(*l, DOWN, 1, &from_y, inner, product)) return 1;
    swiglu_backward(l->linear[GATE].rows, l->linear[UP].rows, product, rows, inner, by_gate, by_up, product);
    if (learn(*l, DOWN, 1, &from_y, product, inner)) return 1;
    rms_norm_forward(u, l->norms[BETWEEN].weight, l->norms[BETWEEN].eps, rows, width, read, inverse);
    bf16* const by_inner[] = {by_gate, by_up};
    if (learn(*l, GATE, 2, by_inner, read, width) || input(*l, GATE, 2, by_inner, width, by_read)) return 1;
    norm_gradients(l->norms[BETWEEN], u, inverse, by_read, grad, rows, width, by_u, blocks);

    Pieces first(both);
    bf16 *by_attended = first.take((size_t)rows * queries), *by_q = first.take((size_t)rows * queries);
    bf16 *by_k = first.take((size_t)rows * keys), *by_v = first.take((size_t)rows * keys);
    if (learn(*l, OUT, 1, &by_u, l->attended, queries) || input(*l, OUT, 1, &by_u, queries, by_attended)) return 1;
    if (attention_backward(&l->seen, by_attended, queries, l->lse, by_q, by_k, by_v)) return 1;
    const auto turn_back = [&](int projection, const Norm& norm, bf16* by) {
        const int count = l->heads(projection);
        rotate(by, (long)count * l->dim, l->cos, l->sin, rows, count, l->dim, 1, by);
        if (!norm.weight) return;
        const bf16* raw = l->linear[projection].rows;
        rms_norm_forward(raw, norm.weight, norm.eps, rows * count, l->dim, by_attended, inverse);
        norm_gradients(norm, raw, inverse, by, nullptr, rows * count, l->dim, by, blocks);
    };
    turn_back(QUERY, l->norms[QUERY_NORM], by_q);
    turn_back(KEY, l->norms[KEY_NORM], by_k);
    rms_norm_forward(l->x, l->norms[BEFORE].weight, l->norms[BEFORE].eps, rows, width, read, inverse);
    bf16* const by_projected[] = {by_q, by_k, by_v};
    if (learn(*l, QUERY, 3, by_projected, read, width) || input(*l, QUERY, 3, by_projected, width, by_read)) return 1;
    norm_gradients(l->norms[BEFORE], l->x, inverse, by_read, by_u, rows, width, by_x, blocks);
    return 0;
}
}

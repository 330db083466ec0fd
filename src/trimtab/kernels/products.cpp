// The matrix products of a linear layer in bfloat16, summed in float32:
//
//     y = x W^T + b,    dx = g W,    dW += g^T x        x [rows, in], W [out, in], g [rows, out]; in and out are multiples of 16
//
// The right side lies in panels of 48 columns, which stay in the second-level cache while the rows of the left side pass by; tiles of
// 8 x 48 sums stay in registers. An output is summed in one order, whatever the number of threads and of rows.
#include <omp.h>

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int PANEL = 48, TILE = 8, DEPTH = 1024;  // columns of a panel, rows of a tile, pairs of rows of a panel that are laid at a time
constexpr int ROWS = 512, STRIP = 96;              // rows of x, or columns of g, that are a thread's task

thread_local Scratch scratch, shared_scratch;

// f(constant number of vectors) for a panel of 16, 32 or 48 columns.
template <typename F> void of_width(int width, F f) {
    if (width == 48) f(std::integral_constant<int, 3>());
    if (width == 32) f(std::integral_constant<int, 2>());
    if (width == 16) f(std::integral_constant<int, 1>());
}

// out [rows, columns] = left [rows, depth] right + start; lay(column, width, from, count, to) packs rows from .. of the right side.
template <typename F> int multiply(const bf16* left, int rows, int depth, int columns, const float* start, bf16* out, F lay) {
    const int panels = (columns + PANEL - 1) / PANEL, busy = (2 * omp_get_max_threads() + panels - 1) / panels;
    const int chunks = std::max({1, (rows + ROWS - 1) / ROWS, std::min(busy, rows / 32)}), chunk = round_up((rows + chunks - 1) / chunks, TILE);
    bool failed = false;
#pragma omp parallel for schedule(dynamic, 1)
    for (int task = 0; task < chunks * panels; task++) {
        const int row = task / panels * chunk, column = task % panels * PANEL;
        const int count = std::min(chunk, rows - row), width = std::min(PANEL, columns - column);
        if (count <= 0) continue;
        try {
            scratch.begin(Scratch::padded<uint32_t>((size_t)DEPTH * PANEL) + Scratch::padded<float>((size_t)chunk * PANEL));
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
            continue;
        }
        uint32_t* right = scratch.take<uint32_t>((size_t)DEPTH * PANEL);
        float* sums = scratch.take<float>((size_t)chunk * PANEL);  // between two parts of the depth
        for (int from = 0; from < depth; from += 2 * DEPTH) {
            const int now = std::min(2 * DEPTH, depth - from);
            const bool first = from == 0, last = from + now == depth;
            lay(column, width, from, now, right);
            of_width(width, [&](auto vectors) {
                in_tiles<TILE>(count, [&](auto tile, int i) {
                    __m512 sum[tile()][vectors()];
                    for (int r = 0; r < tile; r++)
                        for (int j = 0; j < vectors; j++) {
                            const float* begun = first ? start + column : sums + (i + r) * PANEL;
                            sum[r][j] = first && !start ? _mm512_setzero_ps() : _mm512_loadu_ps(begun + LANES * j);
                        }
                    accumulate(now / 2, left + (long)(row + i) * depth + from, depth, 2, right, width, sum, []() {});
                    for (int r = 0; r < tile; r++)
                        for (int j = 0; j < vectors; j++)
                            last ? store(out + (long)(row + i + r) * columns + column + LANES * j, sum[r][j])
                                 : _mm512_storeu_ps(sums + (i + r) * PANEL + LANES * j, sum[r][j]);
                });
            });
        }
    }
    return failed;
}

// Columns of rows [count, columns] as a left side: tiles of 8 columns, each [pairs, 8] with rows 2 k and 2 k + 1 in every lane. Beyond `count`: zeros.
void pack_columns(const bf16* x, long stride, int count, int columns, int pairs, uint32_t* to) {
    for (int k = 0; k < pairs; k++)
        for (int c = 0; c < columns; c += LANES) {
            const bf16* base = x + 2L * k * stride + c;
            const __m256i odd = 2 * k + 1 < count ? _mm256_loadu_si256((const __m256i*)(base + stride)) : _mm256_setzero_si256();
            const __m512i both = interleave(_mm256_loadu_si256((const __m256i*)base), odd);
            uint32_t* tile = to + (long)c * pairs + TILE * k;
            _mm256_storeu_si256((__m256i*)tile, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i*)(tile + (long)TILE * pairs), _mm512_extracti64x4_epi64(both, 1));
        }
}

// A tile of sums [8, stride] += left right; the sums are fetched while the product is made.
template <int VECTORS> void add_tile(int pairs, const uint32_t* left, const uint32_t* right, float* sums, long stride) {
    __m512 sum[TILE][VECTORS] = {};
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < VECTORS; j++) __builtin_prefetch(sums + i * stride + LANES * j, 1);
    accumulate(pairs, (const bf16*)left, 2, 2 * TILE, right, LANES * VECTORS, sum, []() {});
    for (int i = 0; i < TILE; i++)
        for (int j = 0; j < VECTORS; j++) {
            float* to = sums + i * stride + LANES * j;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]));
        }
}

}  // namespace

// All return 0, or 1 if memory ran out.
extern "C" {

// y [rows, out] = x W^T + b; b may be null.
int linear_forward(const bf16* x, const bf16* weight, const float* bias, int rows, int in, int out, bf16* y) {
    return multiply(x, rows, in, out, bias, y, [&](int column, int width, int from, int count, uint32_t* to) {
        pack_transposed(weight + (long)column * in + from, in, width, count, width, to);
    });
}

// dx [rows, in] = g W
int linear_input(const bf16* grad, const bf16* weight, int rows, int in, int out, bf16* found) {
    return multiply(grad, rows, out, in, nullptr, found, [&](int column, int width, int from, int count, uint32_t* to) {
        pack_rows(weight + (long)from * in + column, in, count, width, count, to);
    });
}

// dW [out, in] += g^T x
int linear_weight(const bf16* grad, const bf16* x, int rows, int in, int out, float* sums) {
    const int panels = (in + PANEL - 1) / PANEL, most = std::min(DEPTH, (rows + 1) / 2);
    const int strip = std::clamp(round_up(out / (2 * omp_get_max_threads()), LANES), LANES, STRIP), strips = (out + strip - 1) / strip;
    const size_t whole = (size_t)most * in, part = (size_t)most * strip;
    uint32_t* right;
    try {
        shared_scratch.begin(Scratch::padded<uint32_t>(whole));
        right = shared_scratch.take<uint32_t>(whole);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    bool failed = false;
#pragma omp parallel
    {
        try {
            scratch.begin(Scratch::padded<uint32_t>(part));
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp barrier
        for (int row = 0; row < rows && !failed; row += 2 * DEPTH) {
            const int count = std::min(2 * DEPTH, rows - row), pairs = (count + 1) / 2;
            const auto panel = [&](int p) { return right + (long)p * PANEL * pairs; };
#pragma omp for schedule(static)
            for (int p = 0; p < panels; p++)
                pack_rows(x + (long)row * in + p * PANEL, in, count, std::min(PANEL, in - p * PANEL), 2 * pairs, panel(p));
#pragma omp for schedule(dynamic, 1)
            for (int s = 0; s < strips; s++) {
                const int first = s * strip, columns = std::min(strip, out - first);
                scratch.begin(0);
                uint32_t* left = scratch.take<uint32_t>(part);
                pack_columns(grad + (long)row * out + first, out, count, columns, pairs, left);
                for (int p = 0; p < panels; p++)
                    of_width(std::min(PANEL, in - p * PANEL), [&](auto vectors) {
                        for (int c = 0; c < columns; c += TILE)
                            add_tile<vectors()>(pairs, left + (long)c * pairs, panel(p), sums + (long)(first + c) * in + p * PANEL, in);
                    });
            }
        }
    }
    return failed;
}
}

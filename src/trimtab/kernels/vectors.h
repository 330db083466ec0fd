// Vectors of 16 lanes, and small matrix products of bfloat16 that are summed in float32. Needs AVX-512 with BF16.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "tiles.h"

using bf16 = uint16_t;
constexpr int LANES = 16;

// 0, stride, 2 stride, ...
inline __m512i multiples(long stride) {
    return _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32((int)stride));
}

inline int round_up(int n, int m) { return (n + m - 1) / m * m; }

inline __mmask16 first_lanes(int n) { return n >= LANES ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

inline __m512 to_float(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m512 load(const bf16* x) { return to_float(_mm256_loadu_si256((const __m256i*)x)); }
inline __m512 load(const bf16* x, __mmask16 lanes) { return to_float(_mm256_maskz_loadu_epi16(lanes, x)); }
inline __m256i to_bf16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }
inline void store(bf16* to, __m512 x) { _mm256_storeu_si256((__m256i*)to, to_bf16(x)); }
inline void store(bf16* to, __m512 x, __mmask16 lanes) { _mm256_mask_storeu_epi16(to, lanes, to_bf16(x)); }
// 32 neighbours of a cache line, past the caches.
inline void stream(bf16* to, __m512 low, __m512 high) { _mm512_stream_si512((__m512i*)to, (__m512i)_mm512_cvtne2ps_pbh(high, low)); }

// Two rows as pairs: the lower half of every lane from `even`, the upper from `odd`.
inline __m512i interleave(__m256i even, __m256i odd) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

// e^x to 2 units in the last place of float32 between -20 and 20, to 4 down to -87; 0 below. The polynomial's greatest error between
// -ln(2) / 2 and ln(2) / 2, 0.8 of such a unit, is as small as its degree allows; a number with no room for places behind the point rounds.
inline __m512 exponential(__m512 x) {
    const __m512 large = _mm512_set1_ps(3 << 22), n = _mm512_sub_ps(_mm512_fmadd_ps(x, _mm512_set1_ps(1.44269504f), large), large);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693147181f), x);
    __m512 p = _mm512_set1_ps(0.00829030573f);
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.0418979749f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.166676372f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.499991506f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(0.999999702f));
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0f));
    return _mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GT_OQ), p, n);
}

inline __m512 hyperbolic_tangent(__m512 x) {
    const __m512 bound = _mm512_set1_ps(15.0f), one = _mm512_set1_ps(1.0f);
    const __m512 e = exponential(_mm512_mul_ps(_mm512_set1_ps(2.0f), _mm512_max_ps(_mm512_min_ps(x, bound), _mm512_sub_ps(_mm512_setzero_ps(), bound))));
    return _mm512_div_ps(_mm512_sub_ps(e, one), _mm512_add_ps(e, one));
}

inline __m512 sigmoid(__m512 x) {
    const __m512 one = _mm512_set1_ps(1);
    return _mm512_div_ps(one, _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_max_ps(x, _mm512_set1_ps(-100))))));
}

inline __m512 silu(__m512 x) { return _mm512_mul_ps(x, sigmoid(x)); }

// Memory that a thread keeps for its next task, aligned to a cache line.
class Scratch {
  public:
    ~Scratch() { std::free(memory_); }
    template <typename T> T* take(size_t count) { return (T*)take_bytes(count * sizeof(T)); }
    // Forget what was taken, and have room for `bytes` (rounding up included in `padded`).
    void begin(size_t bytes) {
        used_ = 0;
        if (bytes <= size_) return;
        std::free(memory_);
        size_ = (bytes + 63) / 64 * 64;
        memory_ = (char*)std::aligned_alloc(64, size_);
        if (memory_ == nullptr) throw std::bad_alloc();
    }
    template <typename T> static size_t padded(size_t count) { return (count * sizeof(T) + 63) / 64 * 64; }

  private:
    void* take_bytes(size_t bytes) {
        void* here = memory_ + used_;
        used_ += (bytes + 63) / 64 * 64;
        return here;
    }
    char* memory_ = nullptr;
    size_t size_ = 0, used_ = 0;
};

// sum += a b: pair k of row i begins at a[i * row + k * pair], those of b lie in rows of ldb lanes. between() is called before each pair.
template <int ROWS, int COLUMNS, typename F>
[[gnu::always_inline]] inline void accumulate(int pairs, const bf16* a, long row, long pair, const uint32_t* b, long ldb, __m512 (&sum)[ROWS][COLUMNS], F between) {
    for (int k = 0; k < pairs; k++, a += pair, b += ldb) {
        between();
        __m512bh right[COLUMNS];
        for (int j = 0; j < COLUMNS; j++) right[j] = (__m512bh)_mm512_loadu_si512(b + LANES * j);
        for (int i = 0; i < ROWS; i++) {
            int32_t two;
            std::memcpy(&two, a + i * row, sizeof two);
            const __m512bh left = (__m512bh)_mm512_set1_epi32(two);
            for (int j = 0; j < COLUMNS; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], left, right[j]);
        }
    }
}

template <int ROWS, int COLUMNS, typename F>
inline void product_block(int pairs, const bf16* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool add, F between) {
    __m512 sum[ROWS][COLUMNS];
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + LANES * j) : _mm512_setzero_ps();
    accumulate(pairs, a, lda, 2, b, ldb, sum, between);
    for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < COLUMNS; j++) _mm512_storeu_ps(c + i * ldc + LANES * j, sum[i][j]);
}

// f(count, i) for every tile i .. i + count - 1 of m rows: as many of MOST as there are, then of 4, 2 and 1. count is a constant.
template <int MOST, typename F> inline void in_tiles(int m, F f) {
    int i = 0;
    for (; m - i >= MOST; i += MOST) f(std::integral_constant<int, MOST>(), i);
    for (; m - i >= 4; i += 4) f(std::integral_constant<int, 4>(), i);
    for (; m - i >= 2; i += 2) f(std::integral_constant<int, 2>(), i);
    if (m - i) f(std::integral_constant<int, 1>(), i);
}

template <int COLUMNS>
inline void product_columns(int m, int pairs, const bf16* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool add) {
    in_tiles<6>(m, [&](auto count, int i) { product_block<count(), COLUMNS>(pairs, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add, []() {}); });
}

// c [m, n] (+)= a [m, 2 pairs] b [2 pairs, n]; the rows of b lie in pairs, one 32-bit lane a column; n is a multiple of 16. A thread
// that calls this has `Tiles`.
inline void product(int m, int n, int pairs, const bf16* a, long lda, const uint32_t* b, long ldb, float* c, long ldc, bool add) {
    if (TILES && 2 * pairs % TILE_DEPTH == 0) {
        for (int j = 0; j < n; j += 32)
            for (int i = 0; i < m; i += 32)
                tile_product(std::min(32, m - i), std::min(32, n - j), 2 * pairs / TILE_DEPTH, TileLeft::rows(a + i * lda, lda), TileRight::rows(b + j, ldb), c + i * ldc + j, ldc, add, [](int, int) INLINE {});
        return;
    }
    for (; n >= 64; n -= 64, b += 64, c += 64) product_columns<4>(m, pairs, a, lda, b, ldb, c, ldc, add);
    if (n >= 48) return product_columns<3>(m, pairs, a, lda, b, ldb, c, ldc, add);
    if (n >= 32) return product_columns<2>(m, pairs, a, lda, b, ldb, c, ldc, add);
    if (n >= 16) return product_columns<1>(m, pairs, a, lda, b, ldb, c, ldc, add);
}

// 16 x 16 lanes.
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; i++) t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]), t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        const __m512i a = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        const __m512i c = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd), d = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
        t[j] = _mm512_shuffle_i32x4(a, b, 0x88), t[8 + j] = _mm512_shuffle_i32x4(a, b, 0xdd);
        t[4 + j] = _mm512_shuffle_i32x4(c, d, 0x88), t[12 + j] = _mm512_shuffle_i32x4(c, d, 0xdd);
    }
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

// Rows [count, dim] as the right side x^T: [dim / 2, width], a pair of neighbours of one row in every lane. Beyond `count`: zeros.
// tiled: in the order of TileRight::tiles, with zeros up to whole tiles.
inline void pack_transposed(const bf16* x, long stride, int count, int dim, int width, uint32_t* to, bool tiled = false) {
    const long column = tiled ? LANES : 1, line = tiled ? LANES : width;
    for (int row = 0; row < width; row += LANES)
        for (int pair = 0; pair < dim / 2; pair += LANES) {
            const __mmask16 real = first_lanes(dim / 2 - pair);
            __m512i r[16];
            for (int i = 0; i < 16; i++) r[i] = row + i < count ? _mm512_maskz_loadu_epi32(real, x + (row + i) * stride + 2 * pair) : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < (tiled ? 16 : std::min(16, dim / 2 - pair)); i++) _mm512_storeu_si512(to + (long)pair * width + row * column + i * line, r[i]);
        }
}

// Rows `row` and row + 1 of 16 columns as pairs. Beyond `count`: zeros.
inline __m512i row_pair(const bf16* x, long stride, int row, int count) {
    const bf16* base = x + row * stride;
    const __m256i even = row < count ? _mm256_loadu_si256((const __m256i*)base) : _mm256_setzero_si256();
    const __m256i odd = row + 1 < count ? _mm256_loadu_si256((const __m256i*)(base + stride)) : _mm256_setzero_si256();
    return interleave(even, odd);
}

// 16 columns of 32 rows: a column in every vector. Beyond `count`: zeros.
inline void column_pairs(const bf16* x, long stride, int row, int count, __m512i r[16]) {
    for (int i = 0; i < 16; i++) r[i] = row_pair(x, stride, row + 2 * i, count);
    transpose(r);
}

// Rows [count, dim] as the right side x: [width / 2, dim], rows 2 i and 2 i + 1 in every lane. Beyond `count`: zeros. tiled: as above.
inline void pack_rows(const bf16* x, long stride, int count, int dim, int width, uint32_t* to, bool tiled = false) {
    for (int pair = 0; pair < width / 2; pair++) {
        uint32_t* line = to + (tiled ? (long)(pair & -LANES) * dim + pair % LANES * LANES : (long)pair * dim);
        for (int d = 0; d < dim; d += LANES) _mm512_storeu_si512(line + (tiled ? d * LANES : d), row_pair(x + d, stride, 2 * pair, count));
    }
}

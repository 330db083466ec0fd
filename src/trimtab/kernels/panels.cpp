#include "panels.h"

namespace {

// By tiles: the same, for pairs in whole tiles.
void multiply_tiles(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, Ahead ahead) {
    alignas(64) float block[TILE * PANEL];
    const Goal& goal = part.goal;
    const bool whole = part.first && part.last, begun = part.first && (part.bias || part.plus);
    of_width(width, [&](auto vectors) {
        for (int i = 0; i < count; i += TILE) {
            const int m = std::min(TILE, count - i);
            float* sums = whole ? block : part.sums + i * PANEL;
            const auto each = [&](auto f) {
                for (int r = 0; r < m; r++)
                    for (int j = 0; j < vectors(); j++) f(sums + r * PANEL + LANES * j, (i + r) * goal.stride + LANES * j, LANES * j);
            };
            if (begun)
                each([&](float* sum, long place, int c) {
                    const __m512 x = part.bias ? _mm512_loadu_ps(part.bias + c) : _mm512_setzero_ps();
                    _mm512_storeu_ps(sum, part.plus ? _mm512_add_ps(x, load(part.plus + place)) : x);
                });
            ahead.fetch();
            for (int r = i; part.last && r < i + m; r++) goal.fetch(r, 1);
            const bf16* rows = left + (long)i * lda;
            for (int c = 0; c < width; c += NARROW) {
                const int n = std::min(NARROW, width - c);
                tile_product(m, n, 2 * pairs / TILE_DEPTH, TileLeft::rows(rows, lda), TileRight::tiles(right + (long)c * pairs, n), sums + c, PANEL, begun || !part.first, [=](int k) {
                    for (int r = 0; r < TILE; r++) _mm_prefetch((const char*)(rows + r * lda + (k + 1) * TILE_DEPTH), _MM_HINT_T0);
                });
            }
            if (part.last && goal.finish)
                (*goal.finish)(i, m, width, sums, goal);
            else if (part.last && goal.past)
                for (int r = 0; r < m; r++)
                    for (int j = 0; j + 1 < vectors(); j += 2) {
                        const float* sum = sums + r * PANEL + LANES * j;
                        stream(goal.out + (i + r) * goal.stride + LANES * j, _mm512_loadu_ps(sum), _mm512_loadu_ps(sum + LANES));
                    }
            else if (part.last)
                each([&](float* sum, long place, int) { store(goal.out + place, _mm512_loadu_ps(sum)); });
        }
    });
}

}  // namespace

void multiply(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, Ahead ahead) {
    if (by_tiles(2 * pairs)) return multiply_tiles(left, lda, pairs, right, count, width, part, ahead);
    const Goal& goal = part.goal;
    of_width(width, [&](auto vectors) {
        in_tiles<6>(count, [&](auto tile, int i) {
            __m512 sum[tile()][vectors()];
            const auto each = [&](auto f) {
                for (int r = 0; r < tile(); r++)
                    for (int j = 0; j < vectors(); j++) f(sum[r][j], i + r, LANES * j);
            };
            if (!part.first)
                each([&](__m512& x, int r, int c) { x = _mm512_loadu_ps(part.sums + r * PANEL + c); });
            else if (part.bias)
                each([&](__m512& x, int, int c) { x = _mm512_loadu_ps(part.bias + c); });
            else
                each([&](__m512& x, int, int) { x = _mm512_setzero_ps(); });
            if (part.first && part.plus) each([&](__m512& x, int r, int c) { x = _mm512_add_ps(x, load(part.plus + r * goal.stride + c)); });
            ahead.fetch();
            for (int r = i; part.last && r < i + tile(); r++) goal.fetch(r, width);
            accumulate(pairs, left + (long)i * lda, lda, 2, right, width, sum, []() {});
            if (part.last && !goal.finish) return each([&](__m512& x, int r, int c) { store(goal.out + r * goal.stride + c, x); });
            float* sums = part.sums + i * PANEL;
            each([&](__m512& x, int r, int c) { _mm512_storeu_ps(sums + (r - i) * PANEL + c, x); });
            if (part.last) (*goal.finish)(i, tile(), width, sums, goal);
        });
    });
}

void make(const Outputs& y, const Linear& layer, const Room& room, const Ahead& ahead) {
    for (int from = 0; from < y.in; from += 2 * DEPTH) {
        const int now = std::min(2 * DEPTH, y.in - from);
        const bool first = from == 0, last = from + now == y.in;
        for (int c = 0, most = side_by_side(now); c < y.width; c += most) {
            const int side = std::min(most, y.width - c);
            pack_transposed(layer.weight + (long)(y.column + c) * y.in + from, y.in, side, now, side, room.right + (long)c * now / 2, by_tiles(now));
        }
        const Part part{first, last, layer.bias ? layer.bias + y.column : nullptr, y.plus, room.sums, y.goal};
        multiply(y.x + from, y.in, now / 2, room.right, y.rows, y.width, part, last ? ahead : Ahead(nullptr, 0, 0, 0, y.rows));
    }
    if (y.goal.past) _mm_sfence();
}

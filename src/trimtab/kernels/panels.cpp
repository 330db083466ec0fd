#include "panels.h"

namespace {

// x plus bias and what is added to the row at `place`, from column c on.
inline __m512 more(__m512 x, const Part& part, long place, int c) {
    if (part.bias) x = _mm512_add_ps(x, _mm512_loadu_ps(part.bias + c));
    return part.plus ? _mm512_add_ps(x, load(part.plus + place + c)) : x;
}

// Sums [width] of a row, with bias and what is added where there is any (MORE), to their goal, past the caches or not.
template <bool PAST, bool MORE> inline void finish_row(int row, int width, const float* sums, const Part& part) {
    const long place = row * part.goal.stride;
    const auto sum = [&](int c) {
        const __m512 x = _mm512_loadu_ps(sums + c);
        return MORE ? more(x, part, place, c) : x;
    };
    bf16* out = part.goal.out + place;
    if (PAST)
        for (int c = 0; c < PANEL; c += 2 * LANES) stream(out + c, sum(c), sum(c + LANES));
    else
        for (int c = 0; c < width; c += LANES) store(out + c, sum(c));
}

// By tiles: the same. finish(row, sums) is called for finished rows while the next ones are made: to write them takes as long as a fifth of their
// products, and neither waits for the other.
template <typename F>
void rows_by_tiles(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, Ahead ahead, F finish) {
    alignas(64) float blocks[2][TILE * PANEL];
    const bool whole = part.first && part.last;
    const int steps = 2 * pairs / TILE_DEPTH, rest = 2 * pairs % TILE_DEPTH, calls = std::max(1, steps * panels_of(width, NARROW)), each = panels_of(TILE, calls);
    alignas(64) bf16 last[TILE * TILE_DEPTH] = {};  // what a depth of no whole tiles leaves over, with zeros behind
    float *sums = whole ? blocks[0] : part.sums, *finished = sums;
    ahead.begin((long)panels_of(count, TILE) * calls);
    int row = 0, asked = 0;  // the first that is not finished, and the first whose goal is not fetched
    for (int i = 0; i < count; i += TILE) {
        const int m = std::min(TILE, count - i), due = part.last ? i : 0, goals = part.last ? i + m : 0;
        const bf16* rows = left + (long)i * lda;
        for (int r = 0; rest && r < m; r++) std::memcpy(last + r * TILE_DEPTH, rows + r * lda + steps * TILE_DEPTH, rest * sizeof *last);
        for (int c = 0; c < width; c += NARROW) {
            const int n = std::min(NARROW, width - c);
            const uint32_t* half = right + (long)c * filled(2 * pairs) / 2;
            tile_product(m, n, steps, TileLeft::rows(rows, lda), TileRight::tiles(half, n), sums + c, PANEL, !part.first, [&, rows, lda](int k, int slot) INLINE {
                fetch_lines(rows + (k + 1) * TILE_DEPTH, 2 * lda, slot);
                for (int most = slot == 1 ? each : 0; asked < goals && most; most--) part.goal.fetch(asked++, width);
                if (slot == SLOTS / 2) ahead.fetch();
                for (int most = slot ? 0 : each; row < due && most; most--, finished += PANEL) finish(row++, finished);
            });
            const uint32_t* below = half + (long)steps * TILE_DEPTH / 2 * n;
            if (rest) tile_product(m, n, 1, TileLeft::rows(last, TILE_DEPTH), TileRight::tiles(below, n), sums + c, PANEL, true, [](int, int) INLINE {});
        }
        for (; row < due; finished += PANEL) finish(row++, finished);
        if (whole) finished = sums, sums = blocks[i / TILE % 2 == 0];
        else sums += TILE * PANEL;
    }
    for (; part.last && row < count; finished += PANEL) finish(row++, finished);
}

void multiply_tiles(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, const Ahead& ahead) {
    const auto with = [&](auto finish) { rows_by_tiles(left, lda, pairs, right, count, width, part, ahead, finish); };
    const Goal& goal = part.goal;
    const bool adds = part.bias || part.plus;
    if (goal.finish)
        with([&](int row, float* sums) {
            for (int c = 0; adds && c < width; c += LANES) _mm512_storeu_ps(sums + c, more(_mm512_loadu_ps(sums + c), part, row * goal.stride, c));
            (*goal.finish)(row, 1, width, sums, goal);
        });
    else if (goal.past)
        adds ? with([&](int row, float* sums) { finish_row<true, true>(row, width, sums, part); })
             : with([&](int row, float* sums) { finish_row<true, false>(row, width, sums, part); });
    else
        adds ? with([&](int row, float* sums) { finish_row<false, true>(row, width, sums, part); })
             : with([&](int row, float* sums) { finish_row<false, false>(row, width, sums, part); });
}

}  // namespace

void multiply(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, Ahead ahead) {
    if (TILES) return multiply_tiles(left, lda, pairs, right, count, width, part, ahead);
    const Goal& goal = part.goal;
    ahead.begin(panels_of(count, TILE));
    of_width(width, [&](auto vectors) {
        in_tiles<6>(count, [&](auto tile, int i) {
            __m512 sum[tile()][vectors()];
            const auto each = [&](auto f) {
                for (int r = 0; r < tile(); r++)
                    for (int j = 0; j < vectors(); j++) f(sum[r][j], i + r, LANES * j);
            };
            if (!part.first)
                each([&](__m512& x, int r, int c) { x = _mm512_loadu_ps(part.sums + r * PANEL + c); });
            else
                each([&](__m512& x, int, int) { x = _mm512_setzero_ps(); });
            ahead.fetch();
            for (int r = i; part.last && r < i + tile(); r++) goal.fetch(r, width);
            accumulate(pairs, left + (long)i * lda, lda, 2, right, width, sum, []() {});
            if (part.last && (part.bias || part.plus)) each([&](__m512& x, int r, int c) { x = more(x, part, r * goal.stride, c); });
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
        for (int c = 0; c < y.width; c += NARROW) {
            const int side = std::min(NARROW, y.width - c);
            pack_transposed(layer.weight + (long)(y.column + c) * y.in + from, y.in, side, now, side, room.right + (long)c * filled(now) / 2, TILES);
        }
        const Part part{first, last, layer.bias ? layer.bias + y.column : nullptr, y.plus, room.sums, y.goal};
        multiply(y.x + from, y.in, now / 2, room.right, y.rows, y.width, part, last ? ahead : Ahead(nullptr, 0, 0, 0));
    }
    if (y.goal.past) _mm_sfence();
}

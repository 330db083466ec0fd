// The tile unit (AMX) of newer processors. A tile is 16 rows of 64 bytes; one instruction adds to 16 x 16 sums the products of 16 rows
// of 32 numbers with 16 columns of 32, which lie in pairs as they do for vectors. Everything here is empty where there is no such unit.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#ifdef WITHOUT_TILES
#undef __AMX_BF16__
#endif

#ifdef __AMX_BF16__
constexpr bool TILES = true;
#else
constexpr bool TILES = false;
#endif

constexpr int TILE_ROWS = 16, TILE_DEPTH = 32;

// What rows that are summed over are filled up to with zeros.
constexpr int FILLED = TILES ? TILE_DEPTH : 16;

// What was stored before is in memory: the compiler does not know what tile instructions read.
inline void written(const void* place = nullptr) { asm volatile("" ::"r"(place) : "memory"); }

constexpr int SLOTS = 8;  // calls of between in a step of products by tiles

// Fetches into the first-level cache those of 32 lines, `stride` bytes apart, that are this slot's.
[[gnu::always_inline]] inline void fetch_lines(const void* first, long stride, int slot) {
    for (int i = 4 * slot; i < 4 * slot + 4; i++) _mm_prefetch((const char*)first + i * stride, _MM_HINT_T0);
}

#define INLINE __attribute__((always_inline))  // of a lambda

// While one of these lives its thread may use tiles: 0 to 3 are sums, 4 rows of the left side and 5 its lower ones, 6 rows of the right side. A
// name takes a register until it is set to zero, and a core whose other thread is at work has few: what was read last is let go at once.
class Tiles {
  public:
    Tiles() { set(TILE_ROWS, TILE_ROWS); }
    Tiles(const Tiles&) = delete;
    ~Tiles() {
#ifdef __AMX_BF16__
        _tile_release();
#endif
    }
    // How many rows the upper and the lower tile have; 0: it is not used. What sums there are is lost.
    static void rows(int upper, int lower) {
        if (upper != upper_ || (lower && lower != lower_)) set(upper, lower ? lower : TILE_ROWS);
    }

  private:
    static void set(int upper, int lower) {
        upper_ = upper, lower_ = lower;
#ifdef __AMX_BF16__
        alignas(64) struct {
            uint8_t palette = 1, start = 0, reserved[14] = {};
            uint16_t bytes[16] = {};
            uint8_t rows[16] = {};
        } shape;
        for (int t = 0; t < 8; t++) {
            const bool low = t == 2 || t == 3 || t == 5;
            shape.bytes[t] = 64;
            shape.rows[t] = (uint8_t)(t >= 6 ? TILE_ROWS : low ? lower : upper);
        }
        written(&shape);
        _tile_loadconfig(&shape);
#endif
    }
    inline static thread_local int upper_ = 0, lower_ = 0;
};

// A left side: where it begins, and how far it is to the next row, to the next 32 numbers and to the lower tile.
struct TileLeft {
    const uint16_t* at;
    long row, step, lower;
    static TileLeft rows(const uint16_t* x, long stride) { return {x, stride, TILE_DEPTH, TILE_ROWS * stride}; }
};

// A right side in pairs of rows: where it begins, and how far it is to the next pair, to the next 32 rows and to the right tile.
struct TileRight {
    const uint32_t* at;
    long row, step, right;
    static TileRight rows(const uint32_t* x, long stride) { return {x, stride, TILE_DEPTH / 2 * stride, TILE_ROWS}; }
    // One tile after another: [depth / 32][width / 16][16, 16].
    static TileRight tiles(const uint32_t* x, int width) { return {x, TILE_ROWS, TILE_DEPTH / 2 * width, TILE_ROWS * TILE_ROWS}; }
};

#ifdef __AMX_BF16__
// c [16 or fewer rows x DOWN, 16 ACROSS] (+)= a b for `steps` times 32 numbers. between(k, 0) .. between(k, 7) are called among the instructions of
// step k, for what can be done meanwhile: lines of a cache fetched a few at a time do not hold up the loads of tiles, all at once they do.
template <int DOWN, int ACROSS, typename F>
inline void tile_block(int steps, TileLeft a, TileRight b, float* c, long ldc, bool add, F between) {
    constexpr bool low = DOWN == 2, right = ACROSS == 2;
    float* under = c + TILE_ROWS * ldc;
    const long a_bytes = a.row * 2, b_bytes = b.row * 4, c_bytes = ldc * 4;
    written();
    if (add) {
        _tile_loadd(0, c, c_bytes);
        if (right) _tile_loadd(1, c + 16, c_bytes);
        if (low) _tile_loadd(2, under, c_bytes);
        if (low && right) _tile_loadd(3, under + 16, c_bytes);
    } else {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    }
    for (int k = 0; k < steps; k++, a.at += a.step, b.at += b.step) {
        between(k, 0);
        _tile_loadd(6, b.at, b_bytes);
        between(k, 1);
        _tile_loadd(4, a.at, a_bytes);
        between(k, 2);
        _tile_dpbf16ps(0, 4, 6);
        between(k, 3);
        if (low) _tile_loadd(5, a.at + a.lower, a_bytes);
        between(k, 4);
        if (low) _tile_dpbf16ps(2, 5, 6);
        _tile_zero(6);
        between(k, 5);
        if (right) _tile_loadd(6, b.at + b.right, b_bytes);
        between(k, 6);
        if (low && right) _tile_dpbf16ps(3, 5, 6);
        if (low) _tile_zero(5);
        between(k, 7);
        if (right) _tile_dpbf16ps(1, 4, 6);
        if (right) _tile_zero(6);
        _tile_zero(4);
    }
    _tile_stored(0, c, c_bytes);
    if (right) _tile_stored(1, c + 16, c_bytes);
    if (low) _tile_stored(2, under, c_bytes);
    if (low && right) _tile_stored(3, under + 16, c_bytes);
}
#endif

// c [m, n] (+)= a [m, 32 steps] b [32 steps, n], m and n at most 32, n a multiple of 16.
template <typename F>
inline void tile_product(int m, int n, int steps, const TileLeft& a, const TileRight& b, float* c, long ldc, bool add, F between) {
#ifdef __AMX_BF16__
    const int upper = std::min(m, TILE_ROWS), lower = m - upper;
    Tiles::rows(upper, lower);
    if (lower)
        n > 16 ? tile_block<2, 2>(steps, a, b, c, ldc, add, between) : tile_block<2, 1>(steps, a, b, c, ldc, add, between);
    else
        n > 16 ? tile_block<1, 2>(steps, a, b, c, ldc, add, between) : tile_block<1, 1>(steps, a, b, c, ldc, add, between);
#endif
}

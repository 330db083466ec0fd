// The matrix products of linear layers in bfloat16, summed in float32:
//
//     y = x W^T + b,    dx = g W,    dW += g^T x        x [rows, in], W [out, in], g [rows, out]; in and out are multiples of 16
//
// and z = silu(x G^T + b) * (x U^T + c), whose factors are not written down.
//
// Layers that read the same rows are taken together: their outputs in one pass over x, the sum of their gradients in one over dx.
#include "panels.h"

namespace {

constexpr int WIDTH = TILES ? 32 : 48, HEIGHT = 8;  // gradients of weights: columns of a panel, rows of a tile,
constexpr int STRIP = 64;                           // most columns of g of a task,
constexpr int PAIRS = TILES ? LANES : 1;            // what pairs of its rows are filled up to
constexpr int LONG = 1 << 14;                       // numbers of a row so long that lines of a column meet in few places of a cache:
constexpr int WIDE_STRIP = TILES ? 256 : STRIP;     // most columns of g of a task then,
constexpr int CHUNK = 512, SUMS = 1 << 18;          // columns of g that are brought together, sums of a task

// Sums are the second factor of silu(gate) * up, and rounded as if they had been written down; gate [rows, PANEL].
struct Gated : Finish {
    const bf16* gate;

    explicit Gated(const bf16* gate) : gate(gate) {}
    void operator()(int row, int rows, int width, const float* sums, const Goal& goal) const override {
        for (int r = 0; r < rows; r++)
            for (int c = 0; c < width; c += LANES) {
                const __m512 up = to_float(to_bf16(_mm512_loadu_ps(sums + r * PANEL + c)));
                store(goal.out + (row + r) * goal.stride + c, _mm512_mul_ps(silu(load(gate + (row + r) * PANEL + c)), up));
            }
    }
};

// Columns of rows [count, columns] as a left side: tiles of 8 columns, each [pairs, 8] with rows 2 k and 2 k + 1 in every lane. Beyond `count`: zeros.
void pack_columns(const bf16* x, long stride, int count, int columns, int pairs, uint32_t* to) {
    for (int k = 0; k < pairs; k++)
        for (int c = 0; c < columns; c += LANES) {
            const __m512i both = row_pair(x + c, stride, 2 * k, count);
            uint32_t* tile = to + (long)c * pairs + HEIGHT * k;
            _mm256_storeu_si256((__m256i*)tile, _mm512_castsi512_si256(both));
            _mm256_storeu_si256((__m256i*)(tile + (long)HEIGHT * pairs), _mm512_extracti64x4_epi64(both, 1));
        }
}

// The same in the order in which the tile unit reads them, [columns / 16][pairs / 16][16, 16]; `pairs` are whole tiles. Rows that come next are
// fetched, unless so many columns are read that they would leave the cache before.
void tile_columns(const bf16* x, long stride, int count, int columns, int pairs, uint32_t* to) {
    for (int k = 0; k < pairs; k += LANES) {
        for (int i = 2 * (k + LANES); stride < LONG && i < std::min(count, 2 * (k + 2 * LANES)); i++)
            for (int c = 0; c < columns; c += 32) _mm_prefetch((const char*)(x + i * stride + c), _MM_HINT_T0);
        for (int c = 0; c < columns; c += LANES) {
            __m512i r[16];
            column_pairs(x + c, stride, 2 * k, count, r);
            uint32_t* tile = to + (long)c * pairs + LANES * k;
            for (int i = 0; i < 16; i++) _mm512_storeu_si512(tile + LANES * i, r[i]);
        }
    }
}

// Sums [32, 32] that are added to next.
void fetch_block(const float* sums, long stride) {
    for (int r = 0; r < 32; r++)
        for (int c = 0; c < 32; c += LANES) _mm_prefetch((const char*)(sums + r * stride + c), _MM_HINT_T0);
}

// A tile of sums [8, stride] += left right; the sums are fetched while the product is made.
template <int VECTORS> void add_tile(int pairs, const uint32_t* left, const uint32_t* right, float* sums, long stride) {
    __m512 sum[HEIGHT][VECTORS] = {};
    for (int i = 0; i < HEIGHT; i++)
        for (int j = 0; j < VECTORS; j++) __builtin_prefetch(sums + i * stride + LANES * j, 1);
    accumulate(pairs, (const bf16*)left, 2, 2 * HEIGHT, right, LANES * VECTORS, sum, []() {});
    for (int i = 0; i < HEIGHT; i++)
        for (int j = 0; j < VECTORS; j++) {
            float* to = sums + i * stride + LANES * j;
            _mm512_storeu_ps(to, _mm512_add_ps(_mm512_loadu_ps(to), sum[i][j]));
        }
}

// dx [rows, in] = g W by tiles for a layer with many outputs; false if memory ran out. Rows of g are so long that lines of a column meet
// in few places of a cache, so tasks are parts of the rows, which are brought closer together for all columns.
bool long_input(const Linear& layer, int rows, int in, bf16* found) {
    const int most = std::max(TILE, SUMS / in), panels = panels_of(in, PANEL);
    const int parts = round_up((rows + most - 1) / most, omp_get_max_threads()), part = round_up((rows + parts - 1) / parts, TILE);
    const size_t side = (size_t)CHUNK / 2 * PANEL, block = (size_t)part * PANEL, close = CHUNK + TILE_DEPTH;
    std::atomic<int> taken{0};
    bool failed = false;
#pragma omp parallel
    try {
        const Tiles tiles;
        scratch.begin(Scratch::padded<uint32_t>(side) + Scratch::padded<float>(block * panels) + Scratch::padded<bf16>(part * close));
        uint32_t* right = scratch.take<uint32_t>(side);
        float* sums = scratch.take<float>(block * panels);
        bf16* left = scratch.take<bf16>(part * close);
        for (int row; (row = part * taken++) < rows;)
            for (int from = 0; from < layer.out; from += CHUNK) {
                const int now = std::min(CHUNK, layer.out - from), n = std::min(part, rows - row), then = std::min(CHUNK, layer.out - from - now);
                for (int i = 0; i < n; i++) std::memcpy(left + i * close, layer.rows + (long)(row + i) * layer.out + from, now * sizeof *left);
                for (int column = 0; column < in; column += PANEL) {
                    const int width = std::min(PANEL, in - column);
                    const bf16* weight = layer.weight + (long)from * in + column;
                    for (int c = 0; c < width; c += NARROW) pack_rows(weight + c, in, now, std::min(NARROW, width - c), filled(now), right + (long)c * filled(now) / 2, true);
                    const Ahead ahead(weight + (long)now * in, in, 2 * PANEL, then);
                    float* sum = sums + column / PANEL * block;
                    const Part part{from == 0, from + now == layer.out, nullptr, nullptr, sum, {found + (long)row * in + column, in, false}};
                    multiply(left, close, now / 2, right, n, width, part, ahead);
                }
            }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
    }
    return !failed;
}

}  // namespace

// All return 0, or 1 if memory ran out.
extern "C" {

// y_l [rows, out_l] = x W_l^T + b_l + plus for all layers l; plus may be null.
int linear_forward(const bf16* x, int rows, int in, const Linear* layers, int count, const bf16* plus) {
    long outs = 0;
    bool past = TILES;
    for (int l = 0; l < count; l++) outs += layers[l].out, past = past && whole_lines(layers[l].rows, layers[l].out);
    past = past && rows * outs > LARGE;
    int panels = 0;
    for (int l = 0; l < count; l++) panels += panels_of(layers[l].out, PANEL);
    const auto layer_of = [&](int& panel) -> const Linear& {
        const Linear* layer = layers;
        for (; panel >= panels_of(layer->out, PANEL); layer++) panel -= panels_of(layer->out, PANEL);
        return *layer;
    };
    return !each_part(rows, panels, 0, [&](int row, int n, int panel, const Room& room, int next) {
        const Linear &layer = layer_of(panel), &then = next < 0 ? layer : layer_of(next);
        const int column = panel * PANEL, width = std::min(PANEL, layer.out - column);
        const long place = (long)row * layer.out + column;
        const Outputs made{x + (long)row * in, n, in, column, width, plus ? plus + place : nullptr, {layer.rows + place, layer.out, past}};
        make(made, layer, room, panel_ahead(then, next, in));
    });
}

// z [rows, out] = silu(y_0) * y_1 with y_l = x W_l^T + b_l, for two layers of one size
int linear_gated(const bf16* x, int rows, int in, const Linear* layers, bf16* z) {
    const int out = layers->out;
    return !each_part(rows, panels_of(out, PANEL), PANEL, [&](int row, int n, int panel, const Room& room, int next) {
        const int column = panel * PANEL;
        const Gated gated(room.beside);
        Outputs factor{x + (long)row * in, n, in, column, std::min(PANEL, out - column), nullptr, {room.beside, PANEL, false}};
        make(factor, layers[0], room, panel_ahead(layers[1], panel, in));
        factor.goal = {z + (long)row * out + column, out, false, &gated};
        make(factor, layers[1], room, panel_ahead(layers[0], next, in));
    });
}

// dx [rows, in] = sum_l g_l W_l
int linear_input(const Linear* layers, int count, int rows, int in, bf16* found) {
    if (TILES && count == 1 && layers->out >= LONG) return !long_input(*layers, rows, in, found);
    const bool past = whole_lines(found, in) && (long)rows * in > LARGE;
    return !each_part(rows, panels_of(in, PANEL), 0, [&](int row, int n, int panel, const Room& room, int next) {
        const int column = panel * PANEL, width = std::min(PANEL, in - column);
        for (int l = 0; l < count; l++) {
            const Linear& layer = layers[l];
            for (int from = 0; from < layer.out; from += 2 * DEPTH) {
                const int now = std::min(2 * DEPTH, layer.out - from), after = from + now;
                const bool first = l == 0 && from == 0, more = after < layer.out, last = !more && l == count - 1;
                for (int c = 0; c < width; c += NARROW)
                    pack_rows(layer.weight + (long)from * in + column + c, in, now, std::min(NARROW, width - c), filled(now), room.right + (long)c * filled(now) / 2, TILES);
                // what comes next: the rest of this layer, the next layer, or the next panel of the first one
                const Linear& then = more ? layer : layers[last ? 0 : l + 1];
                const int begin = more ? after : 0, place = last ? next * PANEL : column;
                const int lines = last && next < 0 ? 0 : std::min(2 * DEPTH, then.out - begin);
                const Ahead ahead(then.weight + (long)begin * in + place, in, 2 * PANEL, lines);
                const Part part{first, last, nullptr, nullptr, room.sums, {found + (long)row * in + column, in, past}};
                multiply(layer.rows + (long)row * layer.out + from, layer.out, now / 2, room.right, n, width, part, ahead);
            }
        }
        if (past) _mm_sfence();
    });
}

// dW_l [out_l, in] += g_l^T x for all layers l
int linear_weight(const Linear* layers, int count, const bf16* x, int rows, int in) {
    int outs = 0, strips = 0;
    for (int l = 0; l < count; l++) outs += layers[l].out;
    const int strip = std::clamp(round_up(outs / (2 * omp_get_max_threads()), LANES), LANES, outs < LONG ? STRIP : WIDE_STRIP);
    const auto strips_of = [&](const Linear& layer) { return (layer.out + strip - 1) / strip; };
    for (int l = 0; l < count; l++) strips += strips_of(layers[l]);
    const int panels = (in + WIDTH - 1) / WIDTH, most = std::min(DEPTH, round_up((rows + 1) / 2, PAIRS));
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
        const Tiles tiles;
        try {
            scratch.begin(Scratch::padded<uint32_t>(part));
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            failed = true;
        }
#pragma omp barrier
        for (int row = 0; row < rows && !failed; row += 2 * DEPTH) {
            const int now = std::min(2 * DEPTH, rows - row), pairs = round_up((now + 1) / 2, PAIRS);
            const auto panel = [&](int p) { return right + (long)p * WIDTH * pairs; };
#pragma omp for schedule(static)
            for (int k = 0; k < 2 * pairs; k += TILE_DEPTH)
                for (int p = 0; p < panels; p++) {
                    const int width = std::min(WIDTH, in - p * WIDTH), depth = std::min(TILE_DEPTH, 2 * pairs - k);
                    pack_rows(x + (long)(row + k) * in + p * WIDTH, in, std::max(0, now - k), width, depth, panel(p) + (long)k / 2 * width, TILES);
                }
#pragma omp for schedule(dynamic, 1)
            for (int s = 0; s < strips; s++) {
                const Linear* layer = layers;
                int place = s;
                for (; place >= strips_of(*layer); layer++) place -= strips_of(*layer);
                const int first = place * strip, columns = std::min(strip, layer->out - first);
                scratch.begin(0);
                uint32_t* left = scratch.take<uint32_t>(part);
                const bf16* grads = layer->rows + (long)row * layer->out + first;
                float* sums = layer->sums + (long)first * in;
                if (TILES) {
                    tile_columns(grads, layer->out, now, columns, pairs, left);
                    for (int p = 0; p < panels; p++)
                        for (int c = 0, n = std::min(WIDTH, in - p * WIDTH); c < columns; c += TILE) {
                            const TileLeft mine{(const bf16*)(left + (long)c * pairs), TILE_DEPTH, TILE_ROWS * TILE_DEPTH, (long)TILE_ROWS * 2 * pairs};
                            const uint32_t* theirs = panel(p);
                            float* block = sums + (long)c * in + p * WIDTH;
                            fetch_block(c + TILE < columns ? block + TILE * (long)in : sums + (p + 1) * WIDTH, in);
                            tile_product(std::min(TILE, columns - c), n, pairs / LANES, mine, TileRight::tiles(theirs, n), block, in, true,
                                         [=](int k, int slot) INLINE { fetch_lines(theirs + (k + 1) * LANES * WIDTH, 64, slot); });
                        }
                    continue;
                }
                pack_columns(grads, layer->out, now, columns, pairs, left);
                for (int p = 0; p < panels; p++)
                    of_width(std::min(WIDTH, in - p * WIDTH), [&](auto vectors) {
                        for (int c = 0; c < columns; c += HEIGHT)
                            add_tile<vectors()>(pairs, left + (long)c * pairs, panel(p), sums + (long)c * in + p * WIDTH, in);
                    });
            }
        }
    }
    return failed;
}
}

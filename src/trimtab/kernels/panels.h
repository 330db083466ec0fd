// Panels: how the outputs of linear layers are made, in bfloat16 summed in float32.
//
// The right side of a product lies in panels of columns, which stay in the second-level cache while the rows of the left side pass by; tiles
// of sums stay in registers. Outputs are made in rows of whole cache lines, so that threads do not take them from each other, and the weights
// of a thread's next panel are fetched meanwhile. An output is summed in one order, whatever the number of threads and of rows.
#pragma once

#include <omp.h>

#include <algorithm>
#include <atomic>

#include "parts.h"

constexpr int DEPTH = 1024;                       // pairs of rows of a panel that are laid at a time
constexpr int PANEL = 64, TILE = TILES ? 32 : 6;  // most columns of a panel, rows of a tile,
constexpr int NARROW = TILES ? 32 : PANEL;        // columns of it that lie side by side,
constexpr int ROWS = TILES ? 1024 : 512;          // most rows of a task
constexpr long LARGE = 1 << 19;                   // outputs that tiles write past the caches

inline thread_local Scratch scratch, shared_scratch;

inline int panels_of(int columns, int size) { return (columns + size - 1) / size; }

// Rows of a panel that are laid for as many as these.
inline int filled(int depth) { return round_up(depth, FILLED); }

// Whether parts of these rows, a panel wide, are whole lines of a cache.
inline bool whole_lines(const bf16* rows, int columns) { return TILES && columns % PANEL == 0 && (uintptr_t)rows % 64 == 0; }

// f(constant number of vectors) for a panel of 16, 32, 48 or 64 columns.
template <typename F> void of_width(int width, F f) {
    if (width == 64) f(std::integral_constant<int, 4>());
    if (width == 48) f(std::integral_constant<int, 3>());
    if (width == 32) f(std::integral_constant<int, 2>());
    if (width == 16) f(std::integral_constant<int, 1>());
}

// What a thread has for a task: room for the right side, for sums, and for `beside` numbers of each row.
struct Room {
    uint32_t* right;
    float* sums;
    bf16* beside;
};

// Runs f(first row, rows, panel, room, this thread's next panel or -1) for all parts of the rows and all panels; false if memory ran out.
template <typename F> bool each_part(int rows, int panels, int beside, F f) {
    const int busy = (2 * omp_get_max_threads() + panels - 1) / panels;
    const int parts = std::max({1, (rows + ROWS - 1) / ROWS, std::min(busy, rows / 32)}), part = std::max(TILE, round_up((rows + parts - 1) / parts, TILE));
    const int tasks = (rows + part - 1) / part * panels;
    std::atomic<int> taken{0};
    bool failed = false;
#pragma omp parallel
    try {
        const Tiles tiles;
        const size_t right = (size_t)DEPTH * PANEL, sums = (size_t)part * PANEL, more = (size_t)part * beside;
        scratch.begin(Scratch::padded<uint32_t>(right) + Scratch::padded<float>(sums) + Scratch::padded<bf16>(more));
        const Room room{scratch.take<uint32_t>(right), scratch.take<float>(sums), scratch.take<bf16>(more)};
        const int late = tasks - 2 * omp_get_num_threads();  // from here on no task is taken before it can be begun
        for (int task = taken++; task < tasks;) {
            const int row = task / panels * part, then = task < late ? taken++ : -1;
            f(row, std::min(part, rows - row), task % panels, room, then < 0 ? -1 : then % panels);
            task = then < 0 ? taken++ : then;
        }
    } catch (const std::bad_alloc&) {
#pragma omp atomic write
        failed = true;
    }
    return !failed;
}

// Rows of weights that are fetched into the second-level cache, some with every call of `fetch`.
class Ahead {
  public:
    Ahead(const bf16* first, long stride, int bytes, int rows) : row_(first), stride_(stride), bytes_(bytes), left_(rows) {}
    // How often it will be called.
    void begin(long calls) { each_ = (int)(((long)left_ * panels_of(bytes_, 64) + calls - 1) / calls); }
    void fetch() {
        for (int i = 0; i < each_ && left_; i++) {
            _mm_prefetch((const char*)row_ + at_, _MM_HINT_T1);
            at_ += 64;
            if (at_ >= bytes_) at_ = 0, row_ += stride_, left_--;
        }
    }

  private:
    const bf16* row_;
    long stride_;
    int bytes_, left_, at_ = 0, each_ = 0;
};

struct Goal;

// What else finished sums are good for than to be written down.
struct Finish {
    // Rows `row` .. row + rows - 1 of a panel: sums [rows, PANEL], of which `width` columns are real.
    virtual void operator()(int row, int rows, int width, const float* sums, const Goal& goal) const = 0;
};

// Where finished sums go: to `out` (past the caches: whole lines); or to `finish`, unless it is null, which writes something else there. Where
// `out` is null, nothing is written.
struct Goal {
    bf16* out;
    long stride;
    bool past;
    const Finish* finish = nullptr;

    void fetch(int row, int width) const {
        for (int c = 0; out && !past && c < width; c += 32) __builtin_prefetch(out + row * stride + c, 1);
    }
};

// One part of the depth of a panel of sums [count, width]: whether it is the first, whether the last (then `bias` and the rows `plus` are added,
// where these are not null, and the sums go to `goal`; before that they are kept in `sums`).
struct Part {
    bool first, last;
    const float* bias;
    const bf16* plus;  // in rows like those of the goal
    float* sums;
    Goal goal;
};

// Sums of left [count, 2 pairs] times a panel [pairs, width], of which this is one part. Pairs of the panel are filled up (`filled`) with zeros.
void multiply(const bf16* left, long lda, int pairs, const uint32_t* right, int count, int width, const Part& part, Ahead ahead);

// Rows of x [rows, in], and `width` outputs of a layer for them from `column` on, with `plus` where it is not null.
struct Outputs {
    const bf16* x;
    int rows, in, column, width;
    const bf16* plus;
    Goal goal;
};

void make(const Outputs& y, const Linear& layer, const Room& room, const Ahead& ahead);

// What fetches the weights of a panel of a layer [out, in]. Of panel -1 there is nothing.
inline Ahead panel_ahead(const Linear& layer, int panel, int in) {
    return {layer.weight + (long)panel * PANEL * in, 32, 64, panel < 0 ? 0 : std::min(PANEL, layer.out - panel * PANEL) * in / 32};
}

// What is read from the logits l = scale z [rows, columns] of an output head, z = x W^T + b in bfloat16 or, not written down, in float32.
//
// With weights w_v = exp(l_v - shift) for a number `shift` of each row: total = sum_v w_v, mean = sum_v w_v log w_v, and w in bfloat16.
#include "panels.h"

namespace {

// f(column, lanes) for all columns of a row.
template <typename F> inline void each_vector(int columns, F f) {
    int c = 0;
    for (; c + LANES <= columns; c += LANES) f(c, (__mmask16)0xffff);
    if (c < columns) f(c, first_lanes(columns - c));
}

// Sums over a row: of w = exp(below), and of w below where `means` says so.
struct Sums {
    const bool means;
    __m512 total = _mm512_setzero_ps(), mean = _mm512_setzero_ps();

    // Adds the lanes, and returns w: zero in the others.
    __m512 add(__m512 below, __mmask16 lanes = 0xffff) {
        const __m512 w = _mm512_maskz_mov_ps(lanes, exponential(below));
        total = _mm512_add_ps(total, w);
        if (means) mean = _mm512_mask3_fmadd_ps(below, w, mean, _mm512_cmp_ps_mask(w, _mm512_setzero_ps(), _CMP_GT_OQ));
        return w;
    }
    void write(int row, float* totals, float* means_of) const {
        totals[row] = _mm512_reduce_add_ps(total);
        if (means) means_of[row] = _mm512_reduce_add_ps(mean);
    }
};

// What is wanted of the rows of a head: see head_of_rows.
struct Wanted {
    const int64_t* targets;
    float scale;
    const float* shifts;
    float* chosen;
};

// Sums are logits of rows from `first` and columns from `column` on. totals and means (may be null): of these columns.
struct Weighed : Finish {
    const Wanted& of;
    int first, column;
    float *totals, *means;

    Weighed(const Wanted& of, int first, int column, float* totals, float* means) : of(of), first(first), column(column), totals(totals), means(means) {}
    void operator()(int row, int rows, int width, const float* sums, const Goal& goal) const override {
        for (int r = row; r < row + rows; r++, sums += PANEL) {
            const __m512 factor = _mm512_set1_ps(of.scale), shift = _mm512_set1_ps(of.shifts[first + r]);
            bf16* weights = goal.out ? goal.out + r * goal.stride : nullptr;
            Sums found{means != nullptr};
            __m512 last = _mm512_setzero_ps();
            for (int c = 0; c < width; c += LANES) {
                const __m512 w = found.add(_mm512_fmsub_ps(_mm512_loadu_ps(sums + c), factor, shift));
                if (weights && !goal.past) store(weights + c, w);
                if (goal.past && c % 32) stream(weights + c - LANES, last, w);
                last = w;
            }
            found.write(r, totals, means);
            const long target = of.targets[first + r] - column;
            if (target >= 0 && target < width) of.chosen[first + r] = sums[target] * of.scale - of.shifts[first + r];
        }
    }
};

// sums [rows] of values [panels, rows], in one order.
void add_up(const float* values, int panels, int rows, float* sums) {
#pragma omp parallel for schedule(dynamic, 1)
    for (int block = 0; block < rows; block += LANES) {
        const int end = std::min(rows, block + LANES);
        std::fill(sums + block, sums + end, 0.0f);
        for (int p = 0; p < panels; p++)
            for (int i = block; i < end; i++) sums[i] += values[(long)p * rows + i];
    }
}

}  // namespace

extern "C" {

// From z, over which w is written if it is to be kept. means: null if not wanted.
void head_of_logits(bf16* z, float scale, const float* shifts, int rows, int columns, int keep, float* totals, float* means) {
    const __m512 factor = _mm512_set1_ps(scale);
#pragma omp parallel for schedule(dynamic, 1)
    for (int i = 0; i < rows; i++) {
        bf16* row = z + (long)i * columns;
        const __m512 shift = _mm512_set1_ps(shifts[i]);
        Sums found{means != nullptr};
        each_vector(columns, [&](int c, __mmask16 lanes) {
            const __m512 w = found.add(_mm512_fmsub_ps(load(row + c, lanes), factor, shift), lanes);
            if (keep) store(row + c, w, lanes);
        });
        found.write(i, totals, means);
    }
}

// From x, where the rows of the layer are w unless they are null; and chosen = l_target - shift. means: null if not wanted. Returns 1 if
// memory ran out, else 0.
int head_of_rows(const bf16* x, int rows, int in, const Linear* layer, const int64_t* targets, float scale, const float* shifts, float* chosen,
                 float* totals, float* means) {
    const int panels = panels_of(layer->out, PANEL);
    const size_t each = (size_t)panels * rows;
    const bool past = TILES && layer->rows && whole_lines(layer->rows, layer->out) && (long)rows * layer->out > LARGE;
    float *total_of, *mean_of = nullptr;  // [panels, rows]
    try {
        shared_scratch.begin((means ? 2 : 1) * Scratch::padded<float>(each));
        total_of = shared_scratch.take<float>(each);
        if (means) mean_of = shared_scratch.take<float>(each);
    } catch (const std::bad_alloc&) {
        return 1;
    }
    const Wanted wanted{targets, scale, shifts, chosen};
    const bool made = each_part(rows, panels, 0, [&](int row, int n, int panel, const Room& room, int next) {
        const int column = panel * PANEL, width = std::min(PANEL, layer->out - column);
        const size_t place = (size_t)panel * rows + row;
        const Weighed weighed(wanted, row, column, total_of + place, means ? mean_of + place : nullptr);
        bf16* weights = layer->rows ? layer->rows + (long)row * layer->out + column : nullptr;
        const Goal goal{weights, layer->out, past, &weighed};
        make({x + (long)row * in, n, in, column, width, nullptr, goal}, *layer, room, panel_ahead(*layer, next, in));
    });
    if (!made) return 1;
    add_up(total_of, panels, rows, totals);
    if (means) add_up(mean_of, panels, rows, means);
    return 0;
}
}

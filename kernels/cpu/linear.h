// x @ weight.T + bias over panels of sixteen output columns.
//
// A weight is packed once, when it is loaded: panel p holds columns 16 p to 16 p + 15, step by step
// along k. A step is 64 bytes: for each of the sixteen columns one word of as many neighbouring
// elements of k as fit in it. So a product needs no sum across lanes, and reading a weight is
// reading memory from one end to the other. Rows of x are packed before each product, a tile of
// rows side by side, so that a step finds its numbers next to each other.
//
// Each element of the result is one chain of sums over ascending k, whatever the tile, the number
// of rows or of threads: its bits depend on its row of x and its column of the weight alone.
#pragma once

namespace {

// Bytes that a packed row takes for each step.
template <typename T>
constexpr int64_t row_step_bytes() {
    return static_cast<int64_t>(sizeof(typename Lanes<T>::X)) * Lanes<T>::kNumbers;
}

// Rows [begin, end) of x as one tile: [step][row][number], zeros behind the last column.
template <typename T>
void pack_rows(const PackTask& task, int64_t begin, int64_t end, void* out) {
    using L = Lanes<T>;
    const int64_t stride = (end - begin) * L::kNumbers;
    const int64_t whole = task.k / L::kDepth;
    const int rest = static_cast<int>(task.k % L::kDepth);
    for (int64_t r = begin; r < end; ++r) {
        const T* x = static_cast<const T*>(task.x) + (task.rows ? task.rows[r] : r) * task.x_stride;
        typename L::X* to = static_cast<typename L::X*>(out) + (r - begin) * L::kNumbers;
        for (int64_t s = 0; s < whole; ++s, x += L::kDepth, to += stride) L::pack(x, to);
        if (rest) {
            T last[L::kDepth] = {};
            for (int i = 0; i < rest; ++i) last[i] = x[i];
            L::pack(last, to);
        }
    }
}

// out[row][panel] = each row of a tile times each of the panels side by side. Fetches lines of
// what comes next meanwhile.
template <typename W, int ROWS, int PANELS>
void product(const void* tile, const char* panels, int64_t steps, const char* next,
             int64_t next_lines, float* out) {
    using L = Lanes<W>;
    const typename L::X* x = static_cast<const typename L::X*>(tile);
    Vec sums[ROWS * PANELS];
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PANELS; ++i) sums[i] = set1(0.0f);
    const int64_t panel_bytes = steps * kStepBytes;
    for (int64_t s = 0; s < steps; ++s) {
        L w[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) w[p] = L::load(panels + p * panel_bytes + s * kStepBytes);
        if (s * PANELS < next_lines) {
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) {
                __builtin_prefetch(next + (s * PANELS + p) * kStepBytes, 0, 2);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) {
                sums[r * PANELS + p] = L::dot(sums[r * PANELS + p], x + r * L::kNumbers, w[p]);
            }
        }
        x += ROWS * L::kNumbers;
    }
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PANELS; ++i) store(out + i * kPanelCols, sums[i]);
}

using Product = void (*)(const void*, const char*, int64_t, const char*, int64_t, float*);

// Panels that tiles of at most so many rows take at once: as many sums as the registers hold.
constexpr int panels_at_once(int64_t rows) {
    return 4 * rows <= kLinearSums ? 4 : 2 * rows <= kLinearSums ? 2 : 1;
}

// The product for numbers of rows and panels known at run time.
template <typename W, int ROWS = kLinearRows>
Product product_for(int64_t rows, int panels) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return product_for<W, ROWS - 1>(rows, panels);
    }
    constexpr int kMost = panels_at_once(ROWS);
    if (panels == 1) return product<W, ROWS, 1>;
    if (panels == 2) return product<W, ROWS, kMost < 2 ? kMost : 2>;
    return product<W, ROWS, kMost>;
}

template <typename T>
void store_outputs(const LinearTask& task, int64_t row, int64_t col, const float* values) {
    const int n = static_cast<int>(lesser(kPanelCols, task.n - col));
    const bool whole = n == kPanelCols;
    Vec sums = load(values);
    if (task.bias) {
        const T* bias = static_cast<const T*>(task.bias) + col;
        sums = sums + (whole ? load(bias) : load_n(bias, n));
    }
    const int64_t at = (task.rows ? task.rows[row] : row) * task.n + col;
    if (task.out_float32) {
        float* out = static_cast<float*>(task.out) + at;
        whole ? store(out, sums) : store_n(out, sums, n);
    } else {
        T* out = static_cast<T*>(task.out) + at;
        whole ? store(out, sums) : store_n(out, sums, n);
    }
}

template <typename T>
void linear(const LinearTask& task, int64_t panel_begin, int64_t panel_end) {
    const int64_t panel_bytes = task.steps * kStepBytes;
    const char* weight = static_cast<const char*>(task.weight);
    const char* tiles = static_cast<const char*>(task.x);
    const int64_t num_tiles = task.num_tiles;
    float out[kLinearSums * kPanelCols];

    const int64_t num_panels = (task.n + kPanelCols - 1) / kPanelCols;
    // All tiles have as many rows as the first, or one more.
    const int most = panels_at_once((task.num_rows + num_tiles - 1) / num_tiles);
    for (int64_t panel = panel_begin, next; panel < panel_end; panel = next) {
        const int panels = panel + most <= panel_end ? most : 1;
        next = panel + panels;
        const int64_t lines = lesser(panels, num_panels - next) * task.steps;
        for (int64_t t = 0; t < num_tiles; ++t) {
            const int64_t begin = t * task.num_rows / num_tiles;
            const int64_t end = (t + 1) * task.num_rows / num_tiles;
            // The next panels come from memory while these are multiplied, a share with each tile.
            const int64_t from = t * lines / num_tiles, to = (t + 1) * lines / num_tiles;
            product_for<T>(end - begin, panels)(
                tiles + begin * task.steps * row_step_bytes<T>(), weight + panel * panel_bytes,
                task.steps, weight + next * panel_bytes + from * kStepBytes, to - from, out);
            for (int64_t r = 0; r < end - begin; ++r) {
                for (int p = 0; p < panels; ++p) {
                    store_outputs<T>(task, begin + r, (panel + p) * kPanelCols,
                                     out + (r * panels + p) * kPanelCols);
                }
            }
        }
    }
}

}  // namespace

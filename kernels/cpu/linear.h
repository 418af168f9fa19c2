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
//
// A weight of int8 has a scale for each column. Where the CPU multiplies bytes, a row of x becomes
// whole numbers of 16 bits with a scale of its own, each as two bytes: the sums are exact, and a
// row depends on no other. Elsewhere bytes are widened to float.
#pragma once

namespace {

// Of a weight, so much is multiplied by all tiles before the next comes: within a core's own cache.
constexpr int64_t kBlockBytes = 256 << 10;
// Where no product before fetched a block: steps ahead in each panel.
constexpr int64_t kStepsAhead = 64;

// The largest whole number that x becomes where bytes are multiplied.
constexpr float kLargestWhole = 32767.0f;
constexpr int64_t kMaxTileRows = 16;

// Bytes that a packed row takes for each step.
template <typename T>
constexpr int64_t row_step_bytes() {
    return static_cast<int64_t>(sizeof(typename Lanes<T>::X)) * Lanes<T>::kNumbers;
}

// The largest magnitude of a row; NaN where it holds anything that isn't finite.
template <typename T>
float largest(const T* x, int64_t k) {
    Vec most = set1(0.0f), spoilt = set1(0.0f);
    for (int64_t i = 0; i < k; i += 16) {
        const Vec v = k - i >= 16 ? load(x + i) : load_n(x + i, static_cast<int>(k - i));
        most = max(most, max(v, set1(0.0f) - v));
        spoilt = spoilt + v * set1(0.0f);
    }
    float sum[4];
    sum4(spoilt, spoilt, spoilt, spoilt, sum);
    return max_lane(most) + sum[0];
}

// Rows [begin, end) of x as one tile: [step][row][number], zeros behind the last column.
template <typename T, typename W>
void pack_rows(const PackTask& task, int64_t begin, int64_t end, void* out) {
    using L = Lanes<W>;
    const int64_t steps = (task.k + L::kDepth - 1) / L::kDepth;
    const int64_t stride = (end - begin) * L::kNumbers;
    const T* rows[kMaxTileRows];
    float unit[kMaxTileRows];  // whole numbers to one of x
    for (int64_t r = begin; r < end; ++r) {
        const int64_t from = task.rows ? task.rows[r] : r;
        const T* row = static_cast<const T*>(task.x) + from * task.x_stride;
        rows[r - begin] = row;
        unit[r - begin] = 1.0f;
        if (!task.scales) continue;
        const float scale = L::kWhole ? largest(row, task.k) / kLargestWhole : 1.0f;
        // So small that its inverse overflows: zero. NaN stays.
        unit[r - begin] = scale < std::numeric_limits<float>::min() ? 0.0f : 1.0f / scale;
        task.scales[r] = scale;
    }
    // A cache line of each row at a time, so that the tile is written from one end to the other.
    constexpr int64_t kChunk = 16;
    for (int64_t step = 0; step < steps; step += kChunk) {
        const bool is_whole = (step + kChunk) * L::kDepth <= task.k;
        typename L::X* chunk = static_cast<typename L::X*>(out) + step * stride;
        if constexpr (L::kTurns) {
            if (is_whole && end - begin > 2) {  // turning costs as much for one row as for all
                L::turn(rows, step * L::kDepth, end - begin, chunk);
                continue;
            }
        }
        for (int64_t r = 0; r < end - begin; ++r) {
            const T* x = rows[r] + step * L::kDepth;
            typename L::X* to = chunk + r * L::kNumbers;
            const float u = unit[r];
            if (is_whole) {
#pragma GCC unroll 16
                for (int64_t s = 0; s < kChunk; ++s) L::pack(x + s * L::kDepth, u, to + s * stride);
                continue;
            }
            const int64_t left = task.k - step * L::kDepth;
            T last[kChunk * L::kDepth] = {};
            std::memcpy(last, x, static_cast<size_t>(left) * sizeof(T));
            for (int64_t s = 0; s * L::kDepth < left; ++s) {
                L::pack(last + s * L::kDepth, u, to + s * stride);
            }
        }
    }
}

// Memory to fetch during a product: in each of so many steps, one line for each panel.
struct Ahead {
    const char* from;
    int64_t panel_stride, step_stride, steps;  // in bytes but for the last
    int64_t jump_at = -1, jump = 0;            // before this step, so many bytes on
};

// out[row][panel] = each row of a tile times each of the panels side by side. `column_sums`: of
// the first panel on, where the weight has them.
template <typename W, int ROWS, int PANELS>
void product(const void* tile, const char* panels, int64_t steps, const Ahead& ahead,
             const int32_t* column_sums, float* out) {
    using L = Lanes<W>;
    const typename L::X* x = static_cast<const typename L::X*>(tile);
    typename L::Sum sums[ROWS * PANELS];
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * PANELS; ++i) sums[i] = L::zero();
    const int64_t panel_bytes = steps * kStepBytes;
    const char* next = ahead.from;
    const int64_t panel_stride = ahead.panel_stride, step_stride = ahead.step_stride;
    const int64_t ahead_steps = ahead.steps, jump_at = ahead.jump_at, jump = ahead.jump;
    for (int64_t s = 0; s < steps; ++s) {
        L w[PANELS];
#pragma GCC unroll 4
        for (int p = 0; p < PANELS; ++p) w[p] = L::load(panels + p * panel_bytes + s * kStepBytes);
        if (s < ahead_steps) {
            if (s == jump_at) next += jump;
#pragma GCC unroll 4
            for (int p = 0; p < PANELS; ++p) __builtin_prefetch(next + p * panel_stride, 0, 2);
            next += step_stride;
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
    for (int i = 0; i < ROWS * PANELS; ++i) {
        store(out + i * kPanelCols, L::total(sums[i], column_sums + i % PANELS * kPanelCols));
    }
}

// Products out of the lanes' own registers.
template <typename W>
struct LaneProducts {
    static constexpr int64_t kSums = Lanes<W>::kSums;  // rows times panels at most
    static constexpr int64_t kRowStepBytes = row_step_bytes<W>();

    // Panels that tiles of at most so many rows take at once: as many sums as the registers hold.
    static constexpr int panels_at_once(int64_t rows) {
        return 4 * rows <= kSums ? 4 : 2 * rows <= kSums ? 2 : 1;
    }

    // `product` for numbers of rows and panels known at run time.
    template <int ROWS = Lanes<W>::kRows>
    void multiply(int64_t rows, int panels, const void* tile, const char* weight, int64_t steps,
                  const Ahead& ahead, const int32_t* column_sums, float* out) const {
        if constexpr (ROWS > 1) {
            if (rows < ROWS) {
                return multiply<ROWS - 1>(rows, panels, tile, weight, steps, ahead, column_sums,
                                          out);
            }
        }
        constexpr int kMost = panels_at_once(ROWS);
        const auto of_panels = panels == 1   ? product<W, ROWS, 1>
                               : panels == 2 ? product<W, ROWS, kMost < 2 ? kMost : 2>
                                             : product<W, ROWS, kMost>;
        of_panels(tile, weight, steps, ahead, column_sums, out);
    }
};

template <typename T, typename W>
void store_outputs(const LinearTask& task, int64_t row, int64_t col, const float* values) {
    const int n = static_cast<int>(lesser(kPanelCols, task.n - col));
    const bool whole = n == kPanelCols;
    Vec sums = load(values);
    if constexpr (!std::is_same_v<T, W>) {
        sums = sums * (set1(task.x_scales[row]) * load(task.scales + col));
    }
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

template <typename T, typename W, typename Products = LaneProducts<W>>
void linear(const LinearPiece& piece, const LinearPiece* next_piece, bool is_fetched) {
    const LinearTask& task = *piece.task;
    const int64_t panel_bytes = task.steps * kStepBytes;
    const char* weight = static_cast<const char*>(task.weight);
    const char* tiles = static_cast<const char*>(task.x);
    const int64_t num_tiles = piece.tile_end - piece.tile_begin;
    // Whole panels of scales lie before the sums. Without scales the sums aren't looked at.
    const int64_t num_panels = (task.n + kPanelCols - 1) / kPanelCols;
    const int32_t* column_sums =
        task.scales ? reinterpret_cast<const int32_t*>(task.scales) + num_panels * kPanelCols
                    : nullptr;
    alignas(64) float out[Products::kSums * kPanelCols];
    Products products;

    // All tiles have as many rows as the first, or one more.
    const int most =
        Products::panels_at_once((task.num_rows + task.num_tiles - 1) / task.num_tiles);
    const int64_t block_panels =
        num_tiles == 1 ? piece.panel_end - piece.panel_begin
                       : greater(kBlockBytes / greater(panel_bytes * most, 1), 1) * most;
    for (int64_t block = piece.panel_begin; block < piece.panel_end; block += block_panels) {
        const int64_t block_end = lesser(block + block_panels, piece.panel_end);
        // The next block comes from memory while this one is multiplied, a share with each product.
        const char* next = weight + block_end * panel_bytes;
        int64_t next_panels = lesser(block_panels, piece.panel_end - block_end);
        if (next_panels == 0 && next_piece) {
            next = static_cast<const char*>(next_piece->task->weight) +
                   next_piece->panel_begin * panel_bytes;
            next_panels = lesser(block_panels, next_piece->panel_end - next_piece->panel_begin);
        }
        const int64_t fetching_tiles = num_tiles - (is_fetched ? 0 : 1);
        for (int64_t t = piece.tile_begin; t < piece.tile_end; ++t) {
            const int64_t begin = t * task.num_rows / task.num_tiles;
            const int64_t end = (t + 1) * task.num_rows / task.num_tiles;
            const char* x = tiles + begin * task.steps * Products::kRowStepBytes;
            for (int64_t panel = block; panel < block_end;) {
                const int panels = panel + most <= block_end ? most : 1;
                const char* w = weight + panel * panel_bytes;
                Ahead ahead;
                if (num_tiles == 1 || !is_fetched) {
                    // The last steps fetch the first ones of the next panels side by side.
                    const int64_t turn = task.steps - kStepsAhead;
                    const bool is_last = panel + panels == block_end;
                    ahead = {w + kStepsAhead * kStepBytes, panel_bytes, kStepBytes,
                             is_last ? turn : task.steps,  turn,        (panels - 1) * panel_bytes};
                } else {
                    const int64_t unit = kStepBytes * panels;
                    const int64_t share =
                        next_panels * panel_bytes / fetching_tiles / (block_end - block) * panels;
                    ahead = {next, kStepBytes, unit, (share + unit - 1) / unit};
                    next += share;
                }
                products.multiply(end - begin, panels, x, w, task.steps, ahead,
                                  column_sums + panel * kPanelCols, out);
                for (int64_t r = 0; r < end - begin; ++r) {
                    for (int p = 0; p < panels; ++p) {
                        store_outputs<T, W>(task, begin + r, (panel + p) * kPanelCols,
                                         out + (r * panels + p) * kPanelCols);
                    }
                }
                panel += panels;
            }
            is_fetched = true;  // by the first tile if by nothing before
        }
    }
}

}  // namespace

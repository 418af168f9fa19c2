// x @ weight.T + bias, the weight in its natural [n, k] order: nothing is packed, so loading costs
// nothing, memory never doubles, and an embedding row is a row.
#pragma once

namespace {

template <typename T>
KV_INLINE void store_outputs(const LinearTask& task, int64_t row, int64_t col, const float* values,
                             int n) {
    Vec sums = load_n(values, n);
    if (task.bias) sums = sums + load_n(static_cast<const T*>(task.bias) + col, n);
    const int64_t at = (task.rows ? task.rows[row] : row) * task.n + col;
    if (task.out_float32) {
        store_n(static_cast<float*>(task.out) + at, sums, n);
    } else {
        store_n(static_cast<T*>(task.out) + at, sums, n);
    }
}

template <typename T>
void linear(const LinearTask& task, int64_t row_begin, int64_t row_end, int64_t col_begin,
            int64_t col_end) {
    const T* weight = static_cast<const T*>(task.weight);
    const T* x = static_cast<const T*>(task.x);
    constexpr int kRows = kTileRows<T>;
    const int64_t num_rows = row_end - row_begin;
    const int64_t num_tiles = (num_rows + kRows - 1) / kRows;

    for (int64_t col = col_begin; col < col_end; col += kTileCols) {
        const int cols = static_cast<int>(lesser(kTileCols, col_end - col));
        const T *w[kTileCols], *next[kTileCols];
        // Past the end the last row is computed again and not stored.
        for (int c = 0; c < kTileCols; ++c) {
            w[c] = weight + lesser(col + c, col_end - 1) * task.k;
            next[c] = weight + lesser(col + kTileCols + c, task.n - 1) * task.k;
        }

        for (int64_t tile = 0; tile < num_tiles; ++tile) {
            const int64_t begin = row_begin + tile * num_rows / num_tiles;
            const int rows =
                static_cast<int>(row_begin + (tile + 1) * num_rows / num_tiles - begin);
            const T* operands[kRows];
            for (int r = 0; r < rows; ++r) {
                const int64_t row = task.rows ? task.rows[begin + r] : begin + r;
                operands[r] = x + row * task.x_stride;
            }
            float out[kRows * kTileCols];
            // The first tile waits for memory; while it does, the next columns can come.
            dot_rows<T>(rows, operands, w, task.k, tile == 0 ? next : nullptr, out);
            for (int r = 0; r < rows; ++r) {
                store_outputs<T>(task, begin + r, col, out + r * kTileCols, cols);
            }
        }
    }
}

}  // namespace

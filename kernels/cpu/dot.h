// Dot products of a few rows with a few other rows: the heart of linears and of attention scores.
#pragma once

namespace {

// out[r * COLS + c] = x[r] . w[c] over k elements.
// Each sum runs over k in steps of Operand<T>::kStep, lane by lane, and is folded over the tree of
// sum4: its bits depend on the two rows alone, not on the tile's shape or on the place in it.
// `next`: the rows that w will be next, fetched meanwhile; or null.
template <typename T, int ROWS, int COLS>
KV_INLINE void dot_tile(const T* const* x, const T* const* w, int64_t k,
                        const T* const* next, float* out) {
    using Op = Operand<T>;
    Vec sums[ROWS * COLS];
#pragma GCC unroll 24
    for (int i = 0; i < ROWS * COLS; ++i) sums[i] = set1(0.0f);

    int64_t i = 0;
    for (; i + Op::kStep <= k; i += Op::kStep) {
        Op b[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) b[c] = Op::load(w[c] + i);
        if (next) {
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) __builtin_prefetch(next[c] + i, 0, 2);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Op a = Op::load(x[r] + i);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) sums[r * COLS + c] = Op::dot(sums[r * COLS + c], a, b[c]);
        }
    }
    if (i < k) {
        const int rest = static_cast<int>(k - i);
        Op b[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) b[c] = Op::load_n(w[c] + i, rest);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Op a = Op::load_n(x[r] + i, rest);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) sums[r * COLS + c] = Op::dot(sums[r * COLS + c], a, b[c]);
        }
    }

    // Straight into `out` where nothing is stored past its end: to be read again, wider than it was
    // written, would stall.
    constexpr bool kWhole = ROWS * COLS % 4 == 0;
    float spare[kWhole ? 1 : (ROWS * COLS + 3) / 4 * 4];
    float* to = kWhole ? out : spare;
#pragma GCC unroll 8
    for (int i4 = 0; i4 < ROWS * COLS; i4 += 4) {
        const int last = ROWS * COLS - 1;
        sum4(sums[i4], sums[i4 + 1 < last ? i4 + 1 : last], sums[i4 + 2 < last ? i4 + 2 : last],
             sums[i4 + 3 < last ? i4 + 3 : last], to + i4);
    }
    if (!kWhole) std::memcpy(out, spare, sizeof(float) * ROWS * COLS);
}

// The same for a number of rows known at run time, at most kTileRows<T>.
template <typename T, int ROWS = kTileRows<T>>
KV_INLINE void dot_rows(int rows, const T* const* x, const T* const* w, int64_t k,
                        const T* const* next, float* out) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) return dot_rows<T, ROWS - 1>(rows, x, w, k, next, out);
    }
    dot_tile<T, ROWS, kTileCols>(x, w, k, next, out);
}

}  // namespace

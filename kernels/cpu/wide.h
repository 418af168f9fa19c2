// Quantised keys and values: their scales, and their entries as the products take them.
#pragma once

namespace {

// So many keys or values of one head stand widened at a time.
constexpr int64_t kWideKeys = 64;

// Rows of stored entries K as rows of T; every int8 is one in all dtypes.
template <typename T, typename K>
struct Wide {
    alignas(64) T rows[kWideKeys * kMaxHeadDim];
    const T* place[kSplit];  // of the keys that were widened, by their number in the split

    // Widens keys [begin, end), which lie at place[i] + offset.
    void widen(const K* const* from, int64_t offset, int64_t begin, int64_t end, int64_t head_dim) {
        T* to = rows;
        for (int64_t i = begin; i < end; ++i, to += head_dim) {
            const K* entries = from[i] + offset;
            for_lanes(head_dim, [&](int64_t d, int n) {
                store_some(to + d, load_some(entries + d, n), n);
            });
            place[i] = to;
        }
    }
};
// Nothing to widen.
template <typename T>
struct Wide<T, T> {};

// Scales of a split's keys and values for the heads of an item; 0 where no row sees the key.
template <typename K>
struct Scales {};
template <>
struct Scales<int8_t> {
    alignas(64) float key[kMaxRows][kSplit], value[kMaxRows][kSplit];
};

// The entries of a vector and their scale, as kernels/ops.py defines them.
KV_INLINE void quantise(const float* x, int64_t head_dim, int8_t* entries, float* scale) {
    const Vec zero = set1(0.0f), infinite = set1(kInfinity);
    Vec most = zero;
    for_lanes(head_dim, [&](int64_t i, int n) {
        const Vec a = load_some(x + i, n);
        const Vec size = max(a, zero - a);
        most = max(most, where_less(size, infinite, size, infinite));  // a NaN counts as infinite
    });
    const float amax = max_lane(most), step = amax / 127.0f;
    const bool is_finite = amax < kInfinity;
    if (!is_finite || step < std::numeric_limits<float>::min()) {
        *scale = is_finite ? 0.0f : std::numeric_limits<float>::quiet_NaN();
        std::memset(entries, 0, static_cast<size_t>(head_dim));
        return;
    }
    *scale = step;
    for_lanes(head_dim, [&](int64_t i, int n) {
        float rounded[16];
        store(rounded, round_even(load_some(x + i, n) / set1(step)));
        for (int lane = 0; lane < n; ++lane) entries[i + lane] = static_cast<int8_t>(rounded[lane]);
    });
}

}  // namespace

// Attention of few rows of a KV head (decode), which waits for memory: keys and values are streamed in
// the order in which they lie, page by page with all its heads. Where nothing is won by turning keys,
// many rows too, each KV head for itself.
#pragma once

namespace {

// A tile is 16 keys, or values, of one head. Tiles are read head by head, then the next 16 keys:
// that is how they lie. They are fetched this many tiles before they are needed (8 KiB of heads of
// 128 bfloat16), because pages lie anywhere, and the hardware can't guess where the next one is.
constexpr int64_t kAhead = 2;

template <typename T>
struct Tile {
    const T* const* place;
    int64_t first, end;  // the keys to be read, at most 16
    int64_t head_offset;

    KV_INLINE const T* at(int64_t i) const {
        return place[lesser(first + i, end - 1)] + head_offset;
    }
};

// The tile that is read kAhead tiles after the one of key `first` and head `head`.
template <typename T>
KV_INLINE Tile<T> following(const Block& block, const Places<T>& places, bool are_keys,
                            int64_t first, int64_t head) {
    const T* const* place = are_keys ? places.key : places.value;
    first = first / 16 * 16;
    for (head += kAhead; head >= block.num_kv_heads; head -= block.num_kv_heads) first += 16;
    if (first >= places.keys.end) {
        // Values follow the keys. What follows them is another item's, and not known here.
        first -= (places.keys.end + 15) / 16 * 16 - places.keys.begin / 16 * 16;
        if (!are_keys || first >= places.keys.end) first = places.keys.end - 1;
        place = places.value;
    }
    return {place, greater(first, places.keys.begin), places.keys.end, head * block.head_span};
}

// Fetches what a tile will need.
template <typename K>
KV_INLINE void fetch(const Tile<K>& tile, int64_t count, int64_t head_dim) {
    for (int64_t i = 0; i < count; ++i) {
        const K* entries = tile.at(i);
        for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(K))) {
            __builtin_prefetch(entries + d, 0, 2);
        }
    }
}

// scores[row][i] = query . key, for all rows and the keys of the split that any of them sees.
template <typename T, typename K>
void score(const Block& block, const Places<K>& places, Wide<T, K>& wide,
           float (*scores)[kSplit]) {
    constexpr bool kAreStored = std::is_same_v<T, K>;
    constexpr int kRows = kTileRows<T>;
    const Range keys = places.keys;
    const T* query[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) query[row] = query_of<T>(block, row);
    for (int64_t begin = keys.begin; begin < keys.end; begin = begin / 16 * 16 + 16) {
        const int64_t end = lesser(begin / 16 * 16 + 16, keys.end);
        for (int64_t h = 0; h < block.num_kv_heads; ++h) {
            const Tile<K> ahead = following(block, places, true, begin, h);
            const int64_t offset = h * block.head_span;
            if constexpr (!kAreStored) {
                fetch(ahead, end - begin, block.task.head_dim);
                wide.widen(places.key, offset, begin, end, block.task.head_dim);
            }
            const int64_t first_row = h * block.rows_per_kv;
            for (int64_t i = 0; i < end - begin; i += kTileCols) {
                const T *key[kTileCols], *next[kTileCols];
                for (int c = 0; c < kTileCols; ++c) {
                    const int64_t at = lesser(begin + i + c, end - 1);
                    if constexpr (kAreStored) {
                        key[c] = places.key[at] + offset;
                        next[c] = ahead.at(i + c);
                    } else {
                        key[c] = wide.place[at];
                    }
                }
                const int64_t cols = lesser(kTileCols, end - begin - i);
                for (int64_t r = 0; r < block.rows_per_kv; r += kRows) {
                    const int rows = static_cast<int>(lesser(kRows, block.rows_per_kv - r));
                    float out[kRows * kTileCols];
                    dot_rows<T>(rows, query + first_row + r, key, block.task.head_dim,
                                kAreStored && r == 0 ? next : nullptr, out);
                    for (int j = 0; j < rows; ++j) {
                        float* to = scores[first_row + r + j] + begin + i;
                        const float* from = out + j * kTileCols;
                        if (cols == kTileCols) {
                            std::memcpy(to, from, sizeof(float) * kTileCols);
                        } else {
                            for (int64_t c = 0; c < cols; ++c) to[c] = from[c];
                        }
                    }
                }
            }
        }
    }
}

// acc[row][32 * UNITS] += weights[row][i] * value[i], in the keys' order. Where a step takes two
// keys, one that lies outside counts nothing. `last` elements of the last unit exist.
template <typename T, int ROWS, int UNITS>
KV_INLINE void add_values(Range keys, const T* const* place, int64_t offset, int last,
                          const Tile<T>* ahead, const typename Values<T>::Weight* const* weights,
                          float* const* acc) {
    using V = Values<T>;
    alignas(64) static const T zeros[32 * UNITS] = {};
    Vec sums[ROWS][2 * UNITS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < 2 * UNITS; ++c) sums[r][c] = load(acc[r] + 16 * c);
    }
    const int64_t begin = keys.begin / V::kKeys * V::kKeys;
    for (int64_t i = begin; i < keys.end; i += V::kKeys) {
        V values[UNITS];
#pragma GCC unroll 8
        for (int u = 0; u < UNITS; ++u) {
            const T* value[V::kKeys];
#pragma GCC unroll 2
            for (int k = 0; k < V::kKeys; ++k) {
                const bool is_visible = i + k >= keys.begin && i + k < keys.end;
                value[k] = is_visible ? place[i + k] + offset + 32 * u : zeros + 32 * u;
            }
            values[u] = UNITS == 1 && last < 32 ? V::load_n(value, last) : V::load(value);
        }
        if (ahead) {
#pragma GCC unroll 2
            for (int k = 0; k < V::kKeys; ++k) {
                const T* next = ahead->at(i + k - begin);
#pragma GCC unroll 8
                for (size_t at = 0; at < 32 * UNITS; at += 64 / sizeof(T)) {
                    __builtin_prefetch(next + at, 0, 2);
                }
            }
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const auto w = V::weight(weights[r] + i);
#pragma GCC unroll 8
            for (int c = 0; c < 2 * UNITS; ++c) {
                sums[r][c] = values[c / 2].add(sums[r][c], w, c % 2);
            }
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < 2 * UNITS; ++c) store(acc[r] + 16 * c, sums[r][c]);
    }
}

// The same over the whole head, for a number of rows known at run time.
template <typename T, int ROWS = kValueRows>
KV_INLINE void add_head(int rows, Range keys, const T* const* place, int64_t offset,
                        int64_t head_dim, const Tile<T>* ahead,
                        const typename Values<T>::Weight* const* weights, float* const* acc) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            return add_head<T, ROWS - 1>(rows, keys, place, offset, head_dim, ahead, weights, acc);
        }
    }
    constexpr int kUnits = value_units(ROWS);
    int64_t d = 0;
    float* at[ROWS];
    Tile<T> tile{};
    if (ahead) tile = *ahead;
    for (; d + 32 * kUnits <= head_dim; d += 32 * kUnits) {
        for (int r = 0; r < ROWS; ++r) at[r] = acc[r] + d;
        add_values<T, ROWS, kUnits>(keys, place, offset + d, 32, ahead ? &tile : nullptr, weights,
                                    at);
        tile.head_offset += 32 * kUnits;
    }
    for (; d < head_dim; d += 32) {
        for (int r = 0; r < ROWS; ++r) at[r] = acc[r] + d;
        const int last = static_cast<int>(lesser(32, head_dim - d));
        add_values<T, ROWS, 1>(keys, place, offset + d, last, ahead ? &tile : nullptr, weights, at);
        tile.head_offset += 32;
    }
}

// One tile of rows: the keys that all of them see together, the others row by row.
// Each row still adds its keys in ascending order, and the keys of one step in one step.
template <typename T>
KV_INLINE void weigh_rows(int rows, const Range* visible, const T* const* place, int64_t offset,
                          int64_t head_dim, const Tile<T>* ahead,
                          const typename Values<T>::Weight* const* weights, float* const* acc) {
    constexpr int64_t kKeys = Values<T>::kKeys;
    Range all = visible[0];
    bool are_equal = true;
    for (int r = 1; r < rows; ++r) {
        are_equal &= visible[r].begin == all.begin && visible[r].end == all.end;
        all = common(all, visible[r]);
    }
    if (!are_equal) all = {(all.begin + kKeys - 1) / kKeys * kKeys, all.end / kKeys * kKeys};
    if (all.empty()) all = {visible[0].begin, visible[0].begin};
    const auto alone = [&](int r, Range keys) {
        if (keys.empty()) return;
        add_head<T>(1, keys, place, offset, head_dim, nullptr, weights + r, acc + r);
    };
    if (all.empty()) {
        for (int r = 0; r < rows; ++r) alone(r, visible[r]);
        return;
    }
    for (int r = 0; r < rows; ++r) alone(r, {visible[r].begin, all.begin});
    add_head<T>(rows, all, place, offset, head_dim, ahead, weights, acc);
    for (int r = 0; r < rows; ++r) alone(r, {all.end, visible[r].end});
}

// values[row] = the sum of the visible values, weighted. `step` keys of all heads at a time.
template <typename T, typename K>
void weigh(const Block& block, const Range* visible, const Places<K>& places, Wide<T, K>& wide,
           int64_t step, const typename Values<T>::Weight (*weights)[kSplit], float* values) {
    constexpr bool kAreStored = std::is_same_v<T, K>;
    if (!kAreStored) step = lesser(step, kWideKeys);
    const Range keys = places.keys;
    for (int64_t begin = keys.begin; begin < keys.end; begin = (begin / step + 1) * step) {
        const Range some{begin, lesser((begin / step + 1) * step, keys.end)};
        for (int64_t h = 0; h < block.num_kv_heads; ++h) {
            const Tile<K> ahead = following(block, places, false, begin, h);
            const T* const* place;
            const Tile<T>* next = nullptr;
            int64_t offset = h * block.head_span;
            if constexpr (kAreStored) {
                place = places.value;
                if (step == 16) next = &ahead;
            } else {
                if (step == 16) fetch(ahead, some.size(), block.task.head_dim);
                wide.widen(places.value, offset, some.begin, some.end, block.task.head_dim);
                place = wide.place;
                offset = 0;
            }
            for (int64_t r = 0; r < block.rows_per_kv; r += kValueRows) {
                const int rows = static_cast<int>(lesser(kValueRows, block.rows_per_kv - r));
                const int64_t first = h * block.rows_per_kv + r;
                const typename Values<T>::Weight* of[kValueRows];
                float* acc[kValueRows];
                Range seen[kValueRows] = {};
                for (int j = 0; j < rows; ++j) {
                    of[j] = weights[first + j];
                    acc[j] = values + (first + j) * block.width;
                    seen[j] = common(visible[first + j], some);
                }
                weigh_rows<T>(rows, seen, place, offset, block.task.head_dim,
                              r == 0 ? next : nullptr, of, acc);
            }
        }
    }
}

template <typename T, typename K>
struct alignas(64) Workspace {
    float scores[kMaxRows][kSplit];
    alignas(64) typename Values<T>::Weight weights[kMaxRows][kSplit];
    alignas(64) float values[kMaxRows * kMaxHeadDim];  // [num_rows][width]
    Places<K> places;
    Wide<T, K> wide;
    Scales<K> scales;
};

// One split of all rows of a block: fills gathered[row] and workspace.values.
template <typename T, typename K>
void attend_split(const Block& block, int64_t split, Workspace<T, K>& space, Gathered* gathered) {
    constexpr bool kIsScaled = !std::is_same_v<T, K>;
    Range visible[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) {
        visible[row] = block.visible(row, split);
        gathered[row] = {-kInfinity, 0.0f};
    }
    const Range all = any_of(visible, block.num_rows);
    std::memset(space.values, 0, sizeof(float) * static_cast<size_t>(block.num_rows * block.width));
    if (all.empty()) return;
    space.places.locate(block, split, all);
    score<T>(block, space.places, space.wide, space.scores);
    if constexpr (kIsScaled) locate(block, split, all, &space.scales);
    for (int64_t row = 0; row < block.num_rows; ++row) {
        if (visible[row].empty()) continue;
        const float *key_scales = nullptr, *value_scales = nullptr;
        if constexpr (kIsScaled) {
            key_scales = space.scales.key[row / block.rows_per_kv];
            value_scales = space.scales.value[row / block.rows_per_kv];
        }
        float* scores = space.scores[row];
        const float top = scale_scores<kIsScaled>(block.task, visible[row], key_scales, scores);
        gathered[row] = {top, soften<kIsScaled>(visible[row], scores, top, value_scales,
                                                space.weights[row])};
    }
    const int64_t step = block.rows_per_kv >= kManyRows ? kSplit : 16;
    weigh<T>(block, visible, space.places, space.wide, step, space.weights, space.values);
}

template <typename T, typename K>
void attend_few(const Block& block) {
    const AttentionItem& item = block.item;
    Workspace<T, K> space;
    Gathered found[kMaxRows];
    alignas(64) float gathered_values[kMaxRows * kMaxHeadDim];
    Gathered gathered[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) gathered[row] = {-kInfinity, 0.0f};
    for (int64_t s = 0; s < item.num_splits; ++s) {
        attend_split(block, item.first_split + s, space, found);
        for (int64_t row = 0; row < block.num_rows; ++row) {
            const float* values = space.values + row * block.width;
            if (item.is_apart) {
                keep_apart(block, row, item.first_split + s, found[row], values);
            } else {
                merge(&gathered[row], gathered_values + row * block.width, found[row], values,
                      block.width);
            }
        }
    }
    if (item.is_apart) return;
    for (int64_t row = 0; row < block.num_rows; ++row) {
        finish<T>(block, row, gathered[row], gathered_values + row * block.width);
    }
}

}  // namespace

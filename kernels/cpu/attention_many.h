// Attention of many rows of one KV head (prompts, and decoding sequences that share a split), which
// waits for the multipliers: the keys and values of a split are turned once for all rows of the item,
// and then multiplied by some rows at a time. The bits of every row are those of attention_few.h.
#pragma once

namespace {

template <typename T, typename K>
struct alignas(64) ManyRows {
    T queries[kItemNumbers];                          // [row][width], zeros behind the head
    alignas(64) float gathered_values[kItemNumbers];  // [row][width]
    Gathered gathered[kItemRows];
    Range visible[kItemRows];
    Turned<T> turned;
    // Of the rows that are multiplied at a time.
    // Were rows a power of two apart, they would crowd into few sets of the cache.
    alignas(64) float scores[kBlockRows][kSplit + 32];
    alignas(64) typename Values<T>::Weight weights[kBlockRows][kSplit];
    alignas(64) float values[kBlockRows * kMaxHeadDim];
    Places<K> places;
    Wide<T, K> wide;
    Scales<K> scales;
};

// Turns the keys and values of a split that any row sees.
template <typename T, typename K>
void turn(const Block& block, ManyRows<T, K>& space) {
    alignas(64) static const T zeros[kMaxHeadDim] = {};
    const Range keys = space.places.keys;
    const int64_t head_dim = block.task.head_dim;
    for (int64_t begin = keys.begin / 16 * 16; begin < keys.end; begin += 16) {
        const Range tile = common(keys, {begin, begin + 16});
        const auto entries = [&](const K* const* place, const T** entry) {
            const T* const* at;
            if constexpr (std::is_same_v<T, K>) {
                at = place;
            } else {
                space.wide.widen(place, 0, tile.begin, tile.end, head_dim);
                at = space.wide.place;
            }
            for (int64_t i = 0; i < 16; ++i) {
                const bool is_there = begin + i >= tile.begin && begin + i < tile.end;
                entry[i] = is_there ? at[begin + i] : zeros;
            }
        };
        for (int64_t i = begin + 16; i < lesser(begin + 32, keys.end); ++i) {
            for (int64_t d = 0; d < head_dim; d += 64 / static_cast<int64_t>(sizeof(K))) {
                __builtin_prefetch(space.places.key[i] + d, 0, 3);
                __builtin_prefetch(space.places.value[i] + d, 0, 3);
            }
        }
        const T* entry[16];
        entries(space.places.key, entry);
        space.turned.set_keys(begin / 16, entry, head_dim);
        entries(space.places.value, entry);
        space.turned.set_values(begin / 16, entry, head_dim);
    }
}

// The scores of some rows from `first_row` of the item on.
template <typename T, typename K>
void score_many(const Block& block, int64_t first_row, int64_t num_rows, ManyRows<T, K>& space) {
    using Keys = Turned<T>;
    const Range* visible = space.visible + first_row;
    const Range all = any_of(visible, num_rows);
    for (int64_t tile = all.begin / 16; 16 * tile < all.end; tile += Keys::kTiles) {
        for (int64_t r = 0; r < num_rows; r += Keys::kRows) {
            const int rows = static_cast<int>(lesser(Keys::kRows, num_rows - r));
            const Range seen = common(any_of(visible + r, rows),
                                      {16 * tile, 16 * (tile + Keys::kTiles)});
            if (seen.empty()) continue;
            const T* query[Keys::kRows];
            float* out[Keys::kRows];
            for (int j = 0; j < rows; ++j) {
                query[j] = space.queries + (first_row + r + j) * block.width;
                out[j] = space.scores[r + j] + 16 * tile;
            }
            const int tiles = seen.end > 16 * (tile + 1) ? Keys::kTiles : 1;
            space.turned.dots(rows, tiles, query, tile, out);
        }
    }
}

// values[row] += the visible values, weighted, for a few rows: the pairs of keys that all of them see
// together, the others row by row. Each row still adds its keys in ascending order.
template <typename T>
void weigh_some(int rows, const Range* visible, const Turned<T>& turned,
                const typename Values<T>::Weight* const* weights, float* const* acc) {
    Range pairs[kValueRows], together{0, kSplit / 2};
    for (int r = 0; r < rows; ++r) {
        pairs[r] = {(visible[r].begin + 1) / 2, visible[r].end / 2};
        together = common(together, pairs[r]);
    }
    const auto alone = [&](int r, Range some) {
        if (!some.empty()) turned.template add<1>(1, some, weights + r, acc + r);
    };
    for (int r = 0; r < rows; ++r) {
        const Range keys = visible[r];
        if (keys.empty()) continue;
        if (keys.begin % 2) turned.add_key(keys.begin, weights[r], acc[r]);
        alone(r, {pairs[r].begin, together.empty() ? pairs[r].end : together.begin});
    }
    if (!together.empty()) turned.template add<kValueRows>(rows, together, weights, acc);
    for (int r = 0; r < rows; ++r) {
        const Range keys = visible[r];
        if (keys.empty()) continue;
        if (!together.empty()) alone(r, {together.end, pairs[r].end});
        if (keys.end % 2) turned.add_key(keys.end - 1, weights[r], acc[r]);
    }
}

// One split of some rows, gathered.
template <typename T, typename K>
void attend_rows(const Block& block, int64_t first_row, int64_t num_rows, ManyRows<T, K>& space) {
    constexpr bool kIsScaled = !std::is_same_v<T, K>;
    const Range* visible = space.visible + first_row;
    score_many(block, first_row, num_rows, space);
    const float *key_scales = nullptr, *value_scales = nullptr;
    if constexpr (kIsScaled) {
        key_scales = space.scales.key[0];
        value_scales = space.scales.value[0];
    }
    Gathered found[kBlockRows];
    // First all maxima, then all weights: no row waits for what was just begun.
    for (int64_t r = 0; r < num_rows; ++r) {
        found[r] = {-kInfinity, 0.0f};
        const Range seen = visible[r];
        if (seen.empty()) continue;
        found[r].top = scale_scores<kIsScaled>(block.task, seen, key_scales, space.scores[r]);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        if (visible[r].empty()) continue;
        found[r].sum = soften<kIsScaled>(visible[r], space.scores[r], found[r].top, value_scales,
                                         space.weights[r]);
    }
    const size_t bytes = sizeof(float) * static_cast<size_t>(num_rows * block.width);
    std::memset(space.values, 0, bytes);
    for (int64_t r = 0; r < num_rows; r += kValueRows) {
        const int rows = static_cast<int>(lesser(kValueRows, num_rows - r));
        const typename Values<T>::Weight* weights[kValueRows];
        float* acc[kValueRows];
        for (int j = 0; j < rows; ++j) {
            weights[j] = space.weights[r + j];
            acc[j] = space.values + (r + j) * block.width;
        }
        weigh_some<T>(rows, visible + r, space.turned, weights, acc);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        merge(&space.gathered[first_row + r],
              space.gathered_values + (first_row + r) * block.width, found[r],
              space.values + r * block.width, block.width);
    }
}

// Not inlined: what takes few rows needs none of this room.
template <typename T, typename K>
__attribute__((noinline)) void attend_many(const Block& block) {
    const AttentionTask& task = block.task;
    const AttentionItem& item = block.item;
    ManyRows<T, K> space;
    space.turned.width = block.width;
    for (int64_t row = 0; row < block.num_rows; ++row) {
        T* to = space.queries + row * block.width;
        const size_t bytes = sizeof(T) * static_cast<size_t>(task.head_dim);
        std::memset(static_cast<void*>(to), 0, sizeof(T) * static_cast<size_t>(block.width));
        std::memcpy(to, query_of<T>(block, row), bytes);
        space.gathered[row] = {-kInfinity, 0.0f};
    }
    for (int64_t s = 0; s < item.num_splits; ++s) {
        const int64_t split = item.first_split + s;
        for (int64_t row = 0; row < block.num_rows; ++row) {
            space.visible[row] = block.visible(row, split);
        }
        const Range all = any_of(space.visible, block.num_rows);
        if (all.empty()) continue;
        space.places.locate(block, split, all);
        if constexpr (!std::is_same_v<T, K>) locate(block, split, all, &space.scales);
        turn(block, space);
        for (int64_t row = 0; row < block.num_rows; row += kBlockRows) {
            attend_rows(block, row, lesser(kBlockRows, block.num_rows - row), space);
        }
    }
    for (int64_t row = 0; row < block.num_rows; ++row) {
        const float* values = space.gathered_values + row * block.width;
        if (item.is_apart) {
            keep_apart(block, row, item.first_split, space.gathered[row], values);
        } else {
            finish<T>(block, row, space.gathered[row], values);
        }
    }
}

}  // namespace

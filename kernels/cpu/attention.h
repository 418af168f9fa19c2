// Paged attention of one block of queries.
//
// A row is one (query, head). For each split of 256 keys at absolute positions: scores of all its
// visible keys, their maximum, exp, sum over 16 lanes by absolute position, and the weighted values
// added in the keys' order. Splits are merged in order. All of that is fixed by the row's position
// alone: other rows of the block, where its pages lie and which thread computes change no bit, and
// a key that the row doesn't see is never touched by arithmetic (0 * NaN is NaN).
//
// Few rows of a KV head (decode) wait for memory: keys and values are streamed in the order in which
// they lie, page by page with all its heads. Many rows (prefill) wait for the multipliers: one head
// at a time, the keys turned so that no score needs a sum across lanes. Both give the same bits.
#pragma once

namespace {

struct Range {
    int64_t begin, end;

    bool empty() const { return begin >= end; }
    int64_t size() const { return end - begin; }
};
KV_INLINE Range common(Range a, Range b) {
    return {greater(a.begin, b.begin), lesser(a.end, b.end)};
}

// The rows of an item and what each sees.
struct Block {
    const AttentionTask& task;
    const AttentionItem& item;
    int64_t group;
    int64_t heads_per_kv;  // of this item
    int64_t rows_per_kv, num_rows;
    int64_t num_kv_heads;  // of this item
    int64_t head_span;     // from a head to the next in a page
    int64_t width;         // of a row's sums

    Block(const AttentionTask& t, const AttentionItem& i) : task(t), item(i) {
        group = t.num_heads / t.num_kv_heads;
        heads_per_kv = i.group_end - i.group_begin;
        rows_per_kv = i.num_queries * heads_per_kv;
        num_kv_heads = i.kv_head_end - i.kv_head_begin;
        num_rows = rows_per_kv * num_kv_heads;
        head_span = t.page_size * t.head_dim;
        width = padded_head(t.head_dim);
    }
    // Rows of one KV head: query by query, its heads side by side.
    const AttentionQuery& query_of(int64_t row) const {
        return task.queries[item.first_query + row % rows_per_kv / heads_per_kv];
    }
    int64_t head_of(int64_t row) const {
        return (item.kv_head_begin + row / rows_per_kv) * group + item.group_begin +
               row % heads_per_kv;
    }
    // Offset of a row of `out` in heads.
    int64_t out_at(int64_t row) const {
        return query_of(row).token * task.num_heads + head_of(row);
    }
    // Max, sum and weighted values of a row and a split.
    float* partial(int64_t row, int64_t split) const {
        const AttentionQuery& query = query_of(row);
        const int64_t at = head_of(row) * query.num_splits + split - query.first_split;
        return task.partials + query.partials + at * partial_floats(task.head_dim);
    }
    // The keys of a split that a row sees, counted from the split's first.
    Range visible(int64_t row, int64_t split) const {
        const int64_t position = query_of(row).position;
        const int64_t first = task.window ? greater(0, position - task.window + 1) : 0;
        const Range keys = common({first, position + 1}, {split * kSplit, (split + 1) * kSplit});
        if (keys.empty()) return {0, 0};
        return {keys.begin - split * kSplit, keys.end - split * kSplit};
    }
};

// Where the keys and values of a split, stored as K, lie in the first head of the item.
template <typename K>
struct Places {
    Range keys;  // that any row sees
    const K *key[kSplit], *value[kSplit];

    void locate(const Block& block, int64_t split, Range all) {
        const AttentionTask& task = block.task;
        const int32_t* table = block.item.page_table;
        const int64_t head = block.item.kv_head_begin * block.head_span;
        int64_t page = (split * kSplit + all.begin) / task.page_size;
        int64_t offset = (split * kSplit + all.begin) % task.page_size;
        keys = all;
        for (int64_t i = all.begin; i < all.end; ++page, offset = 0) {
            const K* k = static_cast<const K*>(task.key_pages) +
                         table[page] * task.key_page_stride + head;
            const K* v = static_cast<const K*>(task.value_pages) +
                         table[page] * task.value_page_stride + head;
            for (; offset < task.page_size && i < all.end; ++offset, ++i) {
                key[i] = k + offset * task.head_dim;
                value[i] = v + offset * task.head_dim;
            }
        }
    }
};

// Fills the scales of the keys, and 0 up to whole vectors.
inline void locate(const Block& block, int64_t split, Range keys, Scales<int8_t>* scales) {
    const AttentionTask& task = block.task;
    const int32_t* table = block.item.page_table;
    const int64_t first = keys.begin / 16 * 16, end = (keys.end + 15) / 16 * 16;
    for (int64_t h = 0; h < block.num_kv_heads; ++h) {
        std::memset(scales->key[h] + first, 0, sizeof(float) * static_cast<size_t>(end - first));
        std::memset(scales->value[h] + first, 0, sizeof(float) * static_cast<size_t>(end - first));
        const int64_t head = (block.item.kv_head_begin + h) * task.page_size;
        int64_t page = (split * kSplit + keys.begin) / task.page_size;
        int64_t offset = (split * kSplit + keys.begin) % task.page_size;
        for (int64_t i = keys.begin; i < keys.end; ++page, offset = 0) {
            const int64_t count = lesser(task.page_size - offset, keys.end - i);
            const int64_t at = table[page] * task.scale_page_stride + head + offset;
            const size_t bytes = sizeof(float) * static_cast<size_t>(count);
            std::memcpy(scales->key[h] + i, task.key_scales + at, bytes);
            std::memcpy(scales->value[h] + i, task.value_scales + at, bytes);
            i += count;
        }
    }
}

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

template <typename T>
const T* query_of(const Block& block, int64_t row) {
    const AttentionTask& task = block.task;
    return static_cast<const T*>(task.query) + block.query_of(row).token * task.query_stride +
           block.head_of(row) * task.head_dim;
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

// The same with turned keys.
template <typename T, typename K>
void score_turned(const Block& block, const Range* visible, const Places<K>& places,
                  Wide<T, K>& wide, float (*scores)[kSplit]) {
    using Keys = Turned<T>;
    alignas(64) T queries[kMaxRows * kMaxHeadDim];
    alignas(64) typename Keys::Word turned[kMaxHeadDim][16];
    const T* query[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) {
        T* to = queries + row * block.width;
        const size_t bytes = sizeof(T) * static_cast<size_t>(block.task.head_dim);
        std::memset(static_cast<void*>(to), 0, sizeof(T) * static_cast<size_t>(block.width));
        std::memcpy(to, query_of<T>(block, row), bytes);
        query[row] = to;
    }
    for (int64_t h = 0; h < block.num_kv_heads; ++h) {
        for (int64_t begin = places.keys.begin / 16 * 16; begin < places.keys.end; begin += 16) {
            const T* key[16];
            const Range tile = common(places.keys, {begin, begin + 16});
            const int64_t offset = h * block.head_span;
            if constexpr (!std::is_same_v<T, K>) {
                wide.widen(places.key, offset, tile.begin, tile.end, block.task.head_dim);
            }
            for (int64_t i = 0; i < 16; ++i) {
                key[i] = nullptr;
                if (begin + i < tile.begin || begin + i >= tile.end) continue;
                if constexpr (std::is_same_v<T, K>) {
                    key[i] = places.key[begin + i] + offset;
                } else {
                    key[i] = wide.place[begin + i];
                }
            }
            Keys::turn(key, block.task.head_dim, turned);
            const int64_t end = (h + 1) * block.rows_per_kv;
            for (int64_t r = h * block.rows_per_kv; r < end; r += Keys::kRows) {
                const int rows = static_cast<int>(lesser(Keys::kRows, end - r));
                float* out[Keys::kRows];
                bool is_seen = false;
                for (int j = 0; j < rows; ++j) {
                    out[j] = scores[r + j] + begin;
                    is_seen |= !common(visible[r + j], {begin, begin + 16}).empty();
                }
                if (is_seen) Keys::dots(rows, query + r, turned, block.width, out);
            }
        }
    }
}

// Scores to weights relative to the largest; zero for keys of the row's first and last 16 that it
// doesn't see. The scales of quantised keys go to the scores, those of values to the weights after
// these were summed; null: none.
template <bool SCALED, typename Weight>
KV_INLINE void soften(const AttentionTask& task, Range keys, const float* key_scales,
                      const float* value_scales, float* scores, Weight* weights, float* top,
                      float* sum) {
    const Vec scale = set1(task.scale), cap = set1(task.soft_cap);
    const Vec lanes = iota();
    const int64_t first_step = keys.begin / 16 * 16;
    Vec m = set1(-kInfinity);
    for (int64_t i = first_step; i < keys.end; i += 16) {
        Vec s = load(scores + i) * scale;
        if constexpr (SCALED) s = s * load(key_scales + i);
        if (task.soft_cap > 0) s = cap * tanh(s / cap);
        if (i < keys.begin) {
            s = where_less(lanes, set1(static_cast<float>(keys.begin - i)), set1(-kInfinity), s);
        }
        if (i + 16 > keys.end) {
            s = where_less(lanes, set1(static_cast<float>(keys.end - i)), s, set1(-kInfinity));
        }
        store(scores + i, s);
        m = max(s, m);
    }
    *top = max_lane(m);
    Vec sums = set1(0.0f);
    for (int64_t i = first_step; i < keys.end; i += 16) {
        const Vec p = exp(load(scores + i) - set1(*top));
        if constexpr (SCALED) {
            sums = sums + p;
            Vec scaled = p * load(value_scales + i);
            if (i < keys.begin) {
                const Vec before = set1(static_cast<float>(keys.begin - i));
                scaled = where_less(lanes, before, set1(0.0f), scaled);
            }
            if (i + 16 > keys.end) {
                const Vec before = set1(static_cast<float>(keys.end - i));
                scaled = where_less(lanes, before, scaled, set1(0.0f));
            }
            keep_weights(weights + i, scaled);
        } else {
            sums = sums + keep_weights(weights + i, p);
        }
    }
    *sum = sum_of(sums);
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

// Units side by side for so many rows: few rows leave registers for more of the head.
constexpr int value_units(int rows) { return 2 * rows <= kValueRows ? 2 * kValueUnits : kValueUnits; }

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

// What a row has gathered: values weighted by exp(score - top), and the weights' sum.
// sum == 0: nothing yet (else the largest score alone contributes 1).
struct Gathered {
    float top, sum;
};

KV_INLINE void merge(Gathered* into, float* into_values, Gathered from, const float* from_values,
                     int64_t width) {
    if (from.sum == 0) return;
    if (into->sum == 0) {
        *into = from;
        std::memcpy(into_values, from_values, sizeof(float) * static_cast<size_t>(width));
        return;
    }
    const float top = into->top > from.top ? into->top : from.top;
    const float a = exp(into->top - top), b = exp(from.top - top);
    into->top = top;
    into->sum = into->sum * a + from.sum * b;
    for (int64_t i = 0; i < width; i += 16) {
        const Vec old = load(into_values + i) * set1(a);
        store(into_values + i, fma(load(from_values + i), set1(b), old));
    }
}

template <typename T>
void finish(const Block& block, int64_t row, Gathered gathered, const float* values) {
    const AttentionTask& task = block.task;
    T* out = static_cast<T*>(task.out) + block.out_at(row) * task.head_dim;
    float scale = gathered.sum == 0 ? 0.0f : 1.0f / gathered.sum;
    if (task.sinks && gathered.sum != 0) {
        // The sink takes its share of the weight, once, after all keys.
        const float sink = task.sinks[block.head_of(row)];
        const float top = gathered.top > sink ? gathered.top : sink;
        const float kept = exp(gathered.top - top);
        gathered = {top, gathered.sum * kept + exp(sink - top)};
        scale = kept / gathered.sum;
    }
    if (task.lse) {
        const bool is_empty = gathered.sum == 0;
        task.lse[block.out_at(row)] =
            is_empty ? -kInfinity : gathered.top + std::log(gathered.sum);
    }
    for (int64_t i = 0; i < task.head_dim; i += 32) {
        const Vec a = load(values + i) * set1(scale), b = load(values + i + 16) * set1(scale);
        if (i + 32 <= task.head_dim) {
            Values<T>::store(out + i, a, b);
        } else {
            T some[32];
            Values<T>::store(some, a, b);
            std::memcpy(out + i, some, sizeof(T) * static_cast<size_t>(task.head_dim - i));
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
    Range visible[kMaxRows], all{kSplit, 0};
    for (int64_t row = 0; row < block.num_rows; ++row) {
        visible[row] = block.visible(row, split);
        gathered[row] = {-kInfinity, 0.0f};
        if (visible[row].empty()) continue;
        all.begin = lesser(all.begin, visible[row].begin);
        all.end = greater(all.end, visible[row].end);
    }
    std::memset(space.values, 0, sizeof(float) * static_cast<size_t>(block.num_rows * block.width));
    if (all.empty()) return;
    const bool are_many = block.rows_per_kv >= kManyRows;
    space.places.locate(block, split, all);
    if constexpr (Turned<T>::kIs) {
        if (are_many) score_turned<T>(block, visible, space.places, space.wide, space.scores);
    }
    if (!Turned<T>::kIs || !are_many) score<T>(block, space.places, space.wide, space.scores);
    if constexpr (kIsScaled) locate(block, split, all, &space.scales);
    for (int64_t row = 0; row < block.num_rows; ++row) {
        if (visible[row].empty()) continue;
        const float *key_scales = nullptr, *value_scales = nullptr;
        if constexpr (kIsScaled) {
            key_scales = space.scales.key[row / block.rows_per_kv];
            value_scales = space.scales.value[row / block.rows_per_kv];
        }
        soften<kIsScaled>(block.task, visible[row], key_scales, value_scales, space.scores[row],
                          space.weights[row], &gathered[row].top, &gathered[row].sum);
    }
    weigh<T>(block, visible, space.places, space.wide, are_many ? kSplit : 16, space.weights,
             space.values);
}

// Queries of T, pages of K: the same, or int8 with scales.
template <typename T, typename K>
void attend(const AttentionTask& task, const AttentionItem& item) {
    const Block block(task, item);
    Workspace<T, K> space;
    Gathered gathered[kMaxRows];
    if (item.is_apart) {
        attend_split(block, item.first_split, space, gathered);
        for (int64_t row = 0; row < block.num_rows; ++row) {
            float* to = block.partial(row, item.first_split);
            to[0] = gathered[row].top;
            to[1] = gathered[row].sum;
            std::memcpy(to + 2, space.values + row * block.width,
                        sizeof(float) * static_cast<size_t>(block.width));
        }
        return;
    }
    alignas(64) float merged_values[kMaxRows * kMaxHeadDim];
    Gathered merged[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) merged[row] = {-kInfinity, 0.0f};
    for (int64_t s = 0; s < item.num_splits; ++s) {
        attend_split(block, item.first_split + s, space, gathered);
        for (int64_t row = 0; row < block.num_rows; ++row) {
            merge(&merged[row], merged_values + row * block.width, gathered[row],
                  space.values + row * block.width, block.width);
        }
    }
    for (int64_t row = 0; row < block.num_rows; ++row) {
        finish<T>(block, row, merged[row], merged_values + row * block.width);
    }
}

template <typename T>
void merge_splits(const AttentionTask& task, const AttentionItem& item) {
    const Block block(task, item);
    alignas(64) float values[kMaxHeadDim];
    for (int64_t row = 0; row < block.num_rows; ++row) {
        const AttentionQuery& query = block.query_of(row);
        Gathered merged{-kInfinity, 0.0f};
        for (int64_t s = 0; s < query.num_splits; ++s) {
            const float* from = block.partial(row, query.first_split + s);
            merge(&merged, values, {from[0], from[1]}, from + 2, block.width);
        }
        finish<T>(block, row, merged, values);
    }
}

// A row is one head of one query.
template <typename T>
void merge_states(const MergeTask& task, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const T* a = static_cast<const T*>(task.a) + row * task.width;
        const T* b = static_cast<const T*>(task.b) + row * task.width;
        T* out = static_cast<T*>(task.out) + row * task.width;
        const float a_lse = task.a_lse[row], b_lse = task.b_lse[row];
        if (a_lse == -kInfinity || b_lse == -kInfinity) {
            const bool is_a = b_lse == -kInfinity;
            task.lse[row] = is_a ? a_lse : b_lse;
            const size_t bytes = sizeof(T) * static_cast<size_t>(task.width);
            if (task.lse[row] == -kInfinity) {
                std::memset(out, 0, bytes);
            } else {
                std::memcpy(out, is_a ? a : b, bytes);
            }
            continue;
        }
        const float top = a_lse > b_lse ? a_lse : b_lse;
        const float a_weight = exp(a_lse - top), b_weight = exp(b_lse - top);
        const float sum = a_weight + b_weight;
        task.lse[row] = top + std::log(sum);
        const Vec a_share = set1(a_weight / sum), b_share = set1(b_weight / sum);
        for_lanes(task.width, [&](int64_t i, int n) {
            store_some(out + i, load_some(a + i, n) * a_share + load_some(b + i, n) * b_share, n);
        });
    }
}

}  // namespace

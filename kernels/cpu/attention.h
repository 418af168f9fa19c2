// Paged attention of one block of queries.
//
// A row is one (query, head). For each split of 256 keys at absolute positions: scores of all its
// visible keys, their maximum, exp, sum over 16 lanes by absolute position, and the weighted values
// added key by key. Splits are merged in order. All of that is fixed by the row's position alone:
// other rows of the block, where its pages lie and which thread computes change no bit, and a key
// that the row doesn't see is never touched by arithmetic (0 * NaN is NaN).
#pragma once

namespace {

struct Range {
    int64_t begin, end;
};

// Keys and values are fetched so many tokens before they are needed: pages lie anywhere, and the
// hardware can't guess where the next one is.
constexpr int64_t kAhead = 16;

// The rows of an item and what each sees.
struct Block {
    const AttentionTask& task;
    const AttentionItem& item;
    int64_t group, first_position;  // of the sequence's first query of this step
    int64_t heads_per_kv;           // of this item
    int64_t num_queries, rows_per_kv, num_rows;

    Block(const AttentionTask& t, const AttentionItem& i) : task(t), item(i) {
        const int32_t* starts = t.query_starts + i.seq;
        group = t.num_heads / t.num_kv_heads;
        first_position = t.seq_lens[i.seq] - (starts[1] - starts[0]);
        heads_per_kv = i.group_end - i.group_begin;
        num_queries = i.query_end - i.query_begin;
        rows_per_kv = num_queries * heads_per_kv;
        num_rows = rows_per_kv * (i.kv_head_end - i.kv_head_begin);
    }
    // Rows of one KV head: query by query, its heads side by side.
    int64_t query_of(int64_t row) const {
        return item.query_begin + row % rows_per_kv / heads_per_kv;
    }
    // Offset of a row of `query` and `out` in heads, from the step's first token.
    int64_t token_of(int64_t row) const { return task.query_starts[item.seq] + query_of(row); }
    int64_t head_of(int64_t row) const {
        return (item.kv_head_begin + row / rows_per_kv) * group + item.group_begin +
               row % heads_per_kv;
    }
    Range visible(int64_t query) const {
        const int64_t position = first_position + query;
        return {task.window ? greater(0, position - task.window + 1) : 0, position + 1};
    }
    static Range within(Range keys, int64_t split) {
        return {greater(keys.begin, split * kSplit) - split * kSplit,
                lesser(keys.end, (split + 1) * kSplit) - split * kSplit};
    }
};

// Where each key or value of a split lies, but for its head.
template <typename T>
void locate(const AttentionTask& task, const AttentionItem& item, const void* pages,
            int64_t page_stride, int64_t split, Range keys, const T** places) {
    const int32_t* table = task.page_tables + item.seq * task.table_stride;
    int64_t position = split * kSplit + keys.begin;
    int64_t page = position / task.page_size, offset = position % task.page_size;
    for (int64_t i = keys.begin; i < keys.end; ++page, offset = 0) {
        const T* base = static_cast<const T*>(pages) + table[page] * page_stride;
        for (; offset < task.page_size && i < keys.end; ++offset, ++i) {
            places[i] = base + offset * task.head_dim;
        }
    }
}

// scores[row][i] = query . key, for all rows and the keys of the split that any of them sees.
template <typename T>
void score(const Block& block, Range keys, const T* const* places, float (*scores)[kSplit]) {
    const AttentionTask& task = block.task;
    constexpr int kRows = kTileRows<T>;
    const int64_t head_span = task.page_size * task.head_dim;
    const T* query[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) {
        query[row] = static_cast<const T*>(task.query) + block.token_of(row) * task.query_stride +
                     block.head_of(row) * task.head_dim;
    }
    // All heads of 16 keys before the next 16: a page's heads lie side by side.
    for (int64_t begin = keys.begin; begin < keys.end; begin += 16) {
        const int64_t end = lesser(begin + 16, keys.end);
        for (int64_t h = block.item.kv_head_begin; h < block.item.kv_head_end; ++h) {
            const int64_t first_row = (h - block.item.kv_head_begin) * block.rows_per_kv;
            for (int64_t i = begin; i < end; i += kTileCols) {
                const T *key[kTileCols], *next[kTileCols];
                for (int c = 0; c < kTileCols; ++c) {
                    key[c] = places[lesser(i + c, end - 1)] + h * head_span;
                    next[c] = places[lesser(i + c + kAhead, keys.end - 1)] + h * head_span;
                }
                const int64_t cols = lesser(kTileCols, end - i);
                for (int64_t r = 0; r < block.rows_per_kv; r += kRows) {
                    const int rows = static_cast<int>(lesser(kRows, block.rows_per_kv - r));
                    float out[kRows * kTileCols];
                    dot_rows<T>(rows, query + first_row + r, key, task.head_dim,
                                r == 0 ? next : nullptr, out);
                    for (int j = 0; j < rows; ++j) {
                        float* to = scores[first_row + r + j] + i;
                        for (int64_t c = 0; c < cols; ++c) to[c] = out[j * kTileCols + c];
                    }
                }
            }
        }
    }
}

// Scores to weights relative to the largest, in place; zero where the row sees nothing.
KV_INLINE void soften(const AttentionTask& task, Range keys, float* scores, float* top,
                      float* sum) {
    const Vec scale = set1(task.scale), cap = set1(task.soft_cap);
    const Vec lanes = iota();
    const int64_t first_step = keys.begin / 16 * 16;
    Vec m = set1(-kInfinity);
    for (int64_t i = first_step; i < keys.end; i += 16) {
        Vec s = load(scores + i) * scale;
        if (task.soft_cap > 0) s = cap * tanh(s / cap);
        s = where_less(lanes, set1(static_cast<float>(keys.begin - i)), set1(-kInfinity), s);
        s = where_less(lanes, set1(static_cast<float>(keys.end - i)), s, set1(-kInfinity));
        store(scores + i, s);
        m = max(s, m);
    }
    *top = max_lane(m);
    Vec sums = set1(0.0f);
    for (int64_t i = first_step; i < keys.end; i += 16) {
        const Vec p = exp(load(scores + i) - set1(*top));
        store(scores + i, p);
        sums = sums + p;
    }
    *sum = sum_of(sums);
}

// acc[row][col .. col + 16 * COLS] += weights[row][i] * value[i], key by key. `last` lanes of the
// last vector exist.
template <typename T, int ROWS, int COLS>
KV_INLINE void add_values(Range keys, const T* const* places, int64_t offset, int last,
                          const float* const* weights, float* const* acc) {
    Vec sums[ROWS][COLS];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) sums[r][c] = load(acc[r] + 16 * c);
    }
    for (int64_t i = keys.begin; i < keys.end; ++i) {
        const T* value = places[i] + offset;
        const T* next = places[lesser(i + kAhead, keys.end - 1)] + offset;
#pragma GCC unroll 8
        for (int c = 0; c < COLS; c += 64 / (16 * sizeof(T))) __builtin_prefetch(next + 16 * c);
        Vec v[COLS];
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) {
            v[c] = COLS == 1 ? load_some(value, last) : load(value + 16 * c);
        }
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const Vec w = set1(weights[r][i]);
#pragma GCC unroll 8
            for (int c = 0; c < COLS; ++c) sums[r][c] = fma(w, v[c], sums[r][c]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
        for (int c = 0; c < COLS; ++c) store(acc[r] + 16 * c, sums[r][c]);
    }
}

// Vectors side by side for so many rows: few rows leave registers for more of the head.
constexpr int value_cols(int rows) { return 2 * rows <= kValueRows ? 2 * kValueCols : kValueCols; }

// The same over the whole head, for a number of rows known at run time.
template <typename T, int ROWS = kValueRows>
KV_INLINE void add_head(int rows, Range keys, const T* const* places, int64_t offset,
                        int64_t head_dim, const float* const* weights, float* const* acc) {
    if constexpr (ROWS > 1) {
        if (rows < ROWS) {
            return add_head<T, ROWS - 1>(rows, keys, places, offset, head_dim, weights, acc);
        }
    }
    constexpr int kCols = value_cols(ROWS);
    int64_t d = 0;
    float* at[ROWS];
    for (; d + 16 * kCols <= head_dim; d += 16 * kCols) {
        for (int r = 0; r < ROWS; ++r) at[r] = acc[r] + d;
        add_values<T, ROWS, kCols>(keys, places, offset + d, 16, weights, at);
    }
    for (; d < head_dim; d += 16) {
        for (int r = 0; r < ROWS; ++r) at[r] = acc[r] + d;
        const int last = static_cast<int>(lesser(16, head_dim - d));
        add_values<T, ROWS, 1>(keys, places, offset + d, last, weights, at);
    }
}

// One tile of rows: the keys that all of them see together, the others row by row.
// Each row still adds its keys in ascending order.
template <typename T>
KV_INLINE void weigh_values(int rows, const Range* visible, const T* const* places, int64_t offset,
                            int64_t head_dim, const float* const* weights, float* const* acc) {
    Range common = visible[0];
    for (int r = 1; r < rows; ++r) {
        common.begin = greater(common.begin, visible[r].begin);
        common.end = lesser(common.end, visible[r].end);
    }
    if (common.begin >= common.end) {
        for (int r = 0; r < rows; ++r) {
            add_head<T>(1, visible[r], places, offset, head_dim, weights + r, acc + r);
        }
        return;
    }
    for (int r = 0; r < rows; ++r) {
        const Range before{visible[r].begin, common.begin};
        if (before.begin < before.end) {
            add_head<T>(1, before, places, offset, head_dim, weights + r, acc + r);
        }
    }
    add_head<T>(rows, common, places, offset, head_dim, weights, acc);
    for (int r = 0; r < rows; ++r) {
        const Range after{common.end, visible[r].end};
        if (after.begin < after.end) {
            add_head<T>(1, after, places, offset, head_dim, weights + r, acc + r);
        }
    }
}

// What a row has gathered: values weighted by exp(score - top), and the weights' sum.
// sum == 0: nothing yet (else the largest score alone contributes 1).
struct Gathered {
    float top, sum;
};

KV_INLINE void merge(Gathered* into, float* into_values, Gathered from, const float* from_values,
                     int64_t head_dim) {
    if (from.sum == 0) return;
    if (into->sum == 0) {
        *into = from;
        std::memcpy(into_values, from_values, sizeof(float) * static_cast<size_t>(head_dim));
        return;
    }
    const float top = into->top > from.top ? into->top : from.top;
    const float a = exp(into->top - top), b = exp(from.top - top);
    into->top = top;
    into->sum = into->sum * a + from.sum * b;
    for_lanes(head_dim, [&](int64_t i, int n) {
        const Vec old = load_some(into_values + i, n) * set1(a);
        store_some(into_values + i, fma(load_some(from_values + i, n), set1(b), old), n);
    });
}

template <typename T>
void finish(const Block& block, int64_t row, Gathered gathered, const float* values) {
    const AttentionTask& task = block.task;
    const int64_t head = block.head_of(row);
    T* out = static_cast<T*>(task.out) +
             (block.token_of(row) * task.num_heads + head) * task.head_dim;
    float scale = gathered.sum == 0 ? 0.0f : 1.0f / gathered.sum;
    if (task.sinks && gathered.sum != 0) {
        // The sink takes its share of the weight, once, after all keys.
        const float sink = task.sinks[head];
        const float top = gathered.top > sink ? gathered.top : sink;
        const float kept = exp(gathered.top - top);
        scale = kept / (gathered.sum * kept + exp(sink - top));
    }
    for_lanes(task.head_dim, [&](int64_t i, int n) {
        store_some(out + i, load_some(values + i, n) * set1(scale), n);
    });
}

struct alignas(64) Workspace {
    float scores[kMaxRows][kSplit];
    float values[kMaxRows * kMaxHeadDim];  // [num_rows][head_dim rounded up to lanes]
    const void* keys[kSplit];
};

// One split of all rows of a block: fills gathered[row] and workspace.values.
template <typename T>
void attend_split(const Block& block, int64_t split, Workspace& space, Gathered* gathered) {
    const AttentionTask& task = block.task;
    const int64_t padded = (task.head_dim + 15) / 16 * 16;
    const int64_t head_span = task.page_size * task.head_dim;

    Range visible[kMaxRows], all{kSplit, 0};
    for (int64_t row = 0; row < block.num_rows; ++row) {
        visible[row] = Block::within(block.visible(block.query_of(row)), split);
        if (visible[row].begin >= visible[row].end) visible[row] = {0, 0};
        if (visible[row].begin == visible[row].end) continue;
        all.begin = lesser(all.begin, visible[row].begin);
        all.end = greater(all.end, visible[row].end);
    }
    const T** places = reinterpret_cast<const T**>(space.keys);
    if (all.begin < all.end) {
        locate<T>(task, block.item, task.key_pages, task.key_page_stride, split, all, places);
        score<T>(block, all, places, space.scores);
        locate<T>(task, block.item, task.value_pages, task.value_page_stride, split, all, places);
    }
    std::memset(space.values, 0, sizeof(float) * static_cast<size_t>(block.num_rows * padded));
    for (int64_t row = 0; row < block.num_rows; ++row) {
        gathered[row] = {-kInfinity, 0.0f};
        if (visible[row].begin < visible[row].end) {
            soften(task, visible[row], space.scores[row], &gathered[row].top, &gathered[row].sum);
        }
    }
    for (int64_t h = block.item.kv_head_begin; h < block.item.kv_head_end; ++h) {
        const int64_t first_row = (h - block.item.kv_head_begin) * block.rows_per_kv;
        for (int64_t r = 0; r < block.rows_per_kv; r += kValueRows) {
            const int rows = static_cast<int>(lesser(kValueRows, block.rows_per_kv - r));
            const float* weights[kValueRows];
            float* acc[kValueRows];
            for (int j = 0; j < rows; ++j) {
                weights[j] = space.scores[first_row + r + j];
                acc[j] = space.values + (first_row + r + j) * padded;
            }
            weigh_values<T>(rows, visible + first_row + r, places, h * head_span, task.head_dim,
                            weights, acc);
        }
    }
}

template <typename T>
void attend(const AttentionTask& task, const AttentionItem& item) {
    const Block block(task, item);
    const int64_t d = task.head_dim, padded = (d + 15) / 16 * 16;
    Workspace space;
    Gathered gathered[kMaxRows];
    if (item.split >= 0) {
        attend_split<T>(block, item.split, space, gathered);
        for (int64_t row = 0; row < block.num_rows; ++row) {
            float* to = item.partials +
                        (row * item.num_splits + item.split - item.first_split) * (2 + d);
            to[0] = gathered[row].top;
            to[1] = gathered[row].sum;
            std::memcpy(to + 2, space.values + row * padded,
                        sizeof(float) * static_cast<size_t>(d));
        }
        return;
    }
    alignas(64) float merged_values[kMaxRows * kMaxHeadDim];
    Gathered merged[kMaxRows];
    for (int64_t row = 0; row < block.num_rows; ++row) merged[row] = {-kInfinity, 0.0f};
    for (int64_t s = 0; s < item.num_splits; ++s) {
        attend_split<T>(block, item.first_split + s, space, gathered);
        for (int64_t row = 0; row < block.num_rows; ++row) {
            merge(&merged[row], merged_values + row * padded, gathered[row],
                  space.values + row * padded, d);
        }
    }
    for (int64_t row = 0; row < block.num_rows; ++row) {
        finish<T>(block, row, merged[row], merged_values + row * padded);
    }
}

template <typename T>
void merge_splits(const AttentionTask& task, const AttentionItem& item) {
    const Block block(task, item);
    const int64_t d = task.head_dim;
    alignas(64) float values[kMaxHeadDim];
    for (int64_t row = 0; row < block.num_rows; ++row) {
        Gathered merged{-kInfinity, 0.0f};
        for (int64_t s = 0; s < item.num_splits; ++s) {
            const float* from = item.partials + (row * item.num_splits + s) * (2 + d);
            merge(&merged, values, {from[0], from[1]}, from + 2, d);
        }
        finish<T>(block, row, merged, values);
    }
}

}  // namespace

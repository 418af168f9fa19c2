// What both ways through an attention share: the rows of an item, where their keys lie, and what a row
// gathers split by split.
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

// The keys that some of the rows see.
inline Range any_of(const Range* visible, int64_t rows) {
    Range any{kSplit, 0};
    for (int64_t r = 0; r < rows; ++r) {
        if (visible[r].empty()) continue;
        any = {lesser(any.begin, visible[r].begin), greater(any.end, visible[r].end)};
    }
    return any;
}

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

template <typename T>
const T* query_of(const Block& block, int64_t row) {
    const AttentionTask& task = block.task;
    return static_cast<const T*>(task.query) + block.query_of(row).token * task.query_stride +
           block.head_of(row) * task.head_dim;
}

// Scores of one row times their scales, -infinity for keys of its first and last 16 that it doesn't
// see, after the soft cap if there is one; returns the largest. SCALED: keys are quantised.
template <bool SCALED>
KV_INLINE float scale_scores(const AttentionTask& task, Range keys, const float* key_scales,
                             float* scores) {
    // Copies: what is stored here could be any float, for all that the compiler knows.
    const Vec scale = set1(task.scale), cap = set1(task.soft_cap);
    const bool is_capped = task.soft_cap > 0;
    const Vec lanes = iota();
    Vec m = set1(-kInfinity);
    for (int64_t i = keys.begin / 16 * 16; i < keys.end; i += 16) {
        Vec s = load(scores + i) * scale;
        if constexpr (SCALED) s = s * load(key_scales + i);
        if (is_capped) s = cap * tanh(s / cap);
        if (i < keys.begin) {
            s = where_less(lanes, set1(static_cast<float>(keys.begin - i)), set1(-kInfinity), s);
        }
        if (i + 16 > keys.end) {
            s = where_less(lanes, set1(static_cast<float>(keys.end - i)), s, set1(-kInfinity));
        }
        store(scores + i, s);
        m = max(s, m);
    }
    return max_lane(m);
}

// Scores to weights relative to the largest; returns the weights' sum. SCALED: values are
// quantised, and their scales go to the weights after these were summed.
template <bool SCALED, typename Weight>
KV_INLINE float soften(Range keys, const float* scores, float top, const float* value_scales,
                       Weight* weights) {
    const Vec largest = set1(top), lanes = iota();
    Vec sums = set1(0.0f);
    for (int64_t i = keys.begin / 16 * 16; i < keys.end; i += 16) {
        const Vec p = exp_of_small(load(scores + i) - largest);
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
    return sum_of(sums);
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

// A split's part of a row, to its place of the query's partials.
KV_INLINE void keep_apart(const Block& block, int64_t row, int64_t split, Gathered gathered,
                          const float* values) {
    float* to = block.partial(row, split);
    to[0] = gathered.top;
    to[1] = gathered.sum;
    std::memcpy(to + 2, values, sizeof(float) * static_cast<size_t>(block.width));
}

}  // namespace

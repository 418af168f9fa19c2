// Paged attention of an item: a block of queries, for some heads.
//
// A row is one (query, head). For each split of 256 keys at absolute positions: scores of all its
// visible keys, their maximum, exp, sum over 16 lanes by absolute position, and the weighted values
// added in the keys' order. Splits are merged in order. All of that is fixed by the row's position
// alone: other rows of the block, where its pages lie and which thread computes change no bit, and
// a key that the row doesn't see is never touched by arithmetic (0 * NaN is NaN).
//
// Few rows and many go different ways through a split, with the same bits.
#pragma once

namespace {

// Queries of T, pages of K: the same, or int8 with scales.
template <typename T, typename K>
void attend(const AttentionTask& task, const AttentionItem& item) {
    const Block block(task, item);
    if constexpr (Turned<T>::kIs) {
        if (block.rows_per_kv >= kManyRows) return attend_many<T, K>(block);
    }
    // No more rows at a time than there is room for.
    AttentionItem some = item;
    const int64_t parts = ceil_div(item.num_queries, kMaxRows / (block.num_rows / item.num_queries));
    for (int64_t p = 0; p < parts; ++p) {
        const int64_t begin = p * item.num_queries / parts;
        some.first_query = item.first_query + begin;
        some.num_queries = (p + 1) * item.num_queries / parts - begin;
        attend_few<T, K>(Block(task, some));
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

#include "cut_attention.h"

#include <algorithm>

namespace kv {

namespace {

struct Splits {
    int64_t begin, end;

    bool empty() const { return begin >= end; }
    bool holds(int64_t split) const { return begin <= split && split < end; }
};

// The keys [begin, end) that some query of [query_begin, query_end) of a sequence may see.
struct Keys {
    int64_t begin, end;

    Keys(const AttentionTask& task, const Sequences& seqs, int64_t b, int64_t query_begin,
         int64_t query_end) {
        const int64_t first = seqs.seq_lens[b] - seqs.num_queries(b);
        begin = task.window ? std::max<int64_t>(0, first + query_begin - task.window + 1) : 0;
        end = first + query_end;
    }
    int64_t size() const { return std::max<int64_t>(0, end - begin); }
    Splits splits() const { return {begin / kSplit, ceil_div(end, kSplit)}; }
};

// A split whose keys several sequences find in the same pages.
struct SharedSplit {
    int64_t split;
    std::vector<int64_t> seqs;
};

// What may be kept apart for shared splits: 128 MiB. Sequences for which there is no room share
// nothing.
constexpr int64_t kMaxSharedFloats = int64_t{32} << 20;

// A sequence with one query, and the splits that it may share: full ones, of which it sees some key.
struct Candidate {
    int64_t seq;
    Splits whole;
    bool shares;  // the split before this one
};

std::vector<Candidate> find_candidates(const AttentionTask& task, const Sequences& seqs) {
    std::vector<Candidate> candidates;
    int64_t room = kMaxSharedFloats;
    for (int64_t b = 0; b < seqs.num; ++b) {
        if (seqs.num_queries(b) != 1) continue;
        const Splits seen = Keys(task, seqs, b, 0, 1).splits();
        const Splits whole{seen.begin, seqs.seq_lens[b] / kSplit};
        room -= task.num_heads * (seen.end - seen.begin) * partial_floats(task.head_dim);
        if (room < 0) break;
        if (!whole.empty()) candidates.push_back({b, whole, false});
    }
    return candidates;
}

// By split. A sequence shares an unbroken run of its splits, or none: once it is alone, it stays so.
std::vector<SharedSplit> find_shared(const AttentionTask& task, const Sequences& seqs) {
    std::vector<Candidate> candidates = find_candidates(task, seqs), reading, staying;
    std::vector<SharedSplit> shared;
    for (int64_t split = 0; candidates.size() > 1; ++split) {
        const auto starts_before = [](const Candidate& a, const Candidate& b) {
            return a.whole.begin < b.whole.begin;
        };
        const auto next = std::min_element(candidates.begin(), candidates.end(), starts_before);
        split = std::max(split, next->whole.begin);
        const int64_t first_page = split * kSplit / task.page_size;
        const int64_t end_page = ceil_div((split + 1) * kSplit, task.page_size);
        const auto comes_before = [&](const Candidate& a, const Candidate& b) {
            const int32_t *x = seqs.page_table(a.seq), *y = seqs.page_table(b.seq);
            return std::lexicographical_compare(x + first_page, x + end_page, y + first_page,
                                                y + end_page);
        };
        reading.clear();
        staying.clear();
        for (const Candidate& each : candidates) {
            if (each.whole.holds(split)) reading.push_back(each);
            if (split < each.whole.begin) staying.push_back(each);
        }
        // Who has a window may find others where theirs begin.
        const bool others_come = !staying.empty();
        std::sort(reading.begin(), reading.end(), comes_before);
        for (auto begin = reading.begin(); begin != reading.end();) {
            const auto end = std::upper_bound(begin, reading.end(), *begin, comes_before);
            if (end - begin > 1) {
                shared.push_back({split, {}});
                for (auto each = begin; each != end; ++each) {
                    shared.back().seqs.push_back(each->seq);
                    staying.push_back({each->seq, each->whole, true});
                }
            } else if (others_come && !begin->shares) {
                staying.push_back(*begin);
            }
            begin = end;
        }
        candidates.swap(staying);
    }
    return shared;
}

class Cutter {
  public:
    Cutter(const AttentionTask& task, const Sequences& seqs, int64_t pairs, int threads)
        : task_(task),
          seqs_(seqs),
          share_(threads == 1 ? std::numeric_limits<int64_t>::max()
                              : ceil_div(pairs * task.num_kv_heads, int64_t{2} * threads)),
          group_(task.num_heads / task.num_kv_heads),
          heads_at_once_(std::min<int64_t>(group_, kBlockRows)),
          room_(std::min<int64_t>(kItemRows, kItemNumbers / padded_head(task.head_dim)) /
                kBlockRows * kBlockRows) {}

    AttentionCut cut() {
        std::vector<Splits> with_others(static_cast<size_t>(seqs_.num), Splits{0, 0});
        std::vector<SharedSplit> shared;
        // Else an item has no room for two queries.
        if (2 * heads_at_once_ <= kBlockRows) shared = find_shared(task_, seqs_);
        for (const SharedSplit& each : shared) {
            for (const int64_t b : each.seqs) {
                Splits& run = with_others[static_cast<size_t>(b)];
                run = {run.empty() ? each.split : run.begin, each.split + 1};
            }
        }
        for (int64_t b = 0; b < seqs_.num; ++b) {
            for (int64_t q = 0; q < seqs_.num_queries(b); ++q) {
                const int64_t token = seqs_.query_starts[b] + q;
                const int64_t position = seqs_.seq_lens[b] - seqs_.num_queries(b) + q;
                out_.queries.push_back({static_cast<int32_t>(token), static_cast<int32_t>(position),
                                        0, 0, 0});
            }
        }
        for (int64_t b = 0; b < seqs_.num; ++b) cut_sequence(b, with_others[static_cast<size_t>(b)]);
        for (const SharedSplit& each : shared) cut_shared(each);
        out_.pieces = std::move(whole_);
        out_.pieces.insert(out_.pieces.end(), together_.begin(), together_.end());
        out_.pieces.insert(out_.pieces.end(), apart_.begin(), apart_.end());
        return std::move(out_);
    }

  private:
    // Queries of an item, of those that see so many keys: as many as there is room for, but so few
    // that each thread has some items, if kBlockRows allow it. Of about equal size: a small last one
    // would read all keys for few rows.
    int64_t block_of(int64_t queries, int64_t keys) const {
        const int64_t room = room_ / heads_at_once_;
        const int64_t fair = share_ / kItemsOfShare / std::max<int64_t>(keys, 1);
        const int64_t least = std::max<int64_t>(1, kBlockRows / heads_at_once_);
        const int64_t most = std::max(least, std::min(room, fair));
        return ceil_div(queries, std::max<int64_t>(1, ceil_div(queries, most)));
    }

    // KV heads of an item. Few rows: all at once, which lie side by side in a page.
    int64_t kv_heads_for(int64_t queries) const {
        const int64_t rows = queries * heads_at_once_;
        if (rows >= kManyRows || heads_at_once_ < group_) return 1;
        return std::min<int64_t>(kMaxRows / rows, task_.num_kv_heads);
    }

    // The same, no more than an item's share.
    int64_t kv_heads_for(int64_t queries, int64_t pairs) const {
        return std::clamp<int64_t>(share_ / std::max<int64_t>(pairs, 1), 1, kv_heads_for(queries));
    }

    void add(std::vector<AttentionItem>& to, AttentionItem item, int64_t kv_heads) const {
        for (int64_t h = 0; h < task_.num_kv_heads; h += kv_heads) {
            item.kv_head_begin = static_cast<int32_t>(h);
            item.kv_head_end = static_cast<int32_t>(std::min(task_.num_kv_heads, h + kv_heads));
            for (int64_t g = 0; g < group_; g += heads_at_once_) {
                item.group_begin = static_cast<int32_t>(g);
                item.group_end = static_cast<int32_t>(std::min(group_, g + heads_at_once_));
                to.push_back(item);
            }
        }
    }

    // Splits are kept apart where a block is too long for one item, or shares some of them.
    void cut_sequence(int64_t b, Splits with_others) {
        const int64_t queries = seqs_.num_queries(b);
        if (queries <= 0) return;
        const int64_t block = block_of(queries, Keys(task_, seqs_, b, 0, queries).size());
        const auto first_whole = static_cast<std::ptrdiff_t>(whole_.size());
        // Those with the most keys first, so that threads end together.
        for (int64_t q = (queries - 1) / block * block; q >= 0; q -= block) {
            const int64_t q_end = std::min(queries, q + block);
            const Keys keys(task_, seqs_, b, q, q_end);
            const Splits splits = keys.splits();
            const int64_t pairs = (q_end - q) * keys.size();
            AttentionItem item{};
            item.first_query = seqs_.query_starts[b] + q;
            item.num_queries = q_end - q;
            item.page_table = seqs_.page_table(b);
            item.first_split = splits.begin;
            item.num_splits = std::max<int64_t>(0, splits.end - splits.begin);
            const int64_t kv_heads = kv_heads_for(item.num_queries);
            const bool is_long = item.num_splits > 1 && pairs * kv_heads > share_;
            if (with_others.empty() && !is_long) {
                add(whole_, item, kv_heads_for(item.num_queries, pairs));
                continue;
            }
            keep_apart(item);
            add(out_.merges, item, kv_heads);
            item.is_apart = true;
            item.num_splits = 1;
            for (int64_t split = splits.begin; split < splits.end; ++split) {
                item.first_split = split;
                if (!with_others.holds(split)) add(apart_, item, kv_heads);
            }
        }
        // Head by head: what one block leaves of its keys and values in the cache serves the next.
        std::stable_sort(whole_.begin() + first_whole, whole_.end(), [](const auto& a, const auto& b) {
            return a.kv_head_begin < b.kv_head_begin;
        });
    }

    // Room for each split of the item's queries.
    void keep_apart(const AttentionItem& item) {
        const int64_t floats = task_.num_heads * item.num_splits * partial_floats(task_.head_dim);
        for (int64_t q = item.first_query; q < item.first_query + item.num_queries; ++q) {
            AttentionQuery& query = out_.queries[static_cast<size_t>(q)];
            query.first_split = item.first_split;
            query.num_splits = item.num_splits;
            query.partials = static_cast<int64_t>(out_.num_floats);
            out_.num_floats += static_cast<size_t>(floats);
        }
    }

    // The queries of several sequences side by side, as if they were one sequence's.
    void cut_shared(const SharedSplit& shared) {
        AttentionItem item{};
        item.page_table = seqs_.page_table(shared.seqs.front());
        item.first_split = shared.split;
        item.num_splits = 1;
        item.is_apart = true;
        const int64_t first = static_cast<int64_t>(out_.queries.size());
        for (const int64_t b : shared.seqs) {
            const AttentionQuery query = out_.queries[static_cast<size_t>(seqs_.query_starts[b])];
            out_.queries.push_back(query);
        }
        const int64_t queries = static_cast<int64_t>(shared.seqs.size());
        const int64_t block = block_of(queries, kSplit);
        for (int64_t q = 0; q < queries; q += block) {
            item.first_query = first + q;
            item.num_queries = std::min(block, queries - q);
            add(together_, item, kv_heads_for(item.num_queries, item.num_queries * kSplit));
        }
    }

    static constexpr int64_t kItemsOfShare = 4;

    const AttentionTask& task_;
    const Sequences& seqs_;
    const int64_t share_;  // pairs times KV heads of an item at most, where it can be cut further
    const int64_t group_, heads_at_once_;
    const int64_t room_;  // rows of an item at most
    std::vector<AttentionItem> whole_, together_, apart_;
    AttentionCut out_;
};

}  // namespace

int64_t count_pairs(const AttentionTask& task, const Sequences& seqs) {
    int64_t pairs = 0;
    for (int64_t b = 0; b < seqs.num; ++b) {
        const int64_t queries = seqs.num_queries(b);
        pairs += queries * Keys(task, seqs, b, 0, queries).size();
    }
    return pairs;
}

AttentionCut cut_attention(const AttentionTask& task, const Sequences& seqs, int64_t pairs,
                           int threads) {
    return Cutter(task, seqs, pairs, threads).cut();
}

}  // namespace kv

// How an attention is cut into items, of which any thread takes the next.
//
// Says what is computed together and in which order, never what comes out: a row's bits are the same
// in any item. Knows no instruction sets, and of threads only how many want work.
#pragma once

#include <cstdint>
#include <vector>

#include "isa.h"

namespace kv {

// The sequences of a step.
struct Sequences {
    const int32_t* page_tables;
    int64_t table_stride;
    const int32_t* seq_lens;      // keys of each, those of this step among them
    const int32_t* query_starts;  // [num + 1] among the step's tokens
    int64_t num;

    int64_t num_queries(int64_t b) const { return int64_t{query_starts[b + 1]} - query_starts[b]; }
    const int32_t* page_table(int64_t b) const { return page_tables + b * table_stride; }
};

struct AttentionCut {
    std::vector<AttentionQuery> queries;  // the step's, then those of shared splits once more
    std::vector<AttentionItem> pieces;    // whole sequences first, then single splits
    std::vector<AttentionItem> merges;    // of what pieces keep apart, when all of them are done
    size_t num_floats = 0;                // that pieces keep apart
};

// Queries times the keys that they may see, of all sequences: what the work is measured by.
int64_t count_pairs(const AttentionTask& task, const Sequences& seqs);

// `pairs`: what `count_pairs` says. Throws std::bad_alloc.
AttentionCut cut_attention(const AttentionTask& task, const Sequences& seqs, int64_t pairs,
                           int threads);

}  // namespace kv

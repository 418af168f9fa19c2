// Calls every function of the native library on random shapes, with buffers of exactly the needed
// size, so that the sanitizers see each byte too far. Built and run by test_sanitizers.py.
//
// Each case runs on one thread and on three; the outputs must be equal to the bit.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "cut_attention.h"

struct Context;
struct Tape;
extern "C" {
int kv_num_isas();
const char* kv_isa(int);
Context* kv_create(int, const char*);
void kv_destroy(Context*);
Tape* kv_record(Context*);
void kv_recorded();
int kv_play(const Tape*);
void kv_erase(Tape*);
int64_t kv_packed_bytes(int64_t, int64_t);
int kv_pack_weight(Context*, const void*, int64_t, int64_t, void*);
int kv_unpack_rows(Context*, const void*, int64_t, const int64_t*, int64_t, void*);
int kv_linear(Context*, int, const void*, int64_t, int64_t, const void*, const float*, const void*,
              int64_t, int64_t, void*, int);
int kv_grouped_linear(Context*, int, const void*, int64_t, int64_t, const int64_t*,
                      const void* const*, const float* const*, const void* const*, int64_t, int64_t,
                      int64_t, void*);
int kv_norm(Context*, int, const void*, int64_t, void*, int64_t, int64_t, int64_t, const void*,
            int, float, float, void*);
int kv_gated(Context*, int, int, const void*, int64_t, int64_t, int64_t, void*);
int kv_rope_store(Context*, int, const void*, int64_t, int64_t, const int32_t*, const float*,
                  int64_t, void*, int64_t, void*, int64_t, float*, float*, int64_t, int64_t,
                  const int64_t*, const void*, int, const void*, int, float, float, int64_t, int64_t, int64_t, void*);
int kv_paged_attention(Context*, int, const void*, int64_t, const void*, int64_t, const void*,
                       int64_t, const float*, const float*, int64_t, const int32_t*, int64_t,
                       const int32_t*, const int32_t*, int64_t,
                       int64_t, int64_t, int64_t, int64_t, float, int64_t, float, const float*,
                       void*, float*);
int kv_store_kv(Context*, int, const void*, int64_t, const void*, int64_t, int64_t, void*, int64_t,
                void*, int64_t, float*, float*, int64_t, int64_t, const int64_t*, int64_t, int64_t);
int kv_merge_states(Context*, int, const void*, const float*, const void*, const float*, int64_t,
                    int64_t, void*, float*);
int kv_log_softmax(Context*, const float*, int64_t, int64_t, int64_t, float*);
int kv_sample(Context*, const float*, int64_t, int64_t, int64_t, const float*, const int32_t*,
              const float*, const float*, const int64_t*, const int32_t*, const int32_t*,
              int64_t*);
int kv_copy_pages(Context*, const char*, int64_t, char*, int64_t, int64_t, const int64_t*,
                  const int64_t*, int64_t);
}

namespace {

std::mt19937_64 random_bits;

int64_t between(int64_t low, int64_t high) {
    return std::uniform_int_distribution<int64_t>(low, high)(random_bits);
}
float number() { return std::normal_distribution<float>()(random_bits); }

// Exactly `size` elements of a dtype on the heap.
struct Buffer {
    int dtype;
    std::vector<char> bytes;

    Buffer(int d, int64_t size) : dtype(d), bytes(static_cast<size_t>(size * (d == 0 ? 4 : 2))) {
        for (int64_t i = 0; i < size; ++i) {
            const float x = number();
            if (d == 0) {
                std::memcpy(bytes.data() + 4 * i, &x, 4);
            } else {
                // The upper half of a float32 is a bfloat16; as a float16 its exponent is limited.
                uint32_t bits;
                std::memcpy(&bits, &x, 4);
                const uint16_t half = static_cast<uint16_t>(
                    d == 1 ? bits >> 16 : (bits >> 16 & 0x83ff) | between(12, 16) << 10);
                std::memcpy(bytes.data() + 2 * i, &half, 2);
            }
        }
        bytes.shrink_to_fit();
    }
    void* data() { return bytes.data(); }
};

template <typename T>
std::vector<T> integers(int64_t size, int64_t low, int64_t high) {
    std::vector<T> values;
    values.reserve(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) values.push_back(static_cast<T>(between(low, high)));
    return values;
}
std::vector<float> floats(int64_t size, float low, float high) {
    std::vector<float> values(static_cast<size_t>(size));
    for (float& x : values) x = std::uniform_real_distribution<float>(low, high)(random_bits);
    return values;
}

struct Pair {
    Context *one, *three;

    // f(context, out) on both; equal bits in `out`.
    template <typename F>
    void same(const char* name, Buffer out, F f) {
        Buffer again = out;
        if (f(one, out) || f(three, again)) fail(name, "ran out of memory");
        if (out.bytes != again.bytes) fail(name, "differs between one thread and three");
    }
    static void fail(const char* name, const char* what) {
        std::printf("%s %s\n", name, what);
        std::exit(1);
    }
};

// A weight [n, k] in panels, on the heap; its rows must come back.
Buffer packed(Pair& pair, Buffer& weight, int64_t n, int64_t k) {
    const int64_t item = weight.dtype == 0 ? 4 : 2;
    Buffer panels(weight.dtype, kv_packed_bytes(n, k * item) / item);
    if (kv_pack_weight(pair.three, weight.data(), n, k * item, panels.data())) {
        Pair::fail("pack_weight", "ran out of memory");
    }
    std::vector<int64_t> ids(static_cast<size_t>(n));
    std::iota(ids.begin(), ids.end(), 0);
    Buffer rows(weight.dtype, n * k);
    if (kv_unpack_rows(pair.three, panels.data(), k * item, ids.data(), n, rows.data()) ||
        rows.bytes != weight.bytes) {
        Pair::fail("unpack_rows", "gives back another weight");
    }
    return panels;
}

void linears(Pair& pair, int dtype) {
    const int64_t m = between(0, 70), n = between(1, 150), k = between(1, 300);
    Buffer x(dtype, m * k), weight(dtype, n * k), bias(dtype, n), other(dtype, n * k);
    Buffer first = packed(pair, weight, n, k), second = packed(pair, other, n, k);
    // As int8: the bytes of another buffer, and scales and column sums for whole panels.
    Buffer bytes(0, (n * k + 3) / 4), panels(0, kv_packed_bytes(n, k) / 4);
    kv_pack_weight(pair.three, bytes.data(), n, k, panels.data());
    std::vector<float> scales = floats(2 * ((n + 15) / 16 * 16), 0.1f, 1.0f);
    const void* floating[] = {first.data(), second.data()};
    const void* whole[] = {panels.data(), panels.data()};
    const float* no_scales[] = {nullptr, nullptr};
    const float* both_scales[] = {scales.data(), scales.data()};
    const void* biases[] = {bias.data(), nullptr};
    const std::vector<int64_t> experts = integers<int64_t>(m, 0, 1);
    for (int int8 = 0; int8 < 2; ++int8) {
        const void** weights = int8 ? whole : floating;
        const float** of_columns = int8 ? both_scales : no_scales;
        for (int wide = 0; wide < 2; ++wide) {
            pair.same("linear", Buffer(wide ? 0 : dtype, m * n), [&](Context* c, Buffer& out) {
                return kv_linear(c, dtype, x.data(), k, m, weights[0], of_columns[0],
                                 wide ? bias.data() : nullptr, n, k, out.data(), wide);
            });
        }
        pair.same("grouped_linear", Buffer(dtype, m * n), [&](Context* c, Buffer& out) {
            return kv_grouped_linear(c, dtype, x.data(), k, m, experts.data(), weights, of_columns,
                                     biases, 2, n, k, out.data());
        });
    }
}

void row_operations(Pair& pair, int dtype) {
    const int64_t rows = between(0, 40), width = between(1, 600);
    Buffer x(dtype, rows * width), weight(dtype, width), gate_up(dtype, rows * 2 * width);
    const Buffer residual(dtype, rows * width);
    pair.same("norm", Buffer(dtype, rows * width), [&](Context* c, Buffer& out) {
        return kv_norm(c, dtype, x.data(), width, nullptr, 0, rows, width, weight.data(), dtype, 0,
                       1e-6f, out.data());
    });
    pair.same("add_norm", Buffer(dtype, rows * width), [&](Context* c, Buffer& out) {
        Buffer sum = residual;
        return kv_norm(c, dtype, x.data(), width, sum.data(), width, rows, width, weight.data(),
                       dtype, 1, 1e-6f, out.data());
    });
    for (int gate = 0; gate < 2; ++gate) {
        pair.same("gated", Buffer(dtype, rows * width), [&](Context* c, Buffer& out) {
            return kv_gated(c, dtype, gate, gate_up.data(), 2 * width, rows, width, out.data());
        });
    }
    Buffer logits(0, rows * width);
    const float* scores = static_cast<const float*>(logits.data());
    pair.same("log_softmax", Buffer(0, rows * width), [&](Context* c, Buffer& out) {
        return kv_log_softmax(c, scores, width, rows, width, static_cast<float*>(out.data()));
    });
    const std::vector<float> temperature = floats(rows, -0.2f, 1.5f);
    const std::vector<float> top_p = floats(rows, 0, 1.3f), min_p = floats(rows, -0.1f, 0.3f);
    const std::vector<int32_t> top_k = integers<int32_t>(rows, -1, width + 1);
    const std::vector<int32_t> at = integers<int32_t>(rows, 0, 1000);
    const std::vector<int64_t> seeds = integers<int64_t>(rows, INT64_MIN, INT64_MAX);
    pair.same("sample", Buffer(0, 2 * rows), [&](Context* c, Buffer& out) {
        int64_t* tokens = static_cast<int64_t*>(out.data());
        const int failed =
            kv_sample(c, scores, width, rows, width, temperature.data(), top_k.data(),
                      top_p.data(), min_p.data(), seeds.data(), at.data(), at.data(), tokens);
        for (int64_t r = 0; r < rows; ++r) {
            if (tokens[r] < 0 || tokens[r] >= width) Pair::fail("sample", "left the vocabulary");
        }
        return failed;
    });
}

// Each split that a query sees is computed once for each of its heads, and whole splits that decoding
// sequences find in the same pages from the first on are computed for several.
void check_cut(const kv::Sequences& seqs, int64_t heads, int64_t kv_heads, int64_t d,
               int64_t page_size, int64_t window) {
    kv::AttentionTask task{};
    task.num_heads = heads;
    task.num_kv_heads = kv_heads;
    task.head_dim = d;
    task.page_size = page_size;
    task.window = window;
    const kv::AttentionCut cut = kv::cut_attention(
        task, seqs, kv::count_pairs(task, seqs), static_cast<int>(between(1, 3)));
    const int64_t tokens = seqs.query_starts[seqs.num], most_splits = 8;
    std::vector<int> times(static_cast<size_t>(tokens * heads * most_splits));
    std::vector<bool> is_shared(static_cast<size_t>(most_splits));
    for (const kv::AttentionItem& item : cut.pieces) {
        const int64_t item_heads = item.kv_head_end - item.kv_head_begin;
        const int64_t rows = item.num_queries * (item.group_end - item.group_begin);
        const bool fits = rows < kv::kManyRows
                              ? rows * item_heads <= kv::kMaxRows
                              : item_heads == 1 && rows <= kv::kItemRows &&
                                    rows * kv::padded_head(d) <= kv::kItemNumbers;
        if (!fits) Pair::fail("cut_attention", "an item has more rows than there is room for");
        for (int64_t q = 0; q < item.num_queries; ++q) {
            const kv::AttentionQuery& query = cut.queries[static_cast<size_t>(item.first_query + q)];
            const kv::AttentionQuery& first = cut.queries[static_cast<size_t>(item.first_query)];
            if (item.is_apart && query.token != first.token) {
                is_shared[static_cast<size_t>(item.first_split)] = true;
            }
            for (int64_t h = item.kv_head_begin; h < item.kv_head_end; ++h) {
                for (int64_t g = item.group_begin; g < item.group_end; ++g) {
                    const int64_t row = query.token * heads + h * (heads / kv_heads) + g;
                    for (int64_t s = 0; s < item.num_splits; ++s) {
                        ++times[static_cast<size_t>(row * most_splits + item.first_split + s)];
                    }
                }
            }
        }
    }
    int64_t common = 0;  // splits from the first on, of the first sequence and some other
    for (int64_t b = 0; b < seqs.num; ++b) {
        const int64_t queries = seqs.num_queries(b);
        for (int64_t q = 0; q < queries; ++q) {
            const int64_t position = seqs.seq_lens[b] - queries + q;
            const int64_t first = window ? std::max<int64_t>(0, position - window + 1) : 0;
            for (int64_t i = 0; i < heads * most_splits; ++i) {
                const int64_t split = i % most_splits;
                const bool is_seen = split >= first / kv::kSplit && split <= position / kv::kSplit;
                const int64_t row = (seqs.query_starts[b] + q) * heads + i / most_splits;
                if (is_seen && times[static_cast<size_t>(row * most_splits + split)] != 1) {
                    Pair::fail("cut_attention", "a split isn't computed once");
                }
            }
        }
        if (b == 0 || window || queries != 1 || seqs.num_queries(0) != 1) continue;
        const int64_t whole = std::min(seqs.seq_lens[0], seqs.seq_lens[b]) / kv::kSplit;
        while (common < whole &&
               std::equal(seqs.page_table(0),
                          seqs.page_table(0) + kv::ceil_div((common + 1) * kv::kSplit, page_size),
                          seqs.page_table(b))) {
            ++common;
        }
    }
    for (int64_t split = 0; split < common; ++split) {
        if (!is_shared[static_cast<size_t>(split)]) {
            Pair::fail("cut_attention", "a common split isn't shared");
        }
    }
}

void attention(Pair& pair, int dtype) {
    const int64_t kv_heads = between(1, 3), heads = kv_heads * between(1, 9);
    const int64_t d = 8 * between(1, 17), page_size = between(1, 20);
    std::vector<int32_t> seq_lens, starts{0}, positions;
    int64_t pages = 0, most = 1;
    const bool is_decode = between(0, 2) == 0;  // of sequences that are long enough to share splits
    for (int64_t b = between(1, is_decode ? 12 : 4); b > 0; --b) {
        const int64_t length = is_decode ? between(200, 700) : between(1, between(1, 600));
        const int64_t queries = is_decode ? 1 : between(0, std::min<int64_t>(length, 50));
        seq_lens.push_back(static_cast<int32_t>(length));
        starts.push_back(starts.back() + static_cast<int32_t>(queries));
        for (int64_t q = length - queries; q < length; ++q) {
            positions.push_back(static_cast<int32_t>(q));
        }
        const int64_t count = (length + page_size - 1) / page_size;
        pages += count;
        most = std::max(most, count);
    }
    const int64_t num_seqs = static_cast<int64_t>(seq_lens.size()), tokens = starts.back();
    std::vector<int32_t> order(static_cast<size_t>(pages));
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), random_bits);
    // Past its last page a row of the table names no page at all.
    std::vector<int32_t> tables(static_cast<size_t>(num_seqs * most), INT32_MAX);
    size_t taken = 0;
    std::vector<int64_t> slots;
    for (int64_t b = 0; b < num_seqs; ++b) {
        int32_t* table = tables.data() + b * most;
        for (int64_t p = 0; p * page_size < seq_lens[static_cast<size_t>(b)]; ++p) {
            table[p] = order[taken++];
        }
        for (int32_t t = starts[static_cast<size_t>(b)]; t < starts[static_cast<size_t>(b) + 1]; ++t) {
            const int64_t at = positions[static_cast<size_t>(t)];
            slots.push_back(between(0, 9) ? table[at / page_size] * page_size + at % page_size : -1);
        }
    }
    const int64_t span = kv_heads * page_size * d;
    Buffer pool(dtype, pages * 2 * span), qkv(dtype, tokens * (heads + 2 * kv_heads) * d);
    Buffer norm(dtype, d);
    const int64_t rotary = 2 * between(0, d / 2);
    const std::vector<float> cos_sin = floats(700 * rotary, -1, 1);
    const std::vector<float> sinks = floats(heads, -1, 1);
    const bool normed = between(0, 1);
    const auto values = [&](Buffer& b) { return b.bytes.data() + span * (dtype == 0 ? 4 : 2); };

    pair.same("rope_store", Buffer(dtype, tokens * heads * d), [&](Context* c, Buffer& out) {
        Buffer to = pool;
        return kv_rope_store(c, dtype, qkv.data(), (heads + 2 * kv_heads) * d, tokens,
                             positions.data(), cos_sin.data(), rotary, to.data(), 2 * span,
                             values(to), 2 * span, nullptr, nullptr, 0, page_size, slots.data(),
                             normed ? norm.data() : nullptr, dtype, normed ? norm.data() : nullptr,
                             dtype, 1e-6f, 0, heads, kv_heads, d, out.data());
    });
    for (int64_t b = 1; is_decode && b < num_seqs; ++b) {
        const int32_t length = std::min(seq_lens[0], seq_lens[static_cast<size_t>(b)]);
        std::copy_n(tables.begin(), between(0, length / page_size), tables.begin() + b * most);
    }
    const int64_t window = between(0, 1) ? between(1, 300) : 0;
    check_cut({tables.data(), most, seq_lens.data(), starts.data(), num_seqs}, heads, kv_heads, d,
              page_size, window);
    const float cap = between(0, 1) ? 20.0f : 0.0f;
    const bool sink = between(0, 1);
    pair.same("attention", Buffer(dtype, tokens * heads * d), [&](Context* c, Buffer& out) {
        return kv_paged_attention(c, dtype, qkv.data(), heads * d, pool.data(), 2 * span,
                                  values(pool), 2 * span, nullptr, nullptr, 0, tables.data(), most, seq_lens.data(),
                                  starts.data(), num_seqs, heads, kv_heads, d, page_size, 0.1f,
                                  window, cap, sink ? sinks.data() : nullptr, out.data(),
                                  nullptr);
    });
    pair.same("store_kv", pool, [&](Context* c, Buffer& to) {
        return kv_store_kv(c, dtype, qkv.data(), (heads + 2 * kv_heads) * d, qkv.data(),
                           (heads + 2 * kv_heads) * d, tokens, to.data(), 2 * span, values(to),
                           2 * span, nullptr, nullptr, 0, page_size, slots.data(), kv_heads, d);
    });
    const std::vector<float> weight = floats(tokens * heads, -3, 3);
    Buffer part(dtype, tokens * heads * d);
    pair.same("merge_states", Buffer(dtype, tokens * heads * d), [&](Context* c, Buffer& out) {
        std::vector<float> merged(weight.size());
        return kv_merge_states(c, dtype, part.data(), weight.data(), part.data(), weight.data(),
                               tokens * heads, d, out.data(), merged.data());
    });

    // The same with pages of int8: entries of keys and values, then their scales.
    const int64_t scales = kv_heads * page_size, page_floats = (2 * span + 8 * scales) / 4;
    Buffer small(0, pages * page_floats);
    const auto entries = [](Buffer& b) { return static_cast<int8_t*>(b.data()); };
    const auto scales_of = [&](Buffer& b) { return static_cast<float*>(b.data()) + span / 2; };
    const auto store = [&](Context* c, Buffer& to, void* out) {
        return kv_rope_store(c, dtype, qkv.data(), (heads + 2 * kv_heads) * d, tokens,
                             positions.data(), cos_sin.data(), rotary, to.data(), 4 * page_floats,
                             entries(to) + span, 4 * page_floats, scales_of(to),
                             scales_of(to) + scales, page_floats, page_size, slots.data(),
                             normed ? norm.data() : nullptr, dtype, normed ? norm.data() : nullptr,
                             dtype, 1e-6f, 0, heads, kv_heads, d, out);
    };
    Buffer turned(dtype, tokens * heads * d);
    pair.same("rope_store int8", small, [&](Context* c, Buffer& to) {
        return store(c, to, turned.data());
    });
    pair.same("attention int8", Buffer(dtype, tokens * heads * d), [&](Context* c, Buffer& out) {
        std::vector<float> lse(static_cast<size_t>(tokens * heads));
        return kv_paged_attention(c, dtype, qkv.data(), heads * d, small.data(), 4 * page_floats,
                                  entries(small) + span, 4 * page_floats, scales_of(small),
                                  scales_of(small) + scales, page_floats, tables.data(), most,
                                  seq_lens.data(), starts.data(), num_seqs, heads, kv_heads, d,
                                  page_size, 0.1f, window, cap, sink ? sinks.data() : nullptr,
                                  out.data(), lse.data());
    });
    const int64_t pairs = pages / 2, bytes = 2 * span * (dtype == 0 ? 4 : 2);
    std::vector<int64_t> sources(order.begin(), order.begin() + pairs);
    std::vector<int64_t> targets(order.begin() + pairs, order.begin() + 2 * pairs);
    pair.same("copy_pages", pool, [&](Context* c, Buffer& out) {
        return kv_copy_pages(c, pool.bytes.data(), bytes, out.bytes.data(), bytes, bytes,
                             sources.data(), targets.data(), pairs);
    });
}

// A layer's work recorded and played twice: nothing is done while it is recorded, and its arguments
// may be gone when it is played. Another thread, and what ends a step, compute meanwhile.
void tapes(Pair& pair, int dtype) {
    const int64_t rows = between(1, 40), n = 2 * between(1, 60), k = between(1, 60);
    Buffer weight(dtype, n * k), x(dtype, rows * k), norm(dtype, k);
    Buffer panels = packed(pair, weight, n, k);
    std::vector<float> logits = floats(rows * k, -3, 3);
    const auto norms = [&](Context* c, Buffer& out) {
        return kv_norm(c, dtype, x.data(), k, nullptr, 0, rows, k, norm.data(), dtype, 0, 1e-6f,
                       out.data());
    };
    pair.same("tape", Buffer(dtype, rows * n / 2), [&](Context* c, Buffer& out) {
        Buffer normed(dtype, rows * k), wide(dtype, rows * n), other(dtype, rows * k);
        const Buffer untouched = normed;
        std::vector<float> scores(logits.size());
        Tape* tape = kv_record(c);
        if (!tape) return 1;
        int failed = norms(c, normed);
        failed |= kv_linear(c, dtype, normed.data(), k, rows, panels.data(), nullptr, nullptr, n, k,
                            wide.data(), 0);
        failed |= kv_gated(c, dtype, 0, wide.data(), n, rows, n / 2, out.data());
        failed |= kv_log_softmax(c, logits.data(), k, rows, k, scores.data());
        std::thread([&] { failed |= norms(c, other); }).join();
        kv_recorded();
        if (normed.bytes != untouched.bytes) Pair::fail("tape", "was played while it was recorded");
        if (scores[0] == 0 && k > 1) Pair::fail("tape", "took log-probabilities in");
        failed |= kv_play(tape);
        if (normed.bytes != other.bytes) Pair::fail("tape", "differs from what a thread computes");
        const Buffer first = out;
        std::fill(out.bytes.begin(), out.bytes.end(), 0);
        failed |= kv_play(tape);
        if (first.bytes != out.bytes) Pair::fail("tape", "differs when it is played again");
        kv_erase(tape);
        return failed;
    });
}

}  // namespace

int main(int argc, char** argv) {
    const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0;
    const int rounds = argc > 2 ? std::atoi(argv[2]) : 20;
    int ran = 0;
    for (int i = 0; i < kv_num_isas(); ++i) {
        const char* isa = kv_isa(i);
        if (!isa) continue;
        random_bits.seed(seed);
        Pair pair{kv_create(1, isa), kv_create(3, isa)};
        for (int round = 0; round < rounds; ++round) {
            for (int dtype = 0; dtype < 3; ++dtype) {
                linears(pair, dtype);
                row_operations(pair, dtype);
                attention(pair, dtype);
                tapes(pair, dtype);
            }
        }
        kv_destroy(pair.one);
        kv_destroy(pair.three);
        std::printf("%s ok\n", isa);
        ++ran;
    }
    return ran == 0;
}

// The C ABI: picks the kernels for this CPU, splits the work, and shares it out.
//
// Every function of work takes a context first, returns 0, 1 when memory ran out, or 2 where it
// says which input it refuses (nothing was promised about the outputs then). How work is split depends on sizes and threads, and changes
// when things are computed, never what.
//
// What makes up a model's layers can be recorded instead of done: a tape holds the calls with their
// pointers, and plays them as often as wanted in one call. Grouped weights, rows of a weight, samples
// and log-probabilities are always done at once.

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <new>
#include <utility>
#include <vector>

#include "amx.h"
#include "cpu.h"
#include "cut_attention.h"
#include "isa.h"
#include "pool.h"
#include "sample.h"

#define KV_API extern "C" __attribute__((visibility("default")))

namespace kv {

namespace {

// Numbers of x that are packed at once, in whole rows.
constexpr int64_t kPackedNumbers = 4 << 20;
// Less work than this (about 10 microseconds) isn't worth another thread.
constexpr int64_t kMinProducts = 1 << 18;  // multiply-adds
constexpr int64_t kMinElements = 1 << 15;  // elements read, of row operations

struct Context {
    Pool pool;
    const Kernels& kernels;

    Context(int threads, const Kernels& k) : pool(threads), kernels(k) {}

    // Threads worth waking for `work`, of which `least` deserves one.
    int threads_for(int64_t work, int64_t least) const {
        return static_cast<int>(std::min<int64_t>(pool.threads(), 1 + work / least));
    }
};

template <typename F>
int guarded(F f) noexcept {
    try {
        f();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

struct Tape {
    Context& context;
    std::vector<std::function<void()>> calls;
};

// What this thread records to, or null. Other threads' work is done meanwhile, as ever.
thread_local Tape* recording = nullptr;

// Does f, or takes it into the tape. It holds all that it needs by value.
template <typename F>
int perform(Context* context, F f) noexcept {
    return guarded([&] {
        if (recording && &recording->context == context) {
            recording->calls.emplace_back(std::move(f));
        } else {
            f();
        }
    });
}

// Best first; null where this CPU can't.
const Kernels* usable(int i) {
    switch (i) {
        case 0:
            return amx_bf16();
        case 1:
            return cpu_has_avx512_bf16() ? kAvx512Bf16 : nullptr;
        case 2:
            return cpu_has_avx512() ? kAvx512 : nullptr;
        case 3:
            return cpu_has_avx2() ? kAvx2 : nullptr;
        case 4:
            return kPortable;
        default:
            return nullptr;
    }
}
constexpr int kNumIsas = 5;

// Rows of x for one weight, and where their products go.
struct LinearPart {
    const char* x;
    int64_t x_stride;  // in elements
    const int64_t* rows;  // which rows of x and out; null: the first ones
    int64_t num_rows;
    const void *weight, *bias;
    const float* scales;  // of an int8 weight, else null
    char* out;
};

// What all parts of a linear share.
struct LinearShape {
    int dtype;  // of x
    int weight;
    int64_t n, k;
    bool out_float32;
};

// Large pieces first and small ones last, so that all threads end at about the same time.
void cut_linear(const LinearTask& task, int64_t num_panels, int threads,
                std::vector<LinearPiece>& pieces) {
    const int64_t num_tiles = task.num_tiles;
    const auto cut = [&](int64_t begin, int64_t end, int64_t parts) {
        for (int64_t p = 0; p < parts; ++p) {
            pieces.push_back({&task, begin, end, p * num_tiles / parts, (p + 1) * num_tiles / parts});
        }
    };
    constexpr int64_t kLeast = 4;  // panels: what the smallest tiles take at once
    for (int64_t begin = 0; begin < num_panels;) {
        const int64_t share = (num_panels - begin) / (2 * threads) / kLeast * kLeast;
        const int64_t end = std::min(num_panels, begin + std::max(share, kLeast));
        cut(begin, end, share > kLeast ? 1 : std::clamp<int64_t>(num_tiles / 4, 1, 4 * threads));
        begin = end;
    }
}

// Rows are packed first, then the products are shared out.
void multiply(Context& context, const LinearShape& shape, const std::vector<LinearPart>& parts) {
    const Kernels& kernels = context.kernels;
    const int64_t k = shape.k, num_panels = ceil_div(shape.n, kPanelCols);
    const int64_t item_bytes = shape.weight == kInt8 ? 1 : dtype_bytes(shape.dtype);
    const int64_t steps = ceil_div(k * item_bytes, kWordBytes);
    const int64_t row_bytes = steps * kernels.row_step_bytes[shape.weight][shape.dtype];

    int64_t num_rows = 0;
    for (const LinearPart& part : parts) num_rows += part.num_rows;
    // Kept from call to call: memory that was touched before costs nothing.
    static thread_local std::vector<char> memory;
    const size_t num_bytes = static_cast<size_t>(num_rows * row_bytes);
    if (memory.size() < num_bytes) memory.resize(num_bytes);
    char* packed = memory.data();
    std::vector<float> scales(shape.weight == kInt8 ? static_cast<size_t>(num_rows) : 0);
    float* row_scales = scales.empty() ? nullptr : scales.data();

    struct Tile {
        PackTask rows;
        int64_t begin, end;
        char* out;
    };
    std::vector<LinearTask> tasks;
    tasks.reserve(parts.size());
    std::vector<Tile> tiles;
    std::vector<LinearPiece> pieces;
    const int threads = context.threads_for(num_rows * shape.n * std::max<int64_t>(k, 1), kMinProducts);
    for (const LinearPart& part : parts) {
        const int64_t num_tiles = ceil_div(part.num_rows, kernels.tile_rows[shape.weight][shape.dtype]);
        for (int64_t t = 0; t < num_tiles; ++t) {
            const int64_t begin = t * part.num_rows / num_tiles;
            tiles.push_back({{part.x, part.x_stride, part.rows, k, row_scales},
                             begin,
                             (t + 1) * part.num_rows / num_tiles,
                             packed + begin * row_bytes});
        }
        tasks.push_back({packed, part.num_rows, num_tiles, part.rows, part.weight, part.scales,
                         row_scales, part.bias, part.out, shape.n, steps, shape.out_float32});
        cut_linear(tasks.back(), num_panels, threads, pieces);
        packed += part.num_rows * row_bytes;
        if (row_scales) row_scales += part.num_rows;
    }
    context.pool.run(static_cast<int64_t>(tiles.size()),
                     context.threads_for(num_rows * k, kMinElements), [&](int64_t i) {
                         const Tile& tile = tiles[static_cast<size_t>(i)];
                         kernels.pack_rows[shape.weight][shape.dtype](tile.rows, tile.begin, tile.end, tile.out);
                     });
    // With several tiles a thread takes its next piece before it does one, to fetch it meanwhile.
    std::atomic<size_t> taken{0};
    context.pool.run(threads, threads, [&](int64_t) {
        bool is_fetched = false;
        for (size_t i = taken++; i < pieces.size();) {
            const LinearPiece& piece = pieces[i];
            const bool fetches = piece.tile_end - piece.tile_begin > 1;
            if (fetches) i = taken++;
            kernels.linear[shape.weight][shape.dtype](
                piece, fetches && i < pieces.size() ? &pieces[i] : nullptr, is_fetched);
            if (!fetches) i = taken++;
            is_fetched = fetches;
        }
    });
}

// So many rows at a time as may be packed at once.
void run_linear(Context& context, const LinearShape& shape, const std::vector<LinearPart>& parts) {
    const int64_t out_bytes = shape.out_float32 ? 4 : dtype_bytes(shape.dtype);
    const int64_t at_once = std::max<int64_t>(kPackedNumbers / std::max<int64_t>(shape.k, 1), 1);
    std::vector<LinearPart> batch;
    int64_t room = at_once;
    for (LinearPart part : parts) {
        while (part.num_rows > 0) {
            batch.push_back(part);
            const int64_t taken = batch.back().num_rows = std::min(room, part.num_rows);
            part.num_rows -= taken;
            room -= taken;
            if (part.rows) {
                part.rows += taken;
            } else {
                part.x += taken * part.x_stride * dtype_bytes(shape.dtype);
                part.out += taken * shape.n * out_bytes;
            }
            if (room == 0) {
                multiply(context, shape, batch);
                batch.clear();
                room = at_once;
            }
        }
    }
    if (!batch.empty()) multiply(context, shape, batch);
}

// f(begin, end) over blocks of rows that are `width` wide, which may be nothing.
template <typename F>
void run_rows(Context& context, int64_t rows, int64_t width, F f) {
    width = std::max<int64_t>(width, 1);
    const int threads = context.threads_for(rows * width, kMinElements);
    const int64_t block =
        std::max<int64_t>(1, std::min(ceil_div(rows, 4 * threads), ceil_div(kMinElements, width)));
    context.pool.run(ceil_div(rows, block), threads, [&](int64_t i) {
        f(i * block, std::min(rows, (i + 1) * block));
    });
}

// A weight's rows to panels; zeros behind the last column and the last row.
void pack_weight(Context& context, const char* weight, int64_t n, int64_t row_bytes, char* out) {
    const int64_t steps = ceil_div(row_bytes, kWordBytes);
    const int64_t whole = row_bytes / kWordBytes;
    context.pool.run(ceil_div(n, kPanelCols), context.pool.threads(), [&](int64_t panel) {
        char* to = out + panel * steps * kStepBytes;
        const int64_t cols = std::min(kPanelCols, n - panel * kPanelCols);
        if (cols < kPanelCols || whole < steps) {
            std::memset(to, 0, static_cast<size_t>(steps * kStepBytes));
        }
        const char* from = weight + panel * kPanelCols * row_bytes;
        // A cache line of each row at a time.
        for (int64_t chunk = 0; chunk < steps; chunk += 16) {
            const int64_t end = std::min(chunk + 16, whole);
            for (int64_t c = 0; c < cols; ++c) {
                const char* row = from + c * row_bytes;
                char* lane = to + c * kWordBytes;
                for (int64_t s = chunk; s < end; ++s) {
                    std::memcpy(lane + s * kStepBytes, row + s * kWordBytes, kWordBytes);
                }
            }
        }
        for (int64_t c = 0; c < cols && whole < steps; ++c) {
            std::memcpy(to + whole * kStepBytes + c * kWordBytes,
                        from + c * row_bytes + whole * kWordBytes,
                        static_cast<size_t>(row_bytes - whole * kWordBytes));
        }
    });
}

// Rows of a packed weight, as they were.
void unpack_rows(Context& context, const char* packed, int64_t row_bytes, const int64_t* ids,
                 int64_t num_ids, char* out) {
    const int64_t steps = ceil_div(row_bytes, kWordBytes);
    run_rows(context, num_ids, row_bytes, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const char* from = packed + ids[i] / kPanelCols * steps * kStepBytes +
                               ids[i] % kPanelCols * kWordBytes;
            char* to = out + i * row_bytes;
            const int64_t whole = row_bytes / kWordBytes;
            for (int64_t s = 0; s < whole; ++s) {
                std::memcpy(to + s * kWordBytes, from + s * kStepBytes, kWordBytes);
            }
            std::memcpy(to + whole * kWordBytes, from + whole * kStepBytes,
                        static_cast<size_t>(row_bytes - whole * kWordBytes));
        }
    });
}

void run_attention(Context& context, int dtype, AttentionTask task, const Sequences& seqs) {
    const int64_t pairs = count_pairs(task, seqs);
    const int threads =
        context.threads_for(pairs * task.num_heads * task.head_dim * 2, kMinProducts);
    const AttentionCut cut = cut_attention(task, seqs, pairs, threads);
    // Kept from call to call: memory that was touched before costs nothing.
    static thread_local std::vector<float> partials;
    if (partials.size() < cut.num_floats) {
        partials.clear();  // nothing of it is wanted
        partials.resize(cut.num_floats);
    }
    task.queries = cut.queries.data();
    task.partials = partials.data();
    const auto attend =
        task.key_scales ? context.kernels.attend_int8[dtype] : context.kernels.attend[dtype];
    context.pool.run(static_cast<int64_t>(cut.pieces.size()), threads, [&](int64_t i) {
        attend(task, cut.pieces[static_cast<size_t>(i)]);
    });
    context.pool.run(static_cast<int64_t>(cut.merges.size()), threads, [&](int64_t i) {
        context.kernels.merge_splits[dtype](task, cut.merges[static_cast<size_t>(i)]);
    });
}

}  // namespace

}  // namespace kv

using kv::Context;

// Raised with every change of this interface: Python refuses a library of another version.
KV_API int kv_version() { return 6; }

// The i-th instruction set, best first, or null: unusable here. Ends with i == kv_num_isas().
KV_API int kv_num_isas() { return kv::kNumIsas; }
KV_API const char* kv_isa(int i) {
    const kv::Kernels* kernels = kv::usable(i);
    return kernels ? kernels->name : nullptr;
}

// Null if the instruction set isn't usable here.
KV_API Context* kv_create(int threads, const char* isa) {
    for (int i = 0; i < kv::kNumIsas; ++i) {
        const kv::Kernels* kernels = kv::usable(i);
        if (kernels && std::strcmp(kernels->name, isa) == 0) {
            return new (std::nothrow) Context(threads, *kernels);
        }
    }
    return nullptr;
}
// How many it really has: fewer than asked for where the system gives no more.
KV_API int kv_threads(const Context* context) { return context->pool.threads(); }
KV_API void kv_destroy(Context* context) { delete context; }

// From here on this thread's work of `context` goes to a tape, until `kv_recorded`. Null: no memory.
KV_API kv::Tape* kv_record(Context* context) {
    return kv::recording = new (std::nothrow) kv::Tape{*context, {}};
}
KV_API void kv_recorded() { kv::recording = nullptr; }
// Does all that was recorded, in order. What the pointers lead to must still be there.
KV_API int kv_play(const kv::Tape* tape) {
    return kv::guarded([&] {
        for (const auto& call : tape->calls) call();
    });
}
KV_API void kv_erase(kv::Tape* tape) { delete tape; }

// Bytes of a packed weight: n rounded up to whole panels, rows to whole words.
KV_API int64_t kv_packed_bytes(int64_t n, int64_t row_bytes) {
    return kv::ceil_div(n, kv::kPanelCols) * kv::ceil_div(row_bytes, kv::kWordBytes) * kv::kStepBytes;
}
KV_API int kv_pack_weight(Context* context, const void* weight, int64_t n, int64_t row_bytes,
                          void* out) {
    kv::pack_weight(*context, static_cast<const char*>(weight), n, row_bytes,
                    static_cast<char*>(out));
    return 0;
}
KV_API int kv_unpack_rows(Context* context, const void* packed, int64_t row_bytes,
                          const int64_t* ids, int64_t num_ids, void* out) {
    return kv::guarded([&] {
        kv::unpack_rows(*context, static_cast<const char*>(packed), row_bytes, ids, num_ids,
                        static_cast<char*>(out));
    });
}

// `scales` of an int8 weight, else null: of each column, whole panels, then int32 column sums.
KV_API int kv_linear(Context* context, int dtype, const void* x, int64_t x_stride, int64_t rows,
                     const void* weight, const float* scales, const void* bias, int64_t n,
                     int64_t k, void* out, int out_float32) {
    return kv::perform(context, [=] {
        kv::run_linear(*context, {dtype, scales ? kv::kInt8 : kv::kSame, n, k, out_float32 != 0},
                       {{static_cast<const char*>(x), x_stride, nullptr, rows, weight, bias, scales,
                         static_cast<char*>(out)}});
    });
}

// 2: a row's expert is none of them; nothing was done.
KV_API int kv_grouped_linear(Context* context, int dtype, const void* x, int64_t x_stride,
                             int64_t rows, const int64_t* expert_of_row, const void* const* weights,
                             const float* const* scales, const void* const* biases,
                             int64_t num_experts, int64_t n, int64_t k, void* out) {
    for (int64_t r = 0; r < rows; ++r) {
        if (expert_of_row[r] < 0 || expert_of_row[r] >= num_experts) return 2;
    }
    return kv::guarded([&] {
        // The rows of each expert side by side, in their order.
        std::vector<std::vector<int64_t>> rows_of(static_cast<size_t>(num_experts));
        for (int64_t r = 0; r < rows; ++r) {
            rows_of[static_cast<size_t>(expert_of_row[r])].push_back(r);
        }
        std::vector<kv::LinearPart> parts;
        for (size_t e = 0; e < rows_of.size(); ++e) {
            parts.push_back({static_cast<const char*>(x), x_stride, rows_of[e].data(),
                             static_cast<int64_t>(rows_of[e].size()), weights[e], biases[e], scales[e],
                             static_cast<char*>(out)});
        }
        kv::run_linear(*context, {dtype, scales[0] ? kv::kInt8 : kv::kSame, n, k, false}, parts);
    });
}

KV_API int kv_norm(Context* context, int dtype, const void* x, int64_t x_stride, void* residual,
                   int64_t residual_stride, int64_t rows, int64_t width, const void* weight,
                   int weight_dtype, float weight_offset, float eps, void* out) {
    const kv::NormTask task{x,       x_stride,     residual,      residual_stride,
                            weight,  weight_dtype, weight_offset, eps,
                            out,     width};
    return kv::perform(context, [=] {
        kv::run_rows(*context, rows, width, [&](int64_t begin, int64_t end) {
            context->kernels.norm[dtype](task, begin, end);
        });
    });
}

KV_API int kv_gated(Context* context, int dtype, int gate, const void* gate_up, int64_t stride,
                    int64_t rows, int64_t width, void* out) {
    const kv::GatedTask task{gate_up, stride, out, width, gate};
    return kv::perform(context, [=] {
        kv::run_rows(*context, rows, 4 * width, [&](int64_t begin, int64_t end) {
            context->kernels.gated[dtype](task, begin, end);
        });
    });
}

KV_API int kv_rope_store(Context* context, int dtype, const void* qkv, int64_t qkv_stride,
                         int64_t rows, const int32_t* positions, const float* cos_sin,
                         int64_t rotary_dim, void* key_pages, int64_t key_page_stride,
                         void* value_pages, int64_t value_page_stride, float* key_scales,
                         float* value_scales, int64_t scale_page_stride, int64_t page_size,
                         const int64_t* slots, const void* q_norm, int q_norm_dtype,
                         const void* k_norm, int k_norm_dtype, float eps, float weight_offset,
                         int64_t num_heads, int64_t num_kv_heads, int64_t head_dim,
                         void* query_out) {
    const int64_t bytes = head_dim * kv::dtype_bytes(dtype);
    const char* key = static_cast<const char*>(qkv) + num_heads * bytes;
    kv::RopeTask task{};
    task.query = qkv;
    task.key = key;
    task.value = key + num_kv_heads * bytes;
    task.query_stride = task.key_stride = task.value_stride = qkv_stride;
    task.positions = positions;
    task.cos_sin = cos_sin;
    task.key_pages = key_pages;
    task.value_pages = value_pages;
    task.key_page_stride = key_page_stride;
    task.value_page_stride = value_page_stride;
    task.key_scales = key_scales;
    task.value_scales = value_scales;
    task.scale_page_stride = scale_page_stride;
    task.slots = slots;
    task.q_norm = q_norm;
    task.k_norm = k_norm;
    task.q_norm_dtype = q_norm_dtype;
    task.k_norm_dtype = k_norm_dtype;
    task.eps = eps;
    task.weight_offset = weight_offset;
    task.query_out = query_out;
    task.num_heads = num_heads;
    task.num_kv_heads = num_kv_heads;
    task.head_dim = head_dim;
    task.page_size = page_size;
    task.rotary_dim = rotary_dim;
    const int64_t width = (num_heads + 2 * num_kv_heads) * head_dim;
    return kv::perform(context, [=] {
        kv::run_rows(*context, rows, 2 * width, [&](int64_t begin, int64_t end) {
            context->kernels.rope_store[dtype](task, begin, end);
        });
    });
}

KV_API int kv_store_kv(Context* context, int dtype, const void* key, int64_t key_stride,
                       const void* value, int64_t value_stride, int64_t rows, void* key_pages,
                       int64_t key_page_stride, void* value_pages, int64_t value_page_stride,
                       float* key_scales, float* value_scales, int64_t scale_page_stride,
                       int64_t page_size, const int64_t* slots, int64_t num_kv_heads,
                       int64_t head_dim) {
    kv::RopeTask task{};  // no queries, and nothing turns
    task.key = key;
    task.value = value;
    task.key_stride = key_stride;
    task.value_stride = value_stride;
    task.key_pages = key_pages;
    task.value_pages = value_pages;
    task.key_page_stride = key_page_stride;
    task.value_page_stride = value_page_stride;
    task.key_scales = key_scales;
    task.value_scales = value_scales;
    task.scale_page_stride = scale_page_stride;
    task.slots = slots;
    task.num_kv_heads = num_kv_heads;
    task.head_dim = head_dim;
    task.page_size = page_size;
    return kv::perform(context, [=] {
        kv::run_rows(*context, rows, 4 * num_kv_heads * head_dim, [&](int64_t begin, int64_t end) {
            context->kernels.rope_store[dtype](task, begin, end);
        });
    });
}

KV_API int kv_paged_attention(Context* context, int dtype, const void* query, int64_t query_stride,
                              const void* key_pages, int64_t key_page_stride,
                              const void* value_pages, int64_t value_page_stride,
                              const float* key_scales, const float* value_scales,
                              int64_t scale_page_stride, const int32_t* page_tables, int64_t table_stride,
                              const int32_t* seq_lens, const int32_t* query_starts,
                              int64_t num_seqs, int64_t num_heads, int64_t num_kv_heads,
                              int64_t head_dim, int64_t page_size, float scale, int64_t window,
                              float soft_cap, const float* sinks, void* out, float* lse) {
    return kv::perform(context, [=] {
        const kv::AttentionTask task{query,           query_stride, key_pages,    value_pages,
                                     key_page_stride, value_page_stride, key_scales,
                                     value_scales,    scale_page_stride, out,     num_heads,
                                     num_kv_heads,    head_dim,     page_size,    scale,
                                     window,          soft_cap,     sinks,        lse,
                                     nullptr,         nullptr};
        kv::run_attention(*context, dtype, task,
                          {page_tables, table_stride, seq_lens, query_starts, num_seqs});
    });
}

KV_API int kv_merge_states(Context* context, int dtype, const void* a, const float* a_lse,
                           const void* b, const float* b_lse, int64_t rows, int64_t width,
                           void* out, float* lse) {
    const kv::MergeTask task{a, b, a_lse, b_lse, out, lse, width};
    return kv::perform(context, [=] {
        kv::run_rows(*context, rows, 3 * width, [&](int64_t begin, int64_t end) {
            context->kernels.merge_states[dtype](task, begin, end);
        });
    });
}

KV_API int kv_log_softmax(Context* context, const float* logits, int64_t stride, int64_t rows,
                          int64_t width, float* out) {
    return kv::guarded([&] {
        kv::run_rows(*context, rows, 4 * width, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                context->kernels.log_softmax(logits + r * stride, out + r * width, width);
            }
        });
    });
}

KV_API int kv_sample(Context* context, const float* logits, int64_t stride, int64_t rows,
                     int64_t width, const float* temperature, const int32_t* top_k,
                     const float* top_p, const float* min_p, const int64_t* seeds,
                     const int32_t* output_indices, const int32_t* positions, int64_t* out) {
    return kv::guarded([&] {
        std::atomic<int> failed{0};
        kv::run_rows(*context, rows, 4 * width, [&](int64_t begin, int64_t end) {
            for (int64_t r = begin; r < end; ++r) {
                failed |= kv::guarded([&] {
                    out[r] = kv::sample(
                        context->kernels,
                        {logits + r * stride, width, temperature[r], top_k[r], top_p[r], min_p[r],
                         static_cast<uint64_t>(seeds[r]),
                         static_cast<uint32_t>(output_indices[r]),
                         static_cast<uint32_t>(positions[r])});
                });
            }
        });
        if (failed) throw std::bad_alloc();
    });
}

KV_API int kv_copy_pages(Context* context, const char* from, int64_t from_stride_bytes, char* to,
                         int64_t to_stride_bytes, int64_t page_bytes, const int64_t* sources,
                         const int64_t* targets, int64_t pages) {
    return kv::perform(context, [=] {
        kv::run_rows(*context, pages, page_bytes, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) {
                std::memcpy(to + targets[i] * to_stride_bytes,
                            from + sources[i] * from_stride_bytes,
                            static_cast<size_t>(page_bytes));
            }
        });
    });
}

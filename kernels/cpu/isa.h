// What one instruction set offers: a table of kernels, filled once per isa_*.cpp.
//
// The kernels are written once, over 16-lane vectors (vec_*.h), and compiled once per instruction
// set; native.cpp has the work split and calls through the table that fits the CPU. A kernel computes
// one block of the output and shares nothing with other blocks, so that results don't depend on
// how the work was split.
//
// Every header that the kernels need stands here: an isa_*.cpp includes it before it changes the
// compilation target, so that no function of the standard library is compiled for a newer CPU than
// the one it may be linked for.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define KV_X86 1
// GCC 12 takes the undefined lanes of its own intrinsics for mistakes.
#if !defined(__clang__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
#else
#define KV_X86 0
#endif

// Where AMX can be compiled and asked for, or tests compute it in plain C++.
#if defined(KV_TILES_EMULATED)
#define KV_AMX 1
#elif KV_X86 && defined(__linux__) && defined(__clang__)
#define KV_AMX (__clang_major__ >= 18)
#elif KV_X86 && defined(__linux__)
#define KV_AMX (__GNUC__ >= 11)
#else
#define KV_AMX 0
#endif

namespace kv {

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// The codes that Python passes.
enum Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2 };
constexpr int kNumDtypes = 3;

inline int64_t dtype_bytes(int dtype) { return dtype == kFloat32 ? 4 : 2; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Strides count elements unless a name says bytes.

// A weight's panel: so many columns, a word of each to a step.
constexpr int64_t kPanelCols = 16;
constexpr int64_t kWordBytes = 4;
constexpr int64_t kStepBytes = kPanelCols * kWordBytes;

// Whether a weight is of x's dtype, or int8 with a scale for each column.
enum Weight : int { kSame = 0, kInt8 = 1 };
constexpr int kNumWeights = 2;

// Rows of x, to be packed for a linear.
struct PackTask {
    const void* x;
    int64_t x_stride;
    const int64_t* rows;  // row r of the task is row rows[r] of x; null: row r
    int64_t k;
    float* scales;  // int8 weights: what row r of the task is to be multiplied with again
};

struct LinearTask {
    const void* x;  // packed: tile t has rows [t * num_rows / num_tiles, (t + 1) * ...)
    int64_t num_rows, num_tiles;
    const int64_t* rows;  // row r of the task is row rows[r] of out; null: row r
    const void* weight;   // packed
    const float* scales;  // int8: of each column, whole panels, and behind them int32 column sums
    const float* x_scales;  // int8: of each packed row
    const void* bias;     // [n] or null
    void* out;            // rows of n
    int64_t n, steps;
    bool out_float32;  // out holds float32 whatever x is
};

// Some panels of a linear by some of its tiles: one thread's work.
struct LinearPiece {
    const LinearTask* task;
    int64_t panel_begin, panel_end, tile_begin, tile_end;
};

struct NormTask {
    const void* x;
    int64_t x_stride;
    void* residual;  // null: norm of x; else residual += x, then norm of the residual
    int64_t residual_stride;
    const void* weight;
    int weight_dtype;
    float weight_offset, eps;
    void* out;
    int64_t width;
};

enum Gate : int { kSilu = 0, kGelu = 1 };

struct GatedTask {
    const void* gate_up;
    int64_t stride;
    void* out;
    int64_t width;  // of the output
    int gate;
};

struct RopeTask {
    const void *query, *key, *value;  // rows of heads
    int64_t query_stride, key_stride, value_stride;
    const int32_t* positions;  // null with rotary_dim 0: nothing turns
    const float* cos_sin;      // [max_positions, rotary_dim]: cosines, then sines
    void *key_pages, *value_pages;
    int64_t key_page_stride, value_page_stride;
    float *key_scales, *value_scales;  // null: pages hold what qkv does; else int8
    int64_t scale_page_stride;
    const int64_t* slots;
    const void *q_norm, *k_norm;  // [head_dim] or null
    int q_norm_dtype, k_norm_dtype;
    float eps, weight_offset;
    void* query_out;  // [T, num_heads, head_dim]
    int64_t num_heads, num_kv_heads, head_dim, page_size, rotary_dim;
};

// Two means of one query's values over different keys, and the log of each one's weights' sum.
struct MergeTask {
    const void *a, *b;
    const float *a_lse, *b_lse;  // -infinity: that one isn't read
    void* out;
    float* lse;
    int64_t width;
};

// Keys are taken in splits of this many, at absolute positions: a query's partial sums, and the
// order in which they are merged, depend on its position alone.
constexpr int64_t kSplit = 256;
// Query rows (tokens x heads) that are computed together at most where a KV head has few of them, or
// nothing is won by turning keys.
constexpr int kMaxRows = 64;
// From so many rows of one KV head on, an item is one KV head's, of kItemRows at most, of which
// kBlockRows are multiplied at a time.
constexpr int kManyRows = 17;
constexpr int kBlockRows = 48;
constexpr int kItemRows = 192;
constexpr int64_t kMaxHeadDim = 512;
// A row's sums are kept in units of 32.
constexpr int64_t padded_head(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }
// Elements of all rows of an item at most, so padded: 192 rows of 128, 48 of 512.
constexpr int64_t kItemNumbers = kItemRows * 128;
static_assert(kBlockRows * kMaxHeadDim <= kItemNumbers);
static_assert(kItemRows % kBlockRows == 0 && kBlockRows <= kMaxRows);
// Of one row and split: max, sum, weighted values.
constexpr int64_t partial_floats(int64_t head_dim) { return 2 + padded_head(head_dim); }

// A query that sees the keys up to its own.
struct AttentionQuery {
    int32_t token;     // its row of the step
    int32_t position;  // of its own key
    // What is kept apart of it: [num_heads][split - first_split][partial_floats].
    int64_t first_split, num_splits;
    int64_t partials;  // where in the task's
};

struct AttentionTask {
    const void* query;  // [T, num_heads, head_dim], dense but for the first stride
    int64_t query_stride;
    const void *key_pages, *value_pages;
    int64_t key_page_stride, value_page_stride;
    const float *key_scales, *value_scales;  // with int8 pages
    int64_t scale_page_stride;
    void* out;  // [T, num_heads, head_dim]
    int64_t num_heads, num_kv_heads, head_dim, page_size;
    float scale;
    int64_t window;  // 0: none
    float soft_cap;  // 0: none
    const float* sinks;
    float* lse;  // [T, num_heads], or null
    const AttentionQuery* queries;
    float* partials;
};

// A block of queries that find their keys in the same pages, for some heads. With several KV heads,
// all of their group's query heads; with one, the query heads [group_begin, group_end) of its group.
struct AttentionItem {
    int64_t first_query, num_queries;  // of the task's
    const int32_t* page_table;
    int32_t kv_head_begin, kv_head_end;
    int32_t group_begin, group_end;
    int64_t first_split, num_splits;  // to be computed
    bool is_apart;  // one split, to its place of the queries' partials; else all, into the output
};

struct Kernels {
    const char* name;

    // Linears: rows of a tile at most, bytes of a packed row and step, packing, products.
    int64_t tile_rows[kNumWeights][kNumDtypes];
    int64_t row_step_bytes[kNumWeights][kNumDtypes];
    void (*pack_rows[kNumWeights][kNumDtypes])(const PackTask&, int64_t row_begin, int64_t row_end,
                                               void* out);
    // `next`: what the thread does after this, or null; its weight is fetched meanwhile, and
    // `is_fetched` says whether that happened to this piece.
    void (*linear[kNumWeights][kNumDtypes])(const LinearPiece&, const LinearPiece* next,
                                            bool is_fetched);
    void (*norm[kNumDtypes])(const NormTask&, int64_t row_begin, int64_t row_end);
    void (*gated[kNumDtypes])(const GatedTask&, int64_t row_begin, int64_t row_end);
    void (*rope_store[kNumDtypes])(const RopeTask&, int64_t row_begin, int64_t row_end);
    void (*attend[kNumDtypes])(const AttentionTask&, const AttentionItem&);
    void (*attend_int8[kNumDtypes])(const AttentionTask&, const AttentionItem&);
    // Merges the partials of the item's queries, in split order, into the output.
    void (*merge_splits[kNumDtypes])(const AttentionTask&, const AttentionItem&);
    void (*merge_states[kNumDtypes])(const MergeTask&, int64_t row_begin, int64_t row_end);

    void (*log_softmax)(const float* logits, float* out, int64_t width);
    // The largest number of a row (NaN apart), and the largest of each kMaxBlock of them.
    float (*block_max)(const float* logits, int64_t width, float* maxima);
    // exp((logit - max) * inverse_temperature); 1 where equal to max, 0 for NaN. Returns nothing;
    // the sums of each kMaxBlock weights go to `sums`.
    void (*weights)(const float* logits, int64_t width, float max, float inverse_temperature,
                    float* weights, double* sums);
};
constexpr int64_t kMaxBlock = 64;

// Null where the compiler can't build it for this architecture.
extern const Kernels* const kPortable;
extern const Kernels* const kAvx2;
extern const Kernels* const kAvx512;
extern const Kernels* const kAvx512Bf16;

// What AMX does otherwise than kAvx512Bf16: linears of bfloat16.
struct TileKernels {
    int64_t tile_rows, row_step_bytes;
    void (*pack_rows)(const PackTask&, int64_t row_begin, int64_t row_end, void* out);
    void (*linear)(const LinearPiece&, const LinearPiece* next, bool is_fetched);
};
extern const TileKernels* const kAmxBf16;

}  // namespace kv

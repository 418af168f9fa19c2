// AVX-512 with products of pairs of bfloat16, and of bytes: every CPU that has the first has both.
#include "isa.h"

#if KV_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#define KV_BF16_DOT
#include "vec_avx512.h"

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

namespace kv {
#if KV_X86
static constexpr Kernels kTable = kernels_named("avx512_bf16");
const Kernels* const kAvx512Bf16 = &kTable;
#else
const Kernels* const kAvx512Bf16 = nullptr;
#endif
}  // namespace kv

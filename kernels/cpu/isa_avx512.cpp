// AVX-512 without products of bfloat16: those are widened first.
#include "isa.h"

#if KV_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif

#include "vec_avx512.h"

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

namespace kv {
#if KV_X86
static constexpr Kernels kTable = kernels_named("avx512f");
const Kernels* const kAvx512 = &kTable;
#else
const Kernels* const kAvx512 = nullptr;
#endif
}  // namespace kv

// AVX2 and FMA.
#include "isa.h"

#if KV_X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#include "vec_avx2.h"

#include "table.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

namespace kv {
#if KV_X86
static constexpr Kernels kTable = kernels_named("avx2");
const Kernels* const kAvx2 = &kTable;
#else
const Kernels* const kAvx2 = nullptr;
#endif
}  // namespace kv

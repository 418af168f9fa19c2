// Linears of bfloat16 by AMX. Attention and everything else are those of AVX-512: see amx.cpp.
#include "isa.h"

// Tests compute the tiles in plain C++, with the portable vectors (KV_TILES_EMULATED).
#if defined(KV_TILES_EMULATED)
#include "vec_portable.h"
#elif KV_AMX
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("amx-tile,amx-bf16,avx512bf16,avx512vnni,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")
#endif
#define KV_BF16_DOT
#include "vec_avx512.h"
#endif

#if KV_AMX
#include "tiles.h"

#if defined(__clang__) && !defined(KV_TILES_EMULATED)
#pragma clang attribute pop
#endif
#endif

namespace kv {
#if KV_AMX
static constexpr TileKernels kTable = {2 * kRowsOfTile, TileProducts::kRowStepBytes,
                                       pack_rows_for_tiles, linear<bf16, bf16, TileProducts>};
const TileKernels* const kAmxBf16 = &kTable;
#else
const TileKernels* const kAmxBf16 = nullptr;
#endif
}  // namespace kv

// AMX: the kernels of AVX-512 with linears of bfloat16 by tiles.
#pragma once

#include "isa.h"

namespace kv {

// Null where tiles can't be used: the compiler, the CPU or the system doesn't have them, or a trial
// came out wrong. Asks and tries once.
const Kernels* amx_bf16();

}  // namespace kv

// Any CPU: what the compiler makes of 128-bit vectors.
#include "isa.h"

#include "vec_portable.h"

#include "table.h"

namespace kv {
static constexpr Kernels kTable = kernels_named("portable");
const Kernels* const kPortable = &kTable;
}  // namespace kv

// Choosing one token of a row of logits. The meaning stands at `sample` in kernels/ops.py.
#pragma once

#include <cstdint>

#include "isa.h"

namespace kv {

struct SampleRow {
    const float* logits;
    int64_t width;
    float temperature;
    int32_t top_k;
    float top_p, min_p;
    uint64_t seed;
    uint32_t output_index, position;
};

// Throws std::bad_alloc.
int64_t sample(const Kernels& kernels, const SampleRow& row);

}  // namespace kv

// All kernels of one instruction set. Included last by each isa_*.cpp, after its vec_*.h.
#pragma once

#include "elementary.h"
#include "dot.h"
#include "linear.h"
#include "rows.h"
#include "rope.h"
#include "values.h"
#include "turned.h"
#include "attention.h"

namespace {

constexpr Kernels kernels_named(const char* name) {
    return {
        name,
        kLinearRows,
        {row_step_bytes<float>(), row_step_bytes<bf16>(), row_step_bytes<f16>()},
        {pack_rows<float>, pack_rows<bf16>, pack_rows<f16>},
        {linear<float>, linear<bf16>, linear<f16>},
        {norm<float>, norm<bf16>, norm<f16>},
        {gated<float>, gated<bf16>, gated<f16>},
        {rope_store<float>, rope_store<bf16>, rope_store<f16>},
        {attend<float>, attend<bf16>, attend<f16>},
        {merge_splits<float>, merge_splits<bf16>, merge_splits<f16>},
        log_softmax,
        block_max,
        weights,
    };
}

}  // namespace

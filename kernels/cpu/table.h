// All kernels of one instruction set. Included last by each isa_*.cpp, after its vec_*.h.
#pragma once

#include "elementary.h"
#include "dot.h"
#include "linear.h"
#include "rows.h"
#include "wide.h"
#include "rope.h"
#include "values.h"
#include "attention_block.h"
#include "turned.h"
#include "attention_few.h"
#include "attention_many.h"
#include "attention.h"

namespace {

constexpr Kernels kernels_named(const char* name) {
    return {
        name,
        {{Lanes<float>::kRows, Lanes<bf16>::kRows, Lanes<f16>::kRows},
         {Lanes<int8_t>::kRows, Lanes<int8_t>::kRows, Lanes<int8_t>::kRows}},
        {{row_step_bytes<float>(), row_step_bytes<bf16>(), row_step_bytes<f16>()},
         {row_step_bytes<int8_t>(), row_step_bytes<int8_t>(), row_step_bytes<int8_t>()}},
        {{pack_rows<float, float>, pack_rows<bf16, bf16>, pack_rows<f16, f16>},
         {pack_rows<float, int8_t>, pack_rows<bf16, int8_t>, pack_rows<f16, int8_t>}},
        {{linear<float, float>, linear<bf16, bf16>, linear<f16, f16>},
         {linear<float, int8_t>, linear<bf16, int8_t>, linear<f16, int8_t>}},
        {norm<float>, norm<bf16>, norm<f16>},
        {gated<float>, gated<bf16>, gated<f16>},
        {rope_store<float>, rope_store<bf16>, rope_store<f16>},
        {attend<float, float>, attend<bf16, bf16>, attend<f16, f16>},
        {attend<float, int8_t>, attend<bf16, int8_t>, attend<f16, int8_t>},
        {merge_splits<float>, merge_splits<bf16>, merge_splits<f16>},
        {merge_states<float>, merge_states<bf16>, merge_states<f16>},
        log_softmax,
        block_max,
        weights,
    };
}

}  // namespace

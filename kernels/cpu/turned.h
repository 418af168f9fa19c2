// Scores of many rows: keys are turned so that 16 of them stand in the 16 lanes.
//
// A product of two rows is summed in 16 lanes over the head, and the lanes over the tree of `sum4`.
// Here each of the 16 sums of a lane is a vector over 16 keys, so the tree adds vectors: the same
// sums in the same order, and nothing moves across lanes.
#pragma once

namespace {

// Only where it pays: see the specialisations.
template <typename T>
struct Turned {
    static constexpr bool kIs = false;
};

#if defined(KV_BF16_DOT)
template <>
struct Turned<bf16> {
    static constexpr bool kIs = true;
    static constexpr int kRows = 6;
    using Word = int32_t;  // two elements

    // out[pair][key] for 16 keys of `width` elements, null for none; zeros past their end.
    static void turn(const bf16* const* key, int64_t head_dim, Word (*out)[16]) {
        for (int64_t d = 0; d < head_dim; d += 32, out += 16) {
            const __mmask32 some = head_dim - d >= 32 ? ~__mmask32{0}
                                                      : (__mmask32{1} << (head_dim - d)) - 1;
            __m512i x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                x[i] = _mm512_maskz_loadu_epi16(key[i] ? some : 0, key[i] + d);
            }
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(out[i], x[i]);
        }
    }

    // The sums of one lane.
    template <int ROWS>
    static KV_INLINE void lane(const bf16* const* query, const Word (*keys)[16], int64_t width,
                               int at, Vec* sums) {
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = set1(0.0f);
        for (int64_t d = 0; d < width; d += 32) {
            const __m512i k = _mm512_load_si512(keys[d / 2 + at]);
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                int32_t pair;
                std::memcpy(&pair, query[r] + d + 2 * at, sizeof pair);
                sums[r].v = _mm512_dpbf16_ps(sums[r].v, (__m512bh)_mm512_set1_epi32(pair),
                                             (__m512bh)k);
            }
        }
    }
    // The sums of four lanes.
    template <int ROWS>
    static KV_INLINE void quarter(const bf16* const* query, const Word (*keys)[16],
                                  int64_t width, int at, Vec* sums) {
        Vec a[ROWS], b[ROWS];
        lane<ROWS>(query, keys, width, at, sums);
        lane<ROWS>(query, keys, width, at + 2, a);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + a[r];
        lane<ROWS>(query, keys, width, at + 1, a);
        lane<ROWS>(query, keys, width, at + 3, b);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + (a[r] + b[r]);
    }
    // out[row][0 .. 16] of `rows` rows at most, padded to `width`.
    template <int ROWS = kRows>
    static void dots(int rows, const bf16* const* query, const Word (*keys)[16], int64_t width,
                     float* const* out) {
        if constexpr (ROWS > 1) {
            if (rows < ROWS) return dots<ROWS - 1>(rows, query, keys, width, out);
        }
        Vec sums[ROWS], a[ROWS], b[ROWS];
        quarter<ROWS>(query, keys, width, 0, sums);
        quarter<ROWS>(query, keys, width, 8, a);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) sums[r] = sums[r] + a[r];
        quarter<ROWS>(query, keys, width, 4, a);
        quarter<ROWS>(query, keys, width, 12, b);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) store(out[r], sums[r] + (a[r] + b[r]));
    }
};
#endif

}  // namespace

// Sixteen float lanes in one AVX-512 register.
#pragma once

#define KV_AVX512

namespace {
using namespace kv;

#define KV_INLINE inline __attribute__((always_inline))

struct Vec {
    __m512 v;
};

KV_INLINE __mmask16 first(int n) { return static_cast<__mmask16>((1u << n) - 1); }

KV_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
KV_INLINE Vec iota() {
    return {_mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)};
}
KV_INLINE Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
KV_INLINE Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
KV_INLINE Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
KV_INLINE Vec operator/(Vec a, Vec b) { return {_mm512_div_ps(a.v, b.v)}; }
KV_INLINE Vec fma(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// b where either is NaN.
KV_INLINE Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
KV_INLINE Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
// yes where a < b, else no.
KV_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), no.v, yes.v)};
}
KV_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ), no.v, yes.v)};
}
KV_INLINE Vec round_even(Vec a) {
    return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
// x * 2^n for whole numbers n in [-126, 128].
KV_INLINE Vec scaled(Vec x, Vec n) { return {_mm512_scalef_ps(x.v, n.v)}; }

KV_INLINE float widen(float x) { return x; }
KV_INLINE float widen(bf16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x.bits << 16)));
}
KV_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
KV_INLINE Vec widen(__m256i bits, bf16) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16))};
}
KV_INLINE Vec widen(__m256i bits, f16) { return {_mm512_cvtph_ps(bits)}; }
#if defined(KV_BF16_DOT)
// As the products of pairs do, this takes denormal numbers for zero.
KV_INLINE __m256i narrow(Vec a, bf16) { return (__m256i)_mm512_cvtneps_pbh(a.v); }
#else
KV_INLINE __m256i narrow(Vec a, bf16) {
    const __m512i bits = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
    return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16));
}
#endif
KV_INLINE __m256i narrow(Vec a, f16) {
    return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// The first n lanes (n < 16), zeros behind; nothing past them is touched.
KV_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
KV_INLINE Vec load_n(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }
KV_INLINE void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
KV_INLINE void store_n(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
KV_INLINE Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes))};
}
KV_INLINE Vec load_n(const int8_t* p, int n) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first(n), p)))};
}
template <typename T>
KV_INLINE Vec load(const T* p) {
    return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), T{});
}
template <typename T>
KV_INLINE Vec load_n(const T* p, int n) {
    return widen(_mm256_maskz_loadu_epi16(first(n), p), T{});
}
template <typename T>
KV_INLINE void store(T* p, Vec a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(a, T{}));
}
template <typename T>
KV_INLINE void store_n(T* p, Vec a, int n) {
    _mm256_mask_storeu_epi16(p, first(n), narrow(a, T{}));
}

// out[i] = the sum of the lanes of the i-th vector, each over the same tree.
KV_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
    const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
    const __m512 low = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
    const __m512 high = _mm512_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
    const __m512 quarters = _mm512_add_ps(low, high);
    const __m256 halves =
        _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
    _mm_storeu_ps(out,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
KV_INLINE float max_lane(Vec a) { return _mm512_reduce_max_ps(a.v); }

// 16 rows of 16 words to 16 columns.
KV_INLINE void transpose(__m512i* x) {
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        x[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        x[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        x[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        x[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    // x[4 q + c]: column 4 lane + c of rows 4 q .. 4 q + 3.
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
        const __m512i low01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0x88);
        const __m512i high01 = _mm512_shuffle_i32x4(x[c], x[4 + c], 0xdd);
        const __m512i low23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0x88);
        const __m512i high23 = _mm512_shuffle_i32x4(x[8 + c], x[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
        t[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
        t[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) x[i] = t[i];
}

// A linear's tile in float lanes: its rows at most, and its sums at most.
constexpr int kFloatRows = 12, kFloatSums = 24;

}  // namespace

#include "lanes.h"

namespace {

#if defined(KV_BF16_DOT)
template <>
struct Operand<bf16> {
    static constexpr int kStep = 32;
    __m512i v;
    static KV_INLINE Operand load(const bf16* p) { return {_mm512_loadu_si512(p)}; }
    static KV_INLINE Operand load_n(const bf16* p, int n) {
        return {_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p)};
    }
    static KV_INLINE Vec dot(Vec sum, Operand a, Operand b) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)a.v, (__m512bh)b.v)};
    }
};
constexpr int kBf16TileRows = 6;
#else
// Pairs: the even elements in the upper halves of one vector, the odd ones of the other.
template <>
struct Operand<bf16> {
    static constexpr int kStep = 32;
    Vec even, odd;
    static KV_INLINE Operand split(__m512i pairs) {
        return {{_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))},
                {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))}};
    }
    static KV_INLINE Operand load(const bf16* p) { return split(_mm512_loadu_si512(p)); }
    static KV_INLINE Operand load_n(const bf16* p, int n) {
        return split(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, p));
    }
    static KV_INLINE Vec dot(Vec sum, Operand a, Operand b) {
        return fma(a.odd, b.odd, fma(a.even, b.even, sum));
    }
};
constexpr int kBf16TileRows = 4;
#endif

template <>
struct Lanes<f16> : Pair {
    static KV_INLINE Lanes load(const char* p) {
        const __m512i pairs = _mm512_loadu_si512(p);
        Lanes w;
        w.even = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(pairs))};
        w.odd = {_mm512_cvtph_ps(_mm512_cvtepi32_epi16(_mm512_srli_epi32(pairs, 16)))};
        return w;
    }
};
#if defined(KV_BF16_DOT)
template <>
struct Lanes<bf16> : FloatSums {
    static constexpr int kDepth = 2, kNumbers = 1;
    static constexpr bool kTurns = true;
    using X = int;
    __m512i v;
    static KV_INLINE Lanes load(const char* p) {
        Lanes w;
        w.v = _mm512_loadu_si512(p);
        return w;
    }
    static KV_INLINE void pack(const bf16* x, float, X* to) { std::memcpy(to, x, sizeof *to); }
    // Sixteen steps of a tile, from the same place of each row.
    static KV_INLINE void turn(const bf16* const* row, int64_t at, int64_t rows, X* to) {
        __m512i x[16];
#pragma GCC unroll 16
        for (int r = 0; r < 16; ++r) {
            x[r] = r < rows ? _mm512_loadu_si512(row[r] + at) : _mm512_setzero_si512();
        }
        transpose(x);
#pragma GCC unroll 16
        for (int s = 0; s < 16; ++s) {
            _mm512_mask_storeu_epi32(to + s * rows, first(static_cast<int>(rows)), x[s]);
        }
    }
    static KV_INLINE Vec dot(Vec sum, const X* x, Lanes w) {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)_mm512_set1_epi32(*x), (__m512bh)w.v)};
    }
};
// Sums of products of bytes, exact below 2^31. Numbers of x are taken 32768 higher, so that both
// of their bytes have no sign.
template <>
struct Lanes<int8_t> {
    static constexpr int kRows = 6, kSums = 12;
    static constexpr bool kWhole = true, kTurns = false;
    static constexpr int kDepth = 4, kNumbers = 2;
    using X = int;
    struct Sum {
        __m512i upper, lower;
    };
    __m512i v;
    static KV_INLINE Sum zero() { return {_mm512_setzero_si512(), _mm512_setzero_si512()}; }
    static KV_INLINE Lanes load(const char* p) { return {_mm512_loadu_si512(p)}; }
    template <typename T>
    static KV_INLINE void pack(const T* x, float unit, X* to) {
        const __m128 v = _mm_setr_ps(widen(x[0]), widen(x[1]), widen(x[2]), widen(x[3]));
        const __m128i whole = _mm_add_epi32(_mm_cvtps_epi32(_mm_mul_ps(v, _mm_set1_ps(unit))),
                                            _mm_set1_epi32(32768));
        const __m128i upper_first =
            _mm_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1);
        _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_shuffle_epi8(whole, upper_first));
    }
    static KV_INLINE Sum dot(Sum sum, const X* x, Lanes w) {
        return {_mm512_dpbusd_epi32(sum.upper, _mm512_set1_epi32(x[0]), w.v),
                _mm512_dpbusd_epi32(sum.lower, _mm512_set1_epi32(x[1]), w.v)};
    }
    static KV_INLINE Vec total(Sum sum, const int32_t* column_sums) {
        const __m512i offset = _mm512_slli_epi32(_mm512_loadu_si512(column_sums), 7);
        const __m512 upper = _mm512_cvtepi32_ps(_mm512_sub_epi32(sum.upper, offset));
        return {_mm512_fmadd_ps(upper, _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(sum.lower))};
    }
};
#else
template <>
struct Lanes<bf16> : Pair {
    static KV_INLINE Lanes load(const char* p) {
        const __m512i pairs = _mm512_loadu_si512(p);
        Lanes w;
        w.even = {_mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16))};
        w.odd = {_mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(-65536)))};
        return w;
    }
};
template <>
struct Lanes<int8_t> : FloatBytes {
    static KV_INLINE Lanes load(const char* p) {
        const __m512i bytes = _mm512_loadu_si512(p);
        Lanes w;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const __m512i top = _mm512_slli_epi32(bytes, static_cast<unsigned>(24 - 8 * i));
            w.v[i] = {_mm512_cvtepi32_ps(_mm512_srai_epi32(top, 24))};
        }
        return w;
    }
};
#endif

// Register tiles: kTileCols rows of a weight (or keys) by this many rows of activations (queries).
constexpr int kTileCols = 4;
template <typename T>
constexpr int kTileRows = 6;
template <>
constexpr int kTileRows<bf16> = kBf16TileRows;
// Of the product with the values: rows by units of 32 elements.
constexpr int kValueRows = 6;
constexpr int kValueUnits = 2;

}  // namespace

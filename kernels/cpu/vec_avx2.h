// Sixteen float lanes in two AVX2 registers.
#pragma once

namespace {
using namespace kv;

#define KV_INLINE inline __attribute__((always_inline))

struct Vec {
    __m256 lo, hi;
};

KV_INLINE Vec set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
KV_INLINE Vec iota() {
    return {_mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7), _mm256_setr_ps(8, 9, 10, 11, 12, 13, 14, 15)};
}
KV_INLINE Vec operator+(Vec a, Vec b) {
    return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
KV_INLINE Vec operator-(Vec a, Vec b) {
    return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
KV_INLINE Vec operator*(Vec a, Vec b) {
    return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
KV_INLINE Vec operator/(Vec a, Vec b) {
    return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
KV_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
// b where either is NaN.
KV_INLINE Vec max(Vec a, Vec b) {
    return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
KV_INLINE Vec min(Vec a, Vec b) {
    return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
// yes where a < b, else no.
KV_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
KV_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    return {_mm256_blendv_ps(no.lo, yes.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_EQ_OQ)),
            _mm256_blendv_ps(no.hi, yes.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_EQ_OQ))};
}
KV_INLINE Vec round_even(Vec a) {
    return {_mm256_round_ps(a.lo, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(a.hi, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
KV_INLINE __m256 pow2(__m256 n) {
    __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
// 2^n for whole numbers n in [-126, 127].
KV_INLINE Vec pow2(Vec n) { return {pow2(n.lo), pow2(n.hi)}; }
// x * 2^n for whole numbers n in [-126, 128], in two steps: 2^128 is no float, but e^88.5 is.
KV_INLINE Vec scaled(Vec x, Vec n) { return x * pow2(n - set1(1.0f)) * set1(2.0f); }

KV_INLINE float widen(float x) { return x; }
KV_INLINE float widen(bf16 x) {
    return _mm_cvtss_f32(_mm_castsi128_ps(_mm_cvtsi32_si128(x.bits << 16)));
}
KV_INLINE float widen(f16 x) { return _cvtsh_ss(x.bits); }
KV_INLINE __m256 widen(__m128i bits, bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
KV_INLINE __m256 widen(__m128i bits, f16) { return _mm256_cvtph_ps(bits); }
KV_INLINE __m128i narrow(__m256 a, bf16) {
    const __m256i bits = _mm256_castps_si256(a);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a, a, _CMP_UNORD_Q));
    rounded = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan);
    rounded = _mm256_srli_epi32(rounded, 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(rounded), _mm256_extracti128_si256(rounded, 1));
}
KV_INLINE __m128i narrow(__m256 a, f16) {
    return _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

KV_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
KV_INLINE void store(float* p, Vec a) {
    _mm256_storeu_ps(p, a.lo);
    _mm256_storeu_ps(p + 8, a.hi);
}
KV_INLINE Vec load(const int8_t* p) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)),
            _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(bytes, 8)))};
}
template <typename T>
KV_INLINE Vec load(const T* p) {
    const __m128i* q = reinterpret_cast<const __m128i*>(p);
    return {widen(_mm_loadu_si128(q), T{}), widen(_mm_loadu_si128(q + 1), T{})};
}
template <typename T>
KV_INLINE void store(T* p, Vec a) {
    __m128i* q = reinterpret_cast<__m128i*>(p);
    _mm_storeu_si128(q, narrow(a.lo, T{}));
    _mm_storeu_si128(q + 1, narrow(a.hi, T{}));
}
// The first n lanes (n < 16), zeros behind; nothing past them is touched.
template <typename T>
KV_INLINE Vec load_n(const T* p, int n) {
    T lanes[16] = {};
    std::memcpy(lanes, p, sizeof(T) * static_cast<size_t>(n));
    return load(lanes);
}
template <typename T>
KV_INLINE void store_n(T* p, Vec a, int n) {
    T lanes[16];
    store(lanes, a);
    std::memcpy(p, lanes, sizeof(T) * static_cast<size_t>(n));
}

// out[i] = the sum of the lanes of the i-th vector, each over the same tree.
KV_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    const __m256 a8 = _mm256_add_ps(a.lo, a.hi), b8 = _mm256_add_ps(b.lo, b.hi);
    const __m256 c8 = _mm256_add_ps(c.lo, c.hi), d8 = _mm256_add_ps(d.lo, d.hi);
    const __m256 ab = _mm256_add_ps(_mm256_unpacklo_ps(a8, b8), _mm256_unpackhi_ps(a8, b8));
    const __m256 cd = _mm256_add_ps(_mm256_unpacklo_ps(c8, d8), _mm256_unpackhi_ps(c8, d8));
    const __m256 low = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(1, 0, 1, 0));
    const __m256 high = _mm256_shuffle_ps(ab, cd, _MM_SHUFFLE(3, 2, 3, 2));
    const __m256 halves = _mm256_add_ps(low, high);
    _mm_storeu_ps(out,
                  _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
}
KV_INLINE float max_lane(Vec a) {
    float lanes[8];
    _mm256_storeu_ps(lanes, _mm256_max_ps(a.lo, a.hi));
    float m = lanes[0];
    for (int i = 1; i < 8; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
}

// A linear's tile in float lanes: its rows at most, and its sums at most.
constexpr int kFloatRows = 4, kFloatSums = 4;

}  // namespace

#include "lanes.h"

namespace {

// Pairs: the even elements in the upper halves of one vector, the odd ones of the other.
template <>
struct Operand<bf16> {
    static constexpr int kStep = 16;
    __m256 even, odd;
    static KV_INLINE Operand load(const bf16* p) {
        const __m256i pairs = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(-65536)))};
    }
    static KV_INLINE Operand load_n(const bf16* p, int n) {
        bf16 lanes[16] = {};
        std::memcpy(lanes, p, sizeof(bf16) * static_cast<size_t>(n));
        return load(lanes);
    }
    static KV_INLINE Vec dot(Vec sum, Operand a, Operand b) {
        return {_mm256_fmadd_ps(a.even, b.even, sum.lo), _mm256_fmadd_ps(a.odd, b.odd, sum.hi)};
    }
};

template <>
struct Lanes<bf16> : Pair {
    static KV_INLINE Lanes load(const char* p) {
        const __m256i* q = reinterpret_cast<const __m256i*>(p);
        const __m256i lo = _mm256_loadu_si256(q), hi = _mm256_loadu_si256(q + 1);
        const __m256i upper = _mm256_set1_epi32(-65536);
        Lanes w;
        w.even = {_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                  _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
        w.odd = {_mm256_castsi256_ps(_mm256_and_si256(lo, upper)),
                 _mm256_castsi256_ps(_mm256_and_si256(hi, upper))};
        return w;
    }
};
template <>
struct Lanes<f16> : Pair {
    // The lower halves of eight words.
    static KV_INLINE __m256 widen_words(__m256i words) {
        const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
        return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    }
    static KV_INLINE Lanes load(const char* p) {
        const __m256i* q = reinterpret_cast<const __m256i*>(p);
        const __m256i lo = _mm256_loadu_si256(q), hi = _mm256_loadu_si256(q + 1);
        const __m256i lower = _mm256_set1_epi32(65535);
        Lanes w;
        w.even = {widen_words(_mm256_and_si256(lo, lower)), widen_words(_mm256_and_si256(hi, lower))};
        w.odd = {widen_words(_mm256_srli_epi32(lo, 16)), widen_words(_mm256_srli_epi32(hi, 16))};
        return w;
    }
};
template <>
struct Lanes<int8_t> : FloatBytes {
    static KV_INLINE __m256 widen_bytes(__m256i bytes, int i) {
        const __m256i top = _mm256_slli_epi32(bytes, 24 - 8 * i);
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(top, 24));
    }
    static KV_INLINE Lanes load(const char* p) {
        const __m256i* q = reinterpret_cast<const __m256i*>(p);
        const __m256i lo = _mm256_loadu_si256(q), hi = _mm256_loadu_si256(q + 1);
        Lanes w;
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) w.v[i] = {widen_bytes(lo, i), widen_bytes(hi, i)};
        return w;
    }
};

// Register tiles: kTileCols rows of a weight (or keys) by this many rows of activations (queries).
constexpr int kTileCols = 2;
template <typename T>
constexpr int kTileRows = 2;
// Of the product with the values: rows by units of 32 elements.
constexpr int kValueRows = 3;
constexpr int kValueUnits = 1;

}  // namespace

// What a step of the product with the values loads: 32 elements of the values of one or two keys.
//
// Sums come as two vectors whose lanes stand in an order of `Values<T>`'s own, the cheapest to load;
// `store` puts them back. Lanes never mix, so the order changes no bit.
#pragma once

namespace {

// One key at a time, weights in float32.
template <typename T>
struct Values {
    using Weight = float;
    static constexpr int kKeys = 1;
    Vec part[2];

    static KV_INLINE Values load(const T* const* value) {
        return {{::load(value[0]), ::load(value[0] + 16)}};
    }
    // The first n < 32, zeros behind.
    static KV_INLINE Values load_n(const T* const* value, int n) {
        T some[32] = {};
        std::memcpy(some, value[0], sizeof(T) * static_cast<size_t>(n));
        const T* all = some;
        return load(&all);
    }
    static KV_INLINE Vec weight(const Weight* w) { return set1(*w); }
    KV_INLINE Vec add(Vec sum, Vec weight, int half) const { return fma(weight, part[half], sum); }
    static KV_INLINE void store(T* out, Vec a, Vec b) {
        ::store(out, a);
        ::store(out + 16, b);
    }
};

// Weights as they are stored; returns them as they count.
KV_INLINE Vec keep_weights(float* to, Vec weights) {
    store(to, weights);
    return weights;
}

#if defined(KV_AVX512)
// 32 bfloat16 of two vectors of float32.
KV_INLINE __m512i rounded(Vec a) {
    return _mm512_cvtepu16_epi32(narrow(a, bf16{}));
}

#if defined(KV_BF16_DOT)
// Two keys at a time, an even position and the odd one behind it, weights rounded to bfloat16.
template <>
struct Values<bf16> {
    using Weight = bf16;
    static constexpr int kKeys = 2;
    __m512i part[2];  // of each 8 elements the first four, and the last four: pairs of keys

    static KV_INLINE Values pair(__m512i a, __m512i b) {
        return {{_mm512_unpacklo_epi16(a, b), _mm512_unpackhi_epi16(a, b)}};
    }
    static KV_INLINE Values load(const bf16* const* value) {
        return pair(_mm512_loadu_si512(value[0]), _mm512_loadu_si512(value[1]));
    }
    static KV_INLINE Values load_n(const bf16* const* value, int n) {
        const __mmask32 some = (__mmask32{1} << n) - 1;
        return pair(_mm512_maskz_loadu_epi16(some, value[0]),
                    _mm512_maskz_loadu_epi16(some, value[1]));
    }
    static KV_INLINE __m512i weight(const Weight* w) {
        int32_t both;
        std::memcpy(&both, w, sizeof both);
        return _mm512_set1_epi32(both);
    }
    KV_INLINE Vec add(Vec sum, __m512i weight, int half) const {
        return {_mm512_dpbf16_ps(sum.v, (__m512bh)weight, (__m512bh)part[half])};
    }
    static KV_INLINE void store(bf16* out, Vec a, Vec b) {
        _mm512_storeu_si512(out, _mm512_packus_epi32(rounded(a), rounded(b)));
    }
};

KV_INLINE Vec keep_weights(bf16* to, Vec weights) {
    const __m256i kept = narrow(weights, bf16{});
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), kept);
    return widen(kept, bf16{});
}
#else
// The even elements, then the odd ones.
template <>
struct Values<bf16> {
    using Weight = float;
    static constexpr int kKeys = 1;
    Vec part[2];

    static KV_INLINE Values split(__m512i pairs) {
        const Operand<bf16> x = Operand<bf16>::split(pairs);
        return {{x.even, x.odd}};
    }
    static KV_INLINE Values load(const bf16* const* value) {
        return split(_mm512_loadu_si512(value[0]));
    }
    static KV_INLINE Values load_n(const bf16* const* value, int n) {
        return split(_mm512_maskz_loadu_epi16((__mmask32{1} << n) - 1, value[0]));
    }
    static KV_INLINE Vec weight(const Weight* w) { return set1(*w); }
    KV_INLINE Vec add(Vec sum, Vec weight, int half) const { return fma(weight, part[half], sum); }
    static KV_INLINE void store(bf16* out, Vec even, Vec odd) {
        _mm512_storeu_si512(out,
                            _mm512_or_si512(rounded(even), _mm512_slli_epi32(rounded(odd), 16)));
    }
};
#endif
#endif

// Units side by side for so many rows: few rows leave registers for more of the head.
constexpr int value_units(int rows) { return 2 * rows <= kValueRows ? 2 * kValueUnits : kValueUnits; }

}  // namespace

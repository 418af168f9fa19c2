// What a linear takes of a weight and of its rows, where sums are float lanes; and what one step of
// a dot product loads. Included once an instruction set's vec_*.h has its Vec and its two bounds
// kFloatRows and kFloatSums: what an instruction set does better than this it says behind it.
#pragma once

namespace {

// What one step of a dot product loads of a row.
template <typename T>
struct Operand {
    static constexpr int kStep = 16;
    Vec v;
    static KV_INLINE Operand load(const T* p) { return {::load(p)}; }
    static KV_INLINE Operand load_n(const T* p, int n) { return {::load_n(p, n)}; }
    static KV_INLINE Vec dot(Vec sum, Operand a, Operand b) { return fma(a.v, b.v, sum); }
};

// A linear's sums in float lanes.
struct FloatSums {
    static constexpr int kRows = kFloatRows, kSums = kFloatSums;
    static constexpr bool kWhole = false, kTurns = false;
    using Sum = Vec;
    static KV_INLINE Vec zero() { return set1(0.0f); }
    static KV_INLINE Vec total(Vec sum, const int32_t*) { return sum; }
};
// One step of a weight's panel: for each lane, kDepth elements of k; and what a packed row of x
// holds to multiply them with, in whole numbers or as they are.
template <typename T>
struct Lanes;
template <>
struct Lanes<float> : FloatSums {
    static constexpr int kDepth = 1, kNumbers = 1;
    using X = float;
    Vec v;
    static KV_INLINE Lanes load(const char* p) {
        Lanes w;
        w.v = ::load(reinterpret_cast<const float*>(p));
        return w;
    }
    static KV_INLINE void pack(const float* x, float, X* to) { *to = *x; }
    static KV_INLINE Vec dot(Vec sum, const X* x, Lanes w) { return fma(set1(*x), w.v, sum); }
};
// Neighbours in k, widened.
struct Pair : FloatSums {
    static constexpr int kDepth = 2, kNumbers = 2;
    using X = float;
    Vec even, odd;
    static KV_INLINE Vec dot(Vec sum, const X* x, Pair w) {
        return fma(set1(x[1]), w.odd, fma(set1(x[0]), w.even, sum));
    }
    template <typename T>
    static KV_INLINE void pack(const T* x, float, X* to) {
        to[0] = widen(x[0]);
        to[1] = widen(x[1]);
    }
};
// Four neighbours in k, widened from the bytes of a weight of int8.
struct FloatBytes : FloatSums {
    static constexpr int kDepth = 4, kNumbers = 4;
    using X = float;
    Vec v[4];
    template <typename T>
    static KV_INLINE void pack(const T* x, float, X* to) {
        for (int i = 0; i < 4; ++i) to[i] = widen(x[i]);
    }
    static KV_INLINE Vec dot(Vec sum, const X* x, const FloatBytes& w) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sum = fma(set1(x[i]), w.v[i], sum);
        return sum;
    }
};

}  // namespace

// exp, tanh and small helpers over 16 lanes. Lanes never mix: a value's bits depend on it alone.
#pragma once

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

KV_INLINE int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
KV_INLINE int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

// The lanes' sum, over the tree of sum4.
KV_INLINE float sum_of(Vec a) {
    float out[4];
    sum4(a, a, a, a, out);
    return out[0];
}

// e^x to about 1 ulp for x of at most 88.8: x = n ln 2 + r, the polynomial of Cephes' expf for e^r,
// scaled by 2^n. Below -87.3 it is 0 (no denormals); NaN stays.
KV_INLINE Vec exp_of_small(Vec x) {
    const Vec low = set1(-87.33654f);
    const Vec clamped = max(low, x);
    const Vec n = round_even(clamped * set1(1.44269504f));
    Vec r = fma(n, set1(-0.693359375f), clamped);
    r = fma(n, set1(2.12194440e-4f), r);
    Vec p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = fma(p, r * r, r) + set1(1.0f);
    return where_less(x, low, set1(0.0f), scaled(p, n));
}

// The same for any x; from 88.8 on infinity.
KV_INLINE Vec exp(Vec x) { return exp_of_small(min(set1(88.8f), x)); }

KV_INLINE float exp(float x) {
    float lanes[16];
    store(lanes, exp(set1(x)));
    return lanes[0];
}

// tanh x: Cephes' polynomial near 0, else from e^2x.
KV_INLINE Vec tanh(Vec x) {
    const Vec magnitude = max(x, set1(0.0f) - x);
    const Vec far = set1(1.0f) - set1(2.0f) / (exp(magnitude + magnitude) + set1(1.0f));
    const Vec square = x * x;
    Vec p = set1(-5.70498872745e-3f);
    p = fma(p, square, set1(2.06390887954e-2f));
    p = fma(p, square, set1(-5.37397155531e-2f));
    p = fma(p, square, set1(1.33314422036e-1f));
    p = fma(p, square, set1(-3.33332819422e-1f));
    const Vec near = fma(p * square, x, x);
    const Vec signed_far = where_less(x, set1(0.0f), set1(0.0f) - far, far);
    return where_less(magnitude, set1(0.625f), near, signed_far);
}

// f(lane offset, lanes) over a row of `width`, 16 lanes at a time and the rest at the end: the
// same code for both, so a value's bits don't depend on its place.
template <typename F>
KV_INLINE void for_lanes(int64_t width, F f) {
    int64_t i = 0;
    for (; i + 16 <= width; i += 16) f(i, 16);
    if (i < width) f(i, static_cast<int>(width - i));
}
template <typename T>
KV_INLINE Vec load_some(const T* p, int n) {
    return n == 16 ? load(p) : load_n(p, n);
}
template <typename T>
KV_INLINE void store_some(T* p, Vec a, int n) {
    if (n == 16) {
        store(p, a);
    } else {
        store_n(p, a, n);
    }
}

// Lanes of a vector of any dtype.
KV_INLINE Vec load_as(const void* p, int dtype, int64_t i, int n) {
    switch (dtype) {
        case kFloat32:
            return load_some(static_cast<const float*>(p) + i, n);
        case kBfloat16:
            return load_some(static_cast<const bf16*>(p) + i, n);
        default:
            return load_some(static_cast<const f16*>(p) + i, n);
    }
}

}  // namespace

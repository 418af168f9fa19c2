// Sixteen float lanes in four 128-bit vectors of the compiler: SSE2, NEON or whatever there is.
#pragma once

#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {
using namespace kv;

#define KV_INLINE inline __attribute__((always_inline))

typedef float Quad __attribute__((vector_size(16)));
typedef int32_t QuadInt __attribute__((vector_size(16)));

struct Vec {
    Quad q[4];
};

template <typename F>
KV_INLINE Vec each(F f) {
    return {{f(0), f(1), f(2), f(3)}};
}

KV_INLINE Quad quad(float x) { return Quad{x, x, x, x}; }
KV_INLINE Vec set1(float x) {
    return each([=](int) { return quad(x); });
}
KV_INLINE Vec iota() {
    return each([](int i) {
        const float base = static_cast<float>(4 * i);
        return Quad{base, base + 1, base + 2, base + 3};
    });
}
KV_INLINE Vec operator+(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] + b.q[i]; });
}
KV_INLINE Vec operator-(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] - b.q[i]; });
}
KV_INLINE Vec operator*(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] * b.q[i]; });
}
KV_INLINE Vec operator/(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] / b.q[i]; });
}
// Rounded once where the hardware does so at no cost (NEON), else twice: fixed per build.
KV_INLINE Quad fma(Quad a, Quad b, Quad c) {
#if defined(__ARM_NEON) && defined(__aarch64__)
    return vfmaq_f32(c, a, b);
#else
    return a * b + c;
#endif
}
KV_INLINE Vec fma(Vec a, Vec b, Vec c) {
    return each([&](int i) { return fma(a.q[i], b.q[i], c.q[i]); });
}
// b where either is NaN.
KV_INLINE Vec max(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] > b.q[i] ? a.q[i] : b.q[i]; });
}
KV_INLINE Vec min(Vec a, Vec b) {
    return each([&](int i) { return a.q[i] < b.q[i] ? a.q[i] : b.q[i]; });
}
// yes where a < b, else no.
KV_INLINE Vec where_less(Vec a, Vec b, Vec yes, Vec no) {
    return each([&](int i) { return a.q[i] < b.q[i] ? yes.q[i] : no.q[i]; });
}
KV_INLINE Vec where_equal(Vec a, Vec b, Vec yes, Vec no) {
    return each([&](int i) { return a.q[i] == b.q[i] ? yes.q[i] : no.q[i]; });
}
// Adding and taking away 1.5 * 2^23 rounds to the nearest whole number; for |a| < 2^22.
KV_INLINE Vec round_even(Vec a) {
    return each([&](int i) { return (a.q[i] + quad(12582912.0f)) - quad(12582912.0f); });
}
// 2^n for whole numbers n in [-126, 127].
KV_INLINE Vec pow2(Vec n) {
    return each([&](int i) {
        const QuadInt whole = __builtin_convertvector(n.q[i], QuadInt);
        return reinterpret_cast<Quad>((whole + 127) << 23);
    });
}
// x * 2^n for whole numbers n in [-126, 128], in two steps: 2^128 is no float, but e^88.5 is.
KV_INLINE Vec scaled(Vec x, Vec n) { return x * pow2(n - set1(1.0f)) * set1(2.0f); }

KV_INLINE float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
KV_INLINE uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
KV_INLINE float widen(float x) { return x; }
KV_INLINE float widen(int8_t x) { return x; }
KV_INLINE float widen(bf16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
KV_INLINE float widen(f16 x) {
    const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
    const uint32_t magnitude = x.bits & 0x7fff;
    if (magnitude >= 0x7c00) return from_bits(sign | 0x7f800000 | (magnitude & 0x3ff) << 13);
    // Shifted into place, the exponent is 112 too small; the product corrects it, denormals too.
    return from_bits(sign | to_bits(from_bits(magnitude << 13) * from_bits(0x77800000)));
}
KV_INLINE void narrow(float x, float* out) { *out = x; }
KV_INLINE void narrow(float x, bf16* out) {
    const uint32_t bits = to_bits(x);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    out->bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded >> 16);
}
KV_INLINE void narrow(float x, f16* out) {
    const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude > 0x7f800000) {
        magnitude = 0x7e00;
    } else if (magnitude >= 0x477ff000) {  // rounds past 65504
        magnitude = 0x7c00;
    } else if (magnitude < 0x38800000) {  // denormal: the addition rounds at the right bit
        magnitude = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    } else {
        magnitude = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    }
    out->bits = static_cast<uint16_t>(sign | magnitude);
}

KV_INLINE Vec load(const float* p) {
    Vec a;
    std::memcpy(&a, p, sizeof a);
    return a;
}
KV_INLINE void store(float* p, Vec a) { std::memcpy(p, &a, sizeof a); }
template <typename T>
KV_INLINE Vec load(const T* p) {
    float lanes[16];
    for (int i = 0; i < 16; ++i) lanes[i] = widen(p[i]);
    return load(lanes);
}
template <typename T>
KV_INLINE void store(T* p, Vec a) {
    float lanes[16];
    store(lanes, a);
    for (int i = 0; i < 16; ++i) narrow(lanes[i], p + i);
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

KV_INLINE float sum_lanes(Vec a) {
    const Quad q = (a.q[0] + a.q[2]) + (a.q[1] + a.q[3]);
    return (q[0] + q[2]) + (q[1] + q[3]);
}
// out[i] = the sum of the lanes of the i-th vector, each over the same tree.
KV_INLINE void sum4(Vec a, Vec b, Vec c, Vec d, float* out) {
    out[0] = sum_lanes(a);
    out[1] = sum_lanes(b);
    out[2] = sum_lanes(c);
    out[3] = sum_lanes(d);
}
KV_INLINE float max_lane(Vec a) {
    float lanes[16];
    store(lanes, a);
    float m = lanes[0];
    for (int i = 1; i < 16; ++i) m = lanes[i] > m ? lanes[i] : m;
    return m;
}

// A linear's tile in float lanes: its rows at most, and its sums at most.
constexpr int kFloatRows = 2, kFloatSums = 2;

}  // namespace

#include "lanes.h"

namespace {

template <typename T>
struct Halves : Pair {
    static KV_INLINE Halves load(const char* p) {
        T halves[32];
        std::memcpy(halves, p, sizeof halves);
        float even[16], odd[16];
        for (int i = 0; i < 16; ++i) {
            even[i] = widen(halves[2 * i]);
            odd[i] = widen(halves[2 * i + 1]);
        }
        Halves w;
        w.even = ::load(even);
        w.odd = ::load(odd);
        return w;
    }
};
template <>
struct Lanes<bf16> : Halves<bf16> {
    Lanes() = default;
    KV_INLINE Lanes(const Halves<bf16>& w) : Halves<bf16>(w) {}
};
template <>
struct Lanes<f16> : Halves<f16> {
    Lanes() = default;
    KV_INLINE Lanes(const Halves<f16>& w) : Halves<f16>(w) {}
};
template <>
struct Lanes<int8_t> : FloatBytes {
    static KV_INLINE Lanes load(const char* p) {
        int8_t bytes[64];
        std::memcpy(bytes, p, sizeof bytes);
        Lanes w;
        for (int i = 0; i < 4; ++i) {
            float lanes[16];
            for (int c = 0; c < 16; ++c) lanes[c] = bytes[4 * c + i];
            w.v[i] = ::load(lanes);
        }
        return w;
    }
};

// Register tiles: kTileCols rows of a weight (or keys) by this many rows of activations (queries).
constexpr int kTileCols = 2;
template <typename T>
constexpr int kTileRows = 1;
// Of the product with the values: rows by units of 32 elements.
constexpr int kValueRows = 2;
constexpr int kValueUnits = 1;

}  // namespace

// AMX's tiles in plain C++, for tests on CPUs without them: included before all else (-include).
//
// Follows the pseudo-code of Intel's Software Developer's Manual, volume 2 (TILELOADD, TDPBF16PS,
// TILESTORED): sums of even and odd elements apart within an instruction, each rounded to nearest,
// numbers below the normal ones as zeros. What the hardware would refuse ends the process.
#pragma once

#define KV_TILES_EMULATED

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace emulated {

struct Tile {
    unsigned char bytes[16][64];
};
struct State {
    bool is_configured = false;
    uint16_t row_bytes[8];
    uint8_t rows[8];
    Tile tiles[8];
};
inline thread_local State state;

inline void check(bool is_right, const char* what) {
    if (is_right) return;
    std::fprintf(stderr, "AMX would refuse: %s\n", what);
    std::abort();
}

inline void configure(const void* from) {
    const unsigned char* bytes = static_cast<const unsigned char*>(from);
    check(bytes[0] == 1 && bytes[1] == 0, "palette");
    for (int i = 2; i < 16; ++i) check(bytes[i] == 0, "reserved bytes");
    for (int i = 0; i < 16; ++i) {
        uint16_t row_bytes;
        std::memcpy(&row_bytes, bytes + 16 + 2 * i, 2);
        const uint8_t rows = bytes[48 + i];
        check(row_bytes <= 64 && rows <= 16 && (row_bytes == 0) == (rows == 0), "shape");
        check(i < 8 || rows == 0, "tiles beyond the eighth");
        if (i >= 8) continue;
        state.row_bytes[i] = row_bytes;
        state.rows[i] = rows;
        std::memset(&state.tiles[i], 0, sizeof(Tile));
    }
    state.is_configured = true;
}
inline void release() { state.is_configured = false; }

inline Tile& tile(int i) {
    check(state.is_configured && state.rows[i] > 0, "a tile that isn't configured");
    return state.tiles[i];
}
inline void zero(int i) { std::memset(&tile(i), 0, sizeof(Tile)); }
inline void load(int i, const void* from, int64_t stride) {
    zero(i);
    for (int r = 0; r < state.rows[i]; ++r) {
        std::memcpy(tile(i).bytes[r], static_cast<const char*>(from) + r * stride,
                    state.row_bytes[i]);
    }
}
inline void store(int i, void* to, int64_t stride) {
    for (int r = 0; r < state.rows[i]; ++r) {
        std::memcpy(static_cast<char*>(to) + r * stride, tile(i).bytes[r], state.row_bytes[i]);
    }
}

inline float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }
inline float element(const Tile& t, int row, int i) {
    uint16_t half;
    std::memcpy(&half, t.bytes[row] + 2 * i, 2);
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return flushed(x);
}
inline void dot(int sums, int a, int b) {
    check(sums != a && sums != b && a != b, "one tile twice");
    check(state.rows[sums] == state.rows[a] && state.row_bytes[sums] == state.row_bytes[b] &&
              state.row_bytes[a] == 4 * state.rows[b],
          "shapes that don't fit");
    for (int m = 0; m < state.rows[a]; ++m) {
        for (int n = 0; n < state.row_bytes[b] / 4; ++n) {
            float even = 0.0f, odd = 0.0f, sum;
            for (int k = 0; k < state.rows[b]; ++k) {
                even = flushed(std::fma(element(tile(a), m, 2 * k), element(tile(b), k, 2 * n), even));
                odd = flushed(
                    std::fma(element(tile(a), m, 2 * k + 1), element(tile(b), k, 2 * n + 1), odd));
            }
            std::memcpy(&sum, tile(sums).bytes[m] + 4 * n, 4);
            sum = flushed(flushed(sum) + flushed(even + odd));
            std::memcpy(tile(sums).bytes[m] + 4 * n, &sum, 4);
        }
    }
}

}  // namespace emulated

#define KV_TILE_CONFIGURE(config) emulated::configure(config)
#define KV_TILE_RELEASE() emulated::release()
#define KV_TILE_ZERO(tile) emulated::zero(tile)
#define KV_TILE_LOAD(tile, from, stride) emulated::load(tile, from, stride)
#define KV_TILE_STORE(tile, to, stride) emulated::store(tile, to, stride)
#define KV_TILE_DOT(sums, a, b) emulated::dot(sums, a, b)

// x @ weight.T of bfloat16 by AMX: tiles of 16 rows of 64 bytes.
//
// A weight's panel is what AMX wants as its right side as it is: 16 steps of it, each a pair of
// neighbours in k for sixteen columns, are one tile. Rows of x lie block by block of 32 elements,
// 64 bytes of each row, and the last block as narrow as it is.
//
// An instruction adds 16 pairs to each sum in an order of its own, which doesn't depend on how many
// rows a tile has; blocks follow each other over ascending k. So a result's bits depend on its row
// and its column alone, as everywhere.
#pragma once

#include "elementary.h"
#include "linear.h"

namespace {

// Puts all that was written to memory there: GCC's instructions on tiles don't say what they read,
// and it would keep from them what it thinks nobody wants.
inline void settle(const void* memory) { __asm__ volatile("" ::"r"(memory) : "memory"); }

}  // namespace

#if !defined(KV_TILES_EMULATED)
#define KV_TILE_CONFIGURE(config) (settle(config), _tile_loadconfig(config))
#define KV_TILE_RELEASE() _tile_release()
#define KV_TILE_ZERO(tile) _tile_zero(tile)
#define KV_TILE_LOAD(tile, from, stride)   \
    do {                                   \
        settle(from);                      \
        _tile_loadd(tile, from, stride);   \
    } while (false)
#define KV_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define KV_TILE_DOT(sums, a, b) _tile_dpbf16ps(sums, a, b)
#endif

namespace {

constexpr int64_t kTileSteps = 16;
constexpr int64_t kTileRowBytes = 64;
constexpr int64_t kRowsOfTile = 16;

// What a tile holds: palette 1, the bytes of a row and the rows of each of eight tiles.
struct alignas(64) TileConfig {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);

// Rows [begin, end) of x, block by block.
inline void pack_rows_for_tiles(const PackTask& task, int64_t begin, int64_t end, void* out) {
    const int64_t row_bytes = task.k * 2;
    char* to = static_cast<char*>(out);
    for (int64_t at = 0; at < row_bytes; at += kTileRowBytes) {
        const int64_t bytes = lesser(kTileRowBytes, row_bytes - at);
        const int64_t width = ceil_div(bytes, kWordBytes) * kWordBytes;
        for (int64_t r = begin; r < end; ++r, to += width) {
            const bf16* x =
                static_cast<const bf16*>(task.x) + (task.rows ? task.rows[r] : r) * task.x_stride;
            const char* from = reinterpret_cast<const char*>(x) + at;
            if (bytes == kTileRowBytes) {
                std::memcpy(to, from, static_cast<size_t>(kTileRowBytes));
            } else {
                std::memset(to, 0, static_cast<size_t>(width));
                std::memcpy(to, from, static_cast<size_t>(bytes));
            }
        }
    }
}

// Up to 32 rows by two panels, or up to 16 by four: four tiles of sums (0 to 3), two of rows (4, 5)
// and two of the weight (6, 7). Of a thread, and only while it multiplies: others use tiles too.
class TileProducts {
  public:
    static constexpr int64_t kSums = 64;
    static constexpr int64_t kRowStepBytes = kWordBytes;

    static constexpr int panels_at_once(int64_t rows) { return rows <= kRowsOfTile ? 4 : 2; }

    TileProducts() = default;
    TileProducts(const TileProducts&) = delete;
    TileProducts& operator=(const TileProducts&) = delete;
    ~TileProducts() {
        if (rows_ > 0) KV_TILE_RELEASE();
    }

    void multiply(int64_t rows, int panels, const void* tile, const char* weight, int64_t steps,
                  const Ahead& ahead, const int32_t*, float* out) {
        if (rows != rows_) configure(rows);
        const char* x = static_cast<const char*>(tile);
        KV_TILE_ZERO(0);
        KV_TILE_ZERO(1);
        KV_TILE_ZERO(2);
        KV_TILE_ZERO(3);
        const int64_t panel_bytes = steps * kStepBytes;
        int64_t step = 0;
        for (; step + kTileSteps <= steps; step += kTileSteps) {
            fetch(ahead, step, panels);
            add(x + step * kWordBytes * rows, panels, weight + step * kStepBytes, panel_bytes);
        }
        if (step < steps) {
            // What lies behind is another panel's, or nobody's.
            alignas(64) char last_x[2 * kRowsOfTile * kTileRowBytes] = {};
            alignas(64) char last_weight[4 * kTileSteps * kStepBytes] = {};
            const size_t width = static_cast<size_t>((steps - step) * kWordBytes);
            for (int64_t r = 0; r < rows; ++r) {
                std::memcpy(last_x + r * kTileRowBytes,
                            x + step * kWordBytes * rows + r * (steps - step) * kWordBytes, width);
            }
            for (int64_t p = 0; p < panels; ++p) {
                std::memcpy(last_weight + p * kTileSteps * kStepBytes,
                            weight + p * panel_bytes + step * kStepBytes,
                            static_cast<size_t>((steps - step) * kStepBytes));
            }
            add(last_x, panels, last_weight, kTileSteps * kStepBytes);
        }
        const int64_t stride = panels * kPanelCols * 4;
        KV_TILE_STORE(0, out, stride);
        if (panels > 1) KV_TILE_STORE(1, out + kPanelCols, stride);
        if (rows > kRowsOfTile) {
            float* lower = out + kRowsOfTile * panels * kPanelCols;
            KV_TILE_STORE(2, lower, stride);
            if (panels > 1) KV_TILE_STORE(3, lower + kPanelCols, stride);
        } else if (panels > 2) {
            KV_TILE_STORE(2, out + 2 * kPanelCols, stride);
            KV_TILE_STORE(3, out + 3 * kPanelCols, stride);
        }
    }

  private:
    // Tiles that hold rows have as many as there are, so that nothing else is read or written.
    void configure(int64_t rows) {
        const uint8_t upper = static_cast<uint8_t>(lesser(rows, kRowsOfTile));
        const uint8_t lower = static_cast<uint8_t>(rows <= kRowsOfTile ? upper : rows - kRowsOfTile);
        const uint8_t counts[8] = {upper, upper, lower, lower, upper, lower, 16, 16};
        TileConfig config{};
        config.palette = 1;
        for (int i = 0; i < 8; ++i) {
            config.row_bytes[i] = static_cast<uint16_t>(kTileRowBytes);
            config.rows[i] = counts[i];
        }
        KV_TILE_CONFIGURE(&config);
        rows_ = rows;
    }

    // One block: `x` of the rows, 64 bytes each, and 16 steps of each panel.
    void add(const char* x, int panels, const char* weight, int64_t panel_stride) const {
        KV_TILE_LOAD(4, x, kTileRowBytes);
        KV_TILE_LOAD(6, weight, kStepBytes);
        KV_TILE_DOT(0, 4, 6);
        if (panels > 1) {
            KV_TILE_LOAD(7, weight + panel_stride, kStepBytes);
            KV_TILE_DOT(1, 4, 7);
        }
        if (rows_ > kRowsOfTile) {
            KV_TILE_LOAD(5, x + kRowsOfTile * kTileRowBytes, kTileRowBytes);
            KV_TILE_DOT(2, 5, 6);
            if (panels > 1) KV_TILE_DOT(3, 5, 7);
        } else if (panels > 2) {
            KV_TILE_LOAD(6, weight + 2 * panel_stride, kStepBytes);
            KV_TILE_DOT(2, 4, 6);
            KV_TILE_LOAD(7, weight + 3 * panel_stride, kStepBytes);
            KV_TILE_DOT(3, 4, 7);
        }
    }

    static void fetch(const Ahead& ahead, int64_t step, int panels) {
        const int64_t end = lesser(step + kTileSteps, ahead.steps);
        for (; step < end; ++step) {
            const bool jumps = ahead.jump_at >= 0 && step >= ahead.jump_at;
            const char* next = ahead.from + step * ahead.step_stride + (jumps ? ahead.jump : 0);
            for (int p = 0; p < panels; ++p) __builtin_prefetch(next + p * ahead.panel_stride, 0, 2);
        }
    }

    int64_t rows_ = 0;  // that the tiles are configured for
};

}  // namespace

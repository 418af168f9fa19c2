// Keys and values of a split as products with many rows take them, made once for all of the rows.
//
// Keys are turned so that sixteen of them stand in the sixteen lanes. A product of two rows is summed
// in 16 lanes over the head, and the lanes over the tree of `sum4`. Here each of the 16 sums of a lane
// is a vector over 16 keys, so the tree adds vectors: the same sums in the same order, and nothing
// moves across lanes. Values stand in pairs of keys, as `Values` loads them.
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
    // Of one product of queries and keys.
    static constexpr int kRows = 4, kTiles = 2;
    using Word = int32_t;  // two elements
    using V = Values<bf16>;

    int64_t width;  // a multiple of 32
    // [tile][lane][32 elements][key]: the pairs of elements that one lane adds up follow each other.
    alignas(64) Word keys[kSplit * kMaxHeadDim / 2];
    alignas(64) Word values[kSplit / 2 * kMaxHeadDim];  // [64 elements][pair of keys][element]

    int64_t key_tile(int64_t tile) const { return tile * width * 8; }
    // Of 32 elements the first pair; kPairWords from a pair to the next.
    static constexpr int64_t kPairWords = 64;
    static int64_t value_unit(int64_t unit) {
        return unit / 2 * (kSplit / 2 * kPairWords) + unit % 2 * 32;
    }
    // Of 32 elements those before the head's end.
    static __mmask32 elements(int64_t left) {
        return left >= 32 ? ~__mmask32{0} : (__mmask32{1} << left) - 1;
    }

    // The 16 keys of a tile; zeros past their end.
    void set_keys(int64_t tile, const bf16* const* key, int64_t head_dim) {
        Word* out = keys + key_tile(tile);
        for (int64_t d = 0; d < head_dim; d += 32, out += 16) {
            const __mmask32 some = elements(head_dim - d);
            __m512i x[16];
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) {
                x[i] = _mm512_maskz_loadu_epi16(some, key[i] + d);
            }
            transpose(x);
#pragma GCC unroll 16
            for (int i = 0; i < 16; ++i) _mm512_store_si512(out + i * width / 2, x[i]);
        }
    }
    // The values of a tile, likewise.
    void set_values(int64_t tile, const bf16* const* value, int64_t head_dim) {
        for (int64_t d = 0; d < head_dim; d += 32) {
            const __mmask32 some = elements(head_dim - d);
            Word* out = values + value_unit(d / 32) + tile * 8 * kPairWords;
#pragma GCC unroll 16
            for (int i = 0; i < 16; i += 2, out += kPairWords) {
                const V pair = V::pair(_mm512_maskz_loadu_epi16(some, value[i] + d),
                                       _mm512_maskz_loadu_epi16(some, value[i + 1] + d));
                _mm512_store_si512(out, pair.part[0]);
                _mm512_store_si512(out + 16, pair.part[1]);
            }
        }
    }

    // out[row][0 .. 16 * tiles] = each query times the keys of the tiles from this one on.
    void dots(int rows, int tiles, const bf16* const* query, int64_t tile,
              float* const* out) const {
        tiles == kTiles ? of_rows<kRows, kTiles>(rows, query, keys + key_tile(tile), out)
                        : of_rows<kRows, 1>(rows, query, keys + key_tile(tile), out);
    }

    // acc[row][...] += weights times values, pair by pair.
    template <int ROWS>
    void add(int rows, Range pairs, const bf16* const* weights, float* const* acc) const {
        if constexpr (ROWS > 1) {
            if (rows < ROWS) return add<ROWS - 1>(rows, pairs, weights, acc);
        }
        constexpr int kUnits = value_units(ROWS);
        const int64_t units = width / 32;
        int64_t unit = 0;
        for (; unit + kUnits <= units; unit += kUnits) {
            add_units<ROWS, kUnits>(unit, pairs, weights, acc);
        }
        for (; unit < units; ++unit) add_units<ROWS, 1>(unit, pairs, weights, acc);
    }
    // The same for one row and one key, whose neighbour in the pair the row doesn't see.
    void add_key(int64_t key, const bf16* weights, float* acc) const {
        const __m512i own = _mm512_set1_epi32(key % 2 ? -65536 : 65535);
        const __m512i weight = V::weight(weights + key / 2 * 2);
        for (int64_t unit = 0; unit < width / 32; ++unit, acc += 32) {
            const Word* from = values + value_unit(unit) + key / 2 * kPairWords;
            V pair;
            for (int half = 0; half < 2; ++half) {
                pair.part[half] = _mm512_and_si512(_mm512_load_si512(from + 16 * half), own);
                store(acc + 16 * half, pair.add(load(acc + 16 * half), weight, half));
            }
        }
    }

  private:
    template <int ROWS, int TILES>
    void of_rows(int rows, const bf16* const* query, const Word* tile, float* const* out) const {
        if constexpr (ROWS > 1) {
            if (rows < ROWS) return of_rows<ROWS - 1, TILES>(rows, query, tile, out);
        }
        constexpr int N = ROWS * TILES;
        Vec sums[N], a[N], b[N];
        quarter<ROWS, TILES>(query, tile, 0, sums);
        quarter<ROWS, TILES>(query, tile, 8, a);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) sums[i] = sums[i] + a[i];
        quarter<ROWS, TILES>(query, tile, 4, a);
        quarter<ROWS, TILES>(query, tile, 12, b);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) {
            store(out[i / TILES] + i % TILES * 16, sums[i] + (a[i] + b[i]));
        }
    }
    // The sums of four lanes.
    template <int ROWS, int TILES>
    KV_INLINE void quarter(const bf16* const* query, const Word* tile, int at, Vec* sums) const {
        constexpr int N = ROWS * TILES;
        Vec a[N], b[N];
        lane<ROWS, TILES>(query, tile, at, sums);
        lane<ROWS, TILES>(query, tile, at + 2, a);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) sums[i] = sums[i] + a[i];
        lane<ROWS, TILES>(query, tile, at + 1, a);
        lane<ROWS, TILES>(query, tile, at + 3, b);
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) sums[i] = sums[i] + (a[i] + b[i]);
    }
    // The sums of one lane.
    template <int ROWS, int TILES>
    KV_INLINE void lane(const bf16* const* query, const Word* tile, int at, Vec* sums) const {
#pragma GCC unroll 16
        for (int i = 0; i < ROWS * TILES; ++i) sums[i] = set1(0.0f);
        const Word* k0 = tile + at * width / 2;
        const int64_t next_tile = key_tile(1), steps = width / 32;
        for (int64_t step = 0; step < steps; ++step) {
            __m512i k[TILES];
#pragma GCC unroll 2
            for (int t = 0; t < TILES; ++t) {
                k[t] = _mm512_load_si512(k0 + t * next_tile + 16 * step);
            }
#pragma GCC unroll 4
            for (int r = 0; r < ROWS; ++r) {
                const __m512i pair = V::weight(query[r] + 32 * step + 2 * at);
#pragma GCC unroll 2
                for (int t = 0; t < TILES; ++t) {
                    Vec& sum = sums[r * TILES + t];
                    sum.v = _mm512_dpbf16_ps(sum.v, (__m512bh)pair, (__m512bh)k[t]);
                }
            }
        }
    }

    template <int ROWS, int UNITS>
    void add_units(int64_t unit, Range pairs, const bf16* const* weights, float* const* acc) const {
        Vec sums[ROWS][2 * UNITS];
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < 2 * UNITS; ++c) sums[r][c] = load(acc[r] + 32 * unit + 16 * c);
        }
        const Word* from = values + value_unit(unit);
        for (int64_t p = pairs.begin; p < pairs.end; ++p) {
            V v[UNITS];
#pragma GCC unroll 16
            for (int c = 0; c < 2 * UNITS; ++c) {
                v[c / 2].part[c % 2] = _mm512_load_si512(
                    from + c / 4 * (kSplit / 2 * kPairWords) + p * kPairWords + c % 4 * 16);
            }
#pragma GCC unroll 16
            for (int r = 0; r < ROWS; ++r) {
                const __m512i w = V::weight(weights[r] + 2 * p);
#pragma GCC unroll 16
                for (int c = 0; c < 2 * UNITS; ++c) sums[r][c] = v[c / 2].add(sums[r][c], w, c % 2);
            }
        }
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 16
            for (int c = 0; c < 2 * UNITS; ++c) store(acc[r] + 32 * unit + 16 * c, sums[r][c]);
        }
    }
};
#endif

}  // namespace

#include "amx.h"

#include "cpu.h"

#if KV_AMX
#include <cerrno>
#include <csignal>
#include <initializer_list>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace kv {

namespace {

#if KV_AMX

// Linux gives a process the tiles' registers when it asks: they are 8 KiB of each thread's state.
bool is_permitted() {
#if defined(KV_TILES_EMULATED)
    return true;
#else
    constexpr long kAsk = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return cpu_has_avx512_bf16() && __builtin_cpu_supports("amx-tile") &&
           __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kAsk, kTileData) == 0;
#endif
}

// Small products of whole numbers, which are exact in any order: of more rows than a tile has, of
// few, and of tiles with unequal rows; the last block is narrower than a tile.
class Trial {
  public:
    Trial() {
        for (int64_t r = 0; r < kRows; ++r) {
            for (int64_t i = 0; i < kK; ++i) x_[r * kK + i] = whole(number(r, i));
        }
        for (int64_t c = 0; c < kN; ++c) {
            for (int64_t i = 0; i < kK; ++i) {
                const int64_t panel = c / kPanelCols * kSteps * kPanelCols * 2;
                weight_[panel + (i / 2 * kPanelCols + c % kPanelCols) * 2 + i % 2] =
                    whole(number(c + 100, i));
            }
        }
    }

    bool is_right() { return is_right(19, 1) && is_right(3, 1) && is_right(37, 2); }

  private:
    static constexpr int64_t kRows = 37, kN = 80, kK = 74, kSteps = kK / 2;

    bool is_right(int64_t rows, int64_t tiles) {
        for (int64_t t = 0; t < tiles; ++t) {
            const int64_t begin = t * rows / tiles, end = (t + 1) * rows / tiles;
            kAmxBf16->pack_rows({x_, kK, nullptr, kK, nullptr}, begin, end,
                                packed_ + begin * kSteps * kWordBytes);
        }
        const LinearTask task{packed_, rows,    tiles, nullptr, weight_, nullptr,
                              nullptr, nullptr, out_,  kN,      kSteps,  true};
        kAmxBf16->linear({&task, 0, kN / kPanelCols, 0, tiles}, nullptr, false);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t c = 0; c < kN; ++c) {
                int sum = 0;
                for (int64_t i = 0; i < kK; ++i) sum += number(r, i) * number(c + 100, i);
                if (out_[r * kN + c] != static_cast<float>(sum)) return false;
            }
        }
        return true;
    }

    static int number(int64_t row, int64_t i) {
        return static_cast<int>((row * 31 + i * 17) % 15) - 7;
    }
    static bf16 whole(int value) {
        const float number = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &number, sizeof bits);
        return {static_cast<uint16_t>(bits >> 16)};
    }

    bf16 x_[kRows * kK], weight_[kN * kK];
    char packed_[kRows * kSteps * kWordBytes];
    float out_[kRows * kN];
};

// In a process of its own: a system that has tiles by name only ends that one.
bool is_tried() {
    static Trial trial;
    const pid_t child = fork();
    if (child < 0) return false;
    if (child == 0) {
        // Not the parent's handlers, which would report a crash of the server.
        for (const int each : {SIGILL, SIGSEGV, SIGBUS, SIGABRT}) std::signal(each, SIG_DFL);
        _exit(trial.is_right() ? 0 : 1);
    }
    int status = 0;
    pid_t ended;
    do {
        ended = waitpid(child, &status, 0);
    } while (ended < 0 && errno == EINTR);
    return ended == child && WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

#if defined(KV_TILES_EMULATED)
const Kernels* const kBase = kPortable;
#else
const Kernels* const kBase = kAvx512Bf16;
#endif

#endif

}  // namespace

const Kernels* amx_bf16() {
#if KV_AMX
    static const bool is_usable = kBase && kAmxBf16 && is_permitted() && is_tried();
    if (!is_usable) return nullptr;
    static const Kernels table = [] {
        Kernels kernels = *kBase;
        kernels.name = "amx_bf16";
        kernels.tile_rows[kSame][kBfloat16] = kAmxBf16->tile_rows;
        kernels.row_step_bytes[kSame][kBfloat16] = kAmxBf16->row_step_bytes;
        kernels.pack_rows[kSame][kBfloat16] = kAmxBf16->pack_rows;
        kernels.linear[kSame][kBfloat16] = kAmxBf16->linear;
        return kernels;
    }();
    return &table;
#else
    return nullptr;
#endif
}

}  // namespace kv

#include "pool.h"

#include <system_error>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace kv {

namespace {

// About 50 to 100 microseconds; longer than Python needs between two operations.
constexpr int kSpins = 2000;

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

}  // namespace

Pool::Pool(int threads) {
    try {
        for (int i = 1; i < threads; ++i) workers_.emplace_back([this, i] { work(i - 1); });
    } catch (const std::system_error&) {
        // The system gives no more threads: those that are there do the work.
    }
}

Pool::~Pool() {
    stop_ = true;
    {
        std::lock_guard<std::mutex> lock(sleep_);
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
}

void Pool::take_pieces() {
    for (int64_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < pieces_;) piece_(f_, i);
}

void Pool::work(int index) {
    uint32_t seen = 0;
    for (;;) {
        for (int spins = 0; calls_ == seen && !stop_; ++spins) {
            if (spins < kSpins) {
                pause();
                continue;
            }
            std::unique_lock<std::mutex> lock(sleep_);
            ++asleep_;
            wake_.wait(lock, [&] { return calls_ != seen || stop_; });
            --asleep_;
        }
        if (stop_) return;
        seen = calls_;
        ++inside_;
        if (open_ && index < helpers_) take_pieces();
        --inside_;
    }
}

void Pool::share_out(int64_t pieces, int helpers, Piece piece, const void* f) {
    std::lock_guard<std::mutex> turn(turn_);
    piece_ = piece;
    f_ = f;
    pieces_ = pieces;
    helpers_ = helpers;
    next_ = 0;
    open_ = true;
    ++calls_;
    if (asleep_ > 0) {
        {
            std::lock_guard<std::mutex> lock(sleep_);
        }
        wake_.notify_all();
    }
    take_pieces();
    open_ = false;
    for (int spins = 0; inside_ > 0; ++spins) {
        if (spins < kSpins) {
            pause();
        } else {
            std::this_thread::yield();
        }
    }
}

}  // namespace kv

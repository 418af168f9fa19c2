// A few threads that share out numbered pieces of work.
//
// Pieces are taken in any order by any thread; whoever splits the work sees to it that results
// don't depend on that. Idle threads spin for a moment (the next operation of a step follows within
// microseconds), then sleep: an idle process costs nothing.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace kv {

class Pool {
  public:
    // The calling thread is one of `threads`.
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return static_cast<int>(workers_.size()) + 1; }

    // f(i) for each i in [0, pieces), on at most `wanted` threads; returns when all are done.
    // f must not throw. Callers on other threads wait for their turn.
    template <typename F>
    void run(int64_t pieces, int wanted, const F& f) {
        if (pieces <= 1 || wanted <= 1 || workers_.empty()) {
            for (int64_t i = 0; i < pieces; ++i) f(i);
            return;
        }
        share_out(pieces, wanted - 1, [](const void* g, int64_t i) {
            (*static_cast<const F*>(g))(i);
        }, &f);
    }

  private:
    using Piece = void (*)(const void* f, int64_t i);

    void share_out(int64_t pieces, int helpers, Piece piece, const void* f);
    void work(int index);
    void take_pieces();

    std::vector<std::thread> workers_;
    std::mutex turn_;  // held by the caller whose work is shared out

    // The work: written by the caller while `open_` is false and no worker is `inside_`.
    Piece piece_ = nullptr;
    const void* f_ = nullptr;
    int64_t pieces_ = 0;
    std::atomic<int> helpers_{0};
    alignas(64) std::atomic<int64_t> next_{0};
    // A worker steps inside, and only then looks whether the work is open; the caller closes it,
    // and only then looks who is inside. So one of the two sees the other, and a worker that
    // overslept does no harm.
    alignas(64) std::atomic<bool> open_{false};
    std::atomic<int> inside_{0};

    alignas(64) std::atomic<uint32_t> calls_{0};  // one more for each piece of shared work
    std::atomic<bool> stop_{false};
    std::atomic<int> asleep_{0};
    std::mutex sleep_;
    std::condition_variable wake_;
};

}  // namespace kv

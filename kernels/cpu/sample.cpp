#include "sample.h"

#include <algorithm>
#include <cstddef>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

namespace kv {

namespace {

// Philox 4x32-10 (Salmon et al. 2011) under the seed, at the counter (position, output index, 0, 0):
// a number in [0, 1) of 53 bits.
double uniform(uint64_t seed, uint32_t output_index, uint32_t position) {
    uint32_t c[4] = {position, output_index, 0, 0};
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = uint64_t{0xD2511F53} * c[0], b = uint64_t{0xCD9E8D57} * c[2];
        const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ c[1] ^ k0,
                                  static_cast<uint32_t>(b),
                                  static_cast<uint32_t>(a >> 32) ^ c[3] ^ k1,
                                  static_cast<uint32_t>(a)};
        std::copy(next, next + 4, c);
        k0 += 0x9E3779B9;
        k1 += 0xBB67AE85;
    }
    const double high = c[0] >> 5, low = c[1] >> 6;
    return (high * 67108864.0 + low) / 9007199254740992.0;
}

// A token's place in the order of preference: larger logit first, then lower id.
struct Candidate {
    float logit;
    int64_t id;
    bool operator<(const Candidate& other) const {
        return logit != other.logit ? logit > other.logit : id < other.id;
    }
};

class Row {
  public:
    Row(const Kernels& kernels, const SampleRow& row) : row_(row), kernels_(kernels) {
        maxima_.resize(blocks(row.width));
        max_ = kernels.block_max(row.logits, row.width, maxima_.data());
    }

    int64_t largest() const {
        for (size_t block = 0; block < maxima_.size(); ++block) {
            if (maxima_[block] != max_) continue;
            const int64_t end = std::min<int64_t>((block + 1) * kMaxBlock, row_.width);
            for (int64_t i = block * kMaxBlock; i < end; ++i) {
                if (row_.logits[i] == max_) return i;
            }
        }
        return 0;  // all NaN
    }

    int64_t draw() const {
        const double u = uniform(row_.seed, row_.output_index, row_.position);
        const bool all = row_.top_p >= 1 && limit() == row_.width;
        return all ? draw_of_all(u) : draw_of(kept(), u);
    }

  private:
    struct Weights {
        std::vector<float> each;   // exp((logit - max) / temperature)
        std::vector<double> sums;  // of each kMaxBlock of them
        double total() const { return std::accumulate(sums.begin(), sums.end(), 0.0); }
    };

    static size_t blocks(int64_t width) {
        return static_cast<size_t>((width + kMaxBlock - 1) / kMaxBlock);
    }

    Weights weigh(const float* logits, int64_t width) const {
        Weights weights;
        weights.each.resize(static_cast<size_t>(width));
        weights.sums.resize(blocks(width));
        kernels_.weights(logits, width, max_, 1.0f / row_.temperature, weights.each.data(),
                         weights.sums.data());
        return weights;
    }

    int64_t limit() const {
        return row_.top_k > 0 ? std::min<int64_t>(row_.top_k, row_.width) : row_.width;
    }

    // Weights are relative to the largest, whose own is 1.
    float least_weight() const { return std::min(row_.min_p, 1.0f); }

    // The `count` best, in order.
    std::vector<Candidate> best(int64_t count) const {
        // The count-th largest of the blocks' maxima is at most the count-th largest of all.
        float bound = -std::numeric_limits<float>::infinity();
        if (count < static_cast<int64_t>(maxima_.size())) {
            std::vector<float> sorted = maxima_;
            std::nth_element(sorted.begin(), sorted.begin() + count - 1, sorted.end(),
                             std::greater<float>());
            bound = sorted[static_cast<size_t>(count - 1)];
        }
        std::vector<Candidate> candidates;
        for (size_t block = 0; block < maxima_.size(); ++block) {
            if (maxima_[block] < bound) continue;
            const int64_t end = std::min<int64_t>((block + 1) * kMaxBlock, row_.width);
            for (int64_t i = block * kMaxBlock; i < end; ++i) {
                if (row_.logits[i] >= bound) candidates.push_back({row_.logits[i], i});
            }
        }
        if (candidates.empty()) candidates.push_back({max_, 0});  // all NaN
        const size_t kept = std::min(candidates.size(), static_cast<size_t>(count));
        std::nth_element(candidates.begin(), candidates.begin() + static_cast<std::ptrdiff_t>(kept - 1),
                         candidates.end());
        candidates.resize(kept);
        std::sort(candidates.begin(), candidates.end());
        return candidates;
    }

    Weights weigh(const std::vector<Candidate>& candidates) const {
        std::vector<float> logits;
        for (const Candidate& c : candidates) logits.push_back(c.logit);
        return weigh(logits.data(), static_cast<int64_t>(logits.size()));
    }

    // What top_k and top_p leave, in order of preference.
    std::vector<Candidate> kept() const {
        if (row_.top_p >= 1) return best(limit());
        if (limit() < row_.width) {
            const std::vector<Candidate> top = best(limit());
            const Weights weights = weigh(top);
            return nucleus(top, weights, weights.total());
        }
        // Most often a few tokens hold the nucleus: sort no more than needed.
        const double total = weigh(row_.logits, row_.width).total();
        for (int64_t count = 256;; count *= 8) {
            const std::vector<Candidate> top = best(std::min(count, row_.width));
            const std::vector<Candidate> found = nucleus(top, weigh(top), total);
            if (found.size() < top.size() || count >= row_.width) return found;
        }
    }

    // The shortest beginning that holds top_p of `total`.
    std::vector<Candidate> nucleus(std::vector<Candidate> top, const Weights& weights,
                                   double total) const {
        const double wanted = total * static_cast<double>(row_.top_p);
        double sum = 0;
        for (size_t i = 0; i < top.size(); ++i) {
            sum += static_cast<double>(weights.each[i]);
            if (sum >= wanted) {
                top.resize(i + 1);
                break;
            }
        }
        return top;
    }

    // The first, by id, at which the running sum exceeds u of the total.
    int64_t draw_of(std::vector<Candidate> candidates, double u) const {
        std::sort(candidates.begin(), candidates.end(),
                  [](const Candidate& a, const Candidate& b) { return a.id < b.id; });
        const Weights weights = weigh(candidates);
        double total = 0;
        for (const float w : weights.each) {
            if (w >= least_weight()) total += static_cast<double>(w);
        }
        double sum = 0;
        int64_t chosen = largest();
        for (size_t i = 0; i < candidates.size(); ++i) {
            const float w = weights.each[i];
            if (w == 0 || w < least_weight()) continue;
            chosen = candidates[i].id;
            sum += static_cast<double>(w);
            if (sum > u * total) break;
        }
        return chosen;
    }

    // The same for a whole row, a block at a time.
    int64_t draw_of_all(double u) const {
        Weights weights = weigh(row_.logits, row_.width);
        if (row_.min_p > 0) {
            std::fill(weights.sums.begin(), weights.sums.end(), 0.0);
            for (size_t i = 0; i < weights.each.size(); ++i) {
                float& w = weights.each[i];
                if (w < least_weight()) w = 0;
                weights.sums[i / kMaxBlock] += static_cast<double>(w);
            }
        }
        const double target = u * weights.total();
        double before = 0;
        int64_t chosen = largest();
        for (size_t block = 0; block < weights.sums.size(); ++block) {
            const size_t begin = block * kMaxBlock;
            const size_t end = std::min(begin + kMaxBlock, weights.each.size());
            if (before + weights.sums[block] <= target && end < weights.each.size()) {
                before += weights.sums[block];
                continue;
            }
            double sum = before;
            for (size_t i = begin; i < end; ++i) {
                if (weights.each[i] == 0) continue;
                chosen = static_cast<int64_t>(i);
                sum += static_cast<double>(weights.each[i]);
                if (sum > target) break;
            }
            return chosen;
        }
        return chosen;
    }

    const SampleRow& row_;
    const Kernels& kernels_;
    float max_;
    std::vector<float> maxima_;  // of each kMaxBlock logits
};

}  // namespace

int64_t sample(const Kernels& kernels, const SampleRow& row) {
    const Row of(kernels, row);
    return row.temperature > 0 ? of.draw() : of.largest();
}

}  // namespace kv

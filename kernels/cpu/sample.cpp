#include "sample.h"

#include <algorithm>
#include <cmath>
#include <limits>
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
        maxima_.resize(static_cast<size_t>((row.width + kMaxBlock - 1) / kMaxBlock));
        max_ = kernels.block_max(row.logits, row.width, maxima_.data());
    }

    int64_t largest() const {
        for (int64_t i = 0; i < row_.width; ++i) {
            if (row_.logits[i] == max_) return i;
        }
        return 0;  // all NaN
    }

    int64_t draw() {
        weights_.resize(static_cast<size_t>(row_.width));
        sums_.resize(maxima_.size());
        kernels_.weights(row_.logits, row_.width, max_, 1.0f / row_.temperature, weights_.data(),
                         sums_.data());
        const bool all = (row_.top_k <= 0 || row_.top_k >= row_.width) && row_.top_p >= 1;
        if (!all) keep(last_kept());
        if (row_.min_p > 0) keep_likely();
        return invert(uniform(row_.seed, row_.output_index, row_.position));
    }

  private:
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
            const int64_t begin = static_cast<int64_t>(block) * kMaxBlock;
            const int64_t end = std::min(begin + kMaxBlock, row_.width);
            for (int64_t i = begin; i < end; ++i) {
                if (row_.logits[i] >= bound) candidates.push_back({row_.logits[i], i});
            }
        }
        const size_t kept = std::min(candidates.size(), static_cast<size_t>(count));
        const auto middle = candidates.begin() + static_cast<std::ptrdiff_t>(kept);
        std::nth_element(candidates.begin(), middle, candidates.end());
        candidates.resize(kept);
        std::sort(candidates.begin(), candidates.end());
        return candidates;
    }

    // The last token, in order of preference, that top_k and top_p leave.
    Candidate last_kept() const {
        const int64_t limit = row_.top_k > 0 ? std::min<int64_t>(row_.top_k, row_.width) : row_.width;
        if (row_.top_p >= 1) {
            const std::vector<Candidate> top = best(limit);
            return top.empty() ? Candidate{max_, 0} : top.back();
        }
        double total = 0;
        if (limit == row_.width) {
            for (const double sum : sums_) total += sum;
        } else {
            for (const Candidate& c : best(limit)) total += weight(c);
        }
        const double nucleus = total * static_cast<double>(row_.top_p);
        // Most often a few tokens hold the nucleus: sort no more than needed.
        for (int64_t count = std::min<int64_t>(limit, 256);; count = std::min(limit, count * 8)) {
            const std::vector<Candidate> top = best(count);
            double sum = 0;
            for (const Candidate& c : top) {
                sum += weight(c);
                if (sum >= nucleus) return c;
            }
            if (count == limit) return top.empty() ? Candidate{max_, 0} : top.back();
        }
    }

    double weight(const Candidate& c) const {
        return static_cast<double>(weights_[static_cast<size_t>(c.id)]);
    }

    void keep(Candidate last) {
        for (int64_t i = 0; i < row_.width; ++i) {
            if (last < Candidate{row_.logits[i], i}) weights_[static_cast<size_t>(i)] = 0;
        }
        sum_blocks();
    }

    // Weights are relative to the largest, whose own is 1.
    void keep_likely() {
        const float least = std::min(row_.min_p, 1.0f);
        for (float& w : weights_) w = w < least ? 0 : w;
        sum_blocks();
    }

    void sum_blocks() {
        for (size_t block = 0; block < sums_.size(); ++block) {
            const size_t begin = block * static_cast<size_t>(kMaxBlock);
            const size_t end = std::min(begin + static_cast<size_t>(kMaxBlock), weights_.size());
            double sum = 0;
            for (size_t i = begin; i < end; ++i) sum += static_cast<double>(weights_[i]);
            sums_[block] = sum;
        }
    }

    // The first token, by id, at which the running sum exceeds u of the total.
    int64_t invert(double u) const {
        double total = 0;
        for (const double sum : sums_) total += sum;
        const double target = u * total;
        double sum = 0;
        size_t block = 0;
        size_t last_block = 0;
        for (; block < sums_.size() && sum + sums_[block] <= target; ++block) {
            if (sums_[block] > 0) last_block = block;
            sum += sums_[block];
        }
        if (block == sums_.size()) block = last_block;  // u * total rounded up to the total
        size_t chosen = static_cast<size_t>(largest());
        const size_t begin = block * static_cast<size_t>(kMaxBlock);
        const size_t end = std::min(begin + static_cast<size_t>(kMaxBlock), weights_.size());
        for (size_t i = begin; i < end; ++i) {
            if (weights_[i] == 0) continue;
            chosen = i;
            sum += static_cast<double>(weights_[i]);
            if (sum > target) break;
        }
        return static_cast<int64_t>(chosen);
    }

    const SampleRow& row_;
    const Kernels& kernels_;
    float max_;
    std::vector<float> maxima_;   // of each kMaxBlock logits
    std::vector<float> weights_;  // exp((logit - max) / temperature), 0 where filtered
    std::vector<double> sums_;    // of each kMaxBlock weights
};

}  // namespace

int64_t sample(const Kernels& kernels, const SampleRow& row) {
    Row of(kernels, row);
    return row.temperature > 0 ? of.draw() : of.largest();
}

}  // namespace kv

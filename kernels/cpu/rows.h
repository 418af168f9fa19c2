// Operations on rows: norms, gated activations, softmax. A row is one thread's work, in one order.
#pragma once

namespace {

// Sum of squares of f(i, n), the lanes of a row.
template <typename F>
KV_INLINE float inverse_rms(int64_t width, float eps, F f) {
    Vec sums = set1(0.0f);
    for_lanes(width, [&](int64_t i, int n) {
        const Vec x = f(i, n);
        sums = fma(x, x, sums);
    });
    return 1.0f / std::sqrt(sum_of(sums) / static_cast<float>(width) + eps);
}

template <typename T>
void norm(const NormTask& task, int64_t row_begin, int64_t row_end) {
    const Vec offset = set1(task.weight_offset);
    for (int64_t row = row_begin; row < row_end; ++row) {
        const T* x = static_cast<const T*>(task.x) + row * task.x_stride;
        T* out = static_cast<T*>(task.out) + row * task.width;
        if (task.residual) {
            T* residual = static_cast<T*>(task.residual) + row * task.residual_stride;
            for_lanes(task.width, [&](int64_t i, int n) {
                store_some(residual + i, load_some(residual + i, n) + load_some(x + i, n), n);
            });
            x = residual;
        }
        const Vec scale = set1(inverse_rms(
            task.width, task.eps, [&](int64_t i, int n) { return load_some(x + i, n); }));
        for_lanes(task.width, [&](int64_t i, int n) {
            const Vec weight = offset + load_as(task.weight, task.weight_dtype, i, n);
            store_some(out + i, load_some(x + i, n) * scale * weight, n);
        });
    }
}

// x * sigmoid(x)
KV_INLINE Vec silu(Vec x) { return x / (set1(1.0f) + exp(set1(0.0f) - x)); }
// x / 2 * (1 + tanh(u)) = x * sigmoid(2 u): no cancellation for negative x.
KV_INLINE Vec gelu(Vec x) {
    const Vec u = set1(0.7978845608f) * fma(set1(0.044715f) * x * x, x, x);
    return x / (set1(1.0f) + exp(set1(-2.0f) * u));
}

template <typename T>
void gated(const GatedTask& task, int64_t row_begin, int64_t row_end) {
    for (int64_t row = row_begin; row < row_end; ++row) {
        const T* gate = static_cast<const T*>(task.gate_up) + row * task.stride;
        const T* up = gate + task.width;
        T* out = static_cast<T*>(task.out) + row * task.width;
        for_lanes(task.width, [&](int64_t i, int n) {
            const Vec g = load_some(gate + i, n);
            const Vec activated = task.gate == kSilu ? silu(g) : gelu(g);
            store_some(out + i, activated * load_some(up + i, n), n);
        });
    }
}

float row_max(const float* x, int64_t width) {
    Vec m = set1(-kInfinity);
    for_lanes(width, [&](int64_t i, int n) {
        // Lanes past the end repeat the row's first number.
        const Vec lanes = n == 16 ? load(x + i)
                                  : where_less(iota(), set1(static_cast<float>(n)),
                                               load_n(x + i, n), set1(x[0]));
        m = max(lanes, m);
    });
    return max_lane(m);
}

void log_softmax(const float* logits, float* out, int64_t width) {
    const float m = row_max(logits, width);
    const Vec top = set1(m);
    Vec sums = set1(0.0f);
    for_lanes(width, [&](int64_t i, int n) {
        const Vec e = exp(load_some(logits + i, n) - top);
        sums = sums + where_less(iota(), set1(static_cast<float>(n)), e, set1(0.0f));
    });
    // Summing many small numbers in one lane loses bits; 16 lanes of 10^4 each keep 1e-6.
    const Vec log_sum = set1(std::log(sum_of(sums)));
    for_lanes(width, [&](int64_t i, int n) {
        store_some(out + i, load_some(logits + i, n) - top - log_sum, n);
    });
}

float block_max(const float* logits, int64_t width, float* maxima) {
    float top = -kInfinity;
    for (int64_t begin = 0; begin < width; begin += kMaxBlock) {
        const float m = row_max(logits + begin, lesser(kMaxBlock, width - begin));
        maxima[begin / kMaxBlock] = m;
        top = m > top ? m : top;
    }
    return top;
}

void weights(const float* logits, int64_t width, float max_logit, float inverse_temperature,
             float* out, double* sums) {
    const Vec top = set1(max_logit), scale = set1(inverse_temperature);
    const Vec zero = set1(0.0f), one = set1(1.0f);
    for (int64_t begin = 0; begin < width; begin += kMaxBlock) {
        Vec sum = zero;
        for_lanes(lesser(kMaxBlock, width - begin), [&](int64_t i, int n) {
            const Vec x = load_some(logits + begin + i, n);
            Vec w = exp((x - top) * scale);
            w = where_less(zero, w, w, zero);  // NaN too
            w = where_equal(x, top, one, w);
            w = where_less(iota(), set1(static_cast<float>(n)), w, zero);
            store_some(out + begin + i, w, n);
            sum = sum + w;
        });
        sums[begin / kMaxBlock] = static_cast<double>(sum_of(sum));
    }
}

}  // namespace

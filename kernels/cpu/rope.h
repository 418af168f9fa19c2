// Split qkv, normalise and turn queries and keys, and put keys and values into their slots.
#pragma once

namespace {

template <typename T>
KV_INLINE void head(const RopeTask& task, const T* in, T* out, const float* cosines,
                    const void* weight, int weight_dtype) {
    const int64_t half = task.rotary_dim / 2;
    const float* sines = cosines + half;
    Vec scale = set1(1.0f);
    if (weight) {
        scale = set1(inverse_rms(task.head_dim, task.eps,
                                 [&](int64_t i, int n) { return load_some(in + i, n); }));
    }
    const auto normalised = [&](int64_t i, int n) {
        const Vec x = load_some(in + i, n);
        if (!weight) return x;
        return x * scale * (set1(task.weight_offset) + load_as(weight, weight_dtype, i, n));
    };
    for_lanes(half, [&](int64_t i, int n) {
        const Vec a = normalised(i, n), b = normalised(half + i, n);
        const Vec c = load_some(cosines + i, n), s = load_some(sines + i, n);
        store_some(out + i, a * c - b * s, n);
        store_some(out + half + i, b * c + a * s, n);
    });
    for_lanes(task.head_dim - 2 * half, [&](int64_t i, int n) {
        store_some(out + 2 * half + i, normalised(2 * half + i, n), n);
    });
}

template <typename T>
void rope_store(const RopeTask& task, int64_t row_begin, int64_t row_end) {
    const int64_t d = task.head_dim;
    for (int64_t row = row_begin; row < row_end; ++row) {
        const T* in = static_cast<const T*>(task.qkv) + row * task.qkv_stride;
        const float* cosines = task.cos_sin + task.positions[row] * task.rotary_dim;
        T* query = static_cast<T*>(task.query_out) + row * task.num_heads * d;
        for (int64_t h = 0; h < task.num_heads; ++h, in += d) {
            head(task, in, query + h * d, cosines, task.q_norm, task.q_norm_dtype);
        }
        const int64_t slot = task.slots[row];
        if (slot < 0) continue;
        const int64_t page = slot / task.page_size, place = slot % task.page_size;
        T* keys = static_cast<T*>(task.key_pages) + page * task.key_page_stride + place * d;
        T* values = static_cast<T*>(task.value_pages) + page * task.value_page_stride + place * d;
        for (int64_t h = 0; h < task.num_kv_heads; ++h, in += d) {
            head(task, in, keys + h * task.page_size * d, cosines, task.k_norm, task.k_norm_dtype);
        }
        for (int64_t h = 0; h < task.num_kv_heads; ++h, in += d) {
            std::memcpy(values + h * task.page_size * d, in,
                        sizeof(T) * static_cast<size_t>(d));
        }
    }
}

}  // namespace

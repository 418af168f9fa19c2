// Normalise and turn queries and keys, and put keys and values into their slots.
#pragma once

namespace {

template <typename T, typename Out>
KV_INLINE void head(const RopeTask& task, const T* in, Out* out, const float* cosines,
                    const void* weight, int weight_dtype) {
    const int64_t half = task.rotary_dim / 2;
    if constexpr (std::is_same_v<T, Out>) {
        if (half == 0 && !weight) {
            std::memcpy(out, in, sizeof(T) * static_cast<size_t>(task.head_dim));
            return;
        }
    }
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

// The keys and values of one token.
template <typename T>
void store_int8(const RopeTask& task, const T* key, const T* value, int64_t page, int64_t place,
                const float* cosines) {
    const int64_t d = task.head_dim;
    alignas(64) float x[kMaxHeadDim];
    for (int64_t i = 0; i < 2 * task.num_kv_heads; ++i) {
        const bool is_key = i < task.num_kv_heads;
        const int64_t h = is_key ? i : i - task.num_kv_heads;
        const int64_t slot = h * task.page_size + place;
        const T* in = (is_key ? key : value) + h * d;
        if (is_key) {
            head(task, in, x, cosines, task.k_norm, task.k_norm_dtype);
        } else {
            for_lanes(d, [&](int64_t i, int n) { store_some(x + i, load_some(in + i, n), n); });
        }
        int8_t* pages = static_cast<int8_t*>(is_key ? task.key_pages : task.value_pages) +
                        page * (is_key ? task.key_page_stride : task.value_page_stride);
        float* scales = (is_key ? task.key_scales : task.value_scales);
        quantise(x, d, pages + slot * d, scales + page * task.scale_page_stride + slot);
    }
}

template <typename T>
void rope_store(const RopeTask& task, int64_t row_begin, int64_t row_end) {
    const int64_t d = task.head_dim;
    for (int64_t row = row_begin; row < row_end; ++row) {
        const float* cosines =
            task.positions ? task.cos_sin + task.positions[row] * task.rotary_dim : nullptr;
        const T* query = static_cast<const T*>(task.query) + row * task.query_stride;
        const T* key = static_cast<const T*>(task.key) + row * task.key_stride;
        const T* value = static_cast<const T*>(task.value) + row * task.value_stride;
        T* query_out = static_cast<T*>(task.query_out) + row * task.num_heads * d;
        for (int64_t h = 0; h < task.num_heads; ++h) {
            head(task, query + h * d, query_out + h * d, cosines, task.q_norm, task.q_norm_dtype);
        }
        const int64_t slot = task.slots[row];
        if (slot < 0) continue;
        const int64_t page = slot / task.page_size, place = slot % task.page_size;
        if (task.key_scales) {
            store_int8(task, key, value, page, place, cosines);
            continue;
        }
        T* keys = static_cast<T*>(task.key_pages) + page * task.key_page_stride + place * d;
        T* values = static_cast<T*>(task.value_pages) + page * task.value_page_stride + place * d;
        for (int64_t h = 0; h < task.num_kv_heads; ++h) {
            const int64_t to = h * task.page_size * d;
            head(task, key + h * d, keys + to, cosines, task.k_norm, task.k_norm_dtype);
            std::memcpy(values + to, value + h * d, sizeof(T) * static_cast<size_t>(d));
        }
    }
}

}  // namespace

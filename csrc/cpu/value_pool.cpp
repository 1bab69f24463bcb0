#include "level_kernels.hpp"
#include "simd.hpp"

// Formulas in mold_kernels/value_pool.py. A task is a run of tokens, short enough that threads share the work evenly
// and long enough that a total a task costs nothing.
namespace mold::MOLD_LEVEL {
namespace {

constexpr int64_t tokens_per_task = 512;

// float32 sums run over this many tokens before they go into a float64 total, so the error does not grow with T.
// At 64 some seeds were less accurate than twice the reference; 16 is not, and costs the forward about 3 %.
constexpr int64_t tokens_per_block = 16;

template <typename T>
T dot(const T* a, const T* b, int64_t padded) {
    Vector<T> even{}, odd{};  // two sums hide the latency of an addition; rows are padded with zeros to a pair
    for (int64_t c = 0; c < padded; c += 2 * lanes<T>) {
        even += load(a + c) * load(b + c);
        odd += load(a + c + lanes<T>) * load(b + c + lanes<T>);
    }
    return sum<T>(even + odd);
}

template <typename Element, typename T>
void load_token(const View& v, int64_t example, int64_t token, T* row) {
    const int64_t width = v.sizes[3], stride = v.strides[3];
    for (int64_t h = 0; h < v.sizes[1]; ++h, row += width) {
        const Element* source = v.at<const Element>(example, h, token);
        if (stride == 1) {
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) row[d] = widen(source[d]);
        } else {
            for (int64_t d = 0; d < width; ++d) row[d] = widen(source[d * stride]);
        }
    }
}

template <typename Element, typename T>
void store_token(const T* row, const View& dv, int64_t example, int64_t token) {
    const int64_t width = dv.sizes[3], stride = dv.strides[3];
    for (int64_t h = 0; h < dv.sizes[1]; ++h, row += width) {
        Element* target = dv.at<Element>(example, h, token);
        if (stride == 1) {
#pragma omp simd
            for (int64_t d = 0; d < width; ++d) target[d] = narrow<Element>(row[d]);
        } else {
            for (int64_t d = 0; d < width; ++d) target[d * stride] = narrow<Element>(row[d]);
        }
    }
}

struct Sizes {
    int64_t tokens, dim, padded, tasks_per_example;
};

template <typename T>
Sizes sizes_of(const View& v) {
    const int64_t dim = v.sizes[1] * v.sizes[3];
    return {v.sizes[2], dim, round_up(dim, 2 * lanes<T>), round_up(v.sizes[2], tokens_per_task) / tokens_per_task};
}

template <typename T>
struct Rows {
    T *values, *other;

    Rows(Scratch& scratch, const Sizes& sizes)
        : values(scratch.take<T>(sizes.padded)), other(scratch.take<T>(sizes.padded)) {
        if (!values) return;
        for (int64_t c = 0; c < sizes.padded; ++c) values[c] = other[c] = 0;
    }
};

template <typename Element, typename T>
void forward(const View& v, const View& mask, T eps, const View& pooled, int threads) {
    const Sizes sizes = sizes_of<T>(v);
    const int64_t tasks = v.sizes[0] * sizes.tasks_per_example;
    const Memory memory(tasks * sizes.padded * static_cast<int64_t>(sizeof(double)));
    double* totals = reinterpret_cast<double*>(memory.data);

    const auto make = [&](Scratch& scratch) { return Rows<T>(scratch, sizes); };
    parallel(threads, tasks, make, [&](int64_t task, Rows<T>& rows) {
        const int64_t example = task / sizes.tasks_per_example;
        const int64_t begin = task % sizes.tasks_per_example * tokens_per_task;
        const int64_t end = smaller(begin + tokens_per_task, sizes.tokens);
        double* total = totals + task * sizes.padded;
        for (int64_t c = 0; c < sizes.padded; ++c) total[c] = 0;
        for (int64_t start = begin; start < end; start += tokens_per_block) {
            for (int64_t c = 0; c < sizes.padded; ++c) rows.other[c] = 0;
            for (int64_t t = start; t < smaller(start + tokens_per_block, end); ++t) {
                if (!*mask.at<const bool>(example, t)) continue;
                load_token<Element>(v, example, t, rows.values);
                const T r = 1 / std::sqrt(dot(rows.values, rows.values, sizes.padded) / sizes.dim + eps);
#pragma omp simd
                for (int64_t c = 0; c < sizes.padded; ++c) rows.other[c] += r * rows.values[c];
            }
#pragma omp simd
            for (int64_t c = 0; c < sizes.padded; ++c) total[c] += rows.other[c];
        }
    });
    for (int64_t b = 0; b < v.sizes[0]; ++b) {
        const double* of_example = totals + b * sizes.tasks_per_example * sizes.padded;
        for (int64_t c = 0; c < sizes.dim; ++c) {
            double total = 0;
            for (int64_t i = 0; i < sizes.tasks_per_example; ++i) total += of_example[i * sizes.padded + c];
            pooled.at<T>(b)[c] = static_cast<T>(total);
        }
    }
}

template <typename Element, typename T>
void backward(const View& u, const View& v, const View& mask, T eps, const View& dv, int threads) {
    const Sizes sizes = sizes_of<T>(v);
    const auto make = [&](Scratch& scratch) { return Rows<T>(scratch, sizes); };
    parallel(threads, v.sizes[0] * sizes.tasks_per_example, make, [&](int64_t task, Rows<T>& rows) {
        const int64_t example = task / sizes.tasks_per_example;
        const int64_t begin = task % sizes.tasks_per_example * tokens_per_task;
        for (int64_t c = 0; c < sizes.dim; ++c) rows.other[c] = u.at<const T>(example)[c];
        for (int64_t t = begin; t < smaller(begin + tokens_per_task, sizes.tokens); ++t) {
            if (*mask.at<const bool>(example, t)) {
                load_token<Element>(v, example, t, rows.values);
                const T r = 1 / std::sqrt(dot(rows.values, rows.values, sizes.padded) / sizes.dim + eps);
                const T along = r * r * r * dot(rows.other, rows.values, sizes.padded) / sizes.dim;
#pragma omp simd
                for (int64_t c = 0; c < sizes.padded; ++c) {
                    rows.values[c] = r * rows.other[c] - along * rows.values[c];
                }
            } else {
                for (int64_t c = 0; c < sizes.dim; ++c) rows.values[c] = 0;
            }
            store_token<Element>(rows.values, dv, example, t);
        }
    });
}

}  // namespace

void value_pool_forward(const View& v, const View& mask, double eps, const View& pooled, int threads) {
    dispatch(v.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        forward<decltype(element), T>(v, mask, static_cast<T>(eps), pooled, threads);
    });
}

void value_pool_backward(
    const View& u, const View& v, const View& mask, double eps, const View& dv, int threads) {
    dispatch(v.dtype, [&](auto element, auto accumulator) {
        using T = decltype(accumulator);
        backward<decltype(element), T>(u, v, mask, static_cast<T>(eps), dv, threads);
    });
}

}  // namespace mold::MOLD_LEVEL

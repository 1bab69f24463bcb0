#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <stdexcept>
#include <tuple>

#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace py = pybind11;

namespace {

using mold::View;

#ifdef __clang__
constexpr const char* compiler = __VERSION__;
#else
constexpr const char* compiler = "GCC " __VERSION__;
#endif

std::map<std::string, std::string> build_info() {
    std::string built, used = mold::level().name;
    for (const mold::Level& level : mold::levels()) built += (built.empty() ? "" : ", ") + level.name;
    return {
        {"version", MOLD_VERSION},
        {"compiler", compiler},
        {"standard", "C++" + std::to_string(__cplusplus / 100 % 100)},
        {"instruction sets", built},
        {"instruction set used", used},
        {"threads", mold::thread_source()},
    };
}

std::vector<std::string> supported_levels() {
    std::vector<std::string> names;
    for (const mold::Level& level : mold::levels()) {
        if (level.supported) names.push_back(level.name);
    }
    return names;
}

constexpr std::pair<const char*, mold::Dtype> dtypes[] = {
    {"float32", mold::Dtype::float32}, {"float64", mold::Dtype::float64}, {"bfloat16", mold::Dtype::bfloat16},
    {"float16", mold::Dtype::float16}, {"bool", mold::Dtype::boolean},    {"int32", mold::Dtype::int32},
    {"int64", mold::Dtype::int64},
};

// A call makes a dozen views: sizes and strides are read from the tuples as they are.
View make_view(std::uintptr_t address, mold::Dtype dtype, const py::tuple& sizes, const py::tuple& strides) {
    if (sizes.size() > 4 || sizes.size() != strides.size()) throw std::invalid_argument("view: at most 4 dimensions");
    View view{address, dtype, {1, 1, 1, 1}, {0, 0, 0, 0}};
    for (std::size_t i = 0; i < sizes.size(); ++i) {
        view.sizes[i] = sizes[i].cast<std::int64_t>();
        view.strides[i] = strides[i].cast<std::int64_t>();
    }
    return view;
}

// (mask, first, ranges, scale, softcap, causal)
using Seen = std::tuple<const View*, const View*, const View*, double, double, bool>;

mold::Visibility visibility_of(const Seen& seen) {
    const auto& [mask, first, ranges, scale, softcap, causal] = seen;
    return {mask, first, ranges, scale, softcap, causal};
}

void attention_with_lse_forward(
    const View& q, const View& k, const View* v, const Seen& seen, const View* out, const View& lse, int threads) {
    mold::level().kernels->attention_with_lse_forward(q, k, v, visibility_of(seen), out, lse, threads);
}

void attention_with_lse_backward(
    const View* grad_out, const View& grad_lse, const View& q, const View& k, const View* v, const Seen& seen,
    const View* out, const View& lse, const View& dq, const View& dk, const View* dv, int threads) {
    mold::level().kernels->attention_with_lse_backward(
        grad_out, grad_lse, q, k, v, visibility_of(seen), out, lse, dq, dk, dv, threads);
}

// (row_spans, key_spans, whether every key in them is a key word, most rows of a piece, row_reduction)
using Spans = std::tuple<const View*, const View*, bool, std::int64_t, std::string>;

std::vector<mold::SpanPlan> plans_of(
    const Spans& spans, const View& q, const View& k, const mold::Visibility& visibility, bool list_columns) {
    const auto& [row_spans, key_spans, every_key, piece_rows, reduction] = spans;
    const mold::SpanSizes sizes{q.sizes[2], k.sizes[2], piece_rows};
    return plan_spans(
        *row_spans, *key_spans, every_key, sizes, {visibility.mask, visibility.first, visibility.causal},
        mold::row_reduction_named(reduction), list_columns || !every_key);
}

// Asks for large pages where a result is large: faults of small ones take longer than what is stored there.
void prefer_large_pages([[maybe_unused]] const View& result) {
#ifdef MADV_HUGEPAGE
    constexpr std::uintptr_t page = std::uintptr_t{1} << 21;
    std::uintptr_t bytes = result.dtype == mold::Dtype::float64 ? 8 : 4;
    for (const std::int64_t size : result.sizes) bytes *= static_cast<std::uintptr_t>(size);
    const std::uintptr_t begin = (result.address + page - 1) / page * page, end = (result.address + bytes) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: it may fail
#endif
}

void span_attention_forward(
    const View& q, const View& k, const View& lse, const Spans& spans, const Seen& seen, const View& pooled,
    const View* first, int threads) {
    const mold::Visibility visibility = visibility_of(seen);
    const auto plans = plans_of(spans, q, k, visibility, false);
    const mold::Kernels& kernels = *mold::level().kernels;
    prefer_large_pages(pooled);
    const auto forward = std::get<2>(spans) ? kernels.key_attention_forward : kernels.span_attention_forward;
    forward(q, k, lse, plans.data(), visibility, pooled, first, threads);
}

void span_attention_backward(
    const View& grad, const View& q, const View& k, const View& lse, const View* first, const Spans& spans,
    const Seen& seen, const View& dq, const View& dk, const View& dlse, int threads) {
    const mold::Visibility visibility = visibility_of(seen);
    const auto plans = plans_of(spans, q, k, visibility, true);
    mold::level().kernels->span_attention_backward(
        grad, q, k, lse, first, plans.data(), visibility, dq, dk, dlse, threads);
}

void layer_mixture_kl_forward(
    const View& teacher, const View& student, const View& weights, const View& num_steps, const View& num_keys,
    double tau, const std::string& row_norm, double l1_epsilon, const View& loss, const View& mixture_grad,
    int threads) {
    mold::level().kernels->layer_mixture_kl_forward(
        teacher, student, weights, num_steps, num_keys, tau, mold::row_norm_named(row_norm), l1_epsilon, loss,
        mixture_grad, threads);
}

// Calls the kernel of the level in use.
template <typename... Arguments>
auto kernel(void (*mold::Kernels::*member)(Arguments...)) {
    return [member](Arguments... arguments) { (mold::level().kernels->*member)(arguments...); };
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    using py::call_guard, py::gil_scoped_release;

    py::enum_<mold::Dtype> dtype(module, "Dtype");
    for (const auto& [name, value] : dtypes) dtype.value(name, value);
    py::class_<View>(module, "View").def(py::init(&make_view));

    module.def("build_info", build_info);
    module.def("supported_levels", supported_levels);
    module.def("set_level", mold::set_level);
    module.def("attention_with_lse_forward", attention_with_lse_forward, call_guard<gil_scoped_release>());
    module.def("attention_with_lse_backward", attention_with_lse_backward, call_guard<gil_scoped_release>());
    module.def("span_pieces", mold::span_pieces, call_guard<gil_scoped_release>());
    module.def("span_attention_forward", span_attention_forward, call_guard<gil_scoped_release>());
    module.def("span_attention_backward", span_attention_backward, call_guard<gil_scoped_release>());
    module.def("layer_mixture_kl_forward", layer_mixture_kl_forward, call_guard<gil_scoped_release>());
    module.def("layer_mixture_kl_backward", kernel(&mold::Kernels::layer_mixture_kl_backward), call_guard<gil_scoped_release>());
    module.def("value_pool_forward", kernel(&mold::Kernels::value_pool_forward), call_guard<gil_scoped_release>());
    module.def("value_pool_backward", kernel(&mold::Kernels::value_pool_backward), call_guard<gil_scoped_release>());
}

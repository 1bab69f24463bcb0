#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>

#include "cpu/value_pool.hpp"

namespace py = pybind11;

namespace {

#ifdef __clang__
constexpr const char* compiler = __VERSION__;
#else
constexpr const char* compiler = "GCC " __VERSION__;
#endif

constexpr const char* instruction_set =
#if defined(__AVX512F__)
    "AVX-512";
#elif defined(__AVX2__)
    "AVX2";
#elif defined(__SSE2__)
    "SSE2";
#elif defined(__ARM_NEON)
    "NEON";
#else
    "scalar";
#endif

std::map<std::string, std::string> build_info() {
    return {
        {"version", MOLD_VERSION},
        {"compiler", compiler},
        {"standard", "C++" + std::to_string(__cplusplus / 100 % 100)},
        {"instruction sets", instruction_set},
    };
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    py::class_<mold::View>(module, "View")
        .def(py::init<std::uintptr_t, std::string, std::vector<std::int64_t>, std::vector<std::int64_t>>());

    module.def("build_info", build_info);
    module.def("value_pool_forward", mold::value_pool_forward, py::call_guard<py::gil_scoped_release>());
    module.def("value_pool_backward", mold::value_pool_backward, py::call_guard<py::gil_scoped_release>());
}

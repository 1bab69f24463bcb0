#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "layer_mixture_kl.hpp"
#include "span_attention.hpp"
#ifndef MOLD_EMULATION
#include "device.hpp"
#endif

namespace py = pybind11;
using namespace mold::cuda;

// The tests build the same kernels for the host (emulation.hpp), as a module of another name.
PYBIND11_MODULE(MOLD_MODULE, module) {
    // module_local: both modules may be imported, and have the same C++ types.
    py::class_<Tensor>(module, "Tensor", py::module_local())
        .def(py::init<std::uintptr_t, std::vector<std::int64_t>, std::vector<std::int64_t>>());
    py::class_<Stream>(module, "Stream", py::module_local()).def(py::init<int, std::uintptr_t>());

    using release = py::call_guard<py::gil_scoped_release>;
    module.def("span_attention_forward", span_attention_forward, release());
    module.def("span_attention_backward", span_attention_backward, release());
    module.def("layer_mixture_kl_forward", layer_mixture_kl_forward, release());
    module.def("layer_mixture_kl_backward", layer_mixture_kl_backward, release());
#ifndef MOLD_EMULATION
    module.def("build_info", build_info);
    module.def("device_error", device_error, release());
#endif
}

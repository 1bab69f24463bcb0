#include "device.hpp"

namespace mold::cuda {

std::map<std::string, std::string> build_info() {
    return {{"CUDA", std::to_string(CUDART_VERSION / 1000) + "." + std::to_string(CUDART_VERSION % 1000 / 10)},
            {"architectures", MOLD_ARCHITECTURES}};
}

std::string device_error() {
    int count = 0;
    const cudaError_t status = cudaGetDeviceCount(&count);
    return status == cudaSuccess ? "" : cudaGetErrorString(status);
}

}  // namespace mold::cuda

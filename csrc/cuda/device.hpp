#pragma once

#include <map>
#include <string>

namespace mold::cuda {

// Version of the CUDA toolkit and the architectures that there is code for.
std::map<std::string, std::string> build_info();

// Why the CUDA runtime can use no device here; empty where it can.
std::string device_error();

}  // namespace mold::cuda

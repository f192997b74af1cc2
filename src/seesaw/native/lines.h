// Sizes that memory is cut into.
#pragma once

#include <cstdint>

namespace seesaw {

constexpr int64_t LINE = 64;  // bytes of a cache line

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

}  // namespace seesaw

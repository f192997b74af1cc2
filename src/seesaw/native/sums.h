// Sums over the members of a group, for all-reduces on CPU ranks.
#pragma once

#include <cstdint>

namespace seesaw {

// Types in the order that `transport/calls.py` numbers them.
enum SumType : int32_t { SUM_F32, SUM_BF16, SUM_F16, SUM_F64, SUM_I8, SUM_U8, SUM_I16, SUM_I32, SUM_I64, SUM_TYPES };

// Bytes of one element of `type`.
int64_t sum_item_bytes(int32_t type);

// out[i] = sources[0][i] + sources[1][i] + …, added in that order; 16-bit floats are added in float32 and rounded
// once. `copy` gets the same elements unless it is null. `out` may be one of the sources, from the same element on.
void sum_members(int32_t type, void* out, void* copy, const void* const* sources, int32_t members, int64_t count);

}  // namespace seesaw

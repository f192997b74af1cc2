// Memory that a thread keeps from call to call.
#pragma once

#include <cstdlib>
#include <memory>

#include "lines.h"

namespace seesaw {
namespace {

template <class T>
class Scratch {
  public:
    // Room for `count` elements from a cache line on, whatever they hold; null when there is no memory.
    T* reserve(int64_t count) {
        if (count > capacity_) {
            memory_.reset((T*)std::aligned_alloc(LINE, (size_t)round_up(count * (int64_t)sizeof(T), LINE)));
            capacity_ = memory_ ? count : 0;
        }
        return memory_.get();
    }

  private:
    struct Free {
        void operator()(void* p) const { std::free(p); }
    };
    std::unique_ptr<T, Free> memory_;
    int64_t capacity_ = 0;
};

}  // namespace
}  // namespace seesaw

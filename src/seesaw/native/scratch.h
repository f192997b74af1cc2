// Memory that a thread keeps from call to call.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

namespace seesaw {
namespace {

constexpr int64_t LINE = 64;  // bytes of a cache line

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

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

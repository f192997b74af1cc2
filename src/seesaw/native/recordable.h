// Functions that a program may call (`program.cpp`): each takes its arguments from a row of words.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace seesaw {

// An argument: a pointer, an integer, or a number with a fraction.
union Word {
    int64_t integer;
    double fraction;
};
// Calls a function with arguments from a row; returns its status, 0 if it has none.
using Caller = int32_t (*)(const Word*);

template <class A>
A argument(Word word) {
    if constexpr (std::is_pointer_v<A>)
        return (A)word.integer;
    else if constexpr (std::is_floating_point_v<A>)
        return (A)word.fraction;
    else
        return (A)word.integer;
}

template <auto F>
struct Spread;
template <class R, class... A, R (*F)(A...)>
struct Spread<F> {
    static int32_t call(const Word* words) { return call(words, std::index_sequence_for<A...>{}); }

  private:
    template <size_t... I>
    static int32_t call([[maybe_unused]] const Word* words, std::index_sequence<I...>) {
        if constexpr (std::is_void_v<R>) {
            F(argument<A>(words[I])...);
            return 0;
        } else {
            return (int32_t)F(argument<A>(words[I])...);
        }
    }
};

// Puts a function on the list by its name; beside its definition, once.
struct Recordable {
    Recordable(const char* name, Caller caller);
};
#define SEESAW_RECORDABLE(function) \
    static const seesaw::Recordable recordable_##function(#function, &seesaw::Spread<&function>::call)

}  // namespace seesaw

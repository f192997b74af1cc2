// Programs: calls of native functions that were recorded (`native/program.py`), made one after the other without
// anything between them.

#include <time.h>

#include <cstdint>
#include <string>
#include <unordered_map>

#include "recordable.h"

namespace seesaw {
namespace {

constexpr int64_t WORDS = 32;  // of a row: the call and its arguments

// Made by the first who needs it: functions put themselves on it before `main`, in any order.
std::unordered_map<std::string, Caller>& recordables() {
    static std::unordered_map<std::string, Caller> all;
    return all;
}

int64_t now_ns(int32_t clock) {
    timespec t;
    clock_gettime((clockid_t)clock, &t);
    return t.tv_sec * 1'000'000'000ll + t.tv_nsec;
}

}  // namespace

Recordable::Recordable(const char* name, Caller caller) { recordables()[name] = caller; }

}  // namespace seesaw

extern "C" {

// Words of a row.
int64_t seesaw_program_words() { return seesaw::WORDS; }

// What goes into the first word of a row; 0 if the function cannot be recorded.
int64_t seesaw_program_call(const char* name) {
    const auto found = seesaw::recordables().find(name);
    return found == seesaw::recordables().end() ? 0 : (int64_t)found->second;
}

// Makes the calls from row `at` on, until one answers other than 0. Returns that one's row with its answer in `status`;
// `count` if there was none. `times`, unless null, takes the nanoseconds of each call by `clock`.
int64_t seesaw_program_run(const seesaw::Word* rows, int64_t count, int64_t at, int64_t* times, int32_t clock,
                           int32_t* status) {
    using namespace seesaw;
    for (; at < count; ++at) {
        const Word* row = rows + at * WORDS;
        const int64_t started = times ? now_ns(clock) : 0;
        *status = ((Caller)row[0].integer)(row + 1);
        if (times) times[at] = now_ns(clock) - started;
        if (*status) return at;
    }
    return count;
}

}  // extern "C"

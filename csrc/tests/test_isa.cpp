// Tests of ANTDIFF_CPU_CAPABILITY: it only lowers the level of the processor, and the level computes in this process.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "tests/check.h"

using namespace antdiff;

namespace {

constexpr Isa kLevels[] = {Isa::generic, Isa::avx2, Isa::avx512};

void the_variable_only_lowers_the_level() {
  for (Isa supported : kLevels) {
    CHECK(lowered_isa(supported, nullptr) == supported);
    CHECK(lowered_isa(supported, "") == supported);
    for (Isa wanted : kLevels)
      CHECK(lowered_isa(supported, isa_name(wanted)) == (wanted < supported ? wanted : supported));
  }
}

void an_unknown_name_is_an_error_that_lists_the_names() {
  for (const char* name : {"scalar", "AVX2", "avx", "avx2 ", "0"}) {
    std::string message;
    try {
      lowered_isa(Isa::avx512, name);
    } catch (const std::invalid_argument& error) {
      message = error.what();
    }
    CHECK(message.find("ANTDIFF_CPU_CAPABILITY must be generic, avx2 or avx512; got '" + std::string(name) + "'") == 0);
  }
}

void this_process_uses_the_level_that_was_asked_for() {
  CHECK(isa() == lowered_isa(supported_isa(), std::getenv("ANTDIFF_CPU_CAPABILITY")));
}

}  // namespace

int main() {
  the_variable_only_lowers_the_level();
  an_unknown_name_is_an_error_that_lists_the_names();
  this_process_uses_the_level_that_was_asked_for();
  return test::summary();
}

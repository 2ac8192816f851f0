// A refused system call, thrown. Apart from throw.hpp, since <system_error> is a tenth of what the headers of the
// lower floors take to compile.
#pragma once

#include <lastcall/detail/throw.hpp>

#include <string>
#include <system_error>

namespace lastcall::detail {

/// `error` is an errno, `doing` what was being done: "making a self-pipe".
[[noreturn]] inline void throw_system_error(int error, const std::string& doing) {
  throw_or_die(std::system_error(error, std::generic_category(), "lastcall: " + doing));
}

}  // namespace lastcall::detail

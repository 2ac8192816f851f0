// One place where errors leave the library. Without exceptions they end the process, saying the same.
#pragma once

#include <lastcall/detail/config.hpp>

#include <stdexcept>
#include <string>
#include <system_error>

#if !LASTCALL_EXCEPTIONS
#include <unistd.h>

#include <cstdlib>
#endif

namespace lastcall::detail {

template <class Exception>
[[noreturn]] void throw_or_die(Exception&& error) {
#if LASTCALL_EXCEPTIONS
  throw std::forward<Exception>(error);
#else
  const std::string line = std::string("lastcall: ") + error.what() + "\n";
  const auto written = ::write(STDERR_FILENO, line.data(), line.size());
  static_cast<void>(written);
  std::abort();
#endif
}

/// `error` is an errno, `doing` what was being done: "making a self-pipe".
[[noreturn]] inline void throw_system_error(int error, const std::string& doing) {
  throw_or_die(std::system_error(error, std::generic_category(), "lastcall: " + doing));
}
[[noreturn]] inline void throw_invalid_argument(const std::string& message) {
  throw_or_die(std::invalid_argument("lastcall: " + message));
}
[[noreturn]] inline void throw_logic_error(const std::string& message) {
  throw_or_die(std::logic_error("lastcall: " + message));
}

}  // namespace lastcall::detail

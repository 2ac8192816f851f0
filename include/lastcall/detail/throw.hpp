// One place where errors leave the library. Without exceptions they end the process, saying the same.
#pragma once

#include <lastcall/detail/config.hpp>

#include <stdexcept>
#include <string>
#include <utility>

#if !LASTCALL_EXCEPTIONS
#include <sys/uio.h>
#include <unistd.h>

#include <cstdlib>
#include <string_view>
#endif

namespace lastcall::detail {

template <class Exception>
[[noreturn]] void throw_or_die(Exception&& error) {
#if LASTCALL_EXCEPTIONS
  throw std::forward<Exception>(error);
#else
  // In one piece, and without allocating: the error may be that there is no memory.
  const std::string_view message = error.what();
  std::string_view parts[] = {"lastcall: ", message, "\n"};
  if (message.substr(0, parts[0].size()) == parts[0]) parts[0] = {};
  iovec pieces[3];
  for (int at = 0; at < 3; ++at) {
    pieces[at] = {const_cast<char*>(parts[at].data()), parts[at].size()};
  }
  const auto written = ::writev(STDERR_FILENO, pieces, 3);
  static_cast<void>(written);
  std::abort();
#endif
}

[[noreturn]] inline void throw_invalid_argument(const std::string& message) {
  throw_or_die(std::invalid_argument("lastcall: " + message));
}
[[noreturn]] inline void throw_logic_error(const std::string& message) {
  throw_or_die(std::logic_error("lastcall: " + message));
}

}  // namespace lastcall::detail

// Ways to hang.
#include "adversary.hpp"

#include <unistd.h>

#include <cerrno>
#include <cstdlib>

namespace promise {

void hang() noexcept {
  for (;;) ::pause();
}

void spin() noexcept {
  static std::atomic<unsigned> turn{0};
  for (;;)
    turn.fetch_add(1, std::memory_order_relaxed);  // without any effect it would be undefined
}

int empty_pipe() {
  int ends[2];
  if (::pipe(ends) != 0) std::abort();
  return ends[0];
}

void write_out(int fd, std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t done = ::write(fd, text.data(), text.size());
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(done));
  }
}

}  // namespace promise

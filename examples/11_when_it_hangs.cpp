// 11: when it hangs. Press Ctrl-C, and watch who holds it up.
//
// What to watch for: three who don't come back, each held by something else: a read from a peer that
// says nothing, a loop that never looks at its token, a hook that waits for a lock. Each is named, with
// what the kernel says its thread waits in, and its stack; a task also with the line where it came in. The
// process is gone after the grace period all the same, with the exit code 124. This program is linked with
// -rdynamic: without, stacks say module+offset, which addr2line -e takes.
//
// Ctrl-\ (SIGQUIT) shows who is in now, and goes on.
#include <lastcall/lastcall.hpp>

#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <mutex>
#include <stdexcept>

using namespace std::chrono_literals;

// Functions of their own, so that the stacks have their names.
namespace example {

// A connection whose other end is open and silent.
[[gnu::noinline]] void receive_answer(int connection) {
  char answer = 0;
  if (::read(connection, &answer, 1) == 0) std::puts("the peer has hung up");
}

[[gnu::noinline]] void resize_pictures(const std::atomic<bool>& wanted) {
  while (wanted.load(std::memory_order_relaxed)) {
  }
}

[[gnu::noinline]] void flush_cache(std::mutex& cache) { const std::lock_guard lock(cache); }

}  // namespace example

int main() {
  int connection[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, connection) != 0) return 1;
  const std::atomic<bool> wanted{true};
  std::mutex cache;

  lastcall::ShutdownOptions options;
  options.grace_period = 4s;
  options.abort_margin = 1s;
  options.dump_signal = SIGQUIT;
  lastcall::ShutdownCoordinator coordinator(options);
  try {
    lastcall::Stage& storage = coordinator.stage("storage", 1s);
    storage.on_stop("flush cache", [&] { example::flush_cache(cache); });
    storage.on_stop("close database", [] { std::puts("the database is closed"); });
  } catch (const std::logic_error&) {
    // A signal came before the stage was declared.
    if (coordinator.is_ready()) throw;
  }
  coordinator.spawn("uploader", [&](const lastcall::CancellationToken&) {
    example::receive_answer(connection[0]);
  });
  coordinator.spawn("resizer",
                    [&](const lastcall::CancellationToken&) { example::resize_pictures(wanted); });
  coordinator.spawn("greeter", [](const lastcall::CancellationToken& token) { token.wait(); });
  // Held until the end, which run() doesn't return from.
  // NOLINTNEXTLINE(clang-analyzer-deadcode.DeadStores)
  const auto first = coordinator.try_enter();
  // NOLINTNEXTLINE(clang-analyzer-deadcode.DeadStores)
  const auto second = coordinator.try_enter();

  const std::lock_guard held(cache);
  std::printf("pid %d is up\n", ::getpid());
  coordinator.run();
}

// A program that is built with instrumentation (coverage, profiling, leak checking) and ends by run().
//
//   clean     all leave
//   held      a worker hangs: time runs out
//   locked    a worker holds stdout's lock for ever: the flush hangs
//   leak      all leave, but 12345 bytes are lost
//   forced    asks three times; nothing is written then
#include <lastcall/lastcall.hpp>

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <string_view>
#include <utility>

namespace {

using namespace std::chrono_literals;

[[noreturn]] void hang() {
  for (;;) ::pause();
}

[[gnu::noinline]] void lose_memory() {
  void* volatile lost = std::malloc(12345);
  lost = nullptr;
}

#if defined(LASTCALL_TEST_EMULATOR)
// What an emulator has not yet translated takes it long, the flush of all kinds of data above all.
constexpr auto for_who_hangs = 6s;
#else
constexpr auto for_who_hangs = 1s;
#endif

}  // namespace

int main(int argc, char** argv) {
  const std::string_view mode = argc > 1 ? argv[1] : "clean";
  lastcall::ShutdownOptions options;
  options.grace_period = mode == "held" || mode == "locked" ? for_who_hangs : 60s;
  options.abort_margin = options.grace_period / 4;
  options.repeat_window = 0ms;
  lastcall::ShutdownCoordinator lifetime(std::move(options));
  std::printf("to stdio\n");
  std::cout << "to std::cout\n";
  std::clog << "to std::clog\n";
  if (mode == "leak") lose_memory();
  lifetime.spawn("worker", [mode](lastcall::CancellationToken token) {
    if (mode == "locked") ::flockfile(stdout);
    token.wait();
    if (mode != "clean" && mode != "leak") hang();
  });
  lifetime.on_stop("hook", [mode] {
    if (mode != "forced") return;
    for (int wish = 0; wish < 2; ++wish) {
      ::usleep(20'000);
      ::kill(::getpid(), SIGINT);
    }
    hang();
  });
  ::kill(::getpid(), SIGTERM);
  lifetime.run();
}

// A trap in a process that has a Go library: every thread, also those of Go's with their small stacks, may
// be the one that a signal comes to.
#include "support/catch.hpp"
#include "support/process.hpp"

#include <lastcall/signal_trap.hpp>

#include <dirent.h>
#include <dlfcn.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <optional>

namespace {

using namespace std::chrono_literals;
using lastcall::SignalTrap;
using support::expect;

struct Go {
  void* library = ::dlopen(COMPANY_GO_LIBRARY, RTLD_NOW);
  template <class Function>
  Function* get(const char* name) {
    if (library == nullptr) std::abort();
    return reinterpret_cast<Function*>(::dlsym(library, name));
  }
};

// To each thread of the process, one after the other, and each time the trap has to get it.
void signal_each_thread(SignalTrap& trap, int number) {
  int threads = 0;
  if (DIR* const tasks = ::opendir("/proc/self/task")) {
    while (const dirent* const entry = ::readdir(tasks)) {
      const auto thread = static_cast<pid_t>(std::atoi(entry->d_name));
      if (thread <= 0 || ::syscall(SYS_tgkill, ::getpid(), thread, number) != 0) continue;
      ++threads;
      const auto got = trap.wait_for(10s);
      expect(got && got->number == number, "the trap gets what comes to that thread");
    }
    ::closedir(tasks);
  }
  expect(threads >= 4, "Go has threads");
}

}  // namespace

TEST_CASE("a trap made before or after a Go library is loaded gets what comes to any thread") {
  for (const bool trap_is_first : {true, false}) {
    const support::Ended ended = support::in_a_process([trap_is_first] {
      std::optional<SignalTrap> trap;
      if (trap_is_first) trap.emplace(std::initializer_list<int>{SIGTERM, SIGUSR1});
      Go go;
      go.get<void()>("company_spin")();
      std::this_thread::sleep_for(20ms);
      if (!trap_is_first) trap.emplace(std::initializer_list<int>{SIGTERM, SIGUSR1});
      for (int turn = 0; turn < 20; ++turn) {
        signal_each_thread(*trap, SIGTERM);
        signal_each_thread(*trap, SIGUSR1);
      }
      go.get<void()>("company_rest")();
    });
    INFO((trap_is_first ? "the trap first\n" : "the library first\n") << ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE(
    "Go's os/signal and a trap of the same number: whoever is on top gets it, ours calls on") {
  const support::Ended ended = support::in_a_process([] {
    Go go;
    auto* const noticed = go.get<int()>("company_noticed");
    go.get<void()>("company_notify")();
    {
      SignalTrap trap{SIGUSR2};
      ::raise(SIGUSR2);
      expect(trap.wait_for(10s).has_value(), "the trap on top gets it");
      expect(support::eventually([&] { return noticed() == 1; }, 10s), "and so does Go");
    }
    ::raise(SIGUSR2);
    expect(support::eventually([&] { return noticed() == 2; }, 10s), "Go has it again");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// What a coordinator costs while nothing happens: two threads that never wake, and little memory.
//
// How it is measured. Each of the process's threads has its counts of context switches in
// /proc/self/task/<tid>/status: a thread that didn't run has not been switched to. Memory is what
// /proc/self/smaps calls "Anonymous", of all mappings but the two threads' stacks: pages that exist
// because of the coordinator, and not those of files (libc's code) that all processes share. It is
// measured in a fresh process, this program executed again, whose heap has nothing left over to reuse.
#include "support/catch.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <dirent.h>
#include <pthread.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <thread>

namespace {

using namespace std::chrono_literals;

struct Switches {
  long voluntary = -1;
  long involuntary = -1;
};

std::map<std::string, Switches> switches_by_thread() {
  std::map<std::string, Switches> all;
  DIR* const directory = ::opendir("/proc/self/task");
  if (directory == nullptr) return all;
  while (const dirent* const entry = ::readdir(directory)) {
    if (entry->d_name[0] == '.') continue;
    const std::string path = std::string("/proc/self/task/") + entry->d_name + "/status";
    Switches found;
    if (std::FILE* const file = std::fopen(path.c_str(), "re")) {
      char line[256];
      while (std::fgets(line, sizeof line, file) != nullptr) {
        static_cast<void>(std::sscanf(line, "voluntary_ctxt_switches: %ld", &found.voluntary));
        static_cast<void>(std::sscanf(line, "nonvoluntary_ctxt_switches: %ld", &found.involuntary));
      }
      std::fclose(file);
    }
    all[entry->d_name] = found;
  }
  ::closedir(directory);
  return all;
}

#if !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

struct Memory {
  long own = 0;     // KiB that nobody shares
  long stacks = 0;  // of which stacks of threads
};

// Stacks are the mappings of the size that pthread_create() makes them, and of no file.
Memory memory_in_use(std::size_t stack_size) {
  Memory sum;
  std::FILE* const file = std::fopen("/proc/self/smaps", "re");
  if (file == nullptr) return sum;
  char line[512];
  bool is_stack = false;
  while (std::fgets(line, sizeof line, file) != nullptr) {
    unsigned long begin = 0;
    unsigned long end = 0;
    char access[8] = {};
    unsigned long offset = 0;
    char device[16] = {};
    unsigned long inode = 0;
    if (std::sscanf(line, "%lx-%lx %7s %lx %15s %lu", &begin, &end, access, &offset, device,
                    &inode) == 6) {
      is_stack = inode == 0 && end - begin == stack_size && std::strncmp(access, "rw-p", 4) == 0;
    }
    long kib = 0;
    if (std::sscanf(line, "Anonymous: %ld", &kib) != 1) continue;
    sum.own += kib;
    if (is_stack) sum.stacks += kib;
  }
  std::fclose(file);
  return sum;
}

const bool is_probe = [] {
  if (std::getenv("LASTCALL_TEST_PROBE") == nullptr) return false;
  std::size_t stack_size = 0;
  pthread_attr_t attributes;
  ::pthread_getattr_default_np(&attributes);
  ::pthread_attr_getstacksize(&attributes, &stack_size);
  static_cast<void>(memory_in_use(stack_size));  // what looking costs is paid before
  const Memory before = memory_in_use(stack_size);
  lastcall::ShutdownCoordinator lifetime;
  std::this_thread::sleep_for(200ms);
  const Memory after = memory_in_use(stack_size);
  const long stacks = after.stacks - before.stacks;
  const long beyond = after.own - before.own - stacks;
  support::say(std::to_string(beyond) + " KiB, and " + std::to_string(stacks) + " KiB of stacks");
  support::expect(stacks > 0, "the stacks were found");
  support::expect(beyond >= 0 && beyond < 100, "less than 100 KiB");
  support::leave(0);
}();

#endif

}  // namespace

TEST_CASE("an idle coordinator is two threads, and neither wakes in ten seconds") {
  const support::Ended ended = support::in_a_process([] {
    const auto before = switches_by_thread();
    lastcall::ShutdownCoordinator lifetime;
    lifetime.on_stop("hook", [] {});
    auto& stage = lifetime.stage("storage", 1s);
    const lastcall::WaitGroup::Guard guard = stage.enter("guard");
    lastcall::CancellationSource child(lifetime.token());

    // Until both have come to rest.
    auto settled = switches_by_thread();
    support::eventually([&] {
      std::this_thread::sleep_for(100ms);
      const auto now = switches_by_thread();
      const bool same = std::equal(
          now.begin(), now.end(), settled.begin(), settled.end(), [](const auto& a, const auto& b) {
            return a.first == b.first && (a.first == std::to_string(::getpid()) ||
                                          a.second.voluntary == b.second.voluntary);
          });
      settled = now;
      return same;
    });
    const auto begin = switches_by_thread();
    support::expect_equal(begin.size(), before.size() + 2, "the number of threads");
    const auto spent = support::cpu_time_of_process();
    std::this_thread::sleep_for(10s);
    const auto cpu = support::cpu_time_of_process() - spent;
    const auto end = switches_by_thread();
    support::expect_equal(end.size(), begin.size(), "the number of threads in the end");
    std::size_t looked_at = 0;
    for (const auto& [thread, switches] : end) {
      if (before.count(thread) != 0) continue;  // main, which looks; and a sanitizer's own thread
      const auto was = begin.find(thread);
      if (was == begin.end()) continue;
      ++looked_at;
      support::expect_equal(switches.voluntary, was->second.voluntary, "wake-ups");
      support::expect_equal(switches.involuntary, was->second.involuntary, "turns on a processor");
    }
    support::expect_equal(looked_at, std::size_t{2}, "the number of threads looked at");
    if (!support::under_sanitizer) support::expect(cpu < 20ms, "it used no processor time");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

#if !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)

TEST_CASE("an idle coordinator has less than 100 KiB beyond its threads' stacks") {
  ::setenv("LASTCALL_TEST_PROBE", "1", 1);
  support::Child probe = support::Child::exec(support::this_program());
  ::unsetenv("LASTCALL_TEST_PROBE");
  const support::Ended ended = probe.end();
  INFO(ended.out + " " + ended.err);
  CHECK(ended.how == "exit 0");
}

#endif

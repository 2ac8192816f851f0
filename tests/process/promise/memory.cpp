// No memory left: none for the process, or none from operator new, from the request on.
#include "adversary.hpp"

#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace promise {
namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;

// The address space ends where it is now, and what the heap has free is taken.
void take_all_memory() {
  std::size_t pages = 0;
  if (std::FILE* file = std::fopen("/proc/self/statm", "re")) {
    if (std::fscanf(file, "%zu", &pages) != 1) pages = 0;
    std::fclose(file);
  }
  rlimit limit{};
  ::getrlimit(RLIMIT_AS, &limit);
  limit.rlim_cur = pages * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  ::setrlimit(RLIMIT_AS, &limit);
}

// In the thread that asks, and in each that it could matter to: they have arenas of their own.
void take_the_heap() noexcept {
  for (std::size_t size = std::size_t{1} << 20U; size >= 16; size /= 2) {
    while (std::malloc(size) != nullptr) {
    }
  }
}

// Too long for a string to hold without memory.
constexpr const char* thrower = "one that throws, and whose name is long";

struct Everything {
  explicit Everything(ShutdownOptions options)
      : lifetime(std::move(options)),
        callback(lifetime.token(), [] { write_out(STDERR_FILENO, "callback\n"); }) {
    lifetime.on_stop("stop", [] { write_out(STDERR_FILENO, "stop\n"); });
    // So many that nobody has room for them by chance.
    for (int i = 0; i < 40; ++i) lifetime.on_drained("one of many to be released", [] {});
    lifetime.on_drained("drained", [] { write_out(STDERR_FILENO, "drained\n"); });
    second = &lifetime.stage("second", 50ms);
    second->on_drained("second drained", [] { write_out(STDERR_FILENO, "second drained\n"); });
    lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  }
  ShutdownCoordinator lifetime;
  CancellationCallback<void (*)()> callback;
  lastcall::Stage* second = nullptr;
};

// Hooks that take what the drain thread's own arena has left. The address space has an end by then.
void add_eaters(ShutdownCoordinator& lifetime) {
  lifetime.on_stop("eater", [] { take_the_heap(); });
  lifetime.on_drained("eater", [] { take_the_heap(); });
}

void memory_gone(Stand& stand) {
  Everything all(stand.options());
  add_eaters(all.lifetime);
  take_all_memory();
  take_the_heap();
  stand.ready();
  all.lifetime.run();
}

// In the very moment of the request, by who makes it.
void memory_gone_at_request(Stand& stand) {
  Everything all(stand.options());
  add_eaters(all.lifetime);
  all.lifetime.spawn("asking worker", [&](CancellationToken) {
    stand.ready();
    std::this_thread::sleep_for(40ms);
    take_all_memory();
    take_the_heap();
    stand.requested();
    all.lifetime.request_shutdown();
  });
  all.lifetime.run();
}

void memory_gone_and_worker_held(Stand& stand) {
  Everything all(stand.options());
  all.lifetime.spawn("held worker", [](CancellationToken) { hang(); });
  add_eaters(all.lifetime);
  all.lifetime.on_stop("held hook", [] { hang(); });
  take_all_memory();
  take_the_heap();
  stand.ready();
  all.lifetime.run();
}

void memory_gone_and_everybody_throws(Stand& stand) {
  Everything all(stand.options());
  add_eaters(all.lifetime);
  all.lifetime.on_stop(thrower, [] { throw std::bad_alloc(); });
  all.lifetime.spawn(thrower, [](CancellationToken token) {
    token.wait();
    take_the_heap();
    throw std::bad_alloc();
  });
  take_all_memory();
  stand.ready();
  all.lifetime.run();
}

void new_throws(Stand& stand) {
  Everything all(stand.options());
  exhaust_operator_new();
  stand.ready();
  all.lifetime.run();
}

void new_throws_and_a_hook_hangs(Stand& stand) {
  Everything all(stand.options());
  all.lifetime.on_stop("held hook", [] { hang(); });
  all.lifetime.on_stop("next hook", [] { write_out(STDERR_FILENO, "the next hook has run\n"); });
  exhaust_operator_new();
  stand.ready();
  all.lifetime.run();
}

void new_throws_and_so_does_a_hook(Stand& stand) {
  Everything all(stand.options());
  all.lifetime.on_stop(thrower, [] { throw 1; });
  exhaust_operator_new();
  stand.ready();
  all.lifetime.run();
}

void new_throws_in_a_task(Stand& stand) {
  Everything all(stand.options());
  all.lifetime.spawn(thrower, [&stand](CancellationToken) {
    stand.ready();
    std::this_thread::sleep_for(40ms);
    exhaust_operator_new();
    stand.requested();
    static_cast<void>(std::make_unique<std::string>(100, 'x'));
  });
  all.lifetime.run();
}

}  // namespace

void add_memory(std::vector<Adversary>& all) {
  const auto add = [&all](const char* name, const char* how, std::vector<std::string> says,
                          void (*body)(Stand&), Bound bound) -> Adversary& {
    Adversary adversary;
    adversary.name = name;
    adversary.how = how;
    adversary.says = std::move(says);
    adversary.body = body;
    adversary.bound = bound;
    adversary.needs.plain_build = true;  // sanitizers need memory of their own
    adversary.needs.own_kernel = body == memory_gone || body == memory_gone_at_request ||
                                 body == memory_gone_and_everybody_throws ||
                                 body == memory_gone_and_worker_held;  // by RLIMIT_AS
    all.push_back(std::move(adversary));
    return all.back();
  };
  const std::vector<std::string> steps = {"callback\n", "stop\n", "drained\n", "second drained\n"};
  add("memory gone", "exit 0", steps, memory_gone, Bound::at_once);
  add("memory gone with the request", "exit 0", steps, memory_gone_at_request, Bound::at_once)
      .provoke = [](Target&) {};
  add("memory gone, all throw", "exit 1", steps, memory_gone_and_everybody_throws, Bound::at_once);
  add("memory gone, worker and hook held", "exit 124", {"held worker", "held hook"},
      memory_gone_and_worker_held, Bound::grace);
  add("operator new throws", "exit 0", steps, new_throws, Bound::at_once);
  add("operator new throws, so does a hook", "exit 1", steps, new_throws_and_so_does_a_hook,
      Bound::at_once);
  add("operator new throws, hook held", "exit 124", {"held hook", "the next hook has run"},
      new_throws_and_a_hook_hangs, Bound::grace);
  add("operator new throws in a task", "exit 1", steps, new_throws_in_a_task, Bound::at_once)
      .provoke = [](Target&) {};
}

}  // namespace promise

// 06: a group of tasks, one of which fails. Ends by itself.
//
// What to watch for: an exception in a thread is no std::terminate() here. It stops the other
// tasks, is kept with the name of its task, and comes out of wait(). A task that stops because it
// was told to is no failure.
#include <lastcall/blocking.hpp>
#include <lastcall/task_group.hpp>
#include <lastcall/ticker.hpp>

#include <chrono>
#include <cstdio>
#include <exception>
#include <stdexcept>
#include <string>

using namespace std::chrono_literals;

int main() {
  lastcall::TaskGroup group;

  for (const char* shard : {"shard 1", "shard 2"}) {
    group.spawn(shard, [shard](lastcall::CancellationToken token) {
      lastcall::Ticker ticker(50ms);
      while (ticker.wait(token)) std::printf("%s: copied a block\n", shard);
      std::printf("%s: stops, because %s\n", shard, token.cause().message().c_str());
      token.throw_if_cancelled();
    });
  }
  group.spawn("shard 3", [] {
    lastcall::sleep_for(170ms, {});
    throw std::runtime_error("disk on fire");
  });

  try {
    group.wait();
  } catch (const std::exception& error) {
    std::printf("wait() rethrows: %s\n", error.what());
  }
  for (const lastcall::Failure& failure : group.failures()) {
    std::printf("failed: %s\n", failure.task.c_str());
  }
  std::printf("%zu failure in all\n", group.failures().size());
}

// 01: ten lines.
//
// Run it and press Ctrl-C, or send it a SIGTERM from another terminal.
//
// What to watch for: the worker is not cut off. It is told, between two steps; it says its last
// line; and only then is the process gone, with exit code 0. `main` blocks in run() and does
// nothing at all.
#include <lastcall/lastcall.hpp>

#include <chrono>
#include <cstdio>

int main() {
  lastcall::ShutdownCoordinator coordinator;
  coordinator.spawn("worker", [](lastcall::CancellationToken token) {
    while (lastcall::sleep_for(std::chrono::milliseconds(500), token)) std::puts("working");
    std::puts("last call: everything is put away");
  });
  coordinator.run();
}

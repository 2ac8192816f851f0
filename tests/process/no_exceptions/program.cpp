// A program that is compiled without exceptions and RTTI. With the name of an error as its argument it
// makes that error; without, it goes through a whole life, from the start to the signal to the exit.
#include "errors.hpp"

#include <lastcall/lastcall.hpp>

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <string>
#include <string_view>

#if defined(__cpp_exceptions) || defined(__cpp_rtti)
#error "this program is about -fno-exceptions and -fno-rtti"
#endif

namespace {

using namespace std::chrono_literals;

int provoke(std::string_view name) {
  for (const no_exceptions::ErrorCase& error : no_exceptions::error_cases) {
    if (error.name == name) error.provoke();
  }
  return 3;  // not reached if the error ends the process
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) return provoke(argv[1]);

  lastcall::ShutdownOptions options;
  options.grace_period = 60s;
  options.observer = lastcall::silent_observer();
  lastcall::ShutdownCoordinator coordinator(options);
  coordinator.spawn("worker", [](lastcall::CancellationToken token) {
    lastcall::CancellationSource child(token, 1h);
    ::kill(::getpid(), SIGTERM);
    child.token().wait();
    std::printf("worker: %s\n", std::string(child.token().cause().message()).substr(0, 7).c_str());
  });
  lastcall::Stage& storage = coordinator.stage("storage", 1s);
  storage.on_stop("hook", [] { std::puts("hook"); });
  const lastcall::CancellationCallback callback(coordinator.token(), [] { std::puts("callback"); });
  coordinator.run();
}

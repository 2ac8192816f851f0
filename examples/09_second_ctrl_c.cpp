// 09: the second Ctrl-C, and the third.
//
// Press Ctrl-C once: a long job is told and wishes to finish. Wait a second, press it again: the
// job is told to drop it. (Twice within half a second is a bouncing key, and counts once.) Give the
// argument "stubborn" and the job listens to neither; then the third ends the process at once, with
// code 130.
//
// What to watch for: token() says "take nothing new", abort_token() says "drop what you are doing".
// Most of a job looks at the second one only. Without any further key the same happens when the
// grace period is nearly over.
#include <lastcall/lastcall.hpp>

#include <chrono>
#include <cstdio>
#include <string_view>

using namespace std::chrono_literals;

int main(int argc, char** argv) {
  const bool stubborn = argc > 1 && std::string_view(argv[1]) == "stubborn";

  lastcall::ShutdownOptions options;
  options.grace_period = 30s;
  options.abort_margin = 10s;
  lastcall::ShutdownCoordinator coordinator(options);

  coordinator.spawn("long job", [&](lastcall::CancellationToken token) {
    std::puts("long job: began");
    token.wait();
    std::puts(
        "long job: told, and would need another minute; press Ctrl-C again if that's too long");
    const auto heeded = stubborn ? lastcall::CancellationToken() : coordinator.abort_token();
    const bool done = lastcall::sleep_for(1min, heeded);
    std::puts(done ? "long job: finished" : "long job: dropped it");
  });
  coordinator.run();
}

// 05: how long-lived things stop. A ticker, an event loop of somebody else's, and a server whose
// only way to end is a stop() of its own. Press Ctrl-C when you have seen some ticks.
//
// What to watch for: each kind has one idiom.
//   - A periodic loop: `while (ticker.wait(token))`. It ticks at whole periods, also after a slow
//     step.
//   - An event loop that polls descriptors: token.fd() is one more of them.
//   - A thing with a stop() of its own: an on_stop hook calls it. `main` may be blocked inside.
#include <lastcall/lastcall.hpp>

#include <poll.h>
#include <unistd.h>

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>

using namespace std::chrono_literals;

namespace {

// Stands for a library's server: listen() blocks until stop(), and knows nothing of tokens.
class LegacyServer {
 public:
  void listen() {
    std::unique_lock lock(mutex_);
    changed_.wait(lock, [this] { return stopped_; });
  }
  void stop() {
    const std::lock_guard lock(mutex_);
    stopped_ = true;
    changed_.notify_all();
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool stopped_ = false;
};

}  // namespace

int main() {
  LegacyServer server;
  int wake_up[2];
  if (::pipe(wake_up) != 0) {
    std::perror("pipe");
    return 1;
  }

  lastcall::ShutdownCoordinator coordinator;

  coordinator.spawn("ticker", [](lastcall::CancellationToken token) {
    lastcall::Ticker ticker(200ms);
    int ticks = 0;
    while (ticker.wait(token)) std::printf("tick %d\n", ++ticks);
    std::printf("ticker: stopped after %d ticks\n", ticks);
  });

  coordinator.spawn("event loop", [&](lastcall::CancellationToken token) {
    pollfd watched[] = {{wake_up[0], POLLIN, 0}, {token.fd(), POLLIN, 0}};
    while (::poll(watched, 2, -1) >= 0 && watched[1].revents == 0) {
      char byte = 0;
      if (::read(wake_up[0], &byte, 1) == 1) std::printf("event loop: got '%c'\n", byte);
    }
    std::puts("event loop: the token's descriptor is readable");
  });
  if (::write(wake_up[1], "x", 1) != 1) std::perror("write");

  coordinator.on_stop("legacy server", [&] {
    std::puts("hook: stop()");
    server.stop();
  });

  server.listen();  // not in run() yet, and needs not be
  std::puts("main: listen() has returned");
  coordinator.run();
}

// 08: SIGHUP reloads. From another terminal: kill -HUP, several times if you like; then Ctrl-C.
//
// What to watch for: a reload is an ordinary function on an ordinary thread. It may allocate, lock,
// log and read files, unlike a signal handler. It also may hang: it has a thread of its own, and a
// shutdown that comes meanwhile takes no notice.
#include <lastcall/lastcall.hpp>

#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdio>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

using namespace std::chrono_literals;

namespace {

struct Configuration {
  int generation = 1;
  std::string greeting = "good evening";
};

// Readers take a copy of the pointer; a reload puts another configuration in its place.
class CurrentConfiguration {
 public:
  std::shared_ptr<const Configuration> get() const {
    const std::lock_guard lock(mutex_);
    return current_;
  }
  void set(Configuration next) {
    auto fresh = std::make_shared<const Configuration>(std::move(next));
    const std::lock_guard lock(mutex_);
    current_ = std::move(fresh);
  }

 private:
  mutable std::mutex mutex_;
  std::shared_ptr<const Configuration> current_ = std::make_shared<const Configuration>();
};

}  // namespace

int main() {
  CurrentConfiguration configuration;

  lastcall::ShutdownCoordinator coordinator;
  coordinator.on_signal(SIGHUP, [&](const lastcall::SignalInfo& signal) {
    const int generation = configuration.get()->generation + 1;
    configuration.set({generation, "good evening, again"});
    const std::string name(lastcall::signal_name(signal.number));
    std::printf("reloaded on %s: generation %d\n", name.c_str(), generation);
  });
  coordinator.spawn("greeter", [&](lastcall::CancellationToken token) {
    std::printf("pid %d: kill -HUP %d reloads\n", ::getpid(), ::getpid());
    while (lastcall::sleep_for(100ms, token)) {
      const auto now = configuration.get();
      std::printf("%s (generation %d)\n", now->greeting.c_str(), now->generation);
    }
  });
  coordinator.run();
}

// 13: an observer of your own, in ten lines: the story in your log. Built where spdlog is
// (Debian: libspdlog-dev). Press Ctrl-C.
//
// What to watch for: an observer is told everything, one event at a time, on the coordinator's drain
// thread. It may lock and allocate; what it throws is swallowed, and if it hangs it is left behind.
#include <lastcall/lastcall.hpp>

#include <spdlog/spdlog.h>

#include <chrono>
#include <memory>
#include <stdexcept>

using namespace std::chrono_literals;

namespace {

struct Log : lastcall::Observer {
  void on_event(const lastcall::Event& event) override {
    const bool bad = event.result == lastcall::EventResult::failed ||
                     event.result == lastcall::EventResult::overran;
    const std::chrono::duration<double> took = event.end - event.begin;
    spdlog::log(bad ? spdlog::level::err : spdlog::level::info, "{} {} {}/{} {:.3f} s {}",
                lastcall::name_of(event.kind), lastcall::name_of(event.result), event.stage,
                event.name, took.count(), event.detail);
  }
};

}  // namespace

int main() {
  lastcall::ShutdownOptions options;
  options.observer = std::make_shared<Log>();
  options.exit_codes.failed = 3;
  lastcall::ShutdownCoordinator coordinator(options);
  coordinator.spawn("worker", [](lastcall::CancellationToken token) { token.wait(); });
  coordinator.on_stop("close listener", [] {});
  try {
    coordinator.on_drained("flush", [] { throw std::runtime_error("disk full"); });
  } catch (const std::logic_error&) {
    // A signal may come so early that all is over before this line.
    if (coordinator.is_ready()) throw;
  }
  spdlog::info("up");
  coordinator.run();
}

// 14: an observer of your own, for Prometheus: the phase, who is in flight, how long each stage took, who
// was still in. Built where prometheus-cpp is (Debian: prometheus-cpp-dev). Press Ctrl-C.
//
// What to watch for: metrics can be read while the process drains, from the address that it prints; the
// last ones only from a file, since by then nobody answers (what is printed at the end is what
// node_exporter's textfile collector takes). on_status() comes once a second while somebody is still in.
#include <lastcall/lastcall.hpp>

#include <prometheus/exposer.h>
#include <prometheus/gauge.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

using namespace std::chrono_literals;

namespace {

struct Metrics : lastcall::Observer {
  explicit Metrics(prometheus::Registry& all) : registry(all) {}

  void on_event(const lastcall::Event& event) override {
    using enum lastcall::EventKind;
    using enum lastcall::EventResult;
    const std::chrono::duration<double> took = event.end - event.begin;
    if (event.kind == phase) phases.Add({{"phase", event.name}}).SetToCurrentTime();
    if (event.kind == stage && event.result != begun)
      stages.Add({{"stage", event.name}}).Set(took.count());
    if (event.kind == task && event.result == overran)
      stragglers.Add({{"name", event.name}}).Set(1);
  }
  bool wants_status() const noexcept override { return true; }
  void on_status(const lastcall::LiveStatus& status) override {
    in_flight.Set(static_cast<double>(status.in_flight));
  }

  prometheus::Registry& registry;
  prometheus::Family<prometheus::Gauge>& phases =
      prometheus::BuildGauge().Name("shutdown_phase_began_seconds").Register(registry);
  prometheus::Family<prometheus::Gauge>& stages =
      prometheus::BuildGauge().Name("shutdown_stage_seconds").Register(registry);
  prometheus::Family<prometheus::Gauge>& stragglers =
      prometheus::BuildGauge().Name("shutdown_straggler").Register(registry);
  prometheus::Gauge& in_flight =
      prometheus::BuildGauge().Name("shutdown_in_flight").Register(registry).Add({});
};

}  // namespace

int main() {
  const auto registry = std::make_shared<prometheus::Registry>();
  prometheus::Exposer exposer("127.0.0.1:0");
  exposer.RegisterCollectable(registry);

  lastcall::ShutdownOptions options;
  options.grace_period = 2s;
  options.abort_margin = 200ms;
  options.observer = std::make_shared<Metrics>(*registry);
  lastcall::ShutdownCoordinator coordinator(options);
  try {
    lastcall::Stage& storage = coordinator.stage("storage", 500ms);
    storage.on_stop("checkpoint", [] { lastcall::sleep_for(50ms, {}); });
  } catch (const std::logic_error&) {
    // A signal came before the stage was declared.
    if (coordinator.is_ready()) throw;
  }
  coordinator.spawn("deaf worker",
                    [](const lastcall::CancellationToken&) { lastcall::sleep_for(1h, {}); });

  std::printf("curl 127.0.0.1:%d/metrics\n", exposer.GetListeningPorts().front());
  std::fflush(stdout);
  const lastcall::ShutdownReport report = coordinator.drain();
  std::fputs(prometheus::TextSerializer().Serialize(registry->Collect()).c_str(), stdout);
  std::fflush(stdout);
  std::_Exit(report.exit_code);  // the deaf worker still is in
}

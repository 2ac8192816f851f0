// 12: a picture of a shutdown. It shuts itself down, prints the summary, and writes what happened into a
// file that ui.perfetto.dev, or chrome://tracing, opens: ./12_trace shutdown.json
//
// What to watch for: drain() returns a report instead of ending the process, and text, JSON and trace are
// three views of its events. In the trace each stage has a lane with its hooks in it, and each task one of
// its own. The export is late: its stage overruns, the others have their turn all the same, and it is done
// before the end.
#include <lastcall/lastcall.hpp>

#include <chrono>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <thread>

using namespace std::chrono_literals;

namespace {

// Work that has to be finished, told or not.
void work(std::chrono::milliseconds time) { std::this_thread::sleep_for(time); }

void declare(lastcall::ShutdownCoordinator& coordinator) {
  lastcall::Stage& writing = coordinator.stage("writing", 500ms);
  lastcall::Stage& database = coordinator.stage("database", 1s);

  for (int number = 1; number <= 4; ++number) {
    coordinator.spawn("request " + std::to_string(number), [=](lastcall::CancellationToken token) {
      token.wait();
      work(number * 120ms);
    });
  }
  coordinator.spawn("export", [](lastcall::CancellationToken token) {
    token.wait();
    work(1700ms);
  });
  coordinator.on_stop("close listener", [] { work(150ms); });
  writing.spawn("writer", [](lastcall::CancellationToken token) {
    token.wait();
    work(300ms);
  });
  writing.on_stop("seal the queue", [] { work(150ms); });
  writing.on_drained("sync the log", [] { work(150ms); });
  database.on_stop("checkpoint", [] { work(300ms); });
  database.on_drained("close", [] { work(200ms); });
}

}  // namespace

int main(int argc, char** argv) {
  lastcall::ShutdownOptions options;
  options.grace_period = 4s;
  options.announce_delay = 300ms;
  options.abort_margin = 1500ms;
  options.observer = lastcall::silent_observer();
  lastcall::ShutdownCoordinator coordinator(options);
  try {
    declare(coordinator);
  } catch (const std::logic_error&) {
    // A signal came before all of it was declared.
    if (coordinator.is_ready()) throw;
  }

  work(200ms);
  coordinator.request_shutdown(lastcall::Cause::cancelled("the show is over"));
  const lastcall::ShutdownReport report = coordinator.drain();
  std::fputs(report.to_text().c_str(), stdout);

  if (argc < 2) return report.exit_code;
  std::FILE* const file = std::fopen(argv[1], "w");
  if (file == nullptr) {
    std::perror(argv[1]);
    return 1;
  }
  std::fputs(report.to_trace().c_str(), file);
  return std::fclose(file) == 0 ? report.exit_code : 1;
}

// What a coordinator is told, and the phases it goes through; part of shutdown_coordinator.hpp.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/observer.hpp>

#include <csignal>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <unistd.h>

namespace lastcall {

/// What the process exits with; a forced end is 128 + the signal's number.
struct ExitCodes {
  int clean = 0;
  int failed = 1;     ///< a task or hook threw, or the cause was a failure
  int overrun = 124;  ///< somebody was still in at the end, as timeout(1) says it
};

/// How a coordinator behaves. Everything happens inside `grace_period`.
struct ShutdownOptions {
  /// These request shutdown.
  std::vector<int> signals = {SIGINT, SIGTERM};
  /// From the request until the process is gone. Keep it below the supervisor's patience (systemd's
  /// TimeoutStopSec, Kubernetes' terminationGracePeriodSeconds).
  std::chrono::milliseconds grace_period = std::chrono::seconds(25);
  /// Not ready, but still serving, so that load balancers catch up. SIGINT skips it.
  std::chrono::milliseconds announce_delay = std::chrono::seconds(0);
  /// So long before the end abort_token() is cancelled; at most half of what the announce delay leaves.
  std::chrono::milliseconds abort_margin = std::chrono::seconds(2);
  /// A SIGINT so soon after the last one that counted is its echo, not a wish.
  std::chrono::milliseconds repeat_window = std::chrono::milliseconds(500);
  /// An inherited SIG_IGN on SIGINT, SIGHUP or SIGQUIT stays (nohup), also against on_signal().
  bool respect_ignored = true;
  /// SIGPIPE is caught by an empty handler, so that an exec'ed child gets the default back.
  bool ignore_sigpipe = true;
  /// The last spawned task leaving requests shutdown, too (batch jobs).
  bool stop_when_idle = false;
  /// If a signal was the cause, die of it, whatever the outcome (as process 1, or of a SIGTSTP, SIGTTIN or SIGTTOU,
  /// which would only stop the process: exit with 128 + n).
  bool exit_by_signal = false;
  /// On this signal the observer gets a snapshot() and everything goes on.
  std::optional<int> dump_signal{};
  ExitCodes exit_codes{};
  /// Gets every event; null: silent.
  std::shared_ptr<Observer> observer = stderr_observer();
  /// Where stragglers are named by bare write(2), if the end is forced or the observer could not be told of them;
  /// -1: nowhere.
  int last_words = STDERR_FILENO;
};

/// Where a coordinator is. Only ever goes forward.
enum class Phase {
  running,
  announced,  ///< shutdown was requested; not ready, still serving
  draining,   ///< stage by stage, nothing new is taken
  aborting,   ///< abort_token() is cancelled
  finished,   ///< the report is made
};

namespace detail {

constexpr const char* name_of(Phase phase) noexcept {
  switch (phase) {
    case Phase::running: return "running";
    case Phase::announced: return "announced";
    case Phase::draining: return "draining";
    case Phase::aborting: return "aborting";
    case Phase::finished: return "finished";
  }
  return "unknown";
}

}  // namespace detail
}  // namespace lastcall

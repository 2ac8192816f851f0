// Watching a shutdown: who gets told what happens, as it happens.
//
// An Event is one line of the story. The coordinator's drain thread hands every event to one Observer;
// three are here, and your own takes ten lines:
//
//   struct Log : lastcall::Observer {
//     void on_event(const lastcall::Event& event) override {
//       spdlog::info("{}/{}: {}", event.stage, event.name, event.detail);
//     }
//   };
//   lastcall::ShutdownOptions options;
//   options.observer = std::make_shared<Log>();
//
// The lines of json_observer, one object each, with all of these keys and in this order:
//
//   kind      "phase", "stage", "hook", "signal" or "task"
//   result    "begun", "ok", "failed", "overran" or "skipped"
//   stage     string; empty if it belongs to no stage
//   name      string: of the phase, stage, hook, signal or task
//   detail    string, for people, possibly empty, possibly of several lines (\n)
//   begin_ns  integer: nanoseconds since the request
//   end_ns    integer, the same; equal to begin_ns if it has only begun
//
// Bytes that are no UTF-8 become U+FFFD. The request is the first "phase" line, or what came with
// on_request() before it; the signal that was the request was received a moment before it, and its times are
// negative. Times of lines before any request (a reload on SIGHUP, a thread dump) count from the making of the
// observer, and with a second coordinator from the request before. If nobody reads the descriptor, lines are
// dropped rather than waited for, and the next one that gets through is preceded by {"lost":3}, the number of
// lines dropped; a line cut off in its middle is ended by a newline first.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/event.hpp>  // Event, EventKind, EventResult

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

namespace lastcall {

/// Who is still in, while a drain goes on: what a countdown shows and a gauge exports.
struct LiveStatus {
  Clock::duration since_request{};
  Clock::duration until_end{};       ///< until the process is gone at the latest
  std::size_t in_flight = 0;         ///< members of all stages, the unnamed too
  std::vector<std::string> names{};  ///< some of them, oldest first
  std::string stage{};               ///< the one being drained; empty between stages
};

/// Is told what happens. Derive from it and put it into ShutdownOptions::observer.
///
/// All functions are called one at a time on the coordinator's drain thread, never from a constructor
/// or from spawn(). What they throw is swallowed; one that hangs is abandoned like a hook, and later
/// events reach only the report. May be used by one coordinator after another.
struct Observer {
  virtual ~Observer() = default;

  /// Something happened. The event lives as long as the call.
  virtual void on_event(const Event& event) = 0;

  /// Shutdown was requested, at `when`; comes once, before the events that follow from it.
  virtual void on_request(Clock::time_point when) { static_cast<void>(when); }

  /// How long each call may take; one that takes longer is taken for hung. Comes once, before the first event.
  virtual void on_time_limit(Clock::duration most) { static_cast<void>(most); }

  /// Whether on_status() is worth calling. Asked once when the drain begins.
  virtual bool wants_status() const noexcept { return false; }

  /// About once a second during the drain, if wanted.
  virtual void on_status(const LiveStatus& status) { static_cast<void>(status); }
};

/// For people, on stderr: one readable line an event, with the time since the request; on a terminal a
/// live countdown of who is left, and colours unless NO_COLOR is set; at the end a bar for every stage
/// and hook. Looks at the terminal, TERM and NO_COLOR now. Its lines are written whole, by one write(2)
/// each; if stderr is a full pipe they are dropped (after 200 ms once, or less with a short grace period) and
/// counted, not waited for.
/// Thread-safe.
std::shared_ptr<Observer> stderr_observer();

/// Says nothing.
inline std::shared_ptr<Observer> silent_observer() {
  struct Silent final : Observer {
    void on_event(const Event& event) override { static_cast<void>(event); }
  };
  return std::make_shared<Silent>();
}

/// For machines: one JSON object a line on `fd`, by one write(2) each; the schema is at the top of this
/// file. `fd` stays the caller's and must stay open. Throws std::invalid_argument for a negative number,
/// std::system_error (EBADF) for a descriptor that isn't open, or not for writing. Thread-safe.
std::shared_ptr<Observer> json_observer(int fd);

}  // namespace lastcall

// The three observers' bodies.
#include <lastcall/detail/observer_json.hpp>
#include <lastcall/detail/observer_stderr.hpp>

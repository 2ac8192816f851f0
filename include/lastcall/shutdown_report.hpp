// What happened, and who held it up: the result of ShutdownCoordinator::drain().
//
// A report is one list of events and what follows from them; its three views say the same in three
// languages. to_json() gives one object with these keys:
//
//   outcome     "clean", "failed", "overrun" or "forced"
//   cause       {"kind": "none" | "cancelled" | "deadline_exceeded" | "signal" | "failure",
//                "message": string,
//                "signal": null or {"number", "name", "code", "sender_pid", "sender_uid", "received_ns"}}
//   exit_code   integer
//   elapsed_ns  integer, from the request to the end
//   events      array of the objects that json_observer writes, see observer.hpp
//   stragglers  array of {"name", "stage", "where": {"file", "line", "function"}, "age_ns",
//                "thread_id", "thread_name", "waiting_in", "stack": [string, ...]}
//   failures    array of {"task", "error"}: who threw, and its what()
//
// Times are nanoseconds since the request; what is no UTF-8 is U+FFFD.
#pragma once

#include <lastcall/cause.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/event.hpp>
#include <lastcall/detail/failure.hpp>
#include <lastcall/detail/source_location.hpp>

#include <sys/types.h>

#include <string>
#include <string_view>
#include <vector>

namespace lastcall {

/// How a shutdown ended, best first.
enum class Outcome {
  clean,    ///< everybody left in time and nobody threw
  failed,   ///< a task or a hook threw, or that was why it shut down
  overrun,  ///< somebody was still in at the end
  forced,   ///< a third wish ended it
};

/// Somebody who was still in, and where: a task, a named guard, a hook, or all the unnamed guards of a
/// stage together ("3 unnamed").
struct Straggler {
  std::string name{};
  std::string stage{};
  SourceLocation where{};     ///< where it entered; line 0 if that isn't known
  Clock::duration age{};      ///< since it entered
  pid_t thread_id = 0;        ///< as in ps -L and gdb; 0 if there is no one thread
  std::string thread_name{};  ///< the kernel's name of that thread, at most 15 bytes
  std::string waiting_in{};   ///< "futex", "read(7)", "running (1.23 s CPU)", "gone"; may be empty
  std::vector<std::string> stack{};  ///< innermost frame first; may be empty
};

/// The whole story. An ordinary value: not thread-safe while somebody changes it.
struct ShutdownReport {
  Outcome outcome = Outcome::clean;
  Cause cause{};
  int exit_code = 0;
  Clock::duration elapsed{};            ///< from the request to the end
  std::vector<Event> events{};          ///< every transition, hook, stage: name, begin, end, result
  std::vector<Straggler> stragglers{};  ///< who was still in when time ran out
  std::vector<Failure> failures{};      ///< who threw what, in the order it happened

  /// For people, 80 columns wide: a line that sums it up, a bar for every stage and hook, each straggler
  /// with its stack, each failure. The names are safe to print, whatever they hold.
  std::string to_text() const;

  /// One JSON object on one line, without a newline; its keys are at the top of this file.
  std::string to_json() const;

  /// The trace format of Chrome: open it in ui.perfetto.dev or chrome://tracing. A lane for the phases
  /// and signals, one for each stage with its hooks, one for each task. Times start at the request:
  /// what began before it is drawn from it on and tells the true times in its "args"; what was over a
  /// second before it is left out.
  std::string to_trace() const;
};

namespace detail {

constexpr std::string_view name_of(Outcome outcome) noexcept {
  switch (outcome) {
    case Outcome::clean: return "clean";
    case Outcome::failed: return "failed";
    case Outcome::overrun: return "overrun";
    case Outcome::forced: return "forced";
  }
  return "unknown";
}

constexpr std::string_view name_of(CauseKind kind) noexcept {
  switch (kind) {
    case CauseKind::none: return "none";
    case CauseKind::cancelled: return "cancelled";
    case CauseKind::deadline_exceeded: return "deadline_exceeded";
    case CauseKind::signal: return "signal";
    case CauseKind::failure: return "failure";
  }
  return "unknown";
}

}  // namespace detail

using detail::name_of;  // of an Outcome and of a CauseKind, too

namespace detail {

/// Where a straggler is, for the detail of its event: on the first line where it entered, how long ago,
/// in which thread and what that waits in; then a line for each frame of its stack.
std::string describe_straggler(const Straggler& straggler);

/// "overrun, exit code 124": the detail of the event "finished".
std::string describe_outcome(Outcome outcome, int exit_code);

}  // namespace detail
}  // namespace lastcall

// The bodies of the three views.
#include <lastcall/detail/report_json.hpp>
#include <lastcall/detail/report_text.hpp>
#include <lastcall/detail/report_trace.hpp>

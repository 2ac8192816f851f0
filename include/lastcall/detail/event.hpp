// The one list that every view of a shutdown is made from: the text, the JSON, the trace and a user's
// own observer all see these events and nothing else.
#pragma once

#include <lastcall/detail/clock.hpp>

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace lastcall {

/// What an event is about.
enum class EventKind : std::uint8_t {
  phase,   ///< the coordinator's phase changed; the name is the phase's
  stage,   ///< a stage began or ended
  hook,    ///< an on_stop, on_drained or on_signal function
  signal,  ///< a signal was received; the detail says who sent it
  task,    ///< a spawned or wrapped task, or a named guard
};

/// How it went.
enum class EventResult : std::uint8_t { begun, ok, failed, overran, skipped };

/// One line of the story; begun events have end == begin.
///
/// The detail is for people: who sent a signal, what() of an exception, where a straggler is. It may
/// have several lines; the first one is enough to understand it, the others (a stack) are extra.
struct Event {
  EventKind kind{};
  EventResult result{};
  std::string stage{};   ///< the stage it belongs to; empty if to none
  std::string name{};    ///< the phase, stage, hook, signal or task
  std::string detail{};  ///< more about it, possibly empty
  Clock::time_point begin{};
  Clock::time_point end{};
};

namespace detail {

constexpr std::string_view name_of(EventKind kind) noexcept {
  switch (kind) {
    case EventKind::phase: return "phase";
    case EventKind::stage: return "stage";
    case EventKind::hook: return "hook";
    case EventKind::signal: return "signal";
    case EventKind::task: return "task";
  }
  return "unknown";
}

constexpr std::string_view name_of(EventResult result) noexcept {
  switch (result) {
    case EventResult::begun: return "begun";
    case EventResult::ok: return "ok";
    case EventResult::failed: return "failed";
    case EventResult::overran: return "overran";
    case EventResult::skipped: return "skipped";
  }
  return "unknown";
}

}  // namespace detail

/// The enumerators' names, as they are in JSON: "hook", "overran".
using detail::name_of;

namespace detail {

/// The stage that a stage's event is about, or that any other event belongs to.
inline std::string_view stage_of(const Event& event) noexcept {
  return event.kind == EventKind::stage ? event.name : event.stage;
}

/// The first line of the detail.
inline std::string_view headline_of(const Event& event) noexcept {
  const std::string_view all = event.detail;
  return all.substr(0, all.find('\n'));
}

/// When shutdown was requested: the first phase named "announced", else the first phase, else the
/// first event there is.
inline Clock::time_point request_time(std::span<const Event> events) noexcept {
  const Event* phase = nullptr;
  for (const Event& event : events) {
    if (event.kind != EventKind::phase) continue;
    if (event.name == "announced") return event.begin;
    if (phase == nullptr) phase = &event;
  }
  if (phase != nullptr) return phase->begin;
  return events.empty() ? Clock::time_point{} : events.front().begin;
}

}  // namespace detail
}  // namespace lastcall

// Who is in now, and where: the stragglers of a report, and snapshot().
#pragma once

#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/stack_capture.hpp>
#include <lastcall/detail/thread_probe.hpp>
#include <lastcall/shutdown_report.hpp>

#include <span>
#include <string>
#include <utility>
#include <vector>

namespace lastcall::detail {

inline Straggler straggler_of(std::string name, std::string stage, const SourceLocation& where,
                              Clock::time_point since, pid_t thread) {
  Straggler straggler;
  straggler.name = std::move(name);
  straggler.stage = std::move(stage);
  straggler.where = where;
  straggler.age = Clock::now() - since;
  straggler.thread_id = thread;
  return straggler;
}

/// Adds what the kernel says of their threads: some 50 us each, so past `until` the rest go without. The
/// first are asked about in any case: on a machine that is too busy to keep its times somebody wants to know
/// why, too.
inline void ask_kernel(std::vector<Straggler>& stragglers, Clock::time_point until) {
  int in_any_case = 16;
  for (Straggler& straggler : stragglers) {
    if (straggler.thread_id <= 0) continue;
    if (--in_any_case < 0 && Clock::now() >= until) return;
    straggler.thread_name = thread_name(straggler.thread_id);
    straggler.waiting_in = waiting_in(straggler.thread_id);
  }
}

/// Everybody who is in a stage or hangs in a hook, by name. May throw std::bad_alloc. `but_not` is the
/// calling thread's own section, which doesn't count. (Not its thread id: there are systems on which all
/// threads have the same.)
inline std::vector<Straggler> who_is_in(const EngineState& engine,
                                        const Section* but_not = nullptr) {
  std::vector<Straggler> all;
  for (const Stage* stage = engine.first_stage; stage != nullptr;
       stage = EngineState::after(*stage)) {
    const WaitGroup& group = EngineState::group_of(*stage);
    // The count first: whoever enters between the two must not look like a negative number.
    const std::size_t count = group.count();
    const std::vector<WaitGroup::Member> members = group.members();
    for (const WaitGroup::Member& member : members) {
      all.push_back(
          straggler_of(member.name, stage->name(), member.where, member.entered, member.thread_id));
    }
    if (count > members.size()) {
      Straggler unnamed = straggler_of(std::to_string(count - members.size()) + " unnamed",
                                       stage->name(), {}, Clock::now(), 0);
      unnamed.age = {};
      all.push_back(std::move(unnamed));
    }
  }
  for (const Section& section : engine.sections) {
    const std::uint32_t state = section.state.load(std::memory_order_acquire);
    if (state != Section::inside && state != Section::abandoned) continue;
    const bool counts = section.kind.load(std::memory_order_relaxed) == Section::Kind::hook;
    const pid_t thread = section.thread_id.load(std::memory_order_relaxed);
    if (&section == but_not || (state == Section::inside && !counts)) continue;
    const Stage* const stage = section.stage.load(std::memory_order_relaxed);
    all.push_back(straggler_of(section.name.load(std::memory_order_relaxed),
                               stage == nullptr ? std::string() : stage->name(), {},
                               section.begin.load(), thread));
  }
  return all;
}

enum class Frames { named, by_offset };

/// Adds the stacks that can be had within `budget`; half as much again is for the names of functions, and
/// the frames that come after it are module+offset. So are all of them `by_offset`, which takes no lock that
/// somebody may hold for ever. May throw std::bad_alloc.
inline void add_stacks(std::vector<Straggler>& stragglers, Clock::duration budget,
                       Frames frames = Frames::named) {
  std::vector<RawStack> stacks;
  for (const Straggler& straggler : stragglers) {
    if (straggler.thread_id <= 0) continue;
    stacks.emplace_back();
    stacks.back().thread_id = straggler.thread_id;
  }
  capture_stacks(std::span<RawStack>(stacks), budget);
  // Names take the dynamic loader's lock, and time. One thread that doesn't answer may have taken all of
  // the budget, for no fault of the others.
  const Clock::time_point until = Clock::now() + budget / 2;
  for (Straggler& straggler : stragglers) {
    for (const RawStack& stack : stacks) {
      if (stack.thread_id != straggler.thread_id) continue;
      const bool named = frames == Frames::named && Clock::now() < until;
      straggler.stack = named ? symbolise(stack) : describe_frames(stack);
      break;
    }
  }
}

}  // namespace lastcall::detail

// Who is in now, and where: the stragglers of a report, and snapshot().
#pragma once

#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/stack_capture.hpp>
#include <lastcall/detail/thread_probe.hpp>
#include <lastcall/shutdown_report.hpp>

#include <algorithm>
#include <cstddef>
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

/// The threads of stragglers, each once. What is asked about a thread is asked once, and shared among those that it
/// has: one that holds thousands of guards is one question, and one signal. There may be as many threads as are asked
/// about; those of the others have their names and numbers only.
class ThreadsOf {
 public:
  static constexpr std::size_t most = 1000;
  static constexpr std::size_t none = ~std::size_t{0};

  explicit ThreadsOf(const std::vector<Straggler>& stragglers) {
    numbers_.reserve(stragglers.size());
    for (const Straggler& straggler : stragglers)
      numbers_.push_back(number_of(straggler.thread_id));
  }
  /// In the order of their first stragglers.
  const std::vector<pid_t>& ids() const noexcept { return ids_; }
  /// Which of them is that of straggler number `at`; none: it has no thread, or one too many.
  std::size_t of(std::size_t at) const noexcept { return numbers_[at]; }

 private:
  std::size_t number_of(pid_t thread) {
    if (thread <= 0) return none;
    if (!ids_.empty() && ids_[last_] == thread) return last_;
    const auto known = std::lower_bound(
        sorted_.begin(), sorted_.end(), thread,
        [this](std::size_t number, pid_t wanted) { return ids_[number] < wanted; });
    if (known != sorted_.end() && ids_[*known] == thread) return last_ = *known;
    if (ids_.size() == most) return none;
    last_ = ids_.size();
    sorted_.insert(known, last_);
    ids_.push_back(thread);
    return last_;
  }

  std::vector<pid_t> ids_;
  std::vector<std::size_t> sorted_;  // numbers, by id
  std::vector<std::size_t> numbers_;
  std::size_t last_ = 0;
};

/// How many are asked about, or described, however late it is: on a machine that is too busy to keep its times
/// somebody wants to know why, too.
inline constexpr std::size_t in_any_case = 16;

/// Adds what the kernel says of their threads: some 50 us each, so past `until` the rest go without.
inline void ask_kernel(std::vector<Straggler>& stragglers, Clock::time_point until) {
  struct Answer {
    std::string name;
    std::string waiting;
  };
  const ThreadsOf threads(stragglers);
  std::vector<Answer> answers;
  answers.reserve(threads.ids().size());
  for (const pid_t thread : threads.ids()) {
    if (answers.size() >= in_any_case && Clock::now() >= until) break;
    answers.push_back({thread_name(thread), waiting_in(thread)});
  }
  for (std::size_t at = 0; at < stragglers.size(); ++at) {
    const std::size_t thread = threads.of(at);
    if (thread == ThreadsOf::none || thread >= answers.size()) continue;
    stragglers[at].thread_name = answers[thread].name;
    stragglers[at].waiting_in = answers[thread].waiting;
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
    std::vector<WaitGroup::Member> members = group.members();
    all.reserve(all.size() + members.size());
    for (WaitGroup::Member& member : members) {
      all.push_back(straggler_of(std::move(member.name), stage->name(), member.where,
                                 member.entered, member.thread_id));
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

/// The stacks of stragglers' threads. They are taken in one step, which touches nothing but this object, and
/// handed out in another.
class StragglerStacks {
 public:
  /// So many of one thread get its stack, the others have its number: a stack is a kilobyte, and told with each.
  static constexpr std::size_t most_of_a_thread = 100;

  explicit StragglerStacks(const std::vector<Straggler>& stragglers) : threads_(stragglers) {}

  /// Takes what can be had within `budget`; half as much again is for the names of functions, and the frames
  /// that come after it are module+offset. So are all of them `by_offset`, which takes no lock that somebody may
  /// hold for ever. A quarter more, and what is not described by then has no stack. May throw std::bad_alloc.
  void take(Clock::duration budget, Frames frames) {
    std::vector<RawStack> stacks(threads_.ids().size());
    for (std::size_t at = 0; at < stacks.size(); ++at) stacks[at].thread_id = threads_.ids()[at];
    capture_stacks(std::span<RawStack>(stacks), budget);
    texts_.reserve(stacks.size());
    // Names take the dynamic loader's lock, and time. One thread that doesn't answer may have taken all of
    // the budget, for no fault of the others.
    const Clock::time_point captured = Clock::now();
    const Clock::time_point until = time_after(captured, budget / 2);
    const Clock::time_point last = time_after(captured, budget / 4 * 3);
    for (const RawStack& stack : stacks) {
      const Clock::time_point now = Clock::now();
      if (texts_.size() >= in_any_case && now >= last) break;
      const bool named = frames == Frames::named && now < until;
      texts_.push_back(named ? symbolise(stack) : describe_frames(stack));
    }
  }

  /// `stragglers`: those that it was made of. May throw std::bad_alloc.
  void share_with(std::vector<Straggler>& stragglers) const {
    std::vector<std::size_t> handed_out(texts_.size());
    for (std::size_t at = 0; at < stragglers.size(); ++at) {
      const std::size_t thread = threads_.of(at);
      if (thread == ThreadsOf::none || thread >= texts_.size()) continue;
      if (++handed_out[thread] <= most_of_a_thread) stragglers[at].stack = texts_[thread];
    }
  }

 private:
  ThreadsOf threads_;
  std::vector<std::vector<std::string>> texts_;  // of the first threads, as far as it came
};

/// Both steps at once. May throw std::bad_alloc.
inline void add_stacks(std::vector<Straggler>& stragglers, Clock::duration budget,
                       Frames frames = Frames::named) {
  StragglerStacks stacks(stragglers);
  stacks.take(budget, frames);
  stacks.share_with(stragglers);
}

}  // namespace lastcall::detail

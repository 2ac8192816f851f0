// What has happened so far: the events and the failures of one coordinator.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/event.hpp>
#include <lastcall/detail/failure.hpp>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace lastcall::detail {

/// Appends `end`; an event of that kind and name that is there already is removed.
inline void end_story(std::vector<Event>& story, Event end) {
  std::erase_if(story, [&end](const Event& event) {
    return event.kind == end.kind && event.name == end.name;
  });
  story.push_back(std::move(end));
}

// Thread-safe. Recording never throws: with no memory left a line of the story is lost, and counted,
// but not the shutdown. The lock is never held in user code.
class EngineLog {
 public:
  /// Adds an event.
  void add(Event event) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    LASTCALL_TRY {
      // A service that reloads every minute for a year must not grow: before the request only the
      // last events are kept.
      if (!requested_ && events_.size() >= most_before_request) {
        events_.pop_front();
        ++first_;
      }
      events_.push_back(std::move(event));
    }
    LASTCALL_CATCH(...) { note_lost(); }
  }

  /// From now on everything is kept, and what add_in_drain() held back follows.
  void mark_requested() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    requested_ = true;
    LASTCALL_TRY {
      for (Event& event : early_) events_.push_back(std::move(event));
    }
    LASTCALL_CATCH(...) { note_lost(); }
    early_.clear();
  }

  /// Adds what followed from the request, but may be known before the drain thread has written the
  /// request itself down: the story is told in its order.
  void add_in_drain(Event event) noexcept {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!requested_) {
        LASTCALL_TRY { early_.push_back(std::move(event)); }
        LASTCALL_CATCH(...) { note_lost(); }
        return;
      }
    }
    add(std::move(event));
  }

  // On_signal functions, of which one runs at a time. What they do waits for the drain thread, which writes the
  // signal down first.

  void handler_begins(Event begun) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    LASTCALL_TRY {
      of_handlers_.push_back(begun);
      running_ = std::move(begun);
    }
    LASTCALL_CATCH(...) { note_lost(); }
  }
  void handler_ends(EventResult result, std::string detail, Clock::time_point end) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!running_) return;  // given up, or lost
    running_->result = result;
    running_->detail = std::move(detail);
    running_->end = end;
    LASTCALL_TRY { of_handlers_.push_back(std::move(*running_)); }
    LASTCALL_CATCH(...) { note_lost(); }
    running_.reset();
  }
  /// What they have done since the last call.
  std::vector<Event> take_of_handlers() noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::exchange(of_handlers_, {});
  }
  /// The story is over: what is said of the one that runs still, if any. It has no other end then.
  bool give_up_handler(Event& out, Clock::time_point now) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!running_) return false;
    running_->result = EventResult::overran;
    running_->detail = "still running";
    running_->end = now;
    out = std::move(*running_);
    running_.reset();
    return true;
  }

  /// The event after the one last taken, if any: for handing them to the observer one by one.
  bool take(Event& out) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (taken_ < first_) taken_ = first_;
    if (taken_ == first_ + events_.size()) return false;
    out = events_[taken_ - first_];
    ++taken_;
    return true;
  }

  bool has_untaken() const noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    return taken_ < first_ + events_.size();
  }

  /// If more than `few` have not been taken, the next one taken is the last. Whether it is so.
  bool skip_to_last(std::size_t few) noexcept {
    const std::lock_guard<std::mutex> lock(mutex_);
    const std::size_t end = first_ + events_.size();
    if (end - std::max(taken_, first_) <= few) return false;
    taken_ = end - 1;
    return true;
  }

  std::vector<Event> all() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {events_.begin(), events_.end()};
  }

  /// There was no memory for a line.
  void note_lost() noexcept { lost_.fetch_add(1, std::memory_order_relaxed); }
  bool any_lost() const noexcept { return lost_.load(std::memory_order_relaxed) != 0; }

  /// Something has failed, whatever becomes of its name. Takes no lock and no memory.
  void note_failed() noexcept { failed_.store(true, std::memory_order_release); }
  void add_failure(std::string task, std::exception_ptr error) noexcept {
    note_failed();
    const std::lock_guard<std::mutex> lock(mutex_);
    LASTCALL_TRY { failures_.push_back(Failure{std::move(task), std::move(error)}); }
    LASTCALL_CATCH(...) { note_lost(); }
  }
  bool any_failed() const noexcept { return failed_.load(std::memory_order_acquire); }
  std::vector<Failure> failures() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return failures_;
  }

 private:
  static constexpr std::size_t most_before_request = 1000;

  mutable std::mutex mutex_;
  std::deque<Event> events_;
  std::size_t first_ = 0;  // the place of events_.front() among all there ever were
  std::size_t taken_ = 0;
  std::atomic<std::size_t> lost_{0};
  std::vector<Event> early_;
  bool requested_ = false;
  std::vector<Event> of_handlers_;
  std::optional<Event> running_;  // the begun event of the on_signal function that runs
  std::atomic<bool> failed_{false};
  std::vector<Failure> failures_;
};

}  // namespace lastcall::detail

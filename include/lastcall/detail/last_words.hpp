// What an end still says that had no time for more, or no observer that took it: the names of those who are in, by
// bare write(2).
#pragma once

#include <lastcall/detail/engine_state.hpp>
#include <lastcall/detail/line_writer.hpp>
#include <lastcall/detail/text.hpp>
#include <lastcall/detail/thread_probe.hpp>

#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <string_view>

namespace lastcall::detail {

// A line put together without allocating. What doesn't fit is cut off; the newline always fits.
class LastLine {
 public:
  LastLine& operator<<(std::string_view part) noexcept {
    // A name may hold anything: a newline or an escape in it must not forge a line.
    while (!part.empty()) {
      const CodePoint point = decode_utf8(part);
      const bool harmless = point.valid && !is_unprintable(point.value);
      const std::string_view out = harmless ? part.substr(0, point.length) : "?";
      if (out.size() > sizeof text_ - 1 - used_) break;
      std::copy(out.begin(), out.end(), text_ + used_);
      used_ += out.size();
      part.remove_prefix(point.length);
    }
    return *this;
  }
  LastLine& operator<<(long long number) noexcept {
    char digits[24];
    std::size_t at = sizeof digits;
    auto rest = number < 0 ? 0ULL - static_cast<unsigned long long>(number)
                           : static_cast<unsigned long long>(number);
    do {
      digits[--at] = static_cast<char>('0' + rest % 10);
      rest /= 10;
    } while (rest != 0);
    if (number < 0) digits[--at] = '-';
    return *this << std::string_view(digits + at, sizeof digits - at);
  }
  void write_to(int fd) noexcept {
    text_[used_++] = '\n';
    write_without_waiting(fd, text_, used_);
    used_ = 0;
  }

 private:
  char text_[512];
  std::size_t used_ = 0;
};

/// Whom the last words name: the report has been told already, and only what is called now hangs; or all.
enum class LastWords { calls, everybody };

/// Names the hooks that hang, main if it has not come, and every named member. Allocates nothing and
/// takes no lock that user code can hold; a list whose lock can't be had is only counted. With thousands
/// of members it is a matter of time: after 10 ms they are no longer asked what they wait in, after 20 ms
/// all but the first eight of a stage are counted.
inline void write_last_words(EngineState& engine, std::string_view why,
                             LastWords whom = LastWords::everybody) noexcept {
  const int fd = engine.options.last_words;
  if (fd < 0) return;
  const Clock::time_point now = Clock::now();
  const Clock::time_point last_question = now + std::chrono::milliseconds(10);
  const Clock::time_point last_name = now + std::chrono::milliseconds(20);
  constexpr std::size_t always_named = 8;
  const auto milliseconds_since = [&](Clock::time_point since) {
    return static_cast<long long>(
        std::chrono::duration_cast<std::chrono::milliseconds>(now - since).count());
  };
  LastLine line;
  (line << "lastcall: " << why << " after " << milliseconds_since(engine.requested_at.load())
        << " ms; still in:")
      .write_to(fd);
  bool named = false;
  const auto write_line = [&]() noexcept {
    named = true;
    line.write_to(fd);
  };
  char kernel[96];
  const auto where_it_waits = [&](pid_t thread) {
    if (thread <= 0 || Clock::now() >= last_question) return;
    const std::size_t size = waiting_in(thread, kernel, sizeof kernel);
    if (size > 0) line << ", in " << std::string_view(kernel, size);
  };
  for (const Section& section : engine.sections) {
    const std::uint32_t state = section.state.load(std::memory_order_acquire);
    if (state != Section::inside && (state != Section::abandoned || whom == LastWords::calls))
      continue;
    const Stage* const stage = section.stage.load(std::memory_order_relaxed);
    const pid_t thread = section.thread_id.load(std::memory_order_relaxed);
    line << "lastcall:   '" << section.name.load(std::memory_order_relaxed) << "'";
    if (stage != nullptr) line << " of stage '" << stage->name() << "'";
    line << ", " << milliseconds_since(section.begin.load()) << " ms, thread "
         << static_cast<long long>(thread);
    where_it_waits(thread);
    write_line();
  }
  if (whom == LastWords::calls) return;
  // As in the report: main is in until somebody has come for the end.
  if (engine.ending.load(std::memory_order_acquire) == Ending::nobody ||
      engine.main_was_late.load(std::memory_order_acquire)) {
    line << "lastcall:   'main', " << milliseconds_since(engine.requested_at.load())
         << " ms, thread " << static_cast<long long>(engine.main_thread);
    where_it_waits(engine.main_thread);
    write_line();
  }
  for (const Stage* stage = engine.first_stage; stage != nullptr;
       stage = EngineState::after(*stage)) {
    const WaitGroup& group = EngineState::group_of(*stage);
    const std::size_t all = WaitGroupAccess::named_count(group);
    std::size_t met = 0;
    bool in_time = true;
    const bool seen = WaitGroupAccess::visit_members(group, [&](const MemberView& member) noexcept {
      // The first ones are a matter of microseconds, and of having a processor for them. Past them even to look
      // at a million takes its time.
      in_time = in_time && (met < always_named || Clock::now() < last_name);
      if (!in_time) return false;
      ++met;
      line << "lastcall:   '" << member.name << "' of stage '" << stage->name() << "' ("
           << std::string_view(member.where.file_name()) << ":"
           << static_cast<long long>(member.where.line()) << "), "
           << milliseconds_since(member.entered) << " ms, thread "
           << static_cast<long long>(member.thread_id);
      where_it_waits(member.thread_id);
      write_line();
      return true;
    });
    if ((!in_time || !seen) && all > met) {
      line << "lastcall:   " << static_cast<long long>(all - met)
           << (in_time ? " whose names can't be read, of stage '" : " more of stage '")
           << stage->name() << "'";
      write_line();
    }
    if (const std::size_t unnamed = WaitGroupAccess::unnamed_count(group); unnamed > 0) {
      line << "lastcall:   " << static_cast<long long>(unnamed) << " unnamed of stage '"
           << stage->name() << "'";
      write_line();
    }
  }
  // Nobody, and yet it has come to this: the drain thread itself hangs, between two calls, in a lock of
  // its own or of malloc's that somebody holds. It may be that one who speaks, and then it does not.
  if (named || engine.signal_thread.load(std::memory_order_relaxed) != this_thread_mark()) return;
  const std::uint32_t driver =
      engine.current_driver.load(std::memory_order_acquire) & ~EngineState::driver_quits;
  const pid_t thread = engine.sections[driver].thread_id.load(std::memory_order_relaxed);
  line << "lastcall:   'the drain thread', thread " << static_cast<long long>(thread);
  where_it_waits(thread);
  write_line();
}

/// The last words of run() after drain(), whose report has named everybody else.
inline void write_flush_hangs(const EngineState& engine, Clock::time_point begun,
                              pid_t thread) noexcept {
  const int fd = engine.options.last_words;
  if (fd < 0) return;
  const Clock::time_point now = Clock::now();
  const auto milliseconds_since = [now](Clock::time_point since) {
    return static_cast<long long>(
        std::chrono::duration_cast<std::chrono::milliseconds>(now - since).count());
  };
  LastLine line;
  (line << "lastcall: out of time after " << milliseconds_since(engine.requested_at.load())
        << " ms; still in:")
      .write_to(fd);
  line << "lastcall:   'flushing the streams', " << milliseconds_since(begun) << " ms, thread "
       << static_cast<long long>(thread);
  char kernel[96];
  const std::size_t size = thread > 0 ? waiting_in(thread, kernel, sizeof kernel) : 0;
  if (size > 0) line << ", in " << std::string_view(kernel, size);
  line.write_to(fd);
}
inline void write_not_flushed(const EngineState& engine) noexcept {
  LastLine line;
  line << "lastcall: no thread to be had for it: the streams are not flushed";
  if (engine.options.last_words >= 0) line.write_to(engine.options.last_words);
}

}  // namespace lastcall::detail

// What tests of the coordinator have in common: options that say nothing, ways to hang, an observer that
// remembers, and a story told in short lines.
#pragma once

#include "threads.hpp"

#include <lastcall/shutdown_coordinator.hpp>

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

namespace support {

/// What a test adds to a time that the library promises, on a machine that others use as well.
inline constexpr std::chrono::milliseconds slack =
    under_sanitizer ? std::chrono::milliseconds(8000) : std::chrono::milliseconds(1500);

/// Nobody is told anything, and there is time enough for the slowest machine.
inline lastcall::ShutdownOptions quiet(std::chrono::milliseconds grace = std::chrono::seconds(20)) {
  lastcall::ShutdownOptions options;
  options.grace_period = grace;
  options.observer = nullptr;
  options.last_words = -1;
  return options;
}

/// Whatever happens.
[[noreturn]] inline void hang() {
  for (;;) ::pause();
}

/// From now on another thread has stdout's lock, for ever.
inline void lock_stdout_for_ever() {
  static std::atomic<bool> locked{false};
  std::thread([] {
    ::flockfile(stdout);
    locked = true;
    hang();
  }).detach();
  eventually([] { return locked.load(); });
}

/// "hook failed service/flush": kind, result, stage and name.
inline std::string line_of(const lastcall::Event& event) {
  std::string line(lastcall::detail::name_of(event.kind));
  line += ' ';
  line += lastcall::detail::name_of(event.result);
  line += ' ';
  if (!event.stage.empty()) line += event.stage + "/";
  return line + event.name;
}

/// Every event, or those of some kinds, a line each.
inline std::string story_of(const std::vector<lastcall::Event>& events,
                            std::vector<lastcall::EventKind> kinds = {}) {
  std::string story;
  for (const lastcall::Event& event : events) {
    if (kinds.empty() || std::find(kinds.begin(), kinds.end(), event.kind) != kinds.end()) {
      story += line_of(event) + "\n";
    }
  }
  return story;
}

inline std::size_t count_of(std::string_view text, std::string_view part) {
  std::size_t found = 0;
  for (std::size_t at = text.find(part); at != std::string_view::npos;
       at = text.find(part, at + part.size())) {
    ++found;
  }
  return found;
}

inline const lastcall::Event* find_event(const std::vector<lastcall::Event>& events,
                                         std::string_view line) {
  for (const lastcall::Event& event : events) {
    if (line_of(event) == line) return &event;
  }
  return nullptr;
}

inline const lastcall::Straggler* find_straggler(const std::vector<lastcall::Straggler>& all,
                                                 std::string_view name) {
  for (const lastcall::Straggler& straggler : all) {
    if (straggler.name == name) return &straggler;
  }
  return nullptr;
}

/// Lines in the order they came, from any thread.
class Diary {
 public:
  void add(std::string line) {
    const std::lock_guard<std::mutex> lock(mutex_);
    lines_.push_back(std::move(line));
  }
  std::string text() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    std::string all;
    for (const std::string& line : lines_) all += line + "\n";
    return all;
  }
  bool has(std::string_view line) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return std::find(lines_.begin(), lines_.end(), line) != lines_.end();
  }
  /// A function that adds the line: a hook.
  std::function<void()> entry(std::string line) {
    return [this, line] { add(line); };
  }

 private:
  mutable std::mutex mutex_;
  std::vector<std::string> lines_;
};

/// Remembers every event and the thread that brought it; then does what it is told to.
class Witness : public lastcall::Observer {
 public:
  explicit Witness(std::function<void(const lastcall::Event&)> then = {})
      : then_(std::move(then)) {}

  void on_event(const lastcall::Event& event) override {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      events_.push_back(event);
      threads_.push_back(thread_id());
    }
    if (then_) then_(event);
  }

  std::vector<lastcall::Event> events() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return events_;
  }
  std::vector<pid_t> threads() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    return threads_;
  }

 private:
  const std::function<void(const lastcall::Event&)> then_;
  mutable std::mutex mutex_;
  std::vector<lastcall::Event> events_;
  std::vector<pid_t> threads_;
};

/// Writes a line for every event on a descriptor, at once: for tests that listen from outside.
class Teller : public lastcall::Observer {
 public:
  explicit Teller(int fd = STDOUT_FILENO) : fd_(fd) {}
  void on_event(const lastcall::Event& event) override {
    const std::string line = line_of(event) + "\n";
    static_cast<void>(::write(fd_, line.data(), line.size()) < 0);
  }

 private:
  const int fd_;
};

class Stopwatch {
 public:
  std::chrono::milliseconds elapsed() const {
    return std::chrono::duration_cast<std::chrono::milliseconds>(lastcall::Clock::now() - begin_);
  }

 private:
  const lastcall::Clock::time_point begin_ = lastcall::Clock::now();
};

/// What a call throws, in words: "logic_error: ..."; "nothing" if it returns.
template <class Call>
std::string refusal(Call call) {
  try {
    call();
  } catch (const std::system_error& error) {
    return "system_error " + std::to_string(error.code().value()) + ": " + error.what();
  } catch (const std::invalid_argument& error) {
    return std::string("invalid_argument: ") + error.what();
  } catch (const std::logic_error& error) {
    return std::string("logic_error: ") + error.what();
  } catch (const std::exception& error) {
    return std::string("exception: ") + error.what();
  }
  return "nothing";
}

inline bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}
inline bool starts_with(std::string_view text, std::string_view part) {
  return text.substr(0, part.size()) == part;
}

/// What the process does with a signal, to be compared before and after.
inline std::string disposition_of(int number) {
  struct sigaction now {};
  if (::sigaction(number, nullptr, &now) != 0) return "?";
  std::string words = std::to_string(reinterpret_cast<std::uintptr_t>(now.sa_handler)) + " " +
                      std::to_string(now.sa_flags & ~0x04000000) + " ";
  // ThreadSanitizer keeps a mask of its own where there is no handler that it could matter to.
  const bool plain = now.sa_handler == SIG_DFL || now.sa_handler == SIG_IGN;
  for (int other = 1; other < lastcall::detail::signal_limit; ++other) {
    const bool masked = !(under_tsan && plain) && ::sigismember(&now.sa_mask, other) == 1;
    words += masked ? '1' : '0';
  }
  return words;
}
/// All of them.
inline std::string dispositions() {
  std::string all;
  for (int number = 1; number < lastcall::detail::signal_limit; ++number) {
    all += std::to_string(number) + ": " + disposition_of(number) + "\n";
  }
  return all;
}

/// The calling thread's signal mask.
inline std::string signal_mask() {
  sigset_t now;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &now);
  std::string words;
  for (int number = 1; number < lastcall::detail::signal_limit; ++number) {
    words += ::sigismember(&now, number) == 1 ? '1' : '0';
  }
  return words;
}

}  // namespace support

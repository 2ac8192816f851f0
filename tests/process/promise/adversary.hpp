// What the adversaries of the promise table are made of.
//
// An adversary is a program: the table executes itself with its name, waits until it says that the harm
// is done, asks it to shut down, and measures how long it takes until the process is gone.
#pragma once

#include <lastcall/lastcall.hpp>

#include <sys/types.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace promise {

using namespace std::chrono_literals;
using std::chrono::milliseconds;

#if defined(LASTCALL_ASAN) || defined(LASTCALL_TSAN)
inline constexpr bool sanitized = true;
#else
inline constexpr bool sanitized = false;
#endif

/// The adversary's side: how it talks to the table.
class Stand {
 public:
  explicit Stand(milliseconds grace) : grace_(grace) {}

  milliseconds grace() const { return grace_; }

  /// The grace period, a quarter of it for the abort, and an echo window that a test can wait for.
  lastcall::ShutdownOptions options() const {
    lastcall::ShutdownOptions options;
    options.grace_period = grace_;
    options.abort_margin = grace_ / 4;
    options.repeat_window = 20ms;
    return options;
  }

  /// The harm is done, or about to be in a moment: the table may go on. Only the first one counts.
  /// Allocates nothing and takes no lock.
  void ready() const noexcept;
  /// The adversary itself has asked for shutdown, now. For those whom nobody signals.
  void requested() const noexcept;

 private:
  milliseconds grace_;
};

/// The table's side: what it does to an adversary that is ready.
class Target {
 public:
  explicit Target(pid_t process, milliseconds grace) : process_(process), grace_(grace) {}

  /// Sends a signal. The first one is the request, unless it is told otherwise.
  void send(int number);
  /// Sends one that is no request.
  void poke(int number) const;
  void wait(milliseconds span) const;
  /// The time that counts begins now, and not with the first signal.
  void restart_clock() { begin_ = lastcall::Clock::now(); }

  pid_t process() const { return process_; }
  milliseconds grace() const { return grace_; }
  /// When the request was made; max() if no signal has made it.
  lastcall::Clock::time_point begin() const { return begin_; }

 private:
  pid_t process_;
  milliseconds grace_;
  lastcall::Clock::time_point begin_ = lastcall::Clock::time_point::max();
};

/// How long the process may live after the request.
enum class Bound {
  grace,    // to the end of the grace period
  at_once,  // it must not wait for anything: a third wish, or nobody is left in
};

enum class Streams {
  read,    // somebody reads what it writes
  unread,  // stdout and stderr are pipes, full to the brim, that nobody reads
};

/// What it can't run without, and where it makes no sense.
struct Needs {
  bool plain_build = false;  // it meddles with what sanitizers meddle with
  bool own_kernel =
      false;  // what an emulator of a processor has not: vfork(), ptrace(), RLIMIT_AS, its time
  bool long_form = false;  // it takes long: only with --runs 20 and more, or when it is asked for
};

struct Adversary {
  std::string name;
  std::string how;                  // how the process must end, as waitpid tells: "exit 124"
  std::vector<std::string> says{};  // all of this is on its stderr: who is named
  void (*body)(Stand&) = nullptr;
  void (*provoke)(Target&) = [](Target& target) { target.send(SIGTERM); };
  void (*clean_up)(pid_t) = nullptr;  // when it is gone
  Bound bound = Bound::grace;
  Streams streams = Streams::read;
  Needs needs{};
  milliseconds extra{
      0};  // on top of what is judged, where it isn't the library that takes the time
};

// The families, each in a file of its own.
void add_workers(std::vector<Adversary>& all);
void add_user_code(std::vector<Adversary>& all);
void add_locks(std::vector<Adversary>& all);
void add_memory(std::vector<Adversary>& all);
void add_process_wide(std::vector<Adversary>& all);
void add_inside(std::vector<Adversary>& all);

// ---- ways to hang ----------------------------------------------------------------------------------

/// For ever, whatever happens.
[[noreturn]] void hang() noexcept;
[[noreturn]] void spin() noexcept;
/// Both ends open, nothing in it: descriptor of the end to read from.
int empty_pipe();
/// write(2), without a buffer in between.
void write_out(int fd, std::string_view text) noexcept;

// ---- the interposed allocator and clock (interpose.cpp) ------------------------------------------

/// From now on every call of the allocator by any thread hangs, as if a thread hung in it with its lock.
void hold_allocator() noexcept;
/// The same in the calling thread alone, without the lock.
void hold_allocator_here() noexcept;
/// From now on operator new throws.
void exhaust_operator_new() noexcept;
/// From now on the wall clock is off by that much.
void step_wall_clock(std::chrono::seconds by) noexcept;

}  // namespace promise

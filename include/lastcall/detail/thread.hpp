// Starting, naming and joining threads, with bare pthreads: std::thread hides the errno, can't be
// joined for a bounded time, and terminates the process when it is forgotten.
#pragma once

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/thread_cancellation.hpp>

#include <pthread.h>

#if LASTCALL_LINUX
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__DragonFly__)
#include <pthread_np.h>
#endif

#include <cstring>
#include <string_view>

namespace lastcall::detail {

/// Starts a thread that inherits the caller's signal mask and must be joined or detached. Returns 0 or
/// an errno (EAGAIN: there are too many); `thread` is unchanged then.
inline int start_thread(pthread_t& thread, void* (*body)(void*), void* argument) noexcept {
  pthread_t started{};
  const int error = ::pthread_create(&started, nullptr, body, argument);
  if (error == 0) thread = started;
  return error;
}

/// Names the calling thread for ps, top and debuggers. The kernel keeps 15 bytes of it, the rest is
/// cut off. Where threads have no names, or none can be given, nothing happens.
inline void name_this_thread(std::string_view name) noexcept {
  char cut[16] = {};
  std::memcpy(cut, name.data(), name.size() < sizeof cut ? name.size() : sizeof cut - 1);
#if defined(__linux__)
  ::pthread_setname_np(::pthread_self(), cut);
#elif defined(__APPLE__)
  ::pthread_setname_np(cut);
#elif defined(__FreeBSD__) || defined(__OpenBSD__) || defined(__DragonFly__)
  ::pthread_set_name_np(::pthread_self(), cut);
#elif defined(__NetBSD__)
  ::pthread_setname_np(::pthread_self(), "%s", cut);
#endif
}

/// What the calling thread sleeps until is when it wakes, to 50 us: a slack for timers that saves power
/// (prctl(2), PR_SET_TIMERSLACK) is inherited from the thread's maker, and may be seconds.
inline void keep_exact_time() noexcept {
#if LASTCALL_LINUX
  ::prctl(PR_SET_TIMERSLACK, 50'000UL, 0UL, 0UL, 0UL);
#endif
}

/// The same of somebody else's thread, for a while.
class ExactTime {
 public:
#if LASTCALL_LINUX
  // prctl() of libc returns an int, which 5 s have no room in.
  ExactTime() noexcept : before_(::syscall(SYS_prctl, PR_GET_TIMERSLACK, 0UL, 0UL, 0UL, 0UL)) {
    keep_exact_time();
  }
  ~ExactTime() {
    if (before_ > 0) ::prctl(PR_SET_TIMERSLACK, static_cast<unsigned long>(before_), 0UL, 0UL, 0UL);
  }
#else
  ExactTime() noexcept {}  // not trivial: a variable of it counts as used
#endif
  ExactTime(const ExactTime&) = delete;
  ExactTime& operator=(const ExactTime&) = delete;

#if LASTCALL_LINUX
 private:
  long before_;
#endif
};

/// Calls `attempt` until it is true, some 10,000 times a second; false if it was not by `deadline`. Once at
/// least.
template <class Attempt>
bool try_until(Clock::time_point deadline, Attempt attempt) noexcept {
  while (!attempt()) {
    if (Clock::now() >= deadline) return false;
    nap(100'000);
  }
  return true;
}

/// Joins a thread that has returned from its body, or is about to; false if it is not quite gone.
/// Where threads can't be asked (pthread_tryjoin_np) it is let go instead: destructors of thread_local
/// objects may hang, and nobody is to hang with them.
inline bool join_if_gone(pthread_t thread) noexcept {
#if LASTCALL_LINUX
  return ::pthread_tryjoin_np(thread, nullptr) == 0;
#else
  return ::pthread_detach(thread) == 0;
#endif
}

/// The same, waiting for it; false if it was not gone by `deadline`.
inline bool join_until(pthread_t thread, Clock::time_point deadline) noexcept {
#if !LASTCALL_LINUX
  if (deadline == Clock::time_point::max()) return ::pthread_join(thread, nullptr) == 0;
#endif
  return try_until(deadline, [thread] { return join_if_gone(thread); });
}

}  // namespace lastcall::detail

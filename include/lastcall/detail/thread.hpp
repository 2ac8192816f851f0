// Starting, naming and joining threads, with bare pthreads: std::thread hides the errno, can't be
// joined for a bounded time, and terminates the process when it is forgotten.
#pragma once

#include <lastcall/detail/config.hpp>

#include <pthread.h>

#if LASTCALL_LINUX
#include <sys/prctl.h>
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
#if LASTCALL_LINUX
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

/// Joins a thread that has returned from its body, or is about to. Where threads can be asked
/// (pthread_tryjoin_np) it doesn't wait and says false if the thread is not quite gone; elsewhere it
/// waits for what the C library and thread_local destructors have left to do.
inline bool join_if_gone(pthread_t thread) noexcept {
#if LASTCALL_LINUX
  return ::pthread_tryjoin_np(thread, nullptr) == 0;
#else
  return ::pthread_join(thread, nullptr) == 0;
#endif
}

/// While it lives, pthread_cancel() and its kind can't end the calling thread: the library's own steps
/// are not torn in the middle.
class NoThreadCancellation {
 public:
  NoThreadCancellation() noexcept { ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_); }
  NoThreadCancellation(const NoThreadCancellation&) = delete;
  NoThreadCancellation& operator=(const NoThreadCancellation&) = delete;
  ~NoThreadCancellation() {
    int disabled = 0;
    ::pthread_setcancelstate(before_, &disabled);
  }

 private:
  int before_ = PTHREAD_CANCEL_ENABLE;
};

}  // namespace lastcall::detail

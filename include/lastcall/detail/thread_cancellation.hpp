// System calls that are no cancellation points.
//
// A thread with a pthread_cancel() pending unwinds out of the next cancellation point: write(2), read(2), close(2)
// and nanosleep(2) are such. In the library's own it would leave a lock behind, or come to a function that is
// noexcept, which ends the process. What blocks by the user's wish, poll() and accept(), stays one.
#pragma once

#include <lastcall/detail/config.hpp>

#include <pthread.h>
#include <sys/types.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <ctime>

#if LASTCALL_LINUX
#include <sys/syscall.h>
#endif

namespace lastcall::detail {

/// While it lives, pthread_cancel() and its kind can't end the calling thread: the library's own steps
/// are not torn in the middle. POSIX doesn't list the function as async-signal-safe, but it sets a flag of the
/// thread and does nothing else.
class NoThreadCancellation {
 public:
#if defined(PTHREAD_CANCEL_DISABLE)
  NoThreadCancellation() noexcept { ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_); }
  ~NoThreadCancellation() { ::pthread_setcancelstate(before_, &before_); }
#else
  NoThreadCancellation() noexcept {}  // not trivial: a variable of it counts as used
#endif
  NoThreadCancellation(const NoThreadCancellation&) = delete;
  NoThreadCancellation& operator=(const NoThreadCancellation&) = delete;

 private:
  [[maybe_unused]] int before_ = 0;
};

/// The opposite, on a thread of the library's while that runs something of the user's, which may end the thread.
class OpenToThreadCancellation {
 public:
#if defined(PTHREAD_CANCEL_DISABLE)
  OpenToThreadCancellation() noexcept { ::pthread_setcancelstate(PTHREAD_CANCEL_ENABLE, &before_); }
  ~OpenToThreadCancellation() {
    // The user's may have left the asynchronous type behind: then it would be torn at the next one's beginning.
    ::pthread_setcanceltype(PTHREAD_CANCEL_DEFERRED, &before_);
    ::pthread_setcancelstate(PTHREAD_CANCEL_DISABLE, &before_);
  }
  /// When the user's has returned: a cancel that is still pending ends this call, and not a later one. Then it
  /// doesn't return, but unwinds the stack.
  void let_thread_end_here() const { ::pthread_testcancel(); }
#else
  OpenToThreadCancellation() noexcept {}
  void let_thread_end_here() const noexcept {}
#endif
  OpenToThreadCancellation(const OpenToThreadCancellation&) = delete;
  OpenToThreadCancellation& operator=(const OpenToThreadCancellation&) = delete;

 private:
  [[maybe_unused]] int before_ = 0;
};

/// write(2) and read(2). The bare system calls are no cancellation points. (ThreadSanitizer has to see the calls.)
#if LASTCALL_LINUX && !defined(LASTCALL_TSAN)
inline ssize_t bare_write(int fd, const void* from, std::size_t size) noexcept {
  return static_cast<ssize_t>(::syscall(SYS_write, fd, from, size));
}
inline ssize_t bare_read(int fd, void* to, std::size_t size) noexcept {
  return static_cast<ssize_t>(::syscall(SYS_read, fd, to, size));
}
#else
inline ssize_t bare_write(int fd, const void* from, std::size_t size) noexcept {
  const NoThreadCancellation whole;
  return ::write(fd, from, size);
}
inline ssize_t bare_read(int fd, void* to, std::size_t size) noexcept {
  const NoThreadCancellation whole;
  return ::read(fd, to, size);
}
#endif

/// Sleeps for less than a second, or until a signal comes. Keeps errno.
inline void nap(long nanoseconds) noexcept {
  const NoThreadCancellation whole;
  const int saved = errno;
  const timespec time{0, nanoseconds};
  ::nanosleep(&time, nullptr);
  errno = saved;
}

}  // namespace lastcall::detail

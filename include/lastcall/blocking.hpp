// Blocking calls that a token can end: a sleep, a wait on a condition variable, poll(2), accept(2).
//
// All of them look at the token first: cancelled already, they say so at once, whatever else is ready.
// None of them uses CPU while it waits. A token that can never be cancelled is fine everywhere.
#pragma once

#include <lastcall/cancellation.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/condition_wait.hpp>
#include <lastcall/detail/interruptible.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <condition_variable>
#include <mutex>
#include <optional>
#include <string>
#include <utility>

namespace lastcall {

/// Sleeps for `duration`, or until `token` is cancelled. True: it has slept it all, and never less;
/// false: cancelled. Zero or less returns at once.
template <class Rep, class Period>
bool sleep_for(std::chrono::duration<Rep, Period> duration, const CancellationToken& token) {
  return !token.wait_for(duration);
}

/// Waits until `predicate()` holds or `token` is cancelled, and returns the predicate's last value: what
/// std::condition_variable_any::wait does with a std::stop_token, for a plain condition variable.
///
/// `lock` is locked before, while the predicate runs, and after. Whoever cancels may hold its mutex: the
/// wake-up is not lost, and cancelling doesn't wait for the mutex. Other waiters of `condition` may see a
/// spurious wake-up then. Throws std::logic_error if `lock` is not locked, and what the predicate throws.
///
/// Costs no allocation. The first wait of a process (and the first in a forked child) that has to block starts
/// a thread, one for all, which wakes those whose token is cancelled and sleeps otherwise; std::system_error
/// (EAGAIN) if that can't be had.
template <class Predicate>
bool wait(std::condition_variable& condition, std::unique_lock<std::mutex>& lock,
          const CancellationToken& token, Predicate predicate) {
  if (!lock.owns_lock()) detail::throw_logic_error("wait: the lock given is not locked");
  if (token.is_cancelled()) return static_cast<bool>(predicate());
  if (predicate()) return true;
  if (!token.can_be_cancelled()) {
    condition.wait(lock, std::move(predicate));
    return true;
  }
  {
    detail::ConditionWaiter waiter(detail::TreeAccess::peek(token), condition, *lock.mutex());
    while (waiter.block(lock) && !token.is_cancelled()) {
      if (predicate()) return true;
    }
  }
  return static_cast<bool>(predicate());
}

/// What ended a poll().
enum class Ready { ready, timed_out, cancelled };

namespace detail {

// With events == 0 the descriptor is none of poll(2)'s business: only whether it is one at all.
inline Ready poll_until(int fd, short events, int wake_fd, const CancellationToken& token,
                        Clock::time_point deadline, const char* who) {
  // poll(2) skips negative descriptors without a word.
  if (fd < 0) throw_system_error(EBADF, std::string(who) + ": descriptor " + std::to_string(fd));
  bool look_only = events == 0;
  Clock::duration longest = Clock::duration::max();
  for (;;) {
    if (token.is_cancelled()) return Ready::cancelled;
    pollfd entries[2] = {{fd, events, 0}, {wake_fd, POLLIN, 0}};
    const Clock::time_point now = Clock::now();
    const int timeout =
        look_only ? 0 : poll_timeout(now, std::min(deadline, time_after(now, longest)));
    if (events == 0 && !look_only) entries[0].fd = -1;
    const int count = ::poll(entries, 2, timeout);
    if (count < 0) {
      // EAGAIN: some systems are out of memory for a moment.
      if (errno == EINTR || errno == EAGAIN) continue;
      throw_system_error(errno,
                         std::string(who) + ": waiting for descriptor " + std::to_string(fd));
    }
    if (token.is_cancelled()) return Ready::cancelled;
    if ((entries[0].revents & POLLNVAL) != 0) {
      throw_system_error(EBADF, std::string(who) + ": descriptor " + std::to_string(fd));
    }
    if (events != 0 && entries[0].revents != 0) return Ready::ready;
    if (std::exchange(look_only, false)) continue;
    // The clock decides, not the count: poll(2) may have been given less than the time left.
    if (Clock::now() >= deadline) return Ready::timed_out;
    if (entries[1].revents != 0) {
      // Not by a cancel: somebody else has written to it, or closed it. It says nothing any more.
      wake_fd = -1;
      longest = std::chrono::milliseconds(10);
    }
  }
}

inline int accept_now(int listener) noexcept {
#if LASTCALL_LINUX
  return ::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
#else
  UniqueFd accepted(::accept(listener, nullptr, nullptr));
  // Between the two calls an exec() elsewhere could inherit it: this system has nothing better.
  if (accepted && ::fcntl(accepted.get(), F_SETFD, FD_CLOEXEC) == -1) return -1;
  return accepted.release();
#endif
}

// Accepts without a way to block past the token. -1 with an errno; EINTR: try again.
inline int accept_unless_cancelled(int listener, const CancellationToken& token) {
  const int flags = ::fcntl(listener, F_GETFL);
  if (flags == -1) return -1;
  if ((flags & O_NONBLOCK) != 0 || !token.can_be_cancelled()) return accept_now(listener);
  return Interruptible().run(token, [listener]() noexcept { return accept_now(listener); });
}

enum class AcceptError { retry, wait, fatal };

constexpr AcceptError classify_accept_error(int error) noexcept {
  switch (error) {
    case EINTR:
    case ECONNABORTED:
    case EAGAIN:  // somebody else took it
#if EWOULDBLOCK != EAGAIN
    case EWOULDBLOCK:
#endif
    // Errors of the connection that was to be accepted, which Linux hands on: accept(2).
    case EPROTO:
    case ENETDOWN:
    case EHOSTDOWN:
    case EHOSTUNREACH:
    case ENETUNREACH:
#if defined(ENONET)
    case ENONET:
#endif
      return AcceptError::retry;
    case EMFILE:
    case ENFILE:
    case ENOBUFS:
    case ENOMEM: return AcceptError::wait;
    default: return AcceptError::fatal;
  }
}

}  // namespace detail

/// Waits until `fd` is ready for one of `events` (POLLIN, POLLOUT, ...), for the time given, or until
/// `token` is cancelled, which goes first. An error or a hang-up counts as ready, as poll(2) has it. With
/// no events at all it waits for the token or the timeout alone. A timeout of zero or less looks
/// once; Clock::duration::max() is for ever. A signal handler that runs meanwhile changes nothing.
///
/// Throws std::system_error: EBADF for what is no open descriptor; EMFILE or ENFILE if there is no
/// descriptor left for the token.
inline Ready poll(int fd, short events, const CancellationToken& token,
                  Clock::duration timeout = Clock::duration::max()) {
  if (token.is_cancelled()) return Ready::cancelled;
  return detail::poll_until(fd, events, token.fd(), token, detail::deadline_after(timeout), "poll");
}

/// Accepts a connection on `listener`: a close-on-exec socket, which is the caller's to close. Empty:
/// cancelled, and no connection was taken.
///
/// Any number of loops, in threads and in processes, may share a listener, blocking or not: none blocks
/// past its token, and its flags are left alone. Interruptions and connections that are gone again
/// are not reported; when there are no descriptors or no memory left (EMFILE, ENFILE, ENOBUFS, ENOMEM),
/// it waits 10 ms and tries again. Throws std::system_error for any other error: EBADF, ENOTSOCK,
/// EINVAL (not listening); or std::bad_alloc.
///
/// On a blocking listener a real-time signal is used to get out of accept(2), which interrupts nothing
/// else: see detail/interruptible.hpp. The first time it starts the thread that wait() starts:
/// std::system_error (EAGAIN) if that can't be had. With O_NONBLOCK set neither is needed, and accepting is
/// cheaper.
inline std::optional<int> accept(int listener, const CancellationToken& token) {
  const auto doing = [listener] { return "accept: on descriptor " + std::to_string(listener); };
  if (token.is_cancelled()) return std::nullopt;
  int listening = 0;
  socklen_t size = sizeof listening;
  // Else poll(2) would wait for ever for a connection on what can never have one.
  if (::getsockopt(listener, SOL_SOCKET, SO_ACCEPTCONN, &listening, &size) != 0) {
    if (errno != ENOPROTOOPT) detail::throw_system_error(errno, doing());
  } else if (listening == 0) {
    detail::throw_system_error(EINVAL, doing() + ", which is not listening");
  }
  for (;;) {
    int wake_fd = -1;
    bool waitable = true;
    LASTCALL_TRY { wake_fd = token.fd(); }
    LASTCALL_CATCH(...) { waitable = false; }  // no descriptor left, not even for that
    int error = EMFILE;
    if (waitable) {
      if (detail::poll_until(listener, POLLIN, wake_fd, token, Clock::time_point::max(),
                             "accept") == Ready::cancelled) {
        return std::nullopt;
      }
      const int accepted = detail::accept_unless_cancelled(listener, token);
      if (accepted >= 0) return accepted;
      error = errno;
    }
    switch (detail::classify_accept_error(error)) {
      case detail::AcceptError::retry: break;
      case detail::AcceptError::wait:
        if (token.wait_for(std::chrono::milliseconds(10))) return std::nullopt;
        break;
      case detail::AcceptError::fatal: detail::throw_system_error(error, doing());
    }
  }
}

}  // namespace lastcall

// Descriptors and threads of the operating system, owned and checked.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/thread_cancellation.hpp>
#include <lastcall/detail/throw_system_error.hpp>

#include <fcntl.h>
#include <pthread.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <utility>

#if LASTCALL_LINUX
#include <sys/eventfd.h>
#include <sys/syscall.h>
#endif

namespace lastcall::detail {

/// A descriptor with one owner; closing keeps errno.
class UniqueFd {
 public:
  UniqueFd() noexcept = default;
  explicit UniqueFd(int fd) noexcept : fd_(fd) {}
  UniqueFd(UniqueFd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  UniqueFd& operator=(UniqueFd&& other) noexcept {
    if (this != &other) {
      reset();
      fd_ = std::exchange(other.fd_, -1);
    }
    return *this;
  }
  ~UniqueFd() { reset(); }
  int get() const noexcept { return fd_; }
  explicit operator bool() const noexcept { return fd_ >= 0; }
  int release() noexcept { return std::exchange(fd_, -1); }
  void reset() noexcept {
    if (fd_ < 0) return;
    const NoThreadCancellation whole;
    const int saved = errno;
    // Not retried on EINTR: Linux has closed it by then, and a second close could hit a stranger's.
    ::close(std::exchange(fd_, -1));
    errno = saved;
  }

 private:
  int fd_ = -1;
};

struct Pipe {
  UniqueFd read_end;
  UniqueFd write_end;
};

inline bool set_cloexec_nonblock(int fd) noexcept {
  const int status = ::fcntl(fd, F_GETFL);
  return status != -1 && ::fcntl(fd, F_SETFL, status | O_NONBLOCK) != -1 &&
         ::fcntl(fd, F_SETFD, FD_CLOEXEC) != -1;
}

/// The same open file under a number above the standard three, close-on-exec; -1 with errno if there is none to
/// be had, and then nothing is open. In a program that was started with one of the three closed, the next
/// descriptor gets its number, and whatever prints there would print into it. Passes on -1.
inline int above_standard(int fd) noexcept {
  if (fd < 0 || fd > STDERR_FILENO) return fd;
  const NoThreadCancellation whole;
  const int moved = ::fcntl(fd, F_DUPFD_CLOEXEC, STDERR_FILENO + 1);
  // EINVAL: the number is past the process's limit.
  const int error = errno == EINVAL ? EMFILE : errno;
  ::close(fd);
  if (moved < 0) errno = error;
  return moved;
}

/// As above_standard(), and under a number that programs seldom come to, if one is free: of the last 64 that this
/// process may have, or that select(2) knows. Numbers are given out from below. So if the program closes all
/// descriptors there are, as a daemon does, its next files are not where ours were, which may still be written to.
/// The first one makes the kernel's table grow to some 8 KiB, for which a process that has threads already waits
/// some 20 ms on Linux.
inline int out_of_the_way(int fd) noexcept {
  if (fd < 0) return fd;
  const NoThreadCancellation whole;
  constexpr rlim_t places = 64;
  rlimit limit{};
  if (::getrlimit(RLIMIT_NOFILE, &limit) == 0) {
    const rlim_t end = std::min<rlim_t>(limit.rlim_cur, FD_SETSIZE);
    if (end > 2 * places) {
      const int moved = ::fcntl(fd, F_DUPFD_CLOEXEC, static_cast<int>(end - places));
      if (moved >= 0) {
        // Past the end where all of those are taken.
        const bool near = static_cast<rlim_t>(moved) < end;
        ::close(near ? fd : moved);
        if (near) return moved;
      }
    }
  }
  return above_standard(fd);
}

/// Where a descriptor's number is looked for.
enum class Place { above_standard, out_of_the_way };
inline int moved_to(Place place, int fd) noexcept {
  return place == Place::out_of_the_way ? out_of_the_way(fd) : above_standard(fd);
}

/// A pipe with both ends non-blocking and close-on-exec. Throws std::system_error (EMFILE, ENFILE).
inline Pipe make_pipe(const char* doing, Place place = Place::above_standard) {
  int ends[2] = {-1, -1};
#if LASTCALL_LINUX
  const int made = ::pipe2(ends, O_CLOEXEC | O_NONBLOCK);
#else
  const int made = ::pipe(ends);
#endif
  if (made != 0) throw_system_error(errno, doing);
  Pipe pipe{UniqueFd(ends[0]), UniqueFd(ends[1])};
  for (UniqueFd* const end : {&pipe.read_end, &pipe.write_end}) {
    *end = UniqueFd(moved_to(place, end->release()));
#if LASTCALL_LINUX
    if (!*end) throw_system_error(errno, doing);
#else
    if (!*end || !set_cloexec_nonblock(end->get())) throw_system_error(errno, doing);
#endif
  }
  return pipe;
}

/// A level that can be raised once, seen by poll(2): an eventfd, or a pipe where there is none.
/// raise() is async-signal-safe.
///
/// A forked child shares the descriptor with its parent, but not what it says: before the child uses it, what is
/// behind the same number has to become its own.
class PollableFlag {
 public:
  /// Throws std::system_error (EMFILE, ENFILE).
  explicit PollableFlag(const char* doing, Place place = Place::above_standard) {
#if LASTCALL_LINUX
    read_end_ = UniqueFd(moved_to(place, ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK)));
    if (!read_end_) throw_system_error(errno, doing);
#else
    Pipe pipe = make_pipe(doing, place);
    read_end_ = std::move(pipe.read_end);
    write_end_ = std::move(pipe.write_end);
#endif
  }
  int fd() const noexcept { return read_end_.get(); }
  /// Whether this process has made it, or made it its own.
  bool is_own() const noexcept { return process_ == ::getpid(); }
  /// In a forked child: puts a level of its own, which is down, behind the number. Does nothing if it
  /// is_own(). Returns 0, or an errno (EMFILE, ENFILE), and then it is as before.
  /// Async-signal-safe.
  int make_own() noexcept {
    if (is_own()) return 0;
    const NoThreadCancellation whole;
    const int saved = errno;
    const int error = replace() ? 0 : errno;
    errno = saved;
    if (error == 0) process_ = ::getpid();
    return error;
  }
  void raise() noexcept {
    // Where that fails it may rather say too much in the parent than nothing here.
    make_own();
    const int saved = errno;
    const int to = write_end_ ? write_end_.get() : read_end_.get();
    const unsigned long long one = 1;
    // EAGAIN means that the level is up already. No other error can come of an eventfd or a pipe that is
    // ours; but if a filter or a tracer makes one up, somebody would sleep for ever by it: so once more.
    int attempts = 4;
    while (bare_write(to, &one, sizeof one) < 0 && (errno == EINTR || --attempts > 0)) {
    }
    errno = saved;
  }
  /// Takes the level down again. For flags that serve as a doorbell.
  void lower() const noexcept {
    const int saved = errno;
    unsigned long long sink[8];
    for (int turn = 0; turn < 64; ++turn) {
      const ssize_t got = bare_read(read_end_.get(), sink, sizeof sink);
      if (got < 0 && errno == EINTR) continue;
      // An eventfd gives 8 bytes, whatever the room; and a pipe that doesn't fill the room is empty.
      if (got < static_cast<ssize_t>(sizeof sink)) break;
    }
    errno = saved;
  }

 private:
  bool replace() const noexcept {
#if LASTCALL_LINUX
    const UniqueFd fresh(::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    return fresh && ::dup3(fresh.get(), read_end_.get(), O_CLOEXEC) >= 0;
#else
    int ends[2] = {-1, -1};
    if (::pipe(ends) != 0) return false;
    const UniqueFd fresh_read(ends[0]);
    const UniqueFd fresh_write(ends[1]);
    // The flags that are not the descriptor's but the pipe's are set before it is seen.
    return set_cloexec_nonblock(ends[0]) && set_cloexec_nonblock(ends[1]) &&
           ::dup2(ends[0], read_end_.get()) >= 0 && ::dup2(ends[1], write_end_.get()) >= 0 &&
           ::fcntl(read_end_.get(), F_SETFD, FD_CLOEXEC) != -1 &&
           ::fcntl(write_end_.get(), F_SETFD, FD_CLOEXEC) != -1;
#endif
  }

  UniqueFd read_end_;
  UniqueFd write_end_;          // empty for an eventfd
  pid_t process_ = ::getpid();  // whose the level is
};

/// A mutex of the system.
class Mutex {
 public:
  Mutex() noexcept = default;
  Mutex(const Mutex&) = delete;
  Mutex& operator=(const Mutex&) = delete;
  void lock() noexcept { ::pthread_mutex_lock(&mutex_); }
  void unlock() noexcept { ::pthread_mutex_unlock(&mutex_); }

 private:
  pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

/// Blocks every signal in this thread while it lives: threads made meanwhile inherit that.
class BlockAllSignals {
 public:
  BlockAllSignals() noexcept {
    sigset_t all;
    ::sigfillset(&all);
    ::pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  BlockAllSignals(const BlockAllSignals&) = delete;
  BlockAllSignals& operator=(const BlockAllSignals&) = delete;
  ~BlockAllSignals() { ::pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_{};
};

}  // namespace lastcall::detail

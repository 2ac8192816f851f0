// Whole lines on a descriptor that may be a full pipe, a stopped terminal or closed.
//
// Somebody else's descriptor must not be made non-blocking: O_NONBLOCK belongs to the open file, which
// stderr shares with the shell and with every other process on it. So each kind of file is asked in its
// own way for a write that doesn't wait:
//   sockets            MSG_DONTWAIT
//   pipes              pwritev2() with RWF_NOWAIT where the kernel has it for pipes (Linux 6.5)
//   pipes, terminals   the same file opened anew through /proc/self/fd, non-blocking, for one write
//   all others         poll(2), then write(2): no more than PIPE_BUF bytes, which a pipe that polls
//                      writable takes without waiting, unless another writer is quicker
// Opening anew fails if the pipe belongs to another user; then the last way is left.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/config.hpp>
#include <lastcall/detail/thread_cancellation.hpp>

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <climits>
#include <csignal>
#include <cstddef>
#include <string>
#include <string_view>

namespace lastcall::detail {

#if defined(PIPE_BUF)
inline constexpr std::size_t atomic_write = PIPE_BUF;
#else
inline constexpr std::size_t atomic_write = 512;  // _POSIX_PIPE_BUF
#endif

/// While it lives, a write to a pipe without a reader fails with EPIPE and nothing else, and one to a
/// terminal from a background job (stty tostop) goes through instead of stopping the process.
class QuietWrites {
 public:
  QuietWrites() noexcept {
    sigset_t ours;
    sigemptyset(&ours);
    sigaddset(&ours, SIGPIPE);
    sigaddset(&ours, SIGTTOU);
    ::pthread_sigmask(SIG_BLOCK, &ours, &before_);
    // Only now, with the signals blocked. NOLINTNEXTLINE(cppcoreguidelines-prefer-member-initializer)
    was_pending_ = is_pending();
  }
  QuietWrites(const QuietWrites&) = delete;
  QuietWrites& operator=(const QuietWrites&) = delete;
  ~QuietWrites() {
    const int saved = errno;
    if (!was_pending_ && is_pending()) {
      sigset_t pipe;
      sigemptyset(&pipe);
      sigaddset(&pipe, SIGPIPE);
      int taken = 0;
      ::sigwait(&pipe, &taken);  // it is pending for this thread: returns at once
    }
    ::pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    errno = saved;
  }

 private:
  static bool is_pending() noexcept {
    sigset_t pending;
    sigemptyset(&pending);
    ::sigpending(&pending);
    return sigismember(&pending, SIGPIPE) == 1;
  }

  sigset_t before_{};
  bool was_pending_ = false;
};

constexpr bool would_block(int error) noexcept {
#if EAGAIN != EWOULDBLOCK
  if (error == EWOULDBLOCK) return true;
#endif
  return error == EAGAIN;
}

// One attempt: how much was taken, or -1 with errno. EAGAIN: it would have had to wait.
inline ssize_t write_if_writable(int fd, const char* data, std::size_t size) noexcept {
  pollfd entry{fd, POLLOUT, 0};
  const int ready = ::poll(&entry, 1, 0);
  if (ready < 0) return -1;
  if (ready == 0) {
    errno = EAGAIN;
    return -1;
  }
  return ::write(fd, data, std::min(size, atomic_write));
}

inline ssize_t write_to_reopened(int fd, const char* data, std::size_t size) noexcept {
#if LASTCALL_LINUX
  char path[32];
  BoundedText name(path, sizeof path - 1);
  path[name.add("/proc/self/fd/").add_number(fd).length()] = '\0';
  const int again = ::open(path, O_WRONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
  if (again >= 0) {
    const ssize_t taken = ::write(again, data, size);
    const int error = errno;
    ::close(again);
    errno = error;
    return taken;
  }
#endif
  return write_if_writable(fd, data, size);
}

inline ssize_t write_without_waiting(int fd, const char* data, std::size_t size) noexcept {
  struct stat about {};
  if (::fstat(fd, &about) != 0) return -1;
  const int flags = ::fcntl(fd, F_GETFL);
  if (S_ISREG(about.st_mode) || (flags >= 0 && (flags & O_NONBLOCK) != 0)) {
    return ::write(fd, data, size);
  }
  if (S_ISSOCK(about.st_mode)) {
#if defined(MSG_NOSIGNAL)
    return ::send(fd, data, size, MSG_DONTWAIT | MSG_NOSIGNAL);
#else
    return ::send(fd, data, size, MSG_DONTWAIT);
#endif
  }
  if (S_ISFIFO(about.st_mode)) {
#if LASTCALL_LINUX && defined(RWF_NOWAIT)
    iovec part{const_cast<char*>(data), size};
    const ssize_t taken = ::pwritev2(fd, &part, 1, -1, RWF_NOWAIT);
    if (taken >= 0 || errno == EAGAIN || errno == EINTR || errno == EPIPE) return taken;
#endif
    return write_to_reopened(fd, data, size);
  }
  if (::isatty(fd) == 1) return write_to_reopened(fd, data, size);
  return write_if_writable(fd, data, size);
}

/// Writes `size` bytes, with one write(2) if the file takes them at once, and gives up after `budget`.
/// Returns how many went out. Async-signal-safe, raises no SIGPIPE, keeps errno.
inline std::size_t write_bounded(int fd, const char* data, std::size_t size,
                                 Clock::duration budget) noexcept {
  const NoThreadCancellation whole;
  const int saved = errno;
  const QuietWrites quiet;
  const Clock::time_point end = deadline_after(budget);
  std::size_t done = 0;
  while (done < size) {
    const ssize_t taken = write_without_waiting(fd, data + done, size - done);
    if (taken > 0) {
      done += static_cast<std::size_t>(taken);
      continue;
    }
    if (taken < 0 && errno == EINTR) continue;
    if (taken == 0 || !would_block(errno)) break;
    const Clock::time_point now = Clock::now();
    if (now >= end) break;
    pollfd entry{fd, POLLOUT, 0};
    const int wait = std::min(poll_timeout(now, end), 10);
    // Ready, and yet it took nothing: another writer was quicker, or it wants more room than there is.
    if (::poll(&entry, 1, wait) > 0) ::poll(nullptr, 0, 1);
  }
  errno = saved;
  return done;
}

/// Writes lines and, when nobody reads them, drops them instead of hanging. The first call that finds
/// no room waits for `patience`; the ones after it don't wait at all until one gets through, and then a
/// notice says how many are missing. Not thread-safe: its owner has a lock.
class LineWriter {
 public:
  using Notice = std::string (*)(std::size_t lost);

  LineWriter(int fd, Notice notice,
             Clock::duration patience = std::chrono::milliseconds(200)) noexcept
      : fd_(fd), notice_(notice), own_patience_(patience), patience_(patience) {}

  int fd() const noexcept { return fd_; }

  /// Its owner may take `most` for each call, and has other things to do in it, the processor to wait for too.
  void share_time_limit(Clock::duration most) noexcept {
    patience_ = std::min(own_patience_, most / 5 * 2);
  }

  /// `lines`: whole ones, each with its newline. One write(2) takes as many of them as a pipe accepts
  /// in one piece.
  void write(std::string_view lines) {
    give_up_ = deadline_after(patience_);
    while (!lines.empty()) {
      std::size_t size = lines.find('\n') + 1;
      for (std::size_t next = size; next != 0 && next <= atomic_write;
           next = lines.find('\n', next) + 1) {
        size = next;
        if (size == lines.size()) break;
      }
      if (size == 0) size = lines.size();
      write_piece(lines.substr(0, size));
      lines.remove_prefix(size);
    }
  }

  /// Something that isn't a line, such as the countdown: nobody misses it if it is lost.
  void draw(std::string_view text) {
    give_up_ = deadline_after(patience_);
    if (lost_ == 0) send(text);
  }

 private:
  void write_piece(std::string_view piece) {
    if (lost_ != 0) {
      std::string notice = torn_ ? "\n" : "";
      notice += notice_(lost_);
      const std::size_t sent = send(notice);
      if (sent < notice.size()) {
        torn_ = torn_ || sent != 0;
        lost_ += lines_in(piece);
        return;
      }
      lost_ = 0;
      torn_ = false;
    }
    const std::size_t sent = send(piece);
    if (sent == piece.size()) return;
    lost_ += lines_in(piece.substr(sent));
    torn_ = sent != 0 && piece[sent - 1] != '\n';
  }
  std::size_t send(std::string_view text) {
    const Clock::duration budget = stuck_ ? Clock::duration::zero() : give_up_ - Clock::now();
    const std::size_t sent = write_bounded(fd_, text.data(), text.size(), budget);
    stuck_ = sent < text.size();
    return sent;
  }
  static std::size_t lines_in(std::string_view text) noexcept {
    return static_cast<std::size_t>(std::count(text.begin(), text.end(), '\n'));
  }

  int fd_;
  Notice notice_;
  Clock::duration own_patience_;
  Clock::duration patience_;
  Clock::time_point give_up_{};  // of the call that goes on
  std::size_t lost_ = 0;
  bool stuck_ = false;
  bool torn_ = false;
};

}  // namespace lastcall::detail

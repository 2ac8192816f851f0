// Real processes for tests: forked or executed, with pipes on all three standard descriptors,
// waited for within a bound, and how they ended in words.
//
//     support::Child child = support::Child::run([] { support::say("ready\n"); ...; return 0; });
//     REQUIRE(child.prints("ready\n"));
//     child.send(SIGTERM);
//     const support::Ended ended = child.end();
//     INFO(ended.err);
//     CHECK(ended.how == "exit 0");
//
// A child checks with support::expect(): what didn't hold is on its stderr, and its exit code is
// 70.
#pragma once

#include "threads.hpp"

#include <lastcall/signal_info.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/prctl.h>
#endif

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

namespace support {

inline void write_all(int fd, std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t done = ::write(fd, text.data(), text.size());
    if (done < 0 && errno == EINTR) continue;
    if (done <= 0) return;
    text.remove_prefix(static_cast<std::size_t>(done));
  }
}

/// Straight to standard output, with no buffer in between.
inline void say(std::string_view text) noexcept { write_all(STDOUT_FILENO, text); }

inline int unmet_expectations = 0;

/// A check in a child: says on stderr what didn't hold and where, and goes on.
inline bool expect(bool holds, std::string_view what, int line = __builtin_LINE()) {
  if (holds) return true;
  ++unmet_expectations;
  write_all(STDERR_FILENO,
            "line " + std::to_string(line) + ": not so: " + std::string(what) + "\n");
  return false;
}

/// The same for two values that std::to_string knows.
template <class A, class B>
bool expect_equal(A got, B wanted, std::string_view what, int line = __builtin_LINE()) {
  return expect(
      got == wanted,
      std::string(what) + " is " + std::to_string(got) + " instead of " + std::to_string(wanted),
      line);
}

/// "exit 0", "SIGTERM", or what else waitpid(2) said.
inline std::string in_words(int status) {
  if (WIFEXITED(status)) return "exit " + std::to_string(WEXITSTATUS(status));
  if (WIFSIGNALED(status)) return std::string(lastcall::signal_name(WTERMSIG(status)));
  return "status " + std::to_string(status);
}

/// Leaves a forked child at once: no destructor, no atexit function, nothing flushed twice.
[[noreturn]] inline void leave(int code) { ::_exit(unmet_expectations > 0 ? 70 : code); }

/// Runs `body` (which returns an exit code or nothing) and leaves the process.
template <class Body>
[[noreturn]] void run_and_leave(Body& body) {
  int code = 0;
  try {
    if constexpr (std::is_void_v<std::invoke_result_t<Body&>>) {
      body();
    } else {
      code = body();
    }
  } catch (const std::exception& error) {
    expect(false, std::string("no exception, but: ") + error.what());
  }
  std::fflush(nullptr);
  leave(code);
}

/// How a child ended, and all that it wrote.
struct Ended {
  std::string how;  // "exit 0", "SIGTERM", "killed after 60 s", "exit 124, expectations unmet"
  std::string out;
  std::string err;
};

class Child {
 public:
  /// Forks; the child starts with every disposition the default and nothing blocked, runs `body`
  /// and ends with the code that it returns.
  template <class Body>
  static Child run(Body body) {
    return Child([&] { run_and_leave(body); });
  }

  /// Forks and executes a program, found by PATH. One that was built with this one:
  /// see emulation.hpp.
  static Child exec(std::vector<std::string> words) {
    return Child([&] {
      std::vector<char*> argv;
      for (std::string& word : words) argv.push_back(word.data());
      argv.push_back(nullptr);
      ::execvp(argv[0], argv.data());
      ::_exit(127);
    });
  }

  Child(Child&& other) noexcept
      : id_(std::exchange(other.id_, -1)),
        status_(other.status_),
        input_(std::exchange(other.input_, -1)),
        streams_{std::move(other.streams_[0]), std::move(other.streams_[1])} {}
  Child& operator=(Child&&) = delete;

  /// Kills it if it is still there.
  ~Child() {
    if (id_ > 0) {
      ::kill(id_, SIGKILL);
      ::waitpid(id_, nullptr, 0);
    }
    close_input();
  }

  /// Its process id; -1 once it has ended.
  pid_t id() const { return id_; }

  bool send(int signal) const { return id_ > 0 && ::kill(id_, signal) == 0; }

  /// Writes to its standard input.
  void tell(std::string_view text) const { write_all(input_, text); }
  void close_input() {
    if (input_ >= 0) ::close(std::exchange(input_, -1));
  }

  /// Waits until it has printed `text`; false if it ends, or `limit` passes, without it.
  bool prints(std::string_view text, std::chrono::milliseconds limit = patience) {
    const auto until = std::chrono::steady_clock::now() + limit;
    while (streams_[0].text.find(text) == std::string::npos) {
      if (!listen(until)) return streams_[0].text.find(text) != std::string::npos;
    }
    return true;
  }
  /// What it has printed as far as anybody has listened.
  const std::string& out() const { return streams_[0].text; }
  const std::string& err() const { return streams_[1].text; }

  /// Waits for its end, reading what it writes meanwhile. Kills it after `limit`.
  Ended end(std::chrono::milliseconds limit = patience) {
    const auto until = std::chrono::steady_clock::now() + limit;
    bool in_time = true;
    // A grandchild may hold the streams open longer than the child lives: so both are looked at.
    while (id_ > 0 && !reap()) {
      in_time = std::chrono::steady_clock::now() < until;
      if (!in_time) {
        ::kill(id_, SIGKILL);
        while (!reap()) ::usleep(1000);
        break;
      }
      listen(std::min(until, std::chrono::steady_clock::now() + 5ms));
    }
    while (streams_[0].read() || streams_[1].read()) {
    }
    Ended ended{in_words(status_), streams_[0].text, streams_[1].text};
    if (!in_time) ended.how = "killed after " + std::to_string(limit.count() / 1000) + " s";
    // Also of a child that run() or a signal has ended, with a code of its own.
    if (ended.err.find(": not so: ") != std::string::npos) ended.how += ", expectations unmet";
    return ended;
  }

 private:
  struct Stream {
    int fd = -1;
    std::string text;

    Stream() = default;
    Stream(Stream&& other) noexcept
        : fd(std::exchange(other.fd, -1)), text(std::move(other.text)) {}
    Stream& operator=(Stream&&) = delete;
    ~Stream() {
      if (fd >= 0) ::close(fd);
    }
    /// True if there was something.
    bool read() {
      char buffer[4096];
      for (;;) {
        if (fd < 0) return false;
        const ssize_t got = ::read(fd, buffer, sizeof buffer);
        if (got > 0) {
          text.append(buffer, static_cast<std::size_t>(got));
          return true;
        }
        if (got < 0 && errno == EINTR) continue;
        if (got == 0 || errno != EAGAIN) ::close(std::exchange(fd, -1));
        return false;
      }
    }
  };

  template <class Start>
  explicit Child(Start start) {
    int pipes[3][2];
    for (auto& ends : pipes) {
      if (::pipe(ends) != 0) std::abort();
      for (const int fd : ends) {
        // Away from the standard descriptors, in case one of those is closed.
        ::fcntl(fd, F_SETFD, FD_CLOEXEC);
      }
    }
    std::fflush(nullptr);
    id_ = ::fork();
    if (id_ < 0) std::abort();
    if (id_ == 0) {
#if defined(__linux__)
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // a test runner that is killed leaves nobody behind
#endif
      ::dup2(pipes[0][0], STDIN_FILENO);
      ::dup2(pipes[1][1], STDOUT_FILENO);
      ::dup2(pipes[2][1], STDERR_FILENO);
      for (auto& ends : pipes) {
        for (const int fd : ends) {
          if (fd > STDERR_FILENO) ::close(fd);
        }
      }
      reset_signals();
      unmet_expectations = 0;
      start();
      ::_exit(126);
    }
    ::close(pipes[0][0]);
    input_ = pipes[0][1];
    for (const int stream : {1, 2}) {
      ::close(pipes[stream][1]);
      streams_[stream - 1].fd = pipes[stream][0];
      ::fcntl(pipes[stream][0], F_SETFL, O_NONBLOCK);
    }
  }

  static void reset_signals() {
    struct sigaction by_default {};
    by_default.sa_handler = SIG_DFL;
    for (int number = 1; number < lastcall::detail::signal_limit; ++number) {
      // Sanitizers have handlers of their own for the faults.
      if (number == SIGSEGV || number == SIGBUS || number == SIGFPE || number == SIGILL) continue;
      ::sigaction(number, &by_default, nullptr);
    }
    sigset_t none;
    ::sigemptyset(&none);
    ::sigprocmask(SIG_SETMASK, &none, nullptr);
  }

  bool reap() {
    if (id_ > 0 && ::waitpid(id_, &status_, WNOHANG) == id_) id_ = -1;
    return id_ <= 0;
  }

  /// Reads what comes next; false if nothing can come any more, or nothing came until then.
  bool listen(std::chrono::steady_clock::time_point until) {
    for (;;) {
      pollfd both[] = {{streams_[0].fd, POLLIN, 0}, {streams_[1].fd, POLLIN, 0}};
      const auto left =
          std::chrono::ceil<std::chrono::milliseconds>(until - std::chrono::steady_clock::now());
      if (left.count() <= 0) return false;
      if (both[0].fd < 0 && both[1].fd < 0) {
        std::this_thread::sleep_for(1ms);
        return false;
      }
      if (::poll(both, 2, static_cast<int>(left.count())) > 0) {
        const bool more = streams_[0].read();
        return streams_[1].read() || more || streams_[0].fd >= 0 || streams_[1].fd >= 0;
      }
    }
  }

  pid_t id_ = -1;
  int status_ = 0;
  int input_ = -1;
  Stream streams_[2];
};

/// Runs `body` in a forked child, to its end.
template <class Body>
Ended in_a_process(Body body, std::chrono::milliseconds limit = patience) {
  return Child::run(std::move(body)).end(limit);
}

/// In a child of a test: forks once more, by what is given, and waits. For what a process sees of its own children.
template <class Body>
std::string in_a_grandchild(Body body, pid_t (*fork_by)() = &::fork) {
  const pid_t child = fork_by();
  if (child < 0) return "no fork";
  if (child == 0) {
#if defined(__linux__)
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);  // if it hangs, the test may be killed first
#endif
    unmet_expectations = 0;
    run_and_leave(body);
  }
  int status = 0;
  const bool over = eventually([&] { return ::waitpid(child, &status, WNOHANG) == child; });
  if (!over) {
    ::kill(child, SIGKILL);
    ::waitpid(child, &status, 0);
    return "killed after a minute";
  }
  return in_words(status);
}

}  // namespace support

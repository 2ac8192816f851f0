// A program that closes what isn't its own, as a daemon does that closes all descriptors there are. The library's were
// among them, and the next files of the program get the numbers that are free.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <lastcall/lastcall.hpp>

#include <fcntl.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/types.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

using lastcall::CancellationToken;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::SignalTrap;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::in_a_process;
using support::quiet;
using support::Stopwatch;
using namespace std::chrono_literals;

namespace {

constexpr std::string_view users_data = "user data\n";

void close_all() {
  for (int fd = STDERR_FILENO + 1; fd < 1024; ++fd) ::close(fd);
}

// Of the program's own, each with something in it.
class Files {
 public:
  explicit Files(int count) {
    for (int made = 0; made < count; ++made) {
      std::FILE* const file = std::tmpfile();
      if (!expect(file != nullptr, "a file")) break;
      std::fputs(users_data.data(), file);
      std::fflush(file);
      std::rewind(file);
      files_.push_back(file);
    }
  }
  void expect_untouched() const {
    for (std::FILE* const file : files_) {
      const int fd = ::fileno(file);
      char text[256];
      const ssize_t got = ::pread(fd, text, sizeof text, 0);
      expect(std::string_view(text, got > 0 ? static_cast<std::size_t>(got) : 0) == users_data,
             "what is in number " + std::to_string(fd));
      expect(::lseek(fd, 0, SEEK_CUR) == 0, "nobody has read from it");
    }
  }

 private:
  std::vector<std::FILE*> files_;
};

void do_nothing(int /*number*/) {}

enum class Wish { signal, request };

void expect_end(Wish wish, bool handler_beneath) {
  const Ended ended = in_a_process([=] {
    if (handler_beneath) {
      struct sigaction action {};
      action.sa_handler = &do_nothing;
      ::sigaction(SIGTERM, &action, nullptr);
    }
    const auto grace = support::enough(400ms);
    ShutdownOptions options = quiet(grace);
    options.abort_margin = grace / 4;
    bool released = false;
    {
      ShutdownCoordinator coordinator(options);
      SignalTrap trap{SIGUSR1};
      coordinator.spawn("worker", [](const CancellationToken& token) { token.wait(); });
      coordinator.spawn("held worker", [] { support::hang(); });
      coordinator.on_stop("release", [&] { released = true; });
      std::this_thread::sleep_for(20ms);  // its thread sleeps by then
      close_all();
      const Files files(100);
      std::this_thread::sleep_for(20ms);
      ::raise(SIGUSR1);
      const auto got = trap.try_wait();
      expect(got && got->number == SIGUSR1, "the trap has its signal");
      const Stopwatch watch;
      if (wish == Wish::signal) {
        ::kill(::getpid(), SIGTERM);
      } else {
        coordinator.request_shutdown();
      }
      expect(coordinator.token().wait_for(5s), "it was heard");
      expect(watch.elapsed() < 200ms + support::slack, "and soon");
      const auto report = coordinator.drain();
      expect(watch.elapsed() < grace + 200ms + support::slack, "in time");
      expect(report.outcome == Outcome::overrun, "an overrun");
      expect_equal(report.stragglers.size(), std::size_t{1}, "stragglers");
      expect(released, "the hook has run");
      files.expect_untouched();
      support::leave(0);
    }
  });
  INFO((wish == Wish::signal ? "signal" : "request") << ", " << handler_beneath << "\n"
                                                     << ended.err);
  CHECK(ended.how == "exit 0");
}

}  // namespace

TEST_CASE("a daemon that closes all descriptors ends in time, and its next files are its own") {
  if (support::under_tsan)
    return;  // it takes it for the library's mistake that others close its descriptors
  for (const Wish wish : {Wish::signal, Wish::request}) {
    for (const bool handler_beneath : {false, true}) expect_end(wish, handler_beneath);
  }
}

TEST_CASE("what is others' by then is not closed by the end of a trap and a coordinator") {
  if (support::under_tsan) return;
  const Ended ended = in_a_process([] {
    std::vector<Files> files;
    {
      const ShutdownCoordinator coordinator(quiet());
      const SignalTrap trap{SIGUSR1};
      close_all();
      files.emplace_back(100);
    }
    files.front().expect_untouched();
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("a trap has a number out of the way, or another one where there is none") {
  const Ended ended = in_a_process([] {
    const auto works = [](SignalTrap& trap) {
      ::raise(SIGUSR1);
      return support::is_readable(trap.fd()) && trap.try_wait();
    };
    rlimit limit{};
    ::getrlimit(RLIMIT_NOFILE, &limit);
    const rlim_t before = limit.rlim_cur;
    limit.rlim_cur = 256;
    expect(before >= 256 && ::setrlimit(RLIMIT_NOFILE, &limit) == 0, "a limit of 256");
    {
      SignalTrap trap{SIGUSR1};
      expect(trap.fd() >= 256 - 64 && works(trap), "one of the last 64");
    }
    for (int taken = 256 - 64; taken < 256; ++taken) ::dup2(STDERR_FILENO, taken);
    {
      SignalTrap trap{SIGUSR1};
      expect(trap.fd() > STDERR_FILENO && trap.fd() < 256 - 64 && works(trap), "they are taken");
    }
    limit.rlim_cur = before;
    ::setrlimit(RLIMIT_NOFILE, &limit);
    {
      // Whatever the limit is, it is one that select(2) knows.
      SignalTrap trap{SIGUSR1};
      expect(trap.fd() < FD_SETSIZE && works(trap), "with many to be had");
    }
    for (int taken = 256 - 64; taken < 256; ++taken) ::close(taken);
    limit.rlim_cur = 20;
    expect(::setrlimit(RLIMIT_NOFILE, &limit) == 0, "a limit of 20");
    SignalTrap trap{SIGUSR1};
    expect(trap.fd() > STDERR_FILENO && trap.fd() < 20 && works(trap), "with few");
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

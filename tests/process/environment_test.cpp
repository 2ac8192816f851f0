// Where a service finds itself: process 1 of a container, under nohup and setsid, in the background of a
// shell, a daemon that has forked twice. Each with the real thing, where the system lets us.
#include "support/catch.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <fcntl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using support::Child;
using support::Ended;

bool contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

ShutdownOptions quick() {
  ShutdownOptions options;
  options.grace_period = support::enough(600ms);
  options.abort_margin = support::enough(100ms);
  options.repeat_window = 1ms;
  return options;
}

// One worker; it leaves when it is told, or never.
[[noreturn]] void serve(ShutdownOptions options, bool leaves = true) {
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn(leaves ? "worker" : "held worker", [leaves](CancellationToken token) {
    token.wait();
    while (!leaves) ::pause();
  });
  lifetime.on_stop("hook", [] { support::say("the hook has run\n"); });
  support::say("service is up\n");
  lifetime.run();
}

// This program, executed by nohup, setsid or a shell: LASTCALL_TEST_SERVICE is set, and it is the service.
const bool is_service = [] {
  if (std::getenv("LASTCALL_TEST_SERVICE") == nullptr) return false;
  ShutdownOptions options = quick();
  options.grace_period = 60s;
  options.signals = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
  serve(std::move(options));
}();

// This program, which is the service here, by way of another one.
Child executed(std::vector<std::string> words) {
  for (std::string& word : support::this_program()) words.push_back(std::move(word));
  ::setenv("LASTCALL_TEST_SERVICE", "1", 1);
  Child child = Child::exec(std::move(words));
  ::unsetenv("LASTCALL_TEST_SERVICE");
  return child;
}

// Runs `body` as process 1 of a new pid namespace, with a /proc of its own, and lets `provoke` act on it
// from outside when it is up. How process 1 ended, in words; empty if that isn't allowed here.
template <class Body, class Provoke>
std::pair<std::string, std::string> as_process_1(Body body, Provoke provoke) {
  const Ended ended = support::in_a_process([&] {
    if (::unshare(CLONE_NEWPID | CLONE_NEWNS) != 0) return 3;
    int up[2];
    if (::pipe(up) != 0) return 4;
    const pid_t first = ::fork();
    if (first < 0) return 3;
    if (first == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
      ::mount("proc", "/proc", "proc", 0, nullptr);
      support::expect(::getpid() == 1, "this is process 1");
      body(up[1]);
      ::_exit(99);
    }
    ::close(up[1]);
    char byte = 0;
    static_cast<void>(::read(up[0], &byte, 1) < 0);
    provoke(first);
    int status = 0;
    ::waitpid(first, &status, 0);
    support::say("process 1: " + support::in_words(status) + "\n");
    return 0;
  });
  if (ended.how == "exit 3") return {};
  const std::size_t at = ended.out.rfind("process 1: ");
  std::string how = at == std::string::npos ? ended.how : ended.out.substr(at + 11);
  if (!how.empty() && how.back() == '\n') how.pop_back();
  return {how, ended.out + ended.err};
}

// As the body of process 1.
[[noreturn]] void serve_as_1(int up, ShutdownOptions options, bool leaves) {
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn(leaves ? "worker" : "held worker", [leaves](CancellationToken token) {
    token.wait();
    while (!leaves) ::pause();
  });
  support::write_all(up, "x");
  lifetime.run();
}

void terminate(pid_t process) { ::kill(process, SIGTERM); }

}  // namespace

TEST_CASE("process 1 of a container drains on SIGTERM and exits 0") {
  const auto [how, output] = as_process_1([](int up) { serve_as_1(up, quick(), true); }, terminate);
  if (how.empty()) {
    WARN("no new pid namespace is to be had here");
    return;
  }
  INFO(output);
  CHECK(how == "exit 0");
  CHECK(contains(output, "clean"));
}

TEST_CASE("process 1 with a hung worker is gone in time, which is named with what it waits in") {
  const auto [how, output] =
      as_process_1([](int up) { serve_as_1(up, quick(), false); }, terminate);
  if (how.empty()) return;
  INFO(output);
  CHECK(how == "exit 124");
  CHECK(contains(output, "held worker"));
#if !defined(LASTCALL_PORTABLE)
  CHECK(support::tells_pause(output));
#endif
}

TEST_CASE("process 1 can't die of a signal: with exit_by_signal it exits with 128 + n") {
  for (const bool leaves : {true, false}) {
    const auto [how, output] = as_process_1(
        [leaves](int up) {
          ShutdownOptions options = quick();
          options.exit_by_signal = true;
          serve_as_1(up, std::move(options), leaves);
        },
        terminate);
    if (how.empty()) return;
    INFO(output);
    CHECK(how == "exit 143");
  }
}

TEST_CASE("process 1 heeds a third wish") {
  const auto [how, output] = as_process_1(
      [](int up) {
        ShutdownOptions options = quick();
        options.grace_period = 120s;
        options.abort_margin = 50s;
        serve_as_1(up, std::move(options), false);
      },
      [](pid_t process) {
        for (int wish = 0; wish < 3; ++wish) {
          ::kill(process, SIGINT);
          ::usleep(100'000);
        }
      });
  if (how.empty()) return;
  INFO(output);
  CHECK(how == "exit 130");
  CHECK(contains(output, "forced by a third wish"));
}

TEST_CASE("who stops a container from outside is not said to be the kernel") {
  const auto [how, output] = as_process_1([](int up) { serve_as_1(up, quick(), true); }, terminate);
  if (how.empty()) return;
  INFO(output);
  CHECK(contains(output, "SIGTERM from outside this pid namespace"));
}

TEST_CASE("process 1 names a sender of its own namespace") {
  const auto [how, output] = as_process_1(
      [](int up) {
        ShutdownCoordinator lifetime(quick());
        lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
        support::write_all(up, "x");
        if (::fork() == 0) {
          ::kill(1, SIGTERM);  // the kernel delivers it, since there is a handler
          ::_exit(0);
        }
        lifetime.run();
      },
      [](pid_t) {});
  if (how.empty()) return;
  INFO(output);
  CHECK(how == "exit 0");
  CHECK(contains(output, "SIGTERM from pid "));
}

TEST_CASE("without /proc who hangs is named all the same, with place and age") {
  const Ended ended = support::in_a_process([] {
    if (::unshare(CLONE_NEWNS) != 0) support::leave(3);
    ::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (::mount("nothing", "/proc", "tmpfs", MS_RDONLY, nullptr) != 0) support::leave(3);
    ShutdownCoordinator lifetime(quick());
    const lastcall::WaitGroup::Guard unnamed = lifetime.enter();
    lifetime.spawn("held worker", [](CancellationToken token) {
      token.wait();
      for (;;) ::pause();
    });
    lifetime.request_shutdown();
    lifetime.run();
  });
  if (ended.how == "exit 3") {
    WARN("no mount namespace of one's own is to be had here");
    return;
  }
  INFO(ended.err);
  CHECK(ended.how == "exit 124");
  CHECK(contains(ended.err, "service/held worker: entered at process/environment_test.cpp:"));
  CHECK(contains(ended.err, "service/1 unnamed"));
}

TEST_CASE("under nohup SIGHUP stays ignored, and SIGTERM drains") {
  Child service = executed({"nohup"});
  REQUIRE(service.prints("service is up"));
  CHECK(service.send(SIGHUP));
  CHECK(service.send(SIGTERM));
  const Ended ended = service.end();
  INFO(ended.out + ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.err, "announced: SIGTERM"));
  CHECK_FALSE(contains(ended.err, "SIGHUP"));
  CHECK(contains(ended.out, "the hook has run"));
}

TEST_CASE("without nohup that SIGHUP counts") {
  Child service = executed({});
  REQUIRE(service.prints("service is up"));
  CHECK(service.send(SIGHUP));
  const Ended ended = service.end();
  INFO(ended.out + ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.err, "announced: SIGHUP"));
}

TEST_CASE("with no terminal and in a session of its own (setsid) it drains") {
  Child service = executed({"setsid", "--wait"});
  REQUIRE(service.prints("service is up"));
  CHECK(service.send(SIGTERM));
  const Ended ended = service.end();
  INFO(ended.out + ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.err, "announced: SIGTERM"));
}

TEST_CASE("a background job of a script ignores the SIGINT and SIGQUIT that are typed for others") {
  Child shell = executed({"sh", "-c", "\"$0\" \"$@\" & echo job=$!; wait $!"});
  REQUIRE(shell.prints("service is up"));
  const std::size_t at = shell.out().find("job=");
  REQUIRE(at != std::string::npos);
  const auto job = static_cast<pid_t>(std::atoi(shell.out().c_str() + at + 4));
  REQUIRE(job > 1);
  ::kill(job, SIGINT);
  ::kill(job, SIGQUIT);
  ::kill(job, SIGTERM);
  const Ended ended = shell.end();
  INFO(ended.out + ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.err, "announced: SIGTERM"));
  CHECK_FALSE(contains(ended.err, "SIGINT"));
  CHECK_FALSE(contains(ended.err, "SIGQUIT"));
}

TEST_CASE("in the pipeline of a script it drains, and the pipeline's last one sees the end of it") {
  Child shell =
      executed({"sh", "-c", "(echo job=$(exec sh -c 'echo $PPID') >&2; exec \"$0\" \"$@\") | cat"});
  REQUIRE(shell.prints("service is up"));
  const std::size_t at = shell.err().find("job=");
  REQUIRE(at != std::string::npos);
  ::kill(static_cast<pid_t>(std::atoi(shell.err().c_str() + at + 4)), SIGTERM);
  const Ended ended = shell.end();
  INFO(ended.out + ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(contains(ended.out, "the hook has run"));
}

TEST_CASE("a daemon that has forked twice before it makes its coordinator drains") {
  const Ended ended = support::in_a_process([] {
    ::prctl(PR_SET_CHILD_SUBREAPER, 1);  // so that the daemon's end can be waited for
    int up[2];
    if (::pipe(up) != 0) return 1;
    const pid_t first = ::fork();
    if (first == 0) {
      ::setsid();
      if (::fork() != 0) ::_exit(0);
      ::umask(027);
      static_cast<void>(::chdir("/") < 0);
      const int null = ::open("/dev/null", O_RDWR);
      for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(null, fd);
      for (int fd = 3; fd < 256; ++fd) {
        if (fd != up[1]) ::close(fd);
      }
      ShutdownCoordinator lifetime(quick());
      lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
      const pid_t self = ::getpid();
      static_cast<void>(::write(up[1], &self, sizeof self) < 0);
      lifetime.run();
    }
    pid_t daemon = 0;
    support::expect(::read(up[0], &daemon, sizeof daemon) == sizeof daemon, "the daemon is up");
    int status = 0;
    support::expect(::waitpid(first, &status, 0) == first && status == 0, "its parent has gone");
    ::kill(daemon, SIGTERM);
    support::expect(::waitpid(daemon, &status, 0) == daemon, "the daemon has gone");
    support::say(support::in_words(status));
    return 0;
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "exit 0");
}

TEST_CASE(
    "a program that was started without standard descriptors finds none of ours in their place") {
  for (const unsigned closed : {1U, 2U, 4U, 3U, 5U, 6U, 7U}) {
    const Ended ended = support::in_a_process([closed] {
      const int out = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
      for (int fd = 0; fd < 3; ++fd) {
        if ((closed >> static_cast<unsigned>(fd) & 1U) != 0) ::close(fd);
      }
      // A handler beneath costs a descriptor of its own.
      std::signal(SIGHUP, [](int) {});
      ShutdownOptions options = quick();
      options.signals = {SIGTERM, SIGHUP};
      ShutdownCoordinator lifetime(std::move(options));
      lifetime.on_signal(SIGUSR1, [](const lastcall::SignalInfo&) {});
      lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
      bool ours = lifetime.token().fd() <= STDERR_FILENO;
      for (int fd = 0; fd < 3; ++fd) {
        const bool open = ::fcntl(fd, F_GETFD) != -1;
        if ((closed >> static_cast<unsigned>(fd) & 1U) != 0) ours = ours || open;
      }
      support::write_all(out, ours ? "taken\n" : "free\n");
      ::raise(SIGUSR1);
      ::raise(SIGTERM);
      lifetime.run();
    });
    INFO("closed: " << closed);
    CHECK(ended.how == "exit 0");
    CHECK(contains(ended.out, "free\n"));
  }
}

TEST_CASE("if a descriptor can't be moved off the standard ones, none is left open") {
  const Ended ended = support::in_a_process([] {
    const int out = ::fcntl(STDOUT_FILENO, F_DUPFD_CLOEXEC, 10);
    for (int fd = 0; fd < 10; ++fd) ::close(fd);
    for (const rlim_t most : {rlim_t{3}, rlim_t{4}}) {
      rlimit limit{};
      ::getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = most;
      ::setrlimit(RLIMIT_NOFILE, &limit);
      try {
        const lastcall::SignalTrap trap({SIGUSR1});
        support::write_all(out, "made\n");
      } catch (const std::system_error& error) {
        support::write_all(out, error.code().value() == EMFILE ? "EMFILE\n" : "another error\n");
      }
      for (int fd = 0; fd < 10; ++fd) {
        if (::fcntl(fd, F_GETFD) != -1) support::write_all(out, "left open\n");
      }
    }
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "EMFILE\nEMFILE\n");
}

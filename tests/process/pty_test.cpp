// At a real terminal: signals that are typed, go through the line discipline, and reach a whole process
// group; and terminals that don't take what is written to them.
#include "support/catch.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"
#include "support/screen.hpp"

#include <lastcall/lastcall.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/ioctl.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <thread>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using std::chrono::milliseconds;

// A session of its own on a new pseudo-terminal, with `body` as its leader in the foreground.
class Terminal {
 public:
  template <class Body>
  explicit Terminal(Body body) {
    master_ = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (master_ < 0 || ::grantpt(master_) != 0 || ::unlockpt(master_) != 0) std::abort();
    const std::string name = ::ptsname(master_);
    std::fflush(nullptr);
    child_ = ::fork();
    if (child_ < 0) std::abort();
    if (child_ == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::setsid();
      const int slave = ::open(name.c_str(), O_RDWR);
      ::ioctl(slave, TIOCSCTTY, 0);
      for (const int fd : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) ::dup2(slave, fd);
      if (slave > STDERR_FILENO) ::close(slave);
      ::setenv("TERM", "xterm", 1);
      support::unmet_expectations = 0;
      support::run_and_leave(body);
    }
    ::fcntl(master_, F_SETFL, O_NONBLOCK);
  }
  Terminal(const Terminal&) = delete;
  Terminal& operator=(const Terminal&) = delete;
  ~Terminal() {
    if (child_ > 0) {
      ::kill(child_, SIGKILL);
      ::waitpid(child_, nullptr, 0);
    }
    ::close(master_);
  }

  pid_t process() const { return child_; }

  void type(std::string_view keys) const { support::write_all(master_, keys); }

  /// Waits until the screen has shown `text`.
  bool shows(std::string_view text) {
    const auto end = std::chrono::steady_clock::now() + support::patience;
    while (screen_.find(text) == std::string::npos) {
      if (!look(end)) return screen_.find(text) != std::string::npos;
    }
    return true;
  }

  /// How the leader ended, in words. What it writes meanwhile is read, unless it is to be stuck.
  std::string end(bool reading = true) {
    const auto limit = std::chrono::steady_clock::now() + support::patience;
    int status = 0;
    while (::waitpid(child_, &status, WNOHANG) != child_) {
      if (std::chrono::steady_clock::now() > limit) return "still there";
      if (reading) {
        look(std::chrono::steady_clock::now() + 5ms);
      } else {
        std::this_thread::sleep_for(5ms);
      }
    }
    child_ = -1;
    while (reading && look(std::chrono::steady_clock::now())) {
    }
    return support::in_words(status);
  }

  const std::string& screen() const { return screen_; }

 private:
  // Reads what comes next; false if nothing came until then.
  bool look(std::chrono::steady_clock::time_point until) {
    pollfd entry{master_, POLLIN, 0};
    const auto left =
        std::chrono::ceil<milliseconds>(until - std::chrono::steady_clock::now()).count();
    if (::poll(&entry, 1, static_cast<int>(std::max<long long>(left, 0))) <= 0) return false;
    char buffer[4096];
    const ssize_t got = ::read(master_, buffer, sizeof buffer);
    if (got <= 0) {  // EIO: nobody has the other end open
      std::this_thread::sleep_for(1ms);
      return false;
    }
    screen_.append(buffer, static_cast<std::size_t>(got));
    return true;
  }

  int master_ = -1;
  pid_t child_ = -1;
  std::string screen_;
};

constexpr std::string_view ctrl_c = "\x03";

ShutdownOptions patient() {
  ShutdownOptions options;
  options.grace_period = 120s;
  options.abort_margin = 50s;
  return options;
}

// What never ends by itself: only the third wish does.
int hung_service(ShutdownOptions options) {
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.on_stop("held hook", [] {
    for (;;) ::pause();
  });
  lifetime.spawn("held worker", [abort = lifetime.abort_token()](CancellationToken) {
    abort.wait();
    support::say("the worker was told to abort\n");
    for (;;) ::pause();
  });
  support::say("service is up\n");
  lifetime.run();
}

}  // namespace

TEST_CASE("Ctrl-C three times: shuts down, aborts, and is gone") {
  Terminal terminal([] {
    ShutdownOptions options = patient();
    options.repeat_window = 1ms;
    return hung_service(std::move(options));
  });
  REQUIRE(terminal.shows("service is up"));
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("draining"));
  CHECK(terminal.screen().find("to abort") == std::string::npos);
  std::this_thread::sleep_for(50ms);
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("the worker was told to abort"));
  std::this_thread::sleep_for(50ms);
  terminal.type(ctrl_c);
  CHECK(terminal.end() == "exit 130");
  INFO(terminal.screen());
  CHECK(terminal.screen().find("forced by a third wish") != std::string::npos);
  CHECK(terminal.screen().find("held worker") != std::string::npos);
  CHECK(terminal.screen().find("held hook") != std::string::npos);
}

TEST_CASE("SIGTERM, then Ctrl-C twice: the first one aborts, the second is the last") {
  Terminal terminal([] {
    ShutdownOptions options = patient();
    options.repeat_window = 1ms;
    return hung_service(std::move(options));
  });
  REQUIRE(terminal.shows("service is up"));
  ::kill(terminal.process(), SIGTERM);
  REQUIRE(terminal.shows("draining"));
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("the worker was told to abort"));
  std::this_thread::sleep_for(50ms);
  terminal.type(ctrl_c);
  CHECK(terminal.end() == "exit 130");
}

TEST_CASE("Ctrl-C pressed twice at once counts once") {
  Terminal terminal([] {
    ShutdownOptions options = patient();
    options.repeat_window = 60s;  // however slow this machine is
    ShutdownCoordinator lifetime(std::move(options));
    lifetime.spawn("worker", [](CancellationToken token) {
      token.wait();
      char byte = 0;
      static_cast<void>(::read(STDIN_FILENO, &byte, 1) < 0);
    });
    support::say("service is up\n");
    lifetime.run();
  });
  REQUIRE(terminal.shows("service is up"));
  terminal.type(ctrl_c);
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("draining"));
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("an echo of the last one"));
  terminal.type("\n");  // and the worker leaves
  CHECK(terminal.end() == "exit 0");
  INFO(terminal.screen());
  CHECK(terminal.screen().find("abort") == std::string::npos);
}

TEST_CASE(
    "a wrapper that passes on the SIGINT which its group got already makes an echo, no abort") {
  Terminal terminal([] {
    const pid_t service = ::fork();
    if (service == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ShutdownOptions options = patient();
      options.repeat_window = 60s;
      ShutdownCoordinator lifetime(std::move(options));
      lifetime.spawn("worker", [](CancellationToken token) {
        token.wait();
        char byte = 0;
        static_cast<void>(::read(STDIN_FILENO, &byte, 1) < 0);
      });
      support::say("service is up\n");
      lifetime.run();
    }
    // As npm, docker and shells do it.
    static pid_t passed_to = 0;
    passed_to = service;
    struct sigaction pass_on {};
    pass_on.sa_handler = [](int number) { ::kill(passed_to, number); };
    pass_on.sa_flags = SA_RESTART;
    ::sigaction(SIGINT, &pass_on, nullptr);
    int status = 0;
    ::waitpid(service, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  });
  REQUIRE(terminal.shows("service is up"));
  terminal.type(ctrl_c);
  REQUIRE(terminal.shows("draining"));
  terminal.type("\n");
  CHECK(terminal.end() == "exit 0");
  INFO(terminal.screen());
  CHECK(terminal.screen().find("abort") == std::string::npos);
}

TEST_CASE("each second one live line counts down, and tears nothing that others print") {
  Terminal terminal([] {
    ::setenv("TERM", "xterm", 1);
    ShutdownOptions options;
    options.grace_period = 3s;
    options.abort_margin = 200ms;
    ShutdownCoordinator lifetime(std::move(options));
    lifetime.spawn("held worker", [](CancellationToken) {
      for (;;) ::pause();
    });
    for (const char* const name : {"printer", "writer"}) {
      lifetime.spawn(name, [name](CancellationToken token) {
        token.wait();
        for (int line = 100; line < 150; ++line) {
          support::say("line " + std::to_string(line) + " of the " + name + "\n");
          std::this_thread::sleep_for(50ms);
        }
      });
    }
    support::say("service is up\n");
    lifetime.run();
  });
  REQUIRE(terminal.shows("service is up"));
  ::kill(terminal.process(), SIGTERM);
  CHECK(terminal.end() == "exit 124");
  const std::vector<std::string> lines = support::drawn(terminal.screen(), 80);
  std::string all;
  for (const std::string& line : lines) all += line + "\n";
  INFO(all);
  const auto count = [&](std::string_view wanted) {
    return std::count(lines.begin(), lines.end(), wanted);
  };
  for (int line = 100; line < 150; ++line) {
    for (const char* const name : {"printer", "writer"}) {
      CHECK(count("line " + std::to_string(line) + " of the " + name) == 1);
    }
  }
  std::size_t live = 0;
  for (const std::string& line : lines) {
    if (line.find(" in flight, ") == std::string::npos) continue;
    ++live;
    CHECK(line.rfind("lastcall: ", 0) == 0);
    CHECK(line.find(" s left: held worker") != std::string::npos);
  }
  CHECK(live >= 1);
  CHECK(live <= 4);
}

TEST_CASE("a terminal that was stopped by Ctrl-S holds nobody up beyond the grace period") {
  Terminal terminal([] {
    ShutdownOptions options;
    options.grace_period = 500ms;
    options.abort_margin = 100ms;
    ShutdownCoordinator lifetime(std::move(options));
    lifetime.spawn("held worker", [](CancellationToken) {
      for (;;) ::pause();
    });
    lifetime.on_stop("printer", [] { std::fputs("into the buffer\n", stdout); });
    support::say("service is up\n");
    lifetime.run();
  });
  REQUIRE(terminal.shows("service is up"));
  terminal.type("\x13");
  std::this_thread::sleep_for(50ms);
  ::kill(terminal.process(), SIGTERM);
  CHECK(terminal.end(false) == "exit 124");
}

TEST_CASE("a job in the background of a terminal that stops its writers is not stopped") {
  Terminal terminal([] {
    termios settings{};
    ::tcgetattr(STDIN_FILENO, &settings);
    settings.c_lflag |= TOSTOP;
    ::tcsetattr(STDIN_FILENO, TCSANOW, &settings);
    int up[2];
    if (::pipe(up) != 0) return 1;
    const pid_t job = ::fork();
    if (job == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      ::setpgid(0, 0);
      ShutdownOptions options;
      options.grace_period = support::enough(500ms);
      options.abort_margin = options.grace_period / 5;
      ShutdownCoordinator lifetime(std::move(options));
      lifetime.spawn("held worker", [](CancellationToken) {
        for (;;) ::pause();
      });
      lifetime.on_stop("printer", [] { std::fputs("from the background\n", stdout); });
      support::write_all(up[1], "x");
      lifetime.run();
    }
    char byte = 0;
    static_cast<void>(::read(up[0], &byte, 1) < 0);
    ::kill(job, SIGTERM);
    int status = 0;
    ::waitpid(job, &status, WUNTRACED);
    support::say(WIFSTOPPED(status) ? "stopped\n" : support::in_words(status) + "\n");
    return 0;
  });
  CHECK(terminal.end() == "exit 0");
  INFO(terminal.screen());
  CHECK(terminal.screen().find("exit 124") != std::string::npos);
  CHECK(terminal.screen().find("from the background") != std::string::npos);
  CHECK(terminal.screen().find("held worker") != std::string::npos);
}

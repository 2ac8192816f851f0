// Runs an example as a person at a terminal would, step by step, and fails when it does not do as
// told:
//
//   drive STEP... -- PROGRAM [ARGUMENT]...
//
//   expect TEXT    wait until the output goes on with TEXT somewhere after the last thing expected
//   signal NAME    send it that signal: HUP, INT, QUIT or TERM
//   pause MS       wait so long
//   exit CODE      the exit code to end with (128 + n for death by signal n); the default is 0
//
// When the steps are done it waits for the end. Each wait lasts 20 s at most. What the program
// writes to either stream is shown. Its standard output is a terminal, so that stdio sends every
// line at once.
#include <fcntl.h>
#include <poll.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
constexpr auto patience = std::chrono::seconds(20);

class Example {
 public:
  explicit Example(char** command) {
    const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
    if (terminal < 0 || ::grantpt(terminal) != 0 || ::unlockpt(terminal) != 0) fail("no terminal");
    const int its_side = ::open(::ptsname(terminal), O_RDWR | O_NOCTTY | O_CLOEXEC);
    termios mode{};
    if (its_side < 0 || ::tcgetattr(its_side, &mode) != 0) fail("no terminal");
    ::cfmakeraw(&mode);  // "\n" stays "\n"
    ::tcsetattr(its_side, TCSANOW, &mode);
    int errors[2];
    if (::pipe(errors) != 0) fail("no pipe");

    pid_ = ::fork();
    if (pid_ < 0) fail("no process");
    if (pid_ == 0) {
      ::dup2(its_side, STDOUT_FILENO);
      ::dup2(errors[1], STDERR_FILENO);
      ::close(errors[0]);
      ::close(errors[1]);
      ::execv(command[0], command);
      std::perror(command[0]);
      ::_exit(127);
    }
    ::close(its_side);
    ::close(errors[1]);
    streams_ = {{terminal, POLLIN, 0}, {errors[0], POLLIN, 0}};
  }

  ~Example() {
    if (pid_ > 0) {
      ::kill(pid_, SIGKILL);
      ::waitpid(pid_, nullptr, 0);
    }
  }
  Example(const Example&) = delete;
  Example& operator=(const Example&) = delete;

  void expect(const std::string& text) {
    const auto give_up = Clock::now() + patience;
    for (;;) {
      const auto at = output_.find(text, seen_);
      if (at != std::string::npos) {
        seen_ = at + text.size();
        return;
      }
      if (!read_more(give_up)) fail("never came: \"" + text + "\"");
    }
  }

  void signal(int number) { ::kill(pid_, number); }

  void exits_with(int code) {
    const auto give_up = Clock::now() + patience;
    while (read_more(give_up)) {
    }
    int status = 0;
    pid_t gone = 0;
    while ((gone = ::waitpid(pid_, &status, WNOHANG)) == 0 && Clock::now() < give_up) {
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    if (gone != pid_) fail("still there");
    pid_ = -1;
    const int got = WIFSIGNALED(status) ? 128 + WTERMSIG(status) : WEXITSTATUS(status);
    if (got != code) fail("exit code " + std::to_string(got) + ", not " + std::to_string(code));
  }

  [[noreturn]] void fail(const std::string& what) {
    std::printf("\ndrive: %s\n", what.c_str());
    std::fflush(stdout);
    if (pid_ > 0) ::kill(pid_, SIGKILL);
    std::_Exit(1);
  }

 private:
  // False when it has closed both streams, or the time is over.
  bool read_more(Clock::time_point give_up) {
    while (streams_[0].fd >= 0 || streams_[1].fd >= 0) {
      const auto left = std::chrono::ceil<std::chrono::milliseconds>(give_up - Clock::now());
      if (left.count() <= 0) return false;
      if (::poll(streams_.data(), streams_.size(), static_cast<int>(left.count())) <= 0) continue;
      bool got_some = false;
      for (pollfd& stream : streams_) {
        if (stream.fd < 0 || stream.revents == 0) continue;
        char buffer[4096];
        const auto got = ::read(stream.fd, buffer, sizeof buffer);
        if (got > 0) {
          output_.append(buffer, static_cast<size_t>(got));
          std::fwrite(buffer, 1, static_cast<size_t>(got), stdout);
          got_some = true;
        } else {
          stream.fd = -1;  // poll() leaves it out from now on
        }
      }
      std::fflush(stdout);
      if (got_some) return true;
    }
    return false;
  }

  pid_t pid_ = -1;
  std::vector<pollfd> streams_;
  std::string output_;
  std::size_t seen_ = 0;
};

int signal_number(std::string_view name) {
  static const std::map<std::string_view, int> known = {
      {"HUP", SIGHUP}, {"INT", SIGINT}, {"QUIT", SIGQUIT}, {"TERM", SIGTERM}};
  const auto at = known.find(name);
  return at == known.end() ? 0 : at->second;
}

}  // namespace

int main(int argc, char** argv) {
  char** const end = argv + argc;
  char** const dashes = std::find(argv + 1, end, std::string_view("--"));
  if (end - dashes < 2 || (dashes - argv) % 2 != 1) {
    std::fputs("usage: drive [expect TEXT|signal NAME|pause MS|exit CODE]... -- PROGRAM...\n",
               stderr);
    return 2;
  }
  Example example(dashes + 1);
  int code = 0;
  for (char** step = argv + 1; step != dashes; step += 2) {
    const std::string_view verb = step[0];
    const std::string value = step[1];
    if (verb == "expect") {
      example.expect(value);
    } else if (verb == "signal" && signal_number(value) != 0) {
      example.signal(signal_number(value));
    } else if (verb == "pause") {
      std::this_thread::sleep_for(std::chrono::milliseconds(std::stoi(value)));
    } else if (verb == "exit") {
      code = std::stoi(value);
    } else {
      example.fail("no such step: " + std::string(verb) + " " + value);
    }
  }
  example.exits_with(code);
}

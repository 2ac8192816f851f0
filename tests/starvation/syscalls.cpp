// Refuses each system call that the library makes, one at a time, with the errors that its manual page
// lists, and interrupts those that can be: a documented error or success; never a hang, a crash, a lost
// signal or something left behind.
//
//     starvation_syscalls [--long] [--only scenario[/call]] [--verbose]
//
// Short: each call with one of its errors, and with EINTR if it can be interrupted. --long: with all.
// How a call is refused is in tracer.hpp. Where ptrace(2) is not to be had it says so and exits with 77.
#include "starvation/tracer.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::SignalTrap;
using starvation::toggle_injection;
using support::expect;

constexpr int code_error = 3;  // a documented error, and nothing has changed

// ---- What a call may be refused with: the manual pages' lists, less what speaks of wrong arguments that
// ---- are constants in the library (EINVAL stays, for what kernels and filters make of it).

struct CallErrors {
  long call;
  const char* name;
  std::vector<int> errors;
  bool made = false;
};

const std::vector<CallErrors>& call_errors() {
  static const std::vector<CallErrors> all = {
      {SYS_pipe2, "pipe2", {EMFILE, ENFILE, EINVAL, EFAULT}},
      {SYS_eventfd2, "eventfd2", {EMFILE, ENFILE, ENODEV, ENOMEM, EINVAL}},
      // (Not EINVAL: that means that the descriptor is somebody else's by now, and isn't closed.)
      {SYS_signalfd4, "signalfd4", {EMFILE, ENFILE, ENODEV, ENOMEM, ENOSYS}},
      {SYS_clone3, "clone3", {EAGAIN, ENOMEM, EPERM, ENOSPC, EUSERS, EINVAL, ENOSYS}},
      {SYS_clone, "clone", {EAGAIN, ENOMEM, EPERM, EINVAL}},
      {SYS_rt_sigaction, "rt_sigaction", {EINVAL, EFAULT}},
      {SYS_poll, "poll", {EINTR, ENOMEM, EINVAL, EFAULT}},
      {SYS_ppoll, "ppoll", {EINTR, ENOMEM, EINVAL, EFAULT}},
      {SYS_write, "write", {EINTR, EAGAIN, EIO, ENOSPC, EPIPE, EBADF, EINVAL, EFAULT, EPERM}},
      {SYS_read, "read", {EINTR, EAGAIN, EIO, EBADF, EINVAL, EFAULT, EISDIR}},
      {SYS_mmap, "mmap", {ENOMEM, EAGAIN, EPERM, EACCES, EINVAL, ENODEV}},
      {SYS_mprotect, "mprotect", {ENOMEM, EACCES, EINVAL}},
      {SYS_futex, "futex", {EINTR, EAGAIN, EINVAL, EFAULT, ENOSYS, EPERM, ENOMEM}},
      {SYS_membarrier, "membarrier", {ENOSYS, EPERM, EINVAL, ENOMEM}},
      {SYS_openat, "openat", {EINTR, EMFILE, ENFILE, ENOENT, EACCES, ENOMEM, ELOOP}},
      {SYS_close, "close", {EINTR, EIO, EBADF}, true},
      {SYS_fcntl, "fcntl", {EINTR, EBADF, EACCES, EINVAL, EMFILE}},
      {SYS_prlimit64, "prlimit64", {EFAULT, EINVAL, EPERM}},
      {SYS_prctl, "prctl", {EINVAL, EPERM, EFAULT}},
      {SYS_nanosleep, "nanosleep", {EINTR, EINVAL, EFAULT}},
      {SYS_clock_nanosleep, "clock_nanosleep", {EINTR, EINVAL, ENOTSUP}},
      {SYS_kill, "kill", {EPERM, EINVAL, ESRCH}},
      {SYS_tgkill, "tgkill", {EAGAIN, EPERM, ESRCH, EINVAL}},
      {SYS_rt_tgsigqueueinfo, "rt_tgsigqueueinfo", {EAGAIN, EPERM, ESRCH, EINVAL}},
      {SYS_rt_sigpending, "rt_sigpending", {EFAULT}},
      {SYS_rt_sigtimedwait, "rt_sigtimedwait", {EINTR, EAGAIN, EINVAL}},
      {SYS_getdents64, "getdents64", {ENOENT, EBADF, EINVAL}},
      {SYS_newfstatat, "newfstatat", {ENOMEM, ENOENT, EACCES, EBADF}},
      {SYS_fstat, "fstat", {ENOMEM, EBADF}},
      {SYS_ioctl, "ioctl", {ENOTTY, EBADF, EINVAL}},
      {SYS_getsockopt, "getsockopt", {ENOTSOCK, EBADF, ENOPROTOOPT, ENOMEM}},
      {SYS_accept4,
       "accept4",
       {EINTR, EAGAIN, ECONNABORTED, EMFILE, ENFILE, ENOBUFS, ENOMEM, EPERM, EPROTO, EINVAL}},
      {SYS_process_vm_readv, "process_vm_readv", {EPERM, ESRCH, ENOMEM, EFAULT, EINVAL}},
      {SYS_sched_getaffinity, "sched_getaffinity", {EINVAL, EFAULT, ESRCH}},
      {SYS_readlink, "readlink", {ENOENT, EACCES, EINVAL}},
  };
  return all;
}

// What is not refused, and why: it can't fail, or what it is for is out of our hands.
bool is_left_alone(long call) {
  switch (call) {
    case SYS_getpid:
    case SYS_gettid:
    case SYS_getppid:
    case SYS_sched_yield:
    case SYS_exit:
    case SYS_exit_group:
    case SYS_rt_sigreturn:
    case SYS_pause:
    case SYS_restart_syscall: return true;  // no errors
    case SYS_rt_sigprocmask: return true;   // none but for wrong arguments; nobody could go on
    case SYS_brk:                           // says so by its result, for which malloc() has mmap(2)
    case SYS_set_robust_list:
    case SYS_rseq:
    case SYS_madvise:
    case SYS_munmap: return true;  // the C library's, which heeds no error of theirs
    default: return false;
  }
}

// ---- Scenarios: each a process of its own. While the switch is on a call may be refused. They return 0
// ---- for success, code_error for an error of the documented kind.

// A destructor whose sigaction(2) is refused can't put back what was there. Then our handler stays, and
// does what that would have done.
bool handlers_may_stay = false;

// What a refusal must leave as it was.
struct Before {
  std::string dispositions = support::dispositions();
  std::string mask = support::signal_mask();
  int descriptors = support::open_descriptors();

  void expect_same() const {
    if (!handlers_may_stay) {
      expect(support::dispositions() == dispositions, "the dispositions are as before");
    }
    expect(support::signal_mask() == mask, "the signal mask is as before");
    expect(support::eventually([this] { return support::open_descriptors() == descriptors; }, 2s),
           "the descriptors are as before");
  }
};

/// Runs `body` with the switch on. What it throws must name the library and an errno.
template <class Body>
int starved(const Before& before, Body body) {
  int code = 0;
  std::string words;
  toggle_injection();
  try {
    body();
    toggle_injection();
  } catch (const std::system_error& error) {
    toggle_injection();
    words = error.what();
    expect(words.find("lastcall: ") == 0, "the message says whose it is: " + words);
    expect(error.code().value() != 0, "it has an errno: " + words);
    code = code_error;
  } catch (const std::bad_alloc&) {
    toggle_injection();
    words = "no memory";
    code = code_error;
  } catch (const std::exception& error) {
    toggle_injection();
    words = error.what();
    expect(false, "a documented error: " + words);
  }
  before.expect_same();
  if (!words.empty()) support::say(words + "\n");
  return code;
}

// A thread of the scenario's own: that it can be had is not what is asked.
template <class Body>
class Helper {
 public:
  explicit Helper(Body body) {
    toggle_injection();
    thread_ = std::thread(std::move(body));
    toggle_injection();
  }
  ~Helper() {
    if (thread_.joinable()) thread_.join();
  }
  void join() { thread_.join(); }

 private:
  std::thread thread_;
};

// Sends it from outside of what may be refused.
void send(int number) {
  toggle_injection();
  ::kill(::getpid(), number);
  toggle_injection();
}

int trap_scenario() {
  const Before before;
  return starved(before, [] {
    SignalTrap trap{SIGTERM, SIGUSR1, SIGHUP};
    SignalTrap other{SIGTERM};
    send(SIGUSR1);
    send(SIGTERM);
    send(SIGTERM);
    int terminations = 0;
    int users = 0;
    // A repeat may have merged if the handler's write was refused; a kind is never lost.
    while (const auto got = trap.wait_for(users > 0 && terminations > 0 ? 50ms : 8s)) {
      (got->number == SIGTERM ? terminations : users) += 1;
    }
    expect(terminations > 0 && users == 1, "no signal was lost");
    expect(other.wait_for(8s).has_value(), "nor for the other trap");
    CancellationSource source;
    const CancellationToken token = source.token();
    Helper canceller([&source] {
      std::this_thread::sleep_for(2ms);
      source.cancel();
    });
    expect(!trap.wait(token), "the token was heard");
    const lastcall::SignalIgnore ignore(SIGUSR2);
  });
}

int token_scenario() {
  const Before before;
  return starved(before, [] {
    CancellationSource root;
    CancellationSource child(root.token());
    int calls = 0;
    const lastcall::CancellationCallback callback(child.token(), [&calls]() noexcept { ++calls; });
    const int fd = child.token().fd();
    expect(fd >= 0, "there is a descriptor");
    expect(!child.token().wait_for(1ms), "it is not cancelled yet");
    std::atomic<bool> woken{false};
    Helper waiter([&] {
      child.token().wait();
      woken = true;
    });
    toggle_injection();
    std::this_thread::sleep_for(2ms);  // so that it sleeps
    toggle_injection();
    root.cancel();
    waiter.join();
    expect(woken && calls == 1, "everybody was told");
    toggle_injection();
    expect(support::is_readable(fd), "the descriptor is readable");
    toggle_injection();
  });
}

int blocking_scenario() {
  // Its handler does nothing, and stays: made beforehand, so that it doesn't count as a change.
  static_cast<void>(lastcall::detail::interrupt_signal());
  const Before before;
  return starved(before, [] {
    CancellationSource source;
    int ends[2] = {-1, -1};
    toggle_injection();
    const int listener = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(sa_family_t)) != 0 ||
        ::listen(listener, 8) != 0 || ::pipe(ends) != 0) {
      std::abort();
    }
    const int client = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    socklen_t size = sizeof address;
    ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size);
    static_cast<void>(::connect(client, reinterpret_cast<sockaddr*>(&address), size) != 0);
    support::write_all(ends[1], "x");
    toggle_injection();
    struct Close {
      std::vector<int> all;
      ~Close() {
        toggle_injection();
        for (const int fd : all) ::close(fd);
        toggle_injection();
      }
    } fds{{listener, client, ends[0], ends[1]}};
    expect(lastcall::poll(ends[0], POLLIN, source.token(), 8s) == lastcall::Ready::ready,
           "there is something to read");
    expect(lastcall::sleep_for(2ms, source.token()), "it has slept");
    const std::optional<int> accepted = lastcall::accept(listener, source.token());
    expect(accepted.has_value(), "there was a connection");
    if (accepted) fds.all.push_back(*accepted);
    Helper canceller([&source] {
      std::this_thread::sleep_for(2ms);
      source.cancel();
    });
    expect(!lastcall::accept(listener, source.token()), "the token was heard");
  });
}

int deadline_scenario() {
  const Before before;
  return starved(before, [] {
    const auto begin = lastcall::Clock::now();
    CancellationSource root;
    CancellationSource soon(root.token(), 4ms);
    CancellationSource never(root.token(), 1h);
    soon.token().wait();
    expect(lastcall::Clock::now() - begin >= 4ms, "it was not early");
    expect(soon.token().cause().kind() == lastcall::CauseKind::deadline_exceeded, "the cause");
    CancellationSource sooner(never.token(), 2ms);
    sooner.token().wait();
    const lastcall::Ticker ticker(1ms);
    expect(ticker.wait(root.token()) && ticker.wait(root.token()), "it ticks");
  });
}

int task_scenario() {
  const Before before;
  return starved(before, [] {
    std::atomic<int> runs{0};
    lastcall::TaskGroup group;
    bool all = group.spawn("one", [&](const CancellationToken& token) {
      token.wait();
      ++runs;
    });
    all = group.spawn("two", [&] { ++runs; }) && all;
    all = group.spawn("fails", [] { throw std::runtime_error("on purpose"); }) && all;
    bool thrown = false;
    try {
      group.wait();
    } catch (const std::runtime_error& error) {
      thrown = std::string_view(error.what()) == "on purpose";
    }
    expect(all && thrown && runs == 2, "all have run, and the failure came out");
    // Enough of it that threads count by themselves, and the one that waits has to fence them.
    lastcall::WaitGroup work;
    const auto enter_often = [&work] {
      for (int turn = 0; turn < 2000; ++turn) static_cast<void>(work.enter());
    };
    {
      Helper first(enter_often);
      Helper second(enter_often);
    }
    auto guard = work.enter("last");
    Helper leaver([&guard] {
      std::this_thread::sleep_for(2ms);
      guard.release();
    });
    work.close();
    work.wait();
    leaver.join();
  });
}

lastcall::ShutdownOptions options_for_scenarios() {
  lastcall::ShutdownOptions options;
  options.grace_period = 3s;
  options.abort_margin = 300ms;
  options.dump_signal = SIGQUIT;
  return options;
}

// After a SIGHUP.
void drain_after_reload(lastcall::ShutdownCoordinator& service, const std::atomic<int>& reloads) {
  toggle_injection();
  expect(support::eventually([&] { return reloads == 1; }, 8s), "SIGHUP was handled");
  toggle_injection();
  send(SIGTERM);
  const lastcall::ShutdownReport report = service.drain();
  expect(report.exit_code == 0, "the exit code is " + std::to_string(report.exit_code));
  expect(report.cause.signal() != nullptr, "it was the signal");
}

int coordinator_scenario() {
  const Before before;
  std::atomic<int> hooks{0};
  std::atomic<int> reloads{0};
  std::optional<lastcall::ShutdownCoordinator> coordinator;
  const int code = starved(before, [&] {
    lastcall::ShutdownCoordinator service(options_for_scenarios());
    lastcall::Stage& stage = service.stage("storage", 200ms);
    service.on_signal(SIGHUP, [&reloads](const lastcall::SignalInfo&) { ++reloads; });
    service.on_stop("stop", [&hooks] { ++hooks; });
    stage.on_drained("close", [&hooks] { ++hooks; });
    service.spawn("worker", [](const CancellationToken& token) { token.wait(); });
    stage.spawn("flusher", [](const CancellationToken& token) { token.wait(); });
    send(SIGHUP);
    send(SIGQUIT);
    drain_after_reload(service, reloads);
    expect(hooks == 2, "both hooks have run");
  });
  return code;
}

// Above handlers of the program's, whose signals all of its threads block: taken without those handlers.
int beneath_scenario() {
  struct sigaction action {};
  action.sa_handler = [](int) {};
  sigset_t all;
  ::sigfillset(&all);
  for (const int number : {SIGHUP, SIGTERM}) ::sigaction(number, &action, nullptr);
  ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
  const Before before;
  std::atomic<int> reloads{0};
  return starved(before, [&] {
    lastcall::ShutdownCoordinator service(options_for_scenarios());
    service.on_signal(SIGHUP, [&reloads](const lastcall::SignalInfo&) { ++reloads; });
    // The signal thread's way to its first sleep is starved, too. (A sleep of ours could be refused.)
    const auto soon = std::chrono::steady_clock::now() + 20ms;
    while (std::chrono::steady_clock::now() < soon) ::sched_yield();
    send(SIGHUP);
    drain_after_reload(service, reloads);
  });
}

// Ends by run(): the exit code is all that it says.
int run_scenario(bool hangs) {
  const Before before;
  return starved(before, [hangs] {
    lastcall::ShutdownOptions options = options_for_scenarios();
    if (hangs) {
      options.grace_period = 150ms;  // all of which each run takes
      options.abort_margin = 40ms;
    }
    lastcall::ShutdownCoordinator service(options);
    service.on_stop("stop", [] {});
    service.spawn("worker", [hangs](const CancellationToken& token) {
      token.wait();
      if (hangs) support::hang();
    });
    send(SIGTERM);
    service.run();
  });
}

struct Scenario {
  const char* name;
  int (*run)();
  int good_code;
};
const Scenario scenarios[] = {
    {"trap", trap_scenario, 0},
    {"token", token_scenario, 0},
    {"blocking", blocking_scenario, 0},
    {"deadline", deadline_scenario, 0},
    {"tasks", task_scenario, 0},
    {"coordinator", coordinator_scenario, 0},
    {"beneath", beneath_scenario, 0},
    {"run", [] { return run_scenario(false); }, 0},
    {"overrun", [] { return run_scenario(true); }, 124},
};

// ---- One run

struct Outcome {
  starvation::Traced traced;
  std::string output;
};

std::string text_of(int file) {
  std::string text;
  char part[4096];
  ssize_t got = 0;
  ::lseek(file, 0, SEEK_SET);
  while ((got = ::read(file, part, sizeof part)) > 0) {
    text.append(part, static_cast<std::size_t>(got));
  }
  return text;
}

Outcome run(const Scenario& scenario, const starvation::Injection& injection) {
  const int output = ::memfd_create("output", MFD_CLOEXEC);
  int start[2] = {-1, -1};
  if (output < 0 || ::pipe2(start, O_CLOEXEC) != 0) std::abort();
  std::fflush(nullptr);
  const pid_t child = ::fork();
  if (child < 0) std::abort();
  if (child == 0) {
    ::dup2(start[0], STDIN_FILENO);
    ::dup2(output, STDOUT_FILENO);
    ::dup2(output, STDERR_FILENO);
    for (const int fd : {start[0], start[1], output}) ::close(fd);
    struct sigaction by_default {};
    ::sigaction(SIGALRM, &by_default, nullptr);
    char byte = 0;
    while (::read(STDIN_FILENO, &byte, 1) < 0 && errno == EINTR) {
    }
    if (!starvation::let_calls_be_traced(injection.call)) ::_exit(126);
    handlers_may_stay = injection.call == SYS_rt_sigaction;
    support::run_and_leave(scenario.run);
  }
  Outcome outcome;
  outcome.traced =
      starvation::Tracer::follow(child, injection, 12s, [&] { support::write_all(start[1], "x"); });
  outcome.output = text_of(output);
  for (const int fd : {start[0], start[1], output}) ::close(fd);
  return outcome;
}

std::string in_words(const starvation::Traced& traced) {
  using How = starvation::Traced::How;
  switch (traced.how) {
    case How::exited: return "exit " + std::to_string(traced.value);
    case How::killed: return std::string(lastcall::signal_name(traced.value));
    case How::hung: return "hung";
    case How::impossible: break;
  }
  return "could not be traced";
}

bool exited_with(const starvation::Traced& traced, int code) {
  return traced.how == starvation::Traced::How::exited && traced.value == code;
}

const CallErrors* errors_of(long call) {
  for (const CallErrors& known : call_errors()) {
    if (known.call == call) return &known;
  }
  return nullptr;
}

// ---- The table

struct Line {
  std::string scenario;
  std::string call;
  long calls = 0;
  long refused = 0;
  long went_on = 0;
  long errors = 0;
  long problems = 0;
};

struct Options {
  bool all = false;
  bool verbose = false;
  std::string scenario;
  std::string call;
};

// Which errors the nth of so many calls is refused with.
std::vector<int> errors_for(const CallErrors& known, long nth, const Options& options) {
  if (options.all) return known.errors;
  std::vector<int> some;
  if (known.errors.front() == EINTR) some.push_back(EINTR);
  const int turn = known.errors[static_cast<std::size_t>(nth) % known.errors.size()];
  if (some.empty() || some.front() != turn) some.push_back(turn);
  return some;
}

void inject(const Scenario& scenario, const CallErrors& known, Line& line, const Options& options) {
  for (long nth = 1; nth <= line.calls; ++nth) {
    for (const int error : errors_for(known, nth, options)) {
      const Outcome outcome = run(scenario, {known.call, nth, error, known.made});
      if (!outcome.traced.injected) continue;  // this time there were fewer
      ++line.refused;
      const bool good = exited_with(outcome.traced, scenario.good_code);
      const bool documented = exited_with(outcome.traced, code_error);
      ++(good ? line.went_on : documented ? line.errors : line.problems);
      if (good || (documented && !options.verbose)) continue;
      std::printf("%s: %s number %ld refused with %s: %s\n%s\n", scenario.name, known.name, nth,
                  ::strerrorname_np(error), in_words(outcome.traced).c_str(),
                  outcome.output.c_str());
    }
  }
}

int run_all(const Options& options) {
  std::vector<Line> table;
  bool good = true;
  for (const Scenario& scenario : scenarios) {
    if (!options.scenario.empty() && options.scenario != scenario.name) continue;
    const Outcome dry = run(scenario, {});
    if (dry.traced.how == starvation::Traced::How::impossible) {
      std::printf("ptrace(2) is not to be had here: nothing was refused\n");
      return 77;
    }
    if (!exited_with(dry.traced, scenario.good_code)) {
      std::printf("%s, with nothing refused: %s\n%s\n", scenario.name, in_words(dry.traced).c_str(),
                  dry.output.c_str());
      good = false;
      continue;
    }
    for (const auto& [call, count] : dry.traced.calls) {
      if (is_left_alone(call)) continue;
      const CallErrors* const known = errors_of(call);
      if (known == nullptr) {
        std::printf("%s makes system call %ld, which stands in no list here\n", scenario.name,
                    call);
        good = false;
        continue;
      }
      if (!options.call.empty() && options.call != known->name) continue;
      Line line{scenario.name, known->name, count};
      inject(scenario, *known, line, options);
      good = good && line.problems == 0;
      table.push_back(line);
    }
  }
  std::printf("%-12s %-18s %6s %8s %8s %7s %9s\n", "scenario", "call", "made", "refused", "went on",
              "errors", "problems");
  Line sum{"all", ""};
  for (const Line& line : table) {
    std::printf("%-12s %-18s %6ld %8ld %8ld %7ld %9ld\n", line.scenario.c_str(), line.call.c_str(),
                line.calls, line.refused, line.went_on, line.errors, line.problems);
    sum.calls += line.calls;
    sum.refused += line.refused;
    sum.went_on += line.went_on;
    sum.errors += line.errors;
    sum.problems += line.problems;
  }
  std::printf("%-12s %-18s %6ld %8ld %8ld %7ld %9ld\n", "all", "", sum.calls, sum.refused,
              sum.went_on, sum.errors, sum.problems);
  return good && sum.refused > 0 ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  for (int at = 1; at < argc; ++at) {
    const std::string_view word = argv[at];
    if (word == "--long") {
      options.all = true;
    } else if (word == "--verbose") {
      options.verbose = true;
    } else if (word == "--only" && at + 1 < argc) {
      const std::string only = argv[++at];
      options.scenario = only.substr(0, only.find('/'));
      if (only.find('/') != std::string::npos) options.call = only.substr(only.find('/') + 1);
    } else {
      std::fprintf(stderr, "usage: %s [--long] [--only scenario[/call]] [--verbose]\n", argv[0]);
      return 2;
    }
  }
  if (!starvation::can_trace) {
    std::printf("system calls are refused on x86-64 only: nothing was done\n");
    return 77;
  }
  return run_all(options);
}

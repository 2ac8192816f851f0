// The trap in real processes: what is sent by others, forked, executed, raised again, died of.
//
// Each case forks a child that does the work and says by support::expect() what didn't hold.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <sys/resource.h>
#include <sys/types.h>
#include <sys/wait.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#endif

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

using namespace std::chrono_literals;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;
using support::Child;
using support::Ended;
using support::eventually;
using support::expect;
using support::expect_equal;
using support::in_a_grandchild;
using support::in_a_process;
using support::patience;
using support::say;

namespace {

using Handler = void (*)(int);

struct sigaction disposition_of(int number) {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  return now;
}

Handler handler_of(int number) { return disposition_of(number).sa_handler; }
bool is_default(int number) { return handler_of(number) == SIG_DFL; }

void set_handler(int number, Handler handler, int flags = 0) {
  struct sigaction action {};
  action.sa_handler = handler;
  action.sa_flags = flags;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

void set_blocked(int number, bool blocked) {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, number);
  ::pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, nullptr);
}

bool is_blocked(int number) {
  sigset_t now;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &now);
  return ::sigismember(&now, number) == 1;
}

// Handlers of "somebody else".
std::atomic<int> plain_calls{0};
std::atomic<int> info_calls{0};
std::atomic<pid_t> info_sender{0};
void plain_handler(int) { ++plain_calls; }
void info_handler(int, siginfo_t* info, void* context) {
  ++info_calls;
  info_sender = context != nullptr ? info->si_pid : -1;
}
void set_info_handler(int number) {
  struct sigaction action {};
  action.sa_sigaction = info_handler;
  action.sa_flags = SA_SIGINFO;
  ::sigemptyset(&action.sa_mask);
  ::sigaddset(&action.sa_mask, SIGALRM);
  ::sigaction(number, &action, nullptr);
}

// A handler on top of others, as a well-behaved library installs it: it calls what was there.
struct sigaction beneath;
std::atomic<int> top_calls{0};
void top_handler(int number, siginfo_t* info, void* context) {
  ++top_calls;
  if ((beneath.sa_flags & SA_SIGINFO) != 0) {
    beneath.sa_sigaction(number, info, context);
  } else if (beneath.sa_handler != SIG_DFL && beneath.sa_handler != SIG_IGN) {
    beneath.sa_handler(number);
  }
}
void install_on_top(int number) {
  struct sigaction action {};
  action.sa_sigaction = top_handler;
  action.sa_flags = SA_SIGINFO;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, &beneath);
}

// Sends `count` times `number` to its parent (for ever, if that is negative), from a process of its own;
// returns that process. A `pause` between them lets a parent that sleeps get anywhere at all: a thread
// that the kernel wakes for a signal which another thread has taken starts its sleep anew.
pid_t storm(int number, int count, std::chrono::microseconds pause = 0us) {
  const pid_t target = ::getpid();
  const pid_t sender = ::fork();
  if (sender != 0) return sender;
  for (int sent = 0; count < 0 || sent < count; ++sent) {
    if (::kill(target, number) != 0 || ::getppid() != target) break;
    if (pause > 0us) std::this_thread::sleep_for(pause);
  }
  ::_exit(0);
}

void stop(pid_t sender) {
  ::kill(sender, SIGKILL);
  ::waitpid(sender, nullptr, 0);
}

int pending(SignalTrap& trap) {
  int count = 0;
  while (trap.try_wait()) ++count;
  return count;
}

template <class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "nothing was thrown";
}

void check_clean(const Ended& ended) {
  INFO(ended.err);
  INFO(ended.out);
  CHECK(ended.how == "exit 0");
}

}  // namespace

// ---- Restoring and chaining

TEST_CASE("what was there before a trap is back after it, in whatever order traps go") {
  check_clean(in_a_process([] {
    std::array<int, 3> order = {0, 1, 2};
    do {
      set_handler(SIGHUP, SIG_IGN);
      set_handler(SIGUSR1, plain_handler, SA_RESTART);
      set_info_handler(SIGUSR2);
      std::array<std::optional<SignalTrap>, 3> traps;
      for (auto& trap : traps) {
        trap.emplace(std::initializer_list<int>{SIGTERM, SIGHUP, SIGUSR1, SIGUSR2});
      }
      for (const int at : order) {
        for (const int number : {SIGTERM, SIGHUP, SIGUSR1, SIGUSR2}) {
          expect((disposition_of(number).sa_flags & SA_ONSTACK) != 0, "a trap is in place");
        }
        traps[static_cast<std::size_t>(at)].reset();
      }
      expect(is_default(SIGTERM), "SIGTERM is the default again");
      expect(handler_of(SIGHUP) == SIG_IGN, "SIGHUP is ignored again");
      expect(handler_of(SIGUSR1) == plain_handler, "the plain handler is back");
      expect((disposition_of(SIGUSR1).sa_flags & SA_RESTART) != 0, "with its flags");
      expect((disposition_of(SIGUSR1).sa_flags & SA_SIGINFO) == 0, "and no others");
      expect(disposition_of(SIGUSR2).sa_sigaction == info_handler, "the SA_SIGINFO handler is back");
      const struct sigaction now = disposition_of(SIGUSR2);
      expect(::sigismember(&now.sa_mask, SIGALRM) == 1, "with its mask");
    } while (std::next_permutation(order.begin(), order.end()));
  }));
}

TEST_CASE("a previous handler is called on, plain or with siginfo, once for each signal") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    set_info_handler(SIGUSR2);
    SignalTrap one{SIGUSR1, SIGUSR2};
    SignalTrap two{SIGUSR1, SIGUSR2};
    ::raise(SIGUSR1);
    expect_equal(plain_calls.load(), 1, "calls of the plain handler");
    ::kill(::getpid(), SIGUSR2);
    expect_equal(info_calls.load(), 1, "calls of the SA_SIGINFO handler");
    expect_equal(info_sender.load(), ::getpid(), "the sender that it saw");
    expect_equal(pending(one), 2, "signals of the first trap");
    expect_equal(pending(two), 2, "signals of the second trap");
  }));
}

TEST_CASE("a previous one-shot handler is called once, and is spent afterwards") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler, static_cast<int>(SA_RESETHAND));
    {
      SignalTrap trap{SIGUSR1};
      ::raise(SIGUSR1);
      ::raise(SIGUSR1);
      expect_equal(plain_calls.load(), 1, "calls of the one-shot handler");
      expect_equal(pending(trap), 2, "signals of the trap");
    }
    expect(is_default(SIGUSR1), "it was spent, as without a trap");
    set_handler(SIGUSR1, plain_handler, static_cast<int>(SA_RESETHAND));
    { const SignalTrap trap{SIGUSR1}; }
    expect(handler_of(SIGUSR1) == plain_handler, "one that wasn't called is back");
  }));
}

TEST_CASE("a disposition that somebody else has changed since is not touched on the way out") {
  check_clean(in_a_process([] {
    for (const Handler theirs : {Handler{SIG_IGN}, Handler{plain_handler}, Handler{SIG_DFL}}) {
      set_info_handler(SIGUSR1);
      {
        const SignalTrap trap{SIGUSR1, SIGUSR2};
        set_handler(SIGUSR1, theirs);
      }
      expect(handler_of(SIGUSR1) == theirs, "it is still theirs");
      expect(is_default(SIGUSR2), "the other number was restored");
      // And a trap over it puts it back, too.
      {
        SignalTrap trap{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(trap), 1, "signals of the new trap");
      }
      expect(handler_of(SIGUSR1) == theirs, "it is theirs again");
    }
  }));
}

TEST_CASE("a handler on top that calls ours on shares the signal with the trap, before and after it") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    install_on_top(SIGUSR1);
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 1, "calls of the handler on top");
    expect_equal(plain_calls.load(), 1, "calls of the handler beneath");
    expect_equal(pending(*trap), 1, "signals of the trap between them");
    trap.reset();
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 2, "calls of the handler on top");
    expect_equal(plain_calls.load(), 2, "calls of the handler beneath");
    // A new trap goes on top of them all; the chain has no loop, and nobody is called twice.
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    ::raise(SIGUSR1);
    expect_equal(top_calls.load(), 3, "calls of the handler on top");
    expect_equal(plain_calls.load(), 3, "calls of the handler beneath");
    expect_equal(pending(*trap), 1, "signals of the trap on top");
    trap.reset();
    expect(disposition_of(SIGUSR1).sa_sigaction == top_handler, "theirs is back");
  }));
}

TEST_CASE("traps below and above somebody else's handler each get their copy") {
  check_clean(in_a_process([] {
    SignalTrap below{SIGUSR1};
    install_on_top(SIGUSR1);
    {
      SignalTrap above{SIGUSR1};
      ::raise(SIGUSR1);
      expect_equal(pending(below), 1, "signals of the trap below");
      expect_equal(pending(above), 1, "signals of the trap above");
    }
    ::raise(SIGUSR1);
    expect_equal(pending(below), 1, "signals of the trap below");
    expect_equal(top_calls.load(), 2, "calls of the handler between them");
  }));
}

TEST_CASE("ours put back by somebody else, when no trap is left, acts as what was there before") {
  const auto after = [](int number, Handler before) {
    return in_a_process([=] {
      set_handler(number, before);
      {
        const SignalTrap trap{number};
        install_on_top(number);
      }
      ::sigaction(number, &beneath, nullptr);
      expect(!is_default(number) && handler_of(number) != SIG_IGN, "ours is in place");
      expect(lastcall::detail::is_ignored(number) == (before == SIG_IGN), "ignored, or not");
      ::raise(number);
      expect_equal(plain_calls.load(), before == plain_handler ? 1 : 0, "calls of the handler");
      // A trap that comes now joins it, and what it restores is what was there at first.
      {
        SignalTrap trap{number};
        ::raise(number);
        expect_equal(pending(trap), 1, "signals of the new trap");
      }
      expect(handler_of(number) == before, "what was there at first is back");
    });
  };
  CHECK(after(SIGTERM, SIG_DFL).how == "SIGTERM");
  CHECK(after(SIGQUIT, SIG_DFL).how == "SIGQUIT");
  check_clean(after(SIGTERM, SIG_IGN));
  check_clean(after(SIGTERM, plain_handler));
  check_clean(after(SIGURG, SIG_DFL));  // the default is to ignore it
}

TEST_CASE("ours called by somebody else's handler, when no trap is left, doesn't end the process") {
  check_clean(in_a_process([] {
    {
      const SignalTrap trap{SIGTERM};
      install_on_top(SIGTERM);
    }
    ::raise(SIGTERM);
    expect_equal(top_calls.load(), 1, "calls of the handler on top");
    expect(disposition_of(SIGTERM).sa_sigaction == top_handler, "it is in place");
  }));
}

TEST_CASE("a signal that was on its way to the handler when the last trap went is not swallowed") {
  // The handler is called by hand: nobody can hold a real one at that point.
  const Ended ended = in_a_process([] {
    { const SignalTrap trap{SIGTERM}; }
    lastcall::detail::signal_entries[0](SIGTERM, nullptr, nullptr);
    ::pause();
  });
  CHECK(ended.how == "SIGTERM");
}

template <int>
void one_of_many(int) {}

TEST_CASE("being covered again and again costs nothing, being covered by ever new handlers is refused") {
  check_clean(in_a_process([] {
    for (int turn = 0; turn < 100; ++turn) {
      const SignalTrap trap{SIGUSR1};
      set_handler(SIGUSR1, turn % 3 == 0 ? SIG_DFL : turn % 3 == 1 ? SIG_IGN : plain_handler);
    }
    const Handler others[] = {one_of_many<0>, one_of_many<1>, one_of_many<2>, one_of_many<3>,
                              one_of_many<4>, one_of_many<5>, one_of_many<6>, one_of_many<7>,
                              one_of_many<8>, one_of_many<9>};
    std::string refused;
    try {
      for (const Handler other : others) {
        const SignalTrap trap{SIGUSR2};
        set_handler(SIGUSR2, other);
      }
    } catch (const std::logic_error& error) {
      refused = error.what();
    }
    expect(refused.find("SIGUSR2") != std::string::npos, "refused by name, but: " + refused);
    set_handler(SIGUSR2, SIG_DFL);
    SignalTrap trap{SIGUSR2};
    ::raise(SIGUSR2);
    expect_equal(pending(trap), 1, "signals of a trap over the default");
  }));
}

TEST_CASE("errno of the code that is interrupted is kept") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, [](int) { errno = EDOM; });
    SignalTrap trap{SIGUSR1};
    // Also while the pipe is full, and every write in the handler fails.
    for (int turn = 0; turn < 5000; ++turn) {
      errno = 4711;
      ::raise(SIGUSR1);
      if (errno != 4711) expect_equal(errno, 4711, "errno");
    }
    errno = 4711;
    expect(trap.try_wait().has_value(), "there was a signal");
    expect_equal(errno, 4711, "errno after try_wait()");
  }));
}

TEST_CASE("interrupted system calls are restarted") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    SignalTrap trap{SIGUSR1};
    int ends[2];
    expect(::pipe(ends) == 0, "a pipe");
    const pthread_t reader = ::pthread_self();
    std::atomic<pid_t> id{support::thread_id()};
    std::thread other([&] {
      support::let_it_block(id);
      for (int turn = 0; turn < 10; ++turn) {
        ::pthread_kill(reader, SIGUSR1);
        std::this_thread::sleep_for(1ms);
      }
      support::write_all(ends[1], "x");
    });
    char byte = 0;
    expect_equal(::read(ends[0], &byte, 1), 1, "what read(2) returned");
    other.join();
    expect(pending(trap) > 0, "it was interrupted");
  }));
}

TEST_CASE("the handler runs on the alternate stack of a thread that has one") {
  check_clean(in_a_process([] {
    static std::atomic<char*> where{nullptr};
    set_handler(SIGUSR1, [](int) {
      char here = 0;
      where = &here;
    }, SA_ONSTACK);
    SignalTrap trap{SIGUSR1};
    const std::size_t size = 256 * 1024;
    const auto stack = std::make_unique<char[]>(size);
    std::thread other([&] {
      stack_t alternate{};
      alternate.ss_sp = stack.get();
      alternate.ss_size = size;
      expect(::sigaltstack(&alternate, nullptr) == 0, "an alternate stack");
      ::raise(SIGUSR1);
      alternate.ss_flags = SS_DISABLE;
      ::sigaltstack(&alternate, nullptr);
    });
    other.join();
    expect(std::less_equal<>()(stack.get(), where.load()) &&
               std::less<>()(where.load(), stack.get() + size),
           "the handler was on it");
    expect_equal(pending(trap), 1, "signals");
  }));
}

TEST_CASE("the handler is content with the smallest stack that a thread can have") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGUSR1};
    long smallest = ::sysconf(_SC_THREAD_STACK_MIN);
    if (smallest < 16384) smallest = 16384;
    if (support::under_sanitizer) smallest += 256 * 1024;
    const bool made = support::on_stack_of(static_cast<std::size_t>(smallest), [] {
      for (int turn = 0; turn < 5000; ++turn) ::raise(SIGUSR1);
    });
    expect(made, "a thread with a small stack");
    expect(pending(trap) > 1000, "signals came");
  }));
}

// ---- Raising again

namespace {

/// What becomes of a process whose trap got a SIGTERM and goes. `before` runs before the trap is made.
template <class Before, class Inside>
std::string end_after(Before before, Inside inside) {
  const Ended ended = in_a_process([&] {
    before();
    {
      SignalTrap trap{SIGTERM};
      inside(trap);
    }
    say("lives on");
  });
  UNSCOPED_INFO(ended.err);
  return ended.how == "exit 0" ? ended.out : ended.how;
}

}  // namespace

TEST_CASE("a signal that nobody read is raised again when the trap has gone, if SIG_DFL is back") {
  const auto nothing = [] {};
  const auto unread = [](SignalTrap&) { ::raise(SIGTERM); };
  CHECK(end_after(nothing, unread) == "SIGTERM");
  CHECK(end_after(nothing, [](SignalTrap&) {}) == "lives on");
  CHECK(end_after(nothing, [](SignalTrap& trap) {
          ::raise(SIGTERM);
          trap.wait();
        }) == "lives on");
  CHECK(end_after(nothing, [](SignalTrap& trap) {
          ::raise(SIGTERM);
          ::raise(SIGTERM);
          trap.wait();
        }) == "SIGTERM");
  // Not if something else is restored, or somebody else took the number over.
  CHECK(end_after([] { set_handler(SIGTERM, SIG_IGN); }, unread) == "lives on");
  CHECK(end_after([] { set_handler(SIGTERM, plain_handler); }, unread) == "lives on");
  CHECK(end_after(nothing, [](SignalTrap&) {
          ::raise(SIGTERM);
          set_handler(SIGTERM, plain_handler);
        }) == "lives on");
}

TEST_CASE("a signal that another trap got is not raised again") {
  check_clean(in_a_process([] {
    {
      SignalTrap outer{SIGTERM};
      {
        const SignalTrap inner{SIGTERM};
        ::raise(SIGTERM);
      }
      outer.wait();
    }
    // The one that goes last has it unread; the other one had read it.
    {
      const SignalTrap outer{SIGTERM};
      SignalTrap inner{SIGTERM};
      ::raise(SIGTERM);
      inner.wait();
    }
    expect(is_default(SIGTERM), "the default is back");
  }));
}

TEST_CASE("what came before the other trap, or after it, is raised again all the same") {
  CHECK(in_a_process([] {
          const SignalTrap outer{SIGTERM};
          ::raise(SIGTERM);
          SignalTrap inner{SIGTERM};
          ::raise(SIGTERM);
          inner.wait();
        }).how == "SIGTERM");
  CHECK(in_a_process([] {
          const SignalTrap outer{SIGTERM};
          {
            SignalTrap inner{SIGTERM};
            ::raise(SIGTERM);
            inner.wait();
          }
          ::raise(SIGTERM);
        }).how == "SIGTERM");
}

TEST_CASE("a signal that found the pipe full is raised again too") {
  CHECK(in_a_process([] {
          SignalTrap trap{SIGUSR1, SIGTERM};
          for (int turn = 0; turn < 5000; ++turn) ::raise(SIGUSR1);
          ::raise(SIGTERM);
          for (int turn = 0; turn < 5000; ++turn) trap.try_wait();  // SIGTERM comes first
          ::raise(SIGUSR1);
          for (int turn = 0; turn < 5000; ++turn) ::raise(SIGUSR1);
          ::raise(SIGTERM);
          while (trap.wait().number != SIGTERM) {
          }
          for (int turn = 0; turn < 5000; ++turn) ::raise(SIGUSR1);
          ::raise(SIGTERM);
          set_handler(SIGUSR1, SIG_IGN);
        }).how == "SIGTERM");
}

TEST_CASE("raised again, a signal does what it would have done: blocked, it stays pending") {
  check_clean(in_a_process([] {
    set_blocked(SIGTERM, true);
    {
      const SignalTrap trap{SIGTERM};
      ::raise(SIGTERM);
    }
    expect(is_blocked(SIGTERM), "it is blocked again");
    sigset_t waiting;
    ::sigpending(&waiting);
    expect(::sigismember(&waiting, SIGTERM) == 1, "it is pending");
  }));
}

TEST_CASE("raised again, SIGTSTP stops the process, and it can be continued") {
  check_clean(in_a_process([] {
    const pid_t child = ::fork();
    if (child == 0) {
      // A process group of its own, that isn't orphaned: its parent is in the same session.
      ::setpgid(0, 0);
      {
        const SignalTrap trap{SIGTSTP};
        ::raise(SIGTSTP);
      }
      ::_exit(33);
    }
    int status = 0;
    ::waitpid(child, &status, WUNTRACED);
    expect(WIFSTOPPED(status) && WSTOPSIG(status) == SIGTSTP, "it is stopped");
    ::kill(child, SIGCONT);
    ::waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 33, "it went on");
  }));
}

// ---- Forks and programs

TEST_CASE("in a forked child a trap made before acts as if it weren't there") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGTERM, SIGINT, SIGHUP, SIGUSR1};
    const auto how = in_a_grandchild([] { ::raise(SIGTERM); });
    expect(how == "SIGTERM", "the default action: " + how);
    const auto sent = in_a_grandchild([] {
      ::kill(::getpid(), SIGINT);
      ::pause();
    });
    expect(sent == "SIGINT", "the default action: " + sent);
    expect_equal(pending(trap), 0, "the parent's signals");
    expect(!support::is_readable(trap.fd()), "and nothing to read");
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "the parent's own");
  }));
}

TEST_CASE("in a forked child the previous disposition is back, whatever it was") {
  check_clean(in_a_process([] {
    set_handler(SIGHUP, SIG_IGN);
    set_handler(SIGUSR1, plain_handler);
    install_on_top(SIGUSR2);
    SignalTrap trap{SIGTERM, SIGHUP, SIGUSR1, SIGUSR2};
    const auto how = in_a_grandchild([] {
      ::raise(SIGHUP);
      ::raise(SIGUSR1);
      ::raise(SIGUSR2);
      expect_equal(plain_calls.load(), 1, "calls of the plain handler");
      expect_equal(top_calls.load(), 1, "calls of the SA_SIGINFO handler");
      expect(handler_of(SIGHUP) == SIG_IGN, "ignored, also for the programs that it executes");
      expect(is_default(SIGTERM), "the default");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 0, "the parent's signals");
  }));
}

TEST_CASE("a child's signals never reach the parent's trap, nor the parent's the child's") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGTERM, SIGUSR1};
    ::raise(SIGUSR1);  // pending at the fork
    int ends[2];
    expect(::pipe(ends) == 0, "a pipe");
    const pid_t parent = ::getpid();
    const auto how = in_a_grandchild([&] {
      SignalTrap own{SIGTERM, SIGUSR1};
      expect_equal(pending(own), 0, "signals from before");
      ::raise(SIGTERM);
      ::kill(parent, SIGUSR1);
      const SignalInfo got = own.wait();
      expect_equal(got.number, SIGTERM, "what the child got");
      expect_equal(got.sender_pid, ::getpid(), "who sent it");
      expect(!own.wait_for(50ms), "nothing else came");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 2, "the parent's signals");
  }));
}

TEST_CASE("a new trap in a forked child works, and its end puts back what was there") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> old;
    old.emplace(std::initializer_list<int>{SIGTERM, SIGUSR1});
    const auto body = [&](bool old_goes_first) {
      {
        SignalTrap trap{SIGTERM, SIGUSR1};
        if (old_goes_first) old.reset();
        ::raise(SIGTERM);
        ::raise(SIGUSR1);
        expect_equal(pending(trap), 2, "signals of the new trap");
        expect_equal(plain_calls.load(), 1, "calls of the handler from before");
      }
      expect(is_default(SIGTERM), "the default is back");
      expect(handler_of(SIGUSR1) == plain_handler, "the handler is back");
      old.reset();
      expect(is_default(SIGTERM), "the default is there still");
      const auto how = in_a_grandchild([] { ::raise(SIGTERM); });
      expect(how == "SIGTERM", how);
    };
    for (const bool old_goes_first : {false, true}) {
      const auto how = in_a_grandchild([&] { body(old_goes_first); });
      expect(how == "exit 0", how);
    }
    // What children did to their copy of the trap concerns nobody here.
    ::raise(SIGTERM);
    expect_equal(pending(*old), 1, "signals of the parent's trap");
  }));
}

TEST_CASE("in a forked child the parent's trap is empty, and takes nothing from the parent") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGUSR1};
    ::raise(SIGUSR1);
    ::raise(SIGUSR1);
    expect(trap.try_wait().has_value(), "one is read, one is in the buffer");
    ::raise(SIGUSR1);
    const auto how = in_a_grandchild([&] {
      expect(!support::is_readable(trap.fd()), "nothing to read");
      expect(!trap.try_wait(), "nothing pending");
      expect(!trap.wait_for(20ms), "nothing comes");
      lastcall::CancellationSource source;
      source.cancel();
      expect(!trap.wait(source.token()), "cancelled");
      const std::string why = message_of([&] { trap.wait(); });
      expect(why.find("forked") != std::string::npos, "refused to wait for ever: " + why);
      const SignalIgnore ignore(SIGUSR1);  // nobody holds it here
      lastcall::detail::TrapCore core;
      core.subscribe(SIGUSR2);
    });
    expect(how == "exit 0", how);
    expect_equal(pending(trap), 2, "the parent's signals");
  }));
}

TEST_CASE("signals that nobody read are not raised again in a forked child") {
  check_clean(in_a_process([] {
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGTERM});
    ::raise(SIGTERM);
    const auto how = in_a_grandchild([&] { trap.reset(); });
    expect(how == "exit 0", how);
    trap->wait();
  }));
}

TEST_CASE("children of children, with traps at each level, each mind their own signals") {
  check_clean(in_a_process([] {
    SignalTrap top{SIGUSR1};
    const auto how = in_a_grandchild([] {
      SignalTrap middle{SIGUSR1};
      const auto innermost = in_a_grandchild([] {
        SignalTrap bottom{SIGUSR1};
        ::raise(SIGUSR1);
        expect_equal(pending(bottom), 1, "signals at the bottom");
      });
      expect(innermost == "exit 0", innermost);
      expect_equal(pending(middle), 0, "signals in the middle");
    });
    expect(how == "exit 0", how);
    expect_equal(pending(top), 0, "signals at the top");
  }));
}

#if defined(__linux__)

TEST_CASE("a child of a bare clone, that ran no fork hook, is as well served") {
  check_clean(in_a_process([] {
    if (support::under_sanitizer) return;  // they know nothing of such a child
    SignalTrap trap{SIGTERM, SIGUSR1, SIGURG};
    const auto cloned = [](auto body) {
      const long child = ::syscall(SYS_clone, SIGCHLD, nullptr, nullptr, nullptr, nullptr);
      if (child == 0) {
        support::unmet_expectations = 0;
        support::run_and_leave(body);
      }
      int status = 0;
      ::waitpid(static_cast<pid_t>(child), &status, 0);
      return support::in_words(status);
    };
    const auto killed = cloned([] { ::raise(SIGTERM); });
    expect(killed == "SIGTERM", "the default action: " + killed);
    const auto ignored = cloned([&] {
      ::raise(SIGURG);
      expect(!trap.try_wait(), "the parent's trap is empty");
    });
    expect(ignored == "exit 0", ignored);
    const auto trapped = cloned([] {
      {
        SignalTrap own{SIGTERM};
        ::raise(SIGTERM);
        expect_equal(pending(own), 1, "signals of the child's own trap");
      }
      expect(is_default(SIGTERM), "the default is back");
    });
    expect(trapped == "exit 0", trapped);
    const auto gone = cloned([&] {
      trap.~SignalTrap();
      SignalTrap own{SIGTERM};
      ::raise(SIGTERM);
      expect_equal(pending(own), 1, "signals of the child's own trap");
    });
    expect(gone == "exit 0", gone);
    expect_equal(pending(trap), 0, "the parent's signals");
  }));
}

TEST_CASE("a child of vfork that gets a signal dies of it, and the parent's trap doesn't see it") {
  check_clean(in_a_process([] {
    if (support::under_tsan) return;  // there, vfork() is fork()
    SignalTrap trap{SIGTERM};
    for (int turn = 0; turn < 3; ++turn) {
      const pid_t child = ::vfork();
      if (child == 0) {
        ::kill(::getpid(), SIGTERM);
        ::_exit(1);
      }
      int status = 0;
      ::waitpid(child, &status, 0);
      expect(WIFSIGNALED(status) && WTERMSIG(status) == SIGTERM, "it died of the signal");
      expect_equal(pending(trap), 0, "the parent's signals");
    }
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "the parent's own");
  }));
}

TEST_CASE("a vfork child that is killed inside the handler leaves nobody waiting") {
  check_clean(in_a_process([] {
    if (support::under_tsan) return;
    set_handler(SIGUSR1, [](int) { ::kill(::getpid(), SIGKILL); });
    {
      const SignalTrap trap{SIGUSR1};
      const pid_t child = ::vfork();
      if (child == 0) {
        ::kill(::getpid(), SIGUSR1);
        ::_exit(1);
      }
      ::waitpid(child, nullptr, 0);
    }
    expect(!is_default(SIGUSR1), "the trap has gone");
  }));
}

TEST_CASE("a program that is executed gets no descriptor of a trap, and the dispositions from before") {
  const auto listing = [](bool with_trap) {
    Ended ended = in_a_process([=] {
      set_handler(SIGHUP, SIG_IGN);
      std::vector<std::unique_ptr<SignalTrap>> traps;
      if (with_trap) {
        for (int count = 0; count < 3; ++count) {
          traps.push_back(std::make_unique<SignalTrap>(
              std::initializer_list<int>{SIGINT, SIGTERM, SIGHUP}));
        }
      }
      // One child of a fork, and one that this process itself becomes.
      const pid_t child = ::fork();
      if (child == 0) {
        ::execlp("sh", "sh", "-c", "ls /proc/self/fd; grep -E 'Sig(Ign|Cgt|Blk)' /proc/self/status",
                 nullptr);
        ::_exit(127);
      }
      ::waitpid(child, nullptr, 0);
      ::execlp("sh", "sh", "-c", "ls /proc/self/fd", nullptr);
      return 127;
    });
    return ended.out + ended.err + ended.how;
  };
  const std::string with = listing(true);
  CHECK(with == listing(false));
  CHECK(with.find("SigIgn") != std::string::npos);
}

#endif

TEST_CASE("a signal that was ignored when the program started is trapped, and said to have been") {
  check_clean(in_a_process([] {
    set_handler(SIGHUP, SIG_IGN);
    expect(lastcall::detail::is_ignored(SIGHUP), "it is ignored");
    expect(!lastcall::detail::is_ignored(SIGTERM), "this one isn't");
    {
      SignalTrap trap{SIGHUP};
      ::raise(SIGHUP);
      expect_equal(pending(trap), 1, "signals");
      ::raise(SIGHUP);
    }
    expect(handler_of(SIGHUP) == SIG_IGN, "it is ignored again, and nothing was raised again");
  }));
}

TEST_CASE("a program that is executed inherits a SignalIgnore") {
  const Ended ended = in_a_process([] {
    const SignalIgnore ignore(SIGTERM);
    ::execlp("sh", "sh", "-c", "kill -TERM $$; echo still here", nullptr);
    return 127;
  });
  CHECK(ended.how == "exit 0");
  CHECK(ended.out == "still here\n");
}

TEST_CASE("a fork in the middle of signals and traps that come and go leaves both sides whole") {
  check_clean(in_a_process([] {
    // Such a child may not allocate there: the sanitizers' own locks are not made for it.
    if (support::under_sanitizer) return;
    set_handler(SIGUSR1, plain_handler);
    const pid_t sender = storm(SIGUSR1, -1, 100us);
    std::atomic<bool> over{false};
    support::Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([&] {
        while (!over) {
          { const SignalTrap trap{SIGUSR1, SIGUSR2}; }
          std::this_thread::sleep_for(100us);  // a mutex is not fair
        }
      });
    }
    SignalTrap trap{SIGUSR2};
    for (int turn = 0; turn < 100; ++turn) {
      const auto how = in_a_grandchild([] {
        {
          SignalTrap own{SIGUSR1};
          ::raise(SIGUSR1);
          expect_equal(pending(own), 1, "signals of the child's trap");
        }
        expect(handler_of(SIGUSR1) == plain_handler, "the handler is back");
      });
      if (!expect(how == "exit 0", how)) break;
    }
    over = true;
    threads.join();
    stop(sender);
    ::raise(SIGUSR2);
    expect_equal(pending(trap), 1, "signals of the parent's trap");
  }));
}

// ---- Masks

TEST_CASE("a trap works when whoever started the process has its signals blocked") {
  Child child = Child::run([] {
    set_blocked(SIGTERM, true);
    SignalTrap trap{SIGTERM};
    say("ready\n");
    expect_equal(trap.wait().number, SIGTERM, "what came");
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  check_clean(child.end());
}

TEST_CASE("a trap works when every other thread has its signals blocked") {
  Child child = Child::run([] {
    set_blocked(SIGTERM, true);
    support::Threads threads;
    support::Gate gate;
    for (int at = 0; at < 4; ++at) threads.start([&] { gate.wait(); });
    SignalTrap trap{SIGTERM};
    say("ready\n");
    expect_equal(trap.wait().number, SIGTERM, "what came");
    gate.open();
  });
  REQUIRE(child.prints("ready\n"));
  child.send(SIGTERM);
  check_clean(child.end());
}

// ---- Load

#if defined(SIGRTMIN)
TEST_CASE("with a full pipe repeats may merge, different numbers never do") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGRTMIN, SIGTERM, SIGUSR1, SIGINT};
    for (int round = 0; round < 3; ++round) {
      for (int turn = 0; turn < 10'000; ++turn) ::raise(SIGRTMIN);
      ::kill(::getpid(), SIGUSR1);
      ::kill(::getpid(), SIGTERM);
      ::kill(::getpid(), SIGINT);
      for (const int number : {SIGINT, SIGTERM, SIGUSR1}) {
        expect(support::is_readable(trap.fd()), "there is something to read");
        const std::optional<SignalInfo> info = trap.try_wait();
        if (!expect(info.has_value(), "one is pending")) return;
        expect_equal(info->number, number, "the signal");
        expect_equal(info->sender_pid, ::getpid(), "its sender");
        expect_equal(info->code, SI_USER, "its code");
      }
      int repeats = 0;
      while (const std::optional<SignalInfo> info = trap.try_wait()) {
        expect_equal(info->number, SIGRTMIN, "the repeat");
        ++repeats;
      }
      expect(repeats >= 1000, "a pipe's worth came, but: " + std::to_string(repeats));
      expect(repeats <= 10'000, "each came once, but: " + std::to_string(repeats));
      expect(!support::is_readable(trap.fd()), "there is nothing left to read");
    }
  }));
}

TEST_CASE("a buffer that was filled by one reading still takes every kind of signal") {
  check_clean(in_a_process([] {
    SignalTrap trap{SIGRTMIN, SIGRTMIN + 1, SIGTERM, SIGUSR1, SIGUSR2};
    // Each reading empties a full pipe into the buffer and hands out one: soon the buffer is full, too.
    for (int turn = 0; turn < 4; ++turn) {
      for (int sent = 0; sent < 5000; ++sent) ::raise(SIGRTMIN);
      expect_equal(trap.wait().number, SIGRTMIN, "the flood");
    }
    for (const int number : {SIGUSR1, SIGUSR2, SIGTERM, SIGRTMIN + 1}) ::raise(number);
    expect_equal(trap.wait().number, SIGTERM, "first");
    expect_equal(trap.wait().number, SIGUSR1, "second");
    expect_equal(trap.wait().number, SIGUSR2, "third");
    int flood = 0;
    int last = 0;
    while (const std::optional<SignalInfo> info = trap.try_wait()) {
      flood += info->number == SIGRTMIN ? 1 : 0;
      last = info->number;
    }
    expect(flood > 1000, "the flood was kept, but: " + std::to_string(flood));
    expect_equal(last, SIGRTMIN + 1, "the last one");
  }));
}
#endif

TEST_CASE("a waiter wakes for a signal that finds the pipe full") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);  // so that what is left is not raised again
    SignalTrap trap{SIGUSR1, SIGTERM};
    const pthread_t main_thread = ::pthread_self();
    std::atomic<bool> over{false};
    std::thread other([&] {
      // Signals land on the main thread, which reads meanwhile: the pipe is full, empty, full again.
      while (!over) ::pthread_kill(main_thread, SIGUSR1);
    });
    for (int round = 0; round < 20; ++round) {
      for (int turn = 0; turn < 3000; ++turn) ::raise(SIGUSR1);
      ::raise(SIGTERM);
      expect_equal(trap.wait().number, SIGTERM, "the urgent one");
    }
    over = true;
    other.join();
  }));
}

TEST_CASE("a storm of 100,000 signals from other processes does no harm, and the last one is seen") {
  Child child = Child::run([] {
    SignalTrap trap{SIGUSR1, SIGUSR2, SIGTERM};
    std::vector<pid_t> senders;
    for (int at = 0; at < 4; ++at) senders.push_back(storm(at % 2 == 0 ? SIGUSR1 : SIGUSR2, 25'000));
    std::atomic<long> seen{0};
    support::Threads threads;
    for (int at = 0; at < 2; ++at) {
      threads.start([&] {
        while (trap.wait().number != SIGTERM) ++seen;
      });
    }
    for (const pid_t sender : senders) ::waitpid(sender, nullptr, 0);
    say("over\n");  // the last signals come from the test itself
    threads.join();
    expect(seen >= 2 && seen <= 100'000, "a believable number: " + std::to_string(seen));
  });
  REQUIRE(child.prints("over\n"));
  child.send(SIGTERM);
  std::this_thread::sleep_for(10ms);
  for (int more = 0; more < 100 && child.id() > 0; ++more) {
    child.send(SIGTERM);  // one for each thread; repeats merge while one is pending in the kernel
    std::this_thread::sleep_for(1ms);
  }
  check_clean(child.end());
}

TEST_CASE("a trap that goes in the middle of a storm never writes to somebody else's descriptor") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);  // what the signals meet between two traps
    const pid_t sender = storm(SIGUSR1, -1);
    std::atomic<bool> over{false};
    support::Threads threads;
    std::vector<pthread_t> targets(3);
    std::atomic<int> running{0};
    for (pthread_t& target : targets) {
      threads.start([&] {
        target = ::pthread_self();
        ++running;
        while (!over) ::sched_yield();
      });
    }
    eventually([&] { return running == 3; });
    threads.start([&] {
      while (!over) {
        for (const pthread_t target : targets) ::pthread_kill(target, SIGUSR1);
      }
    });
    const auto end = std::chrono::steady_clock::now() + 3s;
    long rounds = 0;
    long caught = 0;
    for (; std::chrono::steady_clock::now() < end; ++rounds) {
      int numbers[2] = {-1, -1};
      {
        SignalTrap trap{SIGUSR1};
        if (rounds % 4 == 0) caught += trap.wait_for(patience).has_value() ? 1 : 0;
        numbers[0] = trap.fd();
      }
      // Now a neighbour gets the numbers that the trap had.
      int ends[2];
      if (!expect(::pipe(ends) == 0, "a pipe")) break;
      if (rounds == 0) expect_equal(ends[0], numbers[0], "the descriptor, used again");
      ::sched_yield();
      const bool stray = support::is_readable(ends[0]);
      ::close(ends[0]);
      ::close(ends[1]);
      if (!expect(!stray, "nothing strays into a neighbour's pipe")) break;
    }
    over = true;
    threads.join();
    stop(sender);
    expect(rounds > 20, "rounds: " + std::to_string(rounds));
    expect(caught > 0, "signals: " + std::to_string(caught));
  }));
}

TEST_CASE("a trap made while the handler acts for nobody is not undone by it") {
  check_clean(in_a_process([] {
    // SIGURG's default is to be ignored, so a handler without a trap puts SIG_DFL back and goes on.
    const pid_t sender = storm(SIGURG, -1);
    std::atomic<bool> over{false};
    support::Threads threads;
    const pthread_t maker = ::pthread_self();
    std::vector<pthread_t> targets(2);
    std::atomic<int> running{0};
    for (pthread_t& target : targets) {
      threads.start([&] {
        target = ::pthread_self();
        ++running;
        while (!over) ::sched_yield();
      });
    }
    eventually([&] { return running == 2; });
    threads.start([&] {
      while (!over) {
        for (const pthread_t target : targets) ::pthread_kill(target, SIGURG);
        ::pthread_kill(maker, SIGURG);
      }
    });
    const auto end = std::chrono::steady_clock::now() + 3s;
    while (std::chrono::steady_clock::now() < end) {
      const SignalTrap trap{SIGURG};
      for (int look = 0; look < 3; ++look) {
        ::sched_yield();
        if (eventually([] { return !is_default(SIGURG); }, 10s)) continue;
        expect(false, "the trap is in place");
        over = true;
      }
      if (over) break;
    }
    over = true;
    threads.join();
    stop(sender);
  }));
}

TEST_CASE("a previous handler that hangs keeps no trap from going") {
  check_clean(in_a_process([] {
    static std::atomic<bool> inside{false};
    static std::atomic<bool> let_go{false};
    set_handler(SIGUSR1, [](int) {
      inside = true;
      while (!let_go) ::usleep(1000);
    });
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1, SIGUSR2});
    std::thread other([] { ::raise(SIGUSR1); });
    expect(eventually([] { return inside.load(); }), "it hangs");
    SignalTrap second{SIGUSR2};
    ::raise(SIGUSR2);
    expect_equal(pending(second), 1, "signals of another trap");
    trap.reset();
    let_go = true;
    other.join();
  }));
}

TEST_CASE("a previous handler that jumps away keeps no trap from going") {
  check_clean(in_a_process([] {
    if (support::under_tsan) return;  // it delivers signals later, when there is nowhere to jump to
    static sigjmp_buf back;
    set_handler(SIGUSR1, [](int) { ::siglongjmp(back, 1); });
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    static std::atomic<int> turn{0};  // a local variable's value would be uncertain after the jump
    for (; turn < 10; ++turn) {
      if (sigsetjmp(back, 1) == 0) ::raise(SIGUSR1);
    }
    expect_equal(pending(*trap), 10, "signals");
    trap.reset();
  }));
}

TEST_CASE("a thread that is being cancelled is not torn out of the handler") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    std::optional<SignalTrap> trap;
    trap.emplace(std::initializer_list<int>{SIGUSR1});
    static std::atomic<bool> running{false};
    static std::atomic<bool> over{false};
    running = over = false;
    pthread_t thread{};
    // No cancellation point but in the handler, if there were one.
    const int made = ::pthread_create(
        &thread, nullptr,
        [](void*) -> void* {
          running = true;
          while (!over) {
          }
          return &over;
        },
        nullptr);
    expect_equal(made, 0, "pthread_create");
    expect(eventually([] { return running.load(); }), "it runs");
    ::pthread_cancel(thread);
    for (int turn = 0; turn < 10; ++turn) ::pthread_kill(thread, SIGUSR1);
    expect(trap->wait_for(patience).has_value(), "the signal came");
    over = true;
    void* result = nullptr;
    ::pthread_join(thread, &result);
    expect(result == &over, "it returned by itself");
    trap.reset();
  }));
}

// ---- What the system refuses

TEST_CASE("a trap for which there are no descriptors left throws, and leaves everything as it was") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    // UBSan looks at an exception through a pipe, for which there is no room: so the first of its type is
    // thrown before, and it is looked at after.
    message_of([] { lastcall::detail::throw_system_error(EIO, "a trial"); });
    const int next = ::dup(0);
    ::close(next);
    for (const int room : {0, 1}) {
      rlimit limit{};
      ::getrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = static_cast<rlim_t>(next + room);
      ::setrlimit(RLIMIT_NOFILE, &limit);
      limit.rlim_cur = 1024;
      try {
        const SignalTrap trap{SIGTERM, SIGUSR1};
        expect(false, "it throws");
      } catch (const std::system_error& error) {
        ::setrlimit(RLIMIT_NOFILE, &limit);
        expect_equal(error.code().value(), EMFILE, "the error");
        expect(std::string(error.what()).find("self-pipe") != std::string::npos, error.what());
      }
      ::setrlimit(RLIMIT_NOFILE, &limit);
      expect(is_default(SIGTERM), "SIGTERM is the default");
      expect(handler_of(SIGUSR1) == plain_handler, "SIGUSR1 has its handler");
      const int again = ::dup(0);
      ::close(again);
      expect_equal(again, next, "the next free descriptor");
    }
    SignalTrap trap{SIGTERM};
    ::raise(SIGTERM);
    trap.wait();
  }));
}

#if defined(__linux__) && defined(SECCOMP_RET_ERRNO)

namespace {

// From here on the kernel refuses this process any handler for `number`.
bool refuse_handlers_of(int number) {
  sock_filter code[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_sigaction, 0, 5),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
               offsetof(seccomp_data, args) +
                   (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4U : 0U)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, static_cast<std::uint32_t>(number), 0, 3),
      // A call that only asks (no new action) is let through.
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS,
               offsetof(seccomp_data, args) + 8U +
                   (__BYTE_ORDER__ == __ORDER_BIG_ENDIAN__ ? 4U : 0U)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0, 1, 0),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  code[1].jf = 6 - 1;
  sock_fprog program{};
  program.len = sizeof code / sizeof code[0];
  program.filter = code;
  return ::prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
         ::prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

}  // namespace

TEST_CASE("a trap that fails half way leaves every disposition as it was") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    set_handler(SIGHUP, SIG_IGN);
    if (!refuse_handlers_of(SIGUSR2)) return;
    const int before = support::open_descriptors();
    const std::string why =
        message_of([] { const SignalTrap trap{SIGHUP, SIGTERM, SIGUSR1, SIGUSR2}; });
    expect(why.find("installing the handler of SIGUSR2 (") != std::string::npos, why);
    expect(is_default(SIGTERM), "SIGTERM is the default");
    expect(handler_of(SIGUSR1) == plain_handler, "SIGUSR1 has its handler");
    expect(handler_of(SIGHUP) == SIG_IGN, "SIGHUP is ignored");
    expect_equal(support::open_descriptors(), before, "descriptors");
    const std::string ignore = message_of([] { const SignalIgnore refused(SIGUSR2); });
    expect(ignore.find("ignoring SIGUSR2 (") != std::string::npos, ignore);
    SignalTrap trap{SIGTERM};  // the next one works, and SIGUSR2 is nobody's
    ::raise(SIGTERM);
    expect_equal(pending(trap), 1, "signals");
  }));
}

TEST_CASE("a signal that came while a trap failed half way does what it would have done") {
  const Ended ended = in_a_process([] {
    if (!refuse_handlers_of(SIGUSR2)) ::raise(SIGTERM);
    // Pending and blocked until the constructor has it in its hands: SIGTERM is trapped first.
    const pid_t target = ::getpid();
    const pid_t sender = ::fork();
    if (sender == 0) {
      for (;;) {
        if (::kill(target, SIGTERM) != 0 || ::getppid() != target) ::_exit(0);
      }
    }
    for (;;) message_of([] { const SignalTrap trap{SIGTERM, SIGUSR2}; });
  });
  CHECK(ended.how == "SIGTERM");
}

#endif

// ---- The core, as the coordinator uses it

TEST_CASE("a core drops what was not read, if told so, and whoever reads it meanwhile is safe") {
  check_clean(in_a_process([] {
    using lastcall::detail::TrapCore;
    using lastcall::detail::Unread;
    for (int turn = 0; turn < 50; ++turn) {
      TrapCore core;
      core.subscribe(SIGTERM);
      std::atomic<bool> over{false};
      std::thread reader([&] {
        SignalInfo batch[4];
        while (!over) core.read_batch(batch, 4);
      });
      std::thread subscriber([&] { core.subscribe(SIGUSR1); });
      for (int sent = 0; sent < 10; ++sent) ::raise(SIGTERM);
      subscriber.join();
      ::raise(SIGUSR1);
      core.unsubscribe_all(Unread::drop);
      expect(is_default(SIGTERM), "the default is back");
      over = true;
      reader.join();
    }
  }));
}

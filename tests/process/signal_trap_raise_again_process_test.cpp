// What becomes of signals that a trap caught and nobody read.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/signals.hpp"

#include <setjmp.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <initializer_list>
#include <optional>
#include <string>

using namespace support;
using lastcall::SignalTrap;

namespace {

/// What becomes of a process whose trap got a SIGTERM and goes. `before` runs before the trap is
/// made.
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

TEST_CASE(
    "a signal is not raised again for a handler that has had it, or that took the number over") {
  check_clean(in_a_process([] {
    set_handler(SIGUSR1, plain_handler);
    {
      const SignalTrap trap{SIGUSR1, SIGUSR2};
      ::raise(SIGUSR1);
      ::raise(SIGUSR2);
      set_handler(SIGUSR2, plain_handler);
    }
    expect_equal(plain_calls.load(), 1, "calls of the handler that was called on");
  }));
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

TEST_CASE("nor is one that a trap above somebody else's handler got, which was called on") {
  check_clean(in_a_process([] {
    std::optional<SignalTrap> below(std::in_place, std::initializer_list<int>{SIGTERM});
    install_on_top(SIGTERM);
    {
      SignalTrap above{SIGTERM};
      ::raise(SIGTERM);
      above.wait();
    }
    ::sigaction(SIGTERM, &beneath, nullptr);
    below.reset();
    expect(is_default(SIGTERM), "the default is back");
    expect_equal(top_calls.load(), 1, "calls of the handler between them");
  }));
}

TEST_CASE("a trap above that didn't get the signal counts for nothing, whatever it got before") {
  const auto end = [](auto&& between) {
    return in_a_process([&] {
             std::optional<SignalTrap> below(std::in_place, std::initializer_list<int>{SIGTERM});
             install_on_top(SIGTERM);
             between(*below);
             ::sigaction(SIGTERM, &beneath, nullptr);
             below.reset();
           })
        .how;
  };
  // Before it was there, and when it was there no more.
  CHECK(end([](SignalTrap&) {
          ::raise(SIGTERM);
          SignalTrap above{SIGTERM};
          ::raise(SIGTERM);
          above.wait();
        }) == "SIGTERM");
  CHECK(end([](SignalTrap&) {
          {
            SignalTrap above{SIGTERM};
            ::raise(SIGTERM);
            above.wait();
          }
          ::raise(SIGTERM);
        }) == "SIGTERM");
  // It was there, but somebody else's handler that called the lower one took its place for a while.
  CHECK(end([](SignalTrap& below) {
          const SignalTrap above{SIGTERM};
          ::raise(SIGTERM);
          below.wait();
          const struct sigaction ours = disposition_of(SIGTERM);
          struct sigaction theirs = beneath;
          theirs.sa_sigaction = top_handler;
          ::sigaction(SIGTERM, &theirs, nullptr);
          ::raise(SIGTERM);
          ::sigaction(SIGTERM, &ours, nullptr);
        }) == "SIGTERM");
  // It got one that was kept from the lower trap by a handler that jumped away.
  CHECK(end([](SignalTrap&) {
          static sigjmp_buf back;
          static struct sigaction lower;
          lower = beneath;
          beneath.sa_sigaction = [](int, siginfo_t*, void*) { ::siglongjmp(back, 1); };
          {
            const SignalTrap above{SIGTERM};
            if (sigsetjmp(back, 1) == 0) ::raise(SIGTERM);
          }
          beneath = lower;
          ::raise(SIGTERM);
        }) == "SIGTERM");
}

TEST_CASE("a signal that came through a layer which has lost its trap counts as handed out above") {
  check_clean(in_a_process([] {
    std::optional<SignalTrap> lowest(std::in_place, std::initializer_list<int>{SIGTERM});
    install_on_top(SIGTERM);
    std::optional<SignalTrap> middle(std::in_place, std::initializer_list<int>{SIGTERM});
    static struct sigaction beneath_second;
    struct sigaction second {};
    second.sa_sigaction = [](int number, siginfo_t* info, void* context) {
      beneath_second.sa_sigaction(number, info, context);
    };
    second.sa_flags = SA_SIGINFO;
    ::sigaction(SIGTERM, &second, &beneath_second);
    {
      SignalTrap highest{SIGTERM};
      middle.reset();
      ::raise(SIGTERM);
      highest.wait();
    }
    expect_equal(top_calls.load(), 1, "calls of the lower handler");
    ::sigaction(SIGTERM, &beneath, nullptr);
    lowest.reset();
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

TEST_CASE(
    "signals are raised again in the order in which they came, and SIGCONT undoes the stops before "
    "it") {
  const auto end = [](std::initializer_list<int> received) {
    const pid_t child = ::fork();
    if (child == 0) {
      ::setpgid(0, 0);
      {
        const SignalTrap trap{SIGTSTP, SIGTTIN, SIGCONT, SIGTERM, SIGUSR1, SIGHUP};
        for (const int number : received) ::raise(number);
      }
      ::_exit(0);
    }
    int status = 0;
    ::waitpid(child, &status, WUNTRACED);
    if (!WIFSTOPPED(status)) return in_words(status);
    const std::string stopped(lastcall::signal_name(WSTOPSIG(status)));
    ::kill(child, SIGCONT);
    ::waitpid(child, &status, 0);
    return stopped + ", " + in_words(status);
  };
  check_clean(in_a_process([&] {
    const auto ends = [&](std::initializer_list<int> received, const std::string& wanted,
                          int line = __builtin_LINE()) {
      const std::string how = end(received);
      expect(how == wanted, how + " instead of " + wanted, line);
    };
    ends({SIGTSTP, SIGCONT}, "exit 0");
    ends({SIGTSTP, SIGTTIN, SIGCONT}, "exit 0");
    ends({SIGCONT, SIGTSTP}, "SIGTSTP, exit 0");
    ends({SIGTSTP, SIGCONT, SIGTSTP}, "SIGTSTP, exit 0");
    ends({SIGCONT, SIGTSTP, SIGCONT}, "exit 0");
    ends({SIGTSTP, SIGCONT, SIGTTIN}, "SIGTTIN, exit 0");
    ends({SIGTSTP, SIGTERM}, "SIGTSTP, SIGTERM");
    // Of several that end the process the first did it.
    ends({SIGUSR1, SIGHUP, SIGTERM}, "SIGUSR1");
    ends({SIGHUP, SIGUSR1, SIGHUP}, "SIGHUP");
  }));
}

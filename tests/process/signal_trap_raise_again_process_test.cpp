// What becomes of signals that a trap caught and nobody read.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/process.hpp"
#include "support/signals.hpp"

#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
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

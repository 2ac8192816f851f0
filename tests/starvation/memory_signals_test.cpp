// Traps and ignored signals with too little memory: dispositions, masks and descriptors stay as they were
// when one can't be had.
#include "starvation/sweep.hpp"
#include "support/catch.hpp"

#include <lastcall/signal_trap.hpp>

#include <chrono>
#include <csignal>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;
using starvation::sweep;
using support::expect;
using support::expect_equal;

void on_some_signal(int) {}

// As a program that does something with signals already: a handler, one that is spent by its first
// call, an ignored one, a blocked one.
struct Busy {
  Busy() {
    struct sigaction action {};
    action.sa_handler = &on_some_signal;
    ::sigaction(SIGHUP, &action, nullptr);
    action.sa_flags = static_cast<int>(SA_RESETHAND);
    ::sigaction(SIGUSR1, &action, nullptr);
    action.sa_flags = 0;
    action.sa_handler = SIG_IGN;
    ::sigaction(SIGUSR2, &action, nullptr);
    sigset_t blocked;
    ::sigemptyset(&blocked);
    ::sigaddset(&blocked, SIGTERM);
    ::pthread_sigmask(SIG_BLOCK, &blocked, nullptr);
  }
};

struct Trap : Busy {
  std::optional<SignalTrap> trap;
  void call() {
    trap.emplace(std::initializer_list<int>{SIGTERM, SIGHUP, SIGUSR1, SIGUSR2, SIGINT});
  }
  void check() {
    ::raise(SIGUSR2);
    ::raise(SIGTERM);
    const std::optional<SignalInfo> first = trap->wait_for(5s);
    const std::optional<SignalInfo> second = trap->wait_for(5s);
    expect(first && first->number == SIGTERM, "SIGTERM is trapped");
    expect(second && second->number == SIGUSR2, "SIGUSR2 is trapped");
  }
};

// The other traps of a number are none the worse.
struct SecondTrap : Busy {
  SignalTrap first{SIGTERM, SIGHUP};
  std::optional<SignalTrap> second;
  void call() { second.emplace(std::initializer_list<int>{SIGTERM, SIGUSR1}); }
  void check() {
    ::raise(SIGTERM);
    expect(first.wait_for(5s).has_value(), "the first trap gets it");
    expect(second->wait_for(5s).has_value(), "the second trap gets it");
  }
};

struct BadTrap {
  bool refused = false;
  void call() {
    try {
      const SignalTrap trap{SIGTERM, SIGKILL};
    } catch (const std::invalid_argument&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "SIGKILL is refused"); }
};

struct TrapOfIgnored {
  SignalIgnore ignore{SIGHUP};
  bool refused = false;
  void call() {
    try {
      const SignalTrap trap{SIGTERM, SIGHUP};
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "a number that is ignored is refused"); }
};

struct Ignore : Busy {
  std::optional<SignalIgnore> ignore;
  void call() { ignore.emplace(SIGHUP); }
  void check() const {
    struct sigaction now {};
    ::sigaction(SIGHUP, nullptr, &now);
    expect(now.sa_handler == SIG_IGN, "it is ignored");
  }
};

struct IgnoreOfTrapped {
  SignalTrap trap{SIGTERM};
  bool refused = false;
  void call() {
    try {
      const SignalIgnore ignore(SIGTERM);
    } catch (const std::logic_error&) {
      refused = true;
    }
  }
  void check() const { expect(refused, "a number that is trapped is refused"); }
};

// Catching, waiting and going.
struct CatchAndGo {
  std::optional<SignalTrap> trap{std::in_place, std::initializer_list<int>{SIGTERM, SIGUSR1}};
  int caught = 0;
  void call() {
    ::raise(SIGTERM);
    ::raise(SIGUSR1);
    if (trap->wait().number == SIGTERM) ++caught;
    if (trap->wait_for(5s)) ++caught;
    if (trap->try_wait()) ++caught;
    if (trap->wait_for(1ms)) ++caught;
    trap.reset();
  }
  void check() const { expect_equal(caught, 2, "signals caught"); }
};

struct WaitWithToken {
  SignalTrap trap{SIGTERM};
  CancellationSource source;
  bool caught = false;
  bool cancelled = false;
  WaitWithToken() { static_cast<void>(source.token().fd()); }
  void call() {
    ::raise(SIGTERM);
    caught = trap.wait(source.token()).has_value();
    source.cancel();
    cancelled = !trap.wait(source.token());
  }
  void check() const {
    expect(caught, "the signal was handed out");
    expect(cancelled, "the token was heard");
  }
};

}  // namespace

TEST_CASE("a trap that can't be made leaves every disposition as it was") {
  const starvation::Swept swept = sweep<Trap>();
  CHECK(swept.problems == "");
  CHECK(swept.failures >= 6);
  CHECK(sweep<SecondTrap>().problems == "");
  CHECK(sweep<SecondTrap>().failures >= 2);
}

TEST_CASE("what can't be trapped or ignored is refused without memory, too") {
  CHECK(sweep<BadTrap>().problems == "");
  CHECK(sweep<TrapOfIgnored>().problems == "");
  CHECK(sweep<IgnoreOfTrapped>().problems == "");
}

TEST_CASE("a signal is ignored, or its disposition is as it was") {
  const starvation::Swept swept = sweep<Ignore>();
  CHECK(swept.problems == "");
  CHECK(swept.failures >= 1);
}

TEST_CASE("a trap catches, waits and goes without asking for memory") {
  const starvation::Swept swept = sweep<CatchAndGo>();
  CHECK(swept.problems == "");
  CHECK(swept.refusals == 0);
  CHECK(sweep<WaitWithToken>().problems == "");
}

// A trap together with somebody else who installs handlers, in every order of coming and going. For one
// source file of an executable.
//
// A Foreign is made for SIGUSR1 and SIGTERM, got(number) says whether one came within some seconds, and
// its destructor takes its handlers away: by putting back what it found (Foreign::puts_back), or, as many
// do, by setting SIG_DFL whoever has come since.
#pragma once

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"

#include <lastcall/shutdown_coordinator.hpp>
#include <lastcall/signal_trap.hpp>

#include <chrono>
#include <csignal>
#include <initializer_list>
#include <optional>
#include <string>

namespace company {

using namespace std::chrono_literals;
using lastcall::SignalTrap;
using support::expect;

inline bool trap_gets(SignalTrap& trap, int number) {
  ::raise(number);
  const auto got = trap.wait_for(5s);
  return got && got->number == number;
}

inline bool is_default(int number) {
  struct sigaction now {};
  return ::sigaction(number, nullptr, &now) == 0 && now.sa_handler == SIG_DFL;
}

template <class Foreign>
bool foreign_gets(Foreign& foreign, int number) {
  ::raise(number);
  return foreign.got(number);
}

// Ours on top: both get it. Then one goes, and later the other.
template <class Foreign>
void foreign_first(bool trap_goes_first) {
  std::optional<Foreign> foreign(std::in_place);
  std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{SIGUSR1, SIGTERM});
  for (const int number : {SIGUSR1, SIGTERM, SIGUSR1}) {
    expect(trap_gets(*trap, number), "the trap, on top, gets it");
    expect(foreign->got(number), "who was there before gets it, too");
  }
  if (trap_goes_first) {
    trap.reset();
    expect(foreign_gets(*foreign, SIGTERM), "who was there before has it again");
    foreign.reset();
  } else {
    foreign.reset();
    // Whoever puts back what he found puts us out. Who is asked next serves all the same.
    SignalTrap another{SIGUSR1};
    expect(trap_gets(another, SIGUSR1), "a trap made now gets it");
  }
  trap.reset();
  expect(is_default(SIGUSR1) && is_default(SIGTERM), "all have gone");
}

// Theirs on top, which calls nobody on: it gets everything.
template <class Foreign>
void trap_first(bool trap_goes_first) {
  std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{SIGUSR1, SIGTERM});
  expect(trap_gets(*trap, SIGTERM), "the trap gets it while it is alone");
  std::optional<Foreign> foreign(std::in_place);
  for (const int number : {SIGUSR1, SIGTERM}) {
    expect(foreign_gets(*foreign, number), "who came later gets it");
  }
  // And a trap made now is on top of both.
  {
    SignalTrap top{SIGTERM};
    expect(trap_gets(top, SIGTERM), "a trap on top of it gets it");
    expect(foreign->got(SIGTERM), "who is below gets it, too");
  }
  if (trap_goes_first) {
    trap.reset();
    expect(foreign_gets(*foreign, SIGTERM), "who came later still gets it");
    foreign.reset();
  } else {
    foreign.reset();
    if (Foreign::puts_back) {
      expect(trap_gets(*trap, SIGUSR1), "the trap has it again");
      expect(trap_gets(*trap, SIGTERM), "the trap has it again");
    } else {
      SignalTrap another{SIGUSR1};
      expect(trap_gets(another, SIGUSR1), "a trap made now gets it");
    }
    trap.reset();
  }
  // Who put ours back when its trap had gone has left a handler that gives way when it is called.
  if (!is_default(SIGTERM)) ::raise(SIGTERM);
  expect(is_default(SIGTERM), "all have gone");
}

template <class Foreign>
std::string in_every_order() {
  std::string problems;
  for (const bool foreign_is_first : {true, false}) {
    for (const bool trap_goes_first : {true, false}) {
      const support::Ended ended = support::in_a_process([&] {
        foreign_is_first ? foreign_first<Foreign>(trap_goes_first)
                         : trap_first<Foreign>(trap_goes_first);
      });
      // With ours put back for good, the last SIGTERM is one that nobody traps.
      const bool left_behind = Foreign::puts_back && !foreign_is_first && trap_goes_first;
      if (ended.how == "exit 0" || (left_behind && ended.how == "SIGTERM" && ended.err.empty())) {
        continue;
      }
      problems += std::string(foreign_is_first ? "theirs first, " : "ours first, ") +
                  (trap_goes_first ? "ours goes first: " : "theirs goes first: ") + ended.how +
                  "\n" + ended.err;
    }
  }
  return problems;
}

/// A coordinator beside it: a SIGTERM drains, and the dispositions are then as they were.
template <class Foreign>
std::string beside_a_coordinator() {
  const support::Ended ended = support::in_a_process([] {
    Foreign foreign;
    {
      lastcall::ShutdownCoordinator coordinator(support::quiet());
      coordinator.spawn("worker", [](const lastcall::CancellationToken& token) { token.wait(); });
      ::raise(SIGTERM);
      expect(foreign.got(SIGTERM), "who was there before gets it, too");
      expect(coordinator.drain().exit_code == 0, "it drains");
    }
    expect(foreign_gets(foreign, SIGTERM), "who was there before has it again");
  });
  return ended.how == "exit 0" ? std::string() : ended.how + "\n" + ended.err;
}

}  // namespace company

// What a coordinator is told: the defaults, and what it refuses. A refusal changes nothing.
#include <lastcall/shutdown_coordinator.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/threads.hpp"

#include <lastcall/signal_trap.hpp>

#include <chrono>
#include <csignal>
#include <stdexcept>
#include <string>
#include <vector>

using namespace std::chrono_literals;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using support::contains;
using support::quiet;
using support::refusal;
using support::starts_with;

namespace {

// What making a coordinator with these options throws; and it must leave all as it was.
std::string refused(const ShutdownOptions& options) {
  const std::string dispositions = support::dispositions();
  const std::string mask = support::signal_mask();
  const int descriptors = support::open_descriptors();
  const int threads = support::live_threads();
  const std::string words = refusal([&] { const ShutdownCoordinator coordinator(options); });
  CHECK(support::dispositions() == dispositions);
  CHECK(support::signal_mask() == mask);
  CHECK(support::open_descriptors() == descriptors);
  CHECK(support::eventually([&] { return support::live_threads() == threads; }));
  return words;
}

}  // namespace

TEST_CASE("the options have the contract's defaults") {
  const ShutdownOptions options;
  CHECK(options.signals == std::vector<int>{SIGINT, SIGTERM});
  CHECK(options.grace_period == 25s);
  CHECK(options.announce_delay == 0s);
  CHECK(options.abort_margin == 2s);
  CHECK(options.repeat_window == 500ms);
  CHECK(options.respect_ignored);
  CHECK(options.ignore_sigpipe);
  CHECK_FALSE(options.stop_when_idle);
  CHECK_FALSE(options.exit_by_signal);
  CHECK_FALSE(options.dump_signal.has_value());
  CHECK(options.exit_codes.clean == 0);
  CHECK(options.exit_codes.failed == 1);
  CHECK(options.exit_codes.overrun == 124);
  CHECK(options.observer != nullptr);
  CHECK(options.last_words == STDERR_FILENO);
}

TEST_CASE("a negative time is an invalid argument, and the message names it with its value") {
  struct Case {
    const char* name;
    std::chrono::milliseconds ShutdownOptions::*time;
  };
  for (const Case& one : {Case{"grace_period", &ShutdownOptions::grace_period},
                          Case{"announce_delay", &ShutdownOptions::announce_delay},
                          Case{"abort_margin", &ShutdownOptions::abort_margin},
                          Case{"repeat_window", &ShutdownOptions::repeat_window}}) {
    ShutdownOptions options = quiet();
    options.*one.time = -7ms;
    const std::string words = refused(options);
    INFO(words);
    CHECK(starts_with(words, "invalid_argument: "));
    CHECK(contains(words, one.name));
    CHECK(contains(words, "-7"));
    options.*one.time = std::chrono::milliseconds::min();
    CHECK(starts_with(refused(options), "invalid_argument: "));
  }
}

TEST_CASE("an announce delay that is not below the grace period is an invalid argument") {
  ShutdownOptions options = quiet(3000ms);
  options.announce_delay = 3000ms;
  const std::string equal = refused(options);
  INFO(equal);
  CHECK(starts_with(equal, "invalid_argument: "));
  CHECK(contains(equal, "announce_delay"));
  CHECK(contains(equal, "3000"));
  options.announce_delay = 4001ms;
  const std::string longer = refused(options);
  CHECK(starts_with(longer, "invalid_argument: "));
  CHECK(contains(longer, "4001"));
  CHECK(contains(longer, "3000"));
  // No grace at all is not more than no delay at all.
  CHECK(starts_with(refused(quiet(0ms)), "invalid_argument: "));
  // A millisecond less is allowed. It may be too short for the drain, which then leaves things behind.
  options = quiet(300ms);
  options.announce_delay = 299ms;
  CHECK(refusal([&] { const ShutdownCoordinator coordinator(options); }) == "nothing");
}

TEST_CASE("a signal that can't be trapped is an invalid argument, and the message names it") {
  struct Case {
    int number;
    const char* words;
  };
  for (const Case& one :
       {Case{SIGKILL, "SIGKILL"}, Case{SIGSTOP, "SIGSTOP"}, Case{SIGSEGV, "SIGSEGV"},
        Case{SIGBUS, "SIGBUS"}, Case{SIGFPE, "SIGFPE"}, Case{SIGILL, "SIGILL"}, Case{0, "0 "},
        Case{-3, "-3"}, Case{999, "999"}}) {
    INFO(one.words);
    ShutdownOptions options = quiet();
    options.signals = {SIGUSR1, one.number};
    const std::string words = refused(options);
    CHECK(starts_with(words, "invalid_argument: "));
    CHECK(contains(words, one.words));

    ShutdownOptions dump = quiet();
    dump.dump_signal = one.number;
    const std::string of_dump = refused(dump);
    CHECK(starts_with(of_dump, "invalid_argument: "));
    CHECK(contains(of_dump, one.words));
  }
}

TEST_CASE("a dump signal that also requests shutdown is an invalid argument") {
  ShutdownOptions options = quiet();
  options.dump_signal = SIGTERM;
  const std::string words = refused(options);
  CHECK(starts_with(words, "invalid_argument: "));
  CHECK(contains(words, "SIGTERM"));
}

TEST_CASE("a signal named twice counts once") {
  ShutdownOptions options = quiet();
  options.signals = {SIGUSR2, SIGUSR2, SIGUSR2};
  const std::string before = support::disposition_of(SIGUSR2);
  {
    ShutdownCoordinator coordinator(options);
    CHECK(support::disposition_of(SIGUSR2) != before);
    coordinator.request_shutdown();
    CHECK(coordinator.drain().outcome == lastcall::Outcome::clean);
  }
  CHECK(support::disposition_of(SIGUSR2) == before);
}

TEST_CASE("with no signals at all it only shuts down when it is asked to") {
  ShutdownOptions options = quiet();
  options.signals.clear();
  const std::string interrupt = support::disposition_of(SIGINT);
  const std::string terminate = support::disposition_of(SIGTERM);
  ShutdownCoordinator coordinator(options);
  CHECK(support::disposition_of(SIGINT) == interrupt);
  CHECK(support::disposition_of(SIGTERM) == terminate);
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == lastcall::Outcome::clean);
}

TEST_CASE("the largest times saturate and never overflow") {
  constexpr auto forever = std::chrono::milliseconds::max();
  ShutdownOptions patient = quiet(forever);
  patient.abort_margin = forever;
  patient.repeat_window = forever;
  ShutdownCoordinator coordinator(patient);
  bool ran = false;
  coordinator.stage("late", std::chrono::hours(24 * 365)).on_drained("hook", [&] { ran = true; });
  coordinator.request_shutdown();
  const lastcall::ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == lastcall::Outcome::clean);
  CHECK(ran);
  CHECK_FALSE(coordinator.abort_token().is_cancelled());
}

TEST_CASE("one at a time in a process: a second is a logic error, and harms nobody") {
  ShutdownCoordinator coordinator(quiet());
  const std::string words = refused(quiet());
  INFO(words);
  CHECK(starts_with(words, "logic_error: "));
  CHECK(contains(words, std::to_string(::getpid())));
  CHECK(coordinator.is_ready());
  coordinator.request_shutdown();
  CHECK(coordinator.drain().outcome == lastcall::Outcome::clean);
  // It is still there.
  CHECK(starts_with(refusal([] { const ShutdownCoordinator second(quiet()); }), "logic_error: "));
}

TEST_CASE("when the first coordinator has gone, the next one works") {
  for (int round = 0; round < 5; ++round) {
    ShutdownCoordinator coordinator(quiet());
    bool worked = false;
    REQUIRE(coordinator.spawn("task", [&](const lastcall::CancellationToken& token) {
      token.wait();
      worked = true;
    }));
    ::kill(::getpid(), SIGTERM);
    const lastcall::ShutdownReport report = coordinator.drain();
    CHECK(report.cause.kind() == lastcall::CauseKind::signal);
    CHECK(report.outcome == lastcall::Outcome::clean);
    CHECK(worked);
  }
}

TEST_CASE("a coordinator that could not be made leaves the place to the next one") {
  CHECK(starts_with(refused(quiet(-1ms)), "invalid_argument: "));
  ShutdownOptions bad = quiet();
  bad.signals = {SIGKILL};
  CHECK(starts_with(refused(bad), "invalid_argument: "));
  CHECK(refused(quiet()) == "nothing");
}

TEST_CASE(
    "a coordinator of a signal that a live SignalIgnore holds is a logic error, never silence") {
  // Also of those whose inherited SIG_IGN it would respect: this one isn't inherited.
  for (const int number : {SIGTERM, SIGINT, SIGHUP, SIGQUIT}) {
    INFO(lastcall::signal_name(number));
    const lastcall::SignalIgnore ignore(number);
    ShutdownOptions options = quiet();
    options.signals = {SIGUSR1, number};
    const std::string words = refused(options);
    CHECK(starts_with(words, "logic_error: "));
    CHECK(contains(words, lastcall::signal_name(number)));

    ShutdownOptions dump = quiet();
    dump.signals = {SIGUSR1};
    dump.dump_signal = number;
    CHECK(starts_with(refused(dump), "logic_error: "));

    ShutdownOptions other = quiet();
    other.signals = {SIGUSR1};
    ShutdownCoordinator coordinator(other);
    const std::string of_function =
        refusal([&] { coordinator.on_signal(number, [](const lastcall::SignalInfo&) {}); });
    CHECK(starts_with(of_function, "logic_error: "));
    CHECK(contains(of_function, lastcall::signal_name(number)));
  }
}

TEST_CASE("a SignalIgnore of a signal that a coordinator traps is a logic error") {
  ShutdownOptions options = quiet();
  options.dump_signal = SIGQUIT;
  ShutdownCoordinator coordinator(options);
  coordinator.on_signal(SIGHUP, [](const lastcall::SignalInfo&) {});
  for (const int number : {SIGTERM, SIGINT, SIGQUIT, SIGHUP}) {
    CHECK(starts_with(refusal([&] { const lastcall::SignalIgnore ignore(number); }),
                      "logic_error: "));
  }
  coordinator.request_shutdown();
  coordinator.drain();
  // It has put everything back, also while it is still there.
  CHECK(refusal([] { const lastcall::SignalIgnore ignore(SIGTERM); }) == "nothing");
}

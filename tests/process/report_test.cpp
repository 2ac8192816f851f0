// What the report says of who was still in, and that the summary on stderr is that report.
#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/emulation.hpp"
#include "support/process.hpp"

#include <lastcall/lastcall.hpp>

#include <unistd.h>

#if defined(__linux__)
#include <sched.h>
#include <sys/prctl.h>
#endif

#include <atomic>
#include <chrono>
#include <csignal>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::Cause;
using lastcall::Outcome;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::Straggler;
using support::contains;
using support::Ended;
using support::expect;
using support::expect_equal;
using support::hang;
using support::in_a_process;
using support::quiet;

// The last fifth of a second is for the report.
ShutdownOptions short_of_time() {
  ShutdownOptions options = quiet(4000ms);
  options.abort_margin = 1000ms;
  return options;
}

}  // namespace

TEST_CASE("stderr_observer's summary is the report's to_text(), line by line") {
  const Ended ended = in_a_process([] {
    ShutdownOptions options = short_of_time();
    options.observer = lastcall::stderr_observer();
    ShutdownCoordinator coordinator(options);
    lastcall::Stage& storage = coordinator.stage("storage", 200ms);
    coordinator.spawn("held worker", [] { hang(); });
    coordinator.spawn("thrower", [](const CancellationToken& token) {
      token.wait();
      throw std::runtime_error("disk full\nor nearly");
    });
    const lastcall::WaitGroup::Guard unnamed[] = {coordinator.enter(), coordinator.enter()};
    storage.on_stop("held hook", [] { hang(); });
    storage.on_stop("throws, too", [] { throw std::runtime_error("no space"); });
    storage.on_drained("skipped", [] {});
    coordinator.on_signal(SIGHUP, [](const lastcall::SignalInfo&) {
      throw std::runtime_error("a reload is no failure of the shutdown");
    });
    coordinator.request_shutdown(Cause::cancelled("because of a test"));
    ::raise(SIGHUP);
    support::say(coordinator.drain().to_text());
    support::leave(0);
  });
  CHECK(ended.how == "exit 0");
  INFO(ended.err << "---- to_text()\n" << ended.out);
  for (const char* const words :
       {"(because of a test)", "\n  service ", "\n    held hook ", "\n  still in:\n",
        "\n    service/2 unnamed\n", "\n  failed:\n    thrower: disk full\\nor nearly\n",
        "\n    throws, too: no space\n"}) {
    INFO(words);
    CHECK(contains(ended.out, words));
  }
  std::string wanted;
  for (std::size_t begin = 0; begin < ended.out.size();) {
    const std::size_t end = ended.out.find('\n', begin) + 1;
    wanted += "lastcall: " + ended.out.substr(begin, end - begin);
    begin = end;
  }
  REQUIRE(ended.err.size() >= wanted.size());
  CHECK(ended.err.substr(ended.err.size() - wanted.size()) == wanted);
}

#if LASTCALL_LINUX

TEST_CASE("a straggler is all there: name, stage, place, age, thread, what it waits in, stack") {
  const Ended ended = in_a_process([] {
    ShutdownCoordinator coordinator(short_of_time());
    lastcall::Stage& storage = coordinator.stage("storage", 200ms);
    int ends[2];
    if (::pipe(ends) != 0) return 1;
    std::atomic<pid_t> reader{0};
    std::atomic<pid_t> deaf{0};
    const int line = __LINE__ + 1;
    storage.spawn("reader", [&] {
      reader = support::thread_id();
      char byte = 0;
      while (::read(ends[0], &byte, 1) <= 0) {
      }
    });
    coordinator.spawn("spinner", [] {
      static std::atomic<unsigned> turn{0};
      for (;;) ++turn;
    });
    coordinator.spawn("deaf", [&] {
      sigset_t all;
      ::sigfillset(&all);
      ::pthread_sigmask(SIG_BLOCK, &all, nullptr);
      deaf = support::thread_id();
      hang();
    });
    support::eventually([&] { return reader != 0 && deaf != 0; });
    coordinator.request_shutdown();
    const ShutdownReport report = coordinator.drain();
    expect(report.outcome == Outcome::overrun, "an overrun");

    const Straggler* const of_reader = support::find_straggler(report.stragglers, "reader");
    if (expect(of_reader != nullptr, "the reader")) {
      expect(of_reader->stage == "storage", "its stage");
      expect(contains(of_reader->where.file_name(), "report_test.cpp"), "its file");
      expect(static_cast<int>(of_reader->where.line()) >= line &&
                 static_cast<int>(of_reader->where.line()) <= line + 5,
             "its line");
      expect(of_reader->age >= 500ms && of_reader->age < 60s, "its age");
      expect_equal(of_reader->thread_id, reader.load(), "its thread");
      expect(of_reader->thread_name == "reader", "the thread's name");
      expect(support::tells_read(of_reader->waiting_in, ends[0]),
             "what it waits in: " + of_reader->waiting_in);
      if (!support::under_sanitizer && expect(!of_reader->stack.empty(), "its stack")) {
        expect(support::is_in_read(of_reader->stack[0]), "where it is: " + of_reader->stack[0]);
        expect(contains(of_reader->stack.back(), "+0x"), "an offset: " + of_reader->stack.back());
      }
    }
    const Straggler* const of_spinner = support::find_straggler(report.stragglers, "spinner");
    if (expect(of_spinner != nullptr, "the spinner")) {
      expect(support::starts_with(of_spinner->waiting_in, "running (") &&
                 contains(of_spinner->waiting_in, " s CPU)") &&
                 of_spinner->waiting_in != "running (0.00 s CPU)",
             "its time: " + of_spinner->waiting_in);
    }
    // No signal reaches it, so it has no stack; all the rest it has.
    const Straggler* const of_deaf = support::find_straggler(report.stragglers, "deaf");
    if (expect(of_deaf != nullptr, "the deaf one")) {
      expect_equal(of_deaf->thread_id, deaf.load(), "its thread");
      expect(of_deaf->thread_name == "deaf", "the thread's name");
      expect(support::tells_pause(of_deaf->waiting_in), "what it waits in: " + of_deaf->waiting_in);
      expect(of_deaf->where.line() != 0 && of_deaf->age > 0ns, "its place and age");
      if (!support::under_sanitizer) expect(of_deaf->stack.empty(), "no stack");
    }
    support::leave(0);
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// Each thread that shows its stack has to get a turn first, after all the others.
TEST_CASE("stacks are taken in time also where hung spinners and others take the processor") {
  if (support::under_sanitizer) return;
  const auto stacks_missing = [] {
    return in_a_process([] {
      cpu_set_t one;
      CPU_ZERO(&one);
      CPU_SET(static_cast<std::size_t>(::sched_getcpu()), &one);
      ::sched_setaffinity(0, sizeof one, &one);
      for (int busy = 0; busy < 3; ++busy) {
        if (::fork() != 0) continue;
        ::prctl(PR_SET_PDEATHSIG, SIGKILL);
        for (static std::atomic<unsigned> turn{0};;) ++turn;
      }
      ShutdownCoordinator coordinator(short_of_time());
      for (const char* const name : {"first", "second"}) {
        coordinator.spawn(name, [] {
          for (static std::atomic<unsigned> turn{0};;) ++turn;
        });
      }
      coordinator.on_stop("held hook", [] { hang(); });
      coordinator.request_shutdown();
      const ShutdownReport report = coordinator.drain();
      expect_equal(report.stragglers.size(), std::size_t{3}, "stragglers");
      int missing = 0;
      for (const Straggler& straggler : report.stragglers) missing += straggler.stack.empty();
      support::leave(missing);
    });
  };
  // Others may use this machine as well: one of three tries has to do.
  std::string story;
  for (int attempt = 0; attempt < 3; ++attempt) {
    const Ended ended = stacks_missing();
    if (ended.how == "exit 0") return;
    story += "stacks missing: " + ended.how + " " + ended.err + "\n";
  }
  INFO(story);
  CHECK(false);
}

#endif

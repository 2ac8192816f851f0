// A pthread_cancel() that is pending ends what it was meant for: a call of the user's, or the caller when
// the library's call has returned. Never the process, by a cancellation point where nothing may unwind.
#include <lastcall/shutdown_coordinator.hpp>
#include <lastcall/task_group.hpp>

#include "support/catch.hpp"
#include "support/coordinator.hpp"
#include "support/process.hpp"
#include "support/threads.hpp"

#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <functional>
#include <iostream>
#include <memory>
#include <streambuf>
#include <string>
#include <thread>

using namespace std::chrono_literals;
using lastcall::CancellationToken;
using lastcall::EventKind;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::ShutdownReport;
using lastcall::SignalInfo;
using lastcall::Stage;
using support::Diary;
using support::Ended;
using support::expect;
using support::hang;
using support::in_a_process;
using support::quiet;
using support::story_of;

namespace {

void cancel_this_thread() { ::pthread_cancel(::pthread_self()); }

// Drains; then what `before` has registered is at its end.
void drain_with(const ShutdownOptions& options,
                const std::function<void(ShutdownCoordinator&)>& before,
                const std::function<void(const ShutdownReport&)>& after) {
  ShutdownCoordinator coordinator(options);
  before(coordinator);
  coordinator.request_shutdown();
  const ShutdownReport report = coordinator.drain();
  expect(report.exit_code == 0, report.to_text());
  after(report);
  support::leave(0);
}

// A call of the library's on a thread of its own that somebody cancels meanwhile. What is pending when it has
// returned ends the thread at its next cancellation point, and not before.
void call_cancelled(const std::function<void(pthread_t)>& call) {
  std::atomic<bool> returned{false};
  std::atomic<bool> went_on{false};
  pthread_t thread{};
  struct Argument {
    const std::function<void(pthread_t)>& call;
    std::atomic<bool>& returned;
    std::atomic<bool>& went_on;
  } argument{call, returned, went_on};
  const auto body = [](void* given) -> void* {
    auto& mine = *static_cast<Argument*>(given);
    mine.call(::pthread_self());
    mine.returned = true;
    ::pthread_testcancel();
    mine.went_on = true;
    return nullptr;
  };
  expect(::pthread_create(&thread, nullptr, body, &argument) == 0, "a thread");
  void* value = nullptr;
  ::pthread_join(thread, &value);
  expect(returned, "the call returns");
  expect(!went_on && value == PTHREAD_CANCELED, "and then the thread ends");
}

// The same in a process of its own, which ends well.
void check_cancelled(const std::function<void(pthread_t)>& call) {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([&] { call_cancelled(call); });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

// Leaves something to be flushed at the end, by run() alone or after drain().
[[noreturn]] void end_with_output(ShutdownCoordinator& coordinator, bool drained) {
  std::printf("flushed");
  coordinator.request_shutdown();
  if (drained) coordinator.drain();
  coordinator.run();
}

// Ends the thread that flushes it, one way or the other.
class EndsThread : public std::streambuf {
 public:
  explicit EndsThread(bool by_cancel) : by_cancel_(by_cancel) {}

 private:
  int sync() override {
    if (!by_cancel_) ::pthread_exit(nullptr);
    cancel_this_thread();
    return 0;
  }
  const bool by_cancel_;
};

}  // namespace

TEST_CASE(
    "a hook that leaves a pthread_cancel() of its thread behind ended that, and no later one") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([] {
    Diary diary;
    drain_with(
        quiet(),
        [&](ShutdownCoordinator& coordinator) {
          coordinator.on_stop("cancels", cancel_this_thread);
          coordinator.on_stop("cancels at once", [] {
            ::pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, nullptr);
            cancel_this_thread();
          });
          coordinator.on_stop("leaves a type behind", [] {
            ::pthread_setcanceltype(PTHREAD_CANCEL_ASYNCHRONOUS, nullptr);
          });
          coordinator.on_stop("after", [&] {
            diary.add("after");
            ::pthread_testcancel();
            diary.add("went on");
          });
          coordinator.on_drained("last", cancel_this_thread);
        },
        [&](const ShutdownReport& report) {
          expect(diary.text() == "after\nwent on\n", diary.text());
          int ended_threads = 0;
          for (const lastcall::Event& event : report.events) {
            if (event.detail == "ended its thread") ++ended_threads;
          }
          expect(ended_threads == 3, story_of(report.events));
        });
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE(
    "a callback that leaves a pthread_cancel() of its thread behind costs no observer a line") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([] {
    Diary diary;
    ShutdownOptions options = quiet();
    options.observer = lastcall::json_observer(STDOUT_FILENO);
    std::unique_ptr<lastcall::CancellationCallback<void (*)()>> callback;
    drain_with(
        options,
        [&](ShutdownCoordinator& coordinator) {
          callback = std::make_unique<lastcall::CancellationCallback<void (*)()>>(
              coordinator.token(), &cancel_this_thread);
          coordinator.on_stop("after", diary.entry("after"));
        },
        [&](const ShutdownReport&) { expect(diary.text() == "after\n", diary.text()); });
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
  CHECK(support::contains(ended.out, "\"finished\""));
}

TEST_CASE("an observer that leaves a pthread_cancel() of its thread behind costs itself alone") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  const Ended ended = in_a_process([] {
    Diary diary;
    ShutdownOptions options = quiet();
    options.observer =
        std::make_shared<support::Witness>([](const lastcall::Event&) { cancel_this_thread(); });
    drain_with(
        options,
        [&](ShutdownCoordinator& coordinator) {
          coordinator.on_stop("after", diary.entry("after"));
        },
        [&](const ShutdownReport&) { expect(diary.text() == "after\n", diary.text()); });
  });
  INFO(ended.err);
  CHECK(ended.how == "exit 0");
}

TEST_CASE("an on_signal function that ends its thread leaves the next signal to another one") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  for (const bool by_cancel : {false, true}) {
    INFO(by_cancel);
    const Ended ended = in_a_process([by_cancel] {
      std::atomic<int> called{0};
      drain_with(
          quiet(),
          [&](ShutdownCoordinator& coordinator) {
            coordinator.on_signal(SIGHUP, [&](const SignalInfo&) {
              ++called;
              if (!by_cancel) ::pthread_exit(nullptr);
              cancel_this_thread();
            });
            for (int number = 1; number <= 3; ++number) {
              ::kill(::getpid(), SIGHUP);
              expect(support::eventually([&] { return called == number; }), "it is called");
            }
          },
          [](const ShutdownReport& report) {
            int ended_threads = 0;
            for (const lastcall::Event& event : report.events) {
              if (event.name == "on SIGHUP" && event.detail == "ended its thread") ++ended_threads;
            }
            expect(ended_threads >= 2, story_of(report.events));  // the last may be at it
          });
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
  }
}

TEST_CASE("a pthread_cancel() of who is in drain() ends it after that") {
  check_cancelled([](pthread_t self) {
    ShutdownCoordinator coordinator(quiet());
    coordinator.spawn("cancels", [self](const CancellationToken& token) {
      token.wait();
      ::pthread_cancel(self);
    });
    coordinator.request_shutdown();
    expect(coordinator.drain().exit_code == 0, "a clean end");
  });
}

TEST_CASE("a pthread_cancel() of who is in the destructor ends it after that") {
  check_cancelled([](pthread_t self) {
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    coordinator.on_stop("cancels", [self] { ::pthread_cancel(self); });
  });
}

TEST_CASE("a pthread_cancel() of who is in run() doesn't keep the process from its end") {
  for (const bool drained : {false, true}) {
    INFO(drained);
    const Ended ended = in_a_process([drained] {
      ShutdownCoordinator coordinator(quiet());
      const pthread_t self = ::pthread_self();
      coordinator.spawn("cancels", [self](const CancellationToken& token) {
        token.wait();
        ::pthread_cancel(self);
      });
      end_with_output(coordinator, drained);
    });
    INFO(ended.err);
    CHECK(ended.how == "exit 0");
    CHECK(ended.out == "flushed");
  }
}

TEST_CASE("a pthread_cancel() that is pending tears no snapshot(), no on_signal() and no making") {
  check_cancelled([](pthread_t self) {
    ::pthread_cancel(self);
    ShutdownCoordinator coordinator(quiet());
    coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
    coordinator.spawn("worker", [](const CancellationToken& token) { token.wait(); });
    expect(coordinator.snapshot().size() == 1, "one is in");
  });
}

TEST_CASE("a pthread_cancel() of who waits for a group ends it after that") {
  check_cancelled([](pthread_t self) {
    // What is waited for is the thread's very end.
    struct Slow {
      ~Slow() { std::this_thread::sleep_for(50ms); }
      void touch() {}
    };
    lastcall::TaskGroup group;
    group.spawn("cancels", [self] {
      thread_local Slow slow;
      slow.touch();
      ::pthread_cancel(self);
    });
    group.wait();
  });
}

TEST_CASE("a stream that ends the thread that flushes it costs no other one its flush") {
  if (support::under_sanitizer) return;  // they unwind such a thread in ways of their own
  for (const bool drained : {false, true}) {
    for (const bool by_cancel : {false, true}) {
      INFO(drained << by_cancel);
      const Ended ended = in_a_process([=] {
        static EndsThread buffer(by_cancel);
        std::cout.rdbuf(&buffer);
        std::clog.rdbuf(&buffer);
        ShutdownOptions options = quiet();
        options.last_words = STDERR_FILENO;
        ShutdownCoordinator coordinator(options);
        end_with_output(coordinator, drained);
      });
      INFO(ended.err);
      CHECK(ended.how == "exit 0");
      CHECK(ended.out == "flushed");
      CHECK(ended.err.empty());
    }
  }
}

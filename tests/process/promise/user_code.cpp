// User code that the library calls, and that doesn't come back, or comes back in a way nobody expects.
#include "adversary.hpp"

#include <pthread.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <exception>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>

namespace promise {
namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;

// ---- hooks -----------------------------------------------------------------------------------------

void on_stop_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_stop("held hook", [] { hang(); });
  lifetime.on_stop("next hook", [] { write_out(STDERR_FILENO, "the next hook has run\n"); });
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  stand.ready();
  lifetime.run();
}

void on_drained_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_drained("next hook", [] { write_out(STDERR_FILENO, "the next hook has run\n"); });
  lifetime.on_drained("held hook", [] { spin(); });
  stand.ready();
  lifetime.run();
}

void all_hooks_hang(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  for (int i = 0; i < 10; ++i) {
    lifetime.on_stop("held stop " + std::to_string(i), [] { hang(); });
    lifetime.on_drained("held drained " + std::to_string(i), [] { hang(); });
  }
  stand.ready();
  lifetime.run();
}

void on_signal_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_signal(SIGHUP, [&stand](const lastcall::SignalInfo&) {
    stand.ready();
    hang();
  });
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  ::kill(::getpid(), SIGHUP);
  lifetime.run();
}

struct HungObserver final : lastcall::Observer {
  void on_event(const lastcall::Event&) override { hang(); }
};

void observer_hangs(Stand& stand) {
  ShutdownOptions options = stand.options();
  options.observer = std::make_shared<HungObserver>();
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.on_stop("next hook", [] { write_out(STDERR_FILENO, "the next hook has run\n"); });
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  stand.ready();
  lifetime.run();
}

// ---- callbacks -------------------------------------------------------------------------------------

void callback_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  const CancellationCallback held(lifetime.token(), [] { hang(); });
  const CancellationCallback next(lifetime.token(),
                                  [] { write_out(STDERR_FILENO, "the next callback has run\n"); });
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  stand.ready();
  lifetime.run();
}

void abort_callback_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  const CancellationCallback held(lifetime.abort_token(), [] { hang(); });
  lifetime.spawn("worker", [abort = lifetime.abort_token()](CancellationToken) { abort.wait(); });
  stand.ready();
  lifetime.run();
}

// The timer thread is gone for good; the tree still has timers in it.
void deadline_callback_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  // Long enough for the callback to be there before: registered later it would run, and hang, in main.
  CancellationSource soon(lifetime.token(), 100ms);
  CancellationSource later(lifetime.token(), 1h);
  const CancellationCallback held(soon.token(), [&stand] {
    stand.ready();
    hang();
  });
  lifetime.spawn("worker", [token = later.token()](CancellationToken) { token.wait(); });
  lifetime.run();
}

// The destructor of a callback waits for it while it runs: so this worker hangs, too.
void deadline_callback_hangs_in_task(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    CancellationSource soon(token, 5ms);
    const CancellationCallback held(soon.token(), [&stand] {
      stand.ready();
      hang();
    });
    token.wait();
  });
  lifetime.run();
}

void callback_asks_for_more(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  const CancellationCallback busy(lifetime.token(), [&lifetime] {
    if (lifetime.request_shutdown()) write_out(STDERR_FILENO, "asked twice\n");
    try {
      static_cast<void>(lifetime.drain());
      write_out(STDERR_FILENO, "drained inside a callback\n");
    } catch (const std::logic_error&) {
      write_out(STDERR_FILENO, "drain() was refused\n");
    }
    lifetime.spawn("late worker", [](CancellationToken token) {
      if (token.is_cancelled()) write_out(STDERR_FILENO, "the late worker was told\n");
    });
  });
  stand.ready();
  lifetime.run();
}

// ---- what a task leaves behind ---------------------------------------------------------------------

struct HungDestructor {
  HungDestructor() = default;
  HungDestructor(HungDestructor&& other) noexcept : live(std::exchange(other.live, false)) {}
  HungDestructor& operator=(HungDestructor&&) = delete;
  ~HungDestructor() {
    if (live) hang();
  }
  bool live = true;
};

void captured_state_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker",
                 [state = HungDestructor()](CancellationToken token) { token.wait(); });
  stand.ready();
  lifetime.run();
}

void thread_local_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("worker", [](CancellationToken token) {
    static thread_local HungDestructor kept;
    static_cast<void>(kept.live);
    token.wait();
  });
  stand.ready();
  lifetime.run();
}

// ---- threads that end where nobody ends ------------------------------------------------------------

void hook_leaves_by_pthread_exit(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_stop("leaver", [] { ::pthread_exit(nullptr); });
  lifetime.on_stop("next hook", [] { write_out(STDERR_FILENO, "the next hook has run\n"); });
  stand.ready();
  lifetime.run();
}

// ---- exceptions ------------------------------------------------------------------------------------

void everything_throws(Stand& stand) {
  struct Thrower final : lastcall::Observer {
    void on_event(const lastcall::Event&) override { throw 1; }
  };
  ShutdownOptions options = stand.options();
  options.observer = std::make_shared<Thrower>();
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.on_stop("thrower", [] { throw std::runtime_error("no"); });
  lifetime.on_drained("thrower", [] { throw 2; });
  lifetime.spawn("thrower", [&stand](CancellationToken token) {
    stand.ready();
    token.wait();
    throw std::runtime_error("never");
  });
  lifetime.run();
}

void task_throws(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("thrower", [&stand](CancellationToken) {
    stand.ready();
    std::this_thread::sleep_for(40ms);
    stand.requested();
    throw std::runtime_error("no more");
  });
  lifetime.spawn("worker", [](CancellationToken token) { token.wait(); });
  lifetime.run();
}

// ---- main elsewhere --------------------------------------------------------------------------------

void main_before_run(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  stand.ready();
  char byte = 0;
  while (::read(empty_pipe(), &byte, 1) <= 0) {
  }
}

void main_on_its_own_mutex(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
  ::pthread_mutex_lock(&mutex);
  stand.ready();
  ::pthread_mutex_lock(&mutex);
}

void main_ends_by_hook(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  int ends[2];
  if (::pipe(ends) != 0) std::abort();
  lifetime.on_stop("server.stop()", [&] { ::close(ends[1]); });
  stand.ready();
  char byte = 0;
  static_cast<void>(::read(ends[0], &byte, 1) < 0);
  lifetime.run();
}

// ---- main that keeps the exit to itself ------------------------------------------------------------

void drains_with_a_held_worker(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [](CancellationToken) { hang(); });
  lifetime.on_stop("held hook", [] { hang(); });
  stand.ready();
  const lastcall::ShutdownReport report = lifetime.drain();
  std::_Exit(report.exit_code);
}

void destroyed_with_a_held_worker(Stand& stand) {
  {
    ShutdownCoordinator lifetime(stand.options());
    lifetime.spawn("held worker", [](CancellationToken) { hang(); });
    lifetime.on_stop("held hook", [] { hang(); });
    stand.ready();
    std::this_thread::sleep_for(40ms);
    stand.requested();
  }
  std::_Exit(5);
}

// ---- everything at once ----------------------------------------------------------------------------

[[noreturn]] void all_hangs(Stand& stand) {
  ShutdownOptions options = stand.options();
  options.grace_period = 60s;
  options.abort_margin = 20s;
  options.observer = std::make_shared<HungObserver>();
  ShutdownCoordinator lifetime(std::move(options));
  const CancellationCallback callback(lifetime.token(), [] { hang(); });
  const CancellationCallback abort(lifetime.abort_token(), [] { spin(); });
  lifetime.on_stop("held stop", [] { hang(); });
  lifetime.on_drained("held drained", [] { hang(); });
  lifetime.on_signal(SIGHUP, [](const lastcall::SignalInfo&) { hang(); });
  ::kill(::getpid(), SIGHUP);
  for (int i = 0; i < 4; ++i) {
    lifetime.spawn("held worker", [&stand](CancellationToken) {
      stand.ready();
      spin();
    });
  }
  hang();  // main, too
}

void three_interrupts(Target& target) {
  target.poke(SIGINT);
  target.wait(150ms);
  target.poke(SIGINT);
  target.wait(150ms);
  target.send(SIGINT);
}

void terminate_and_two_interrupts(Target& target) {
  target.poke(SIGTERM);
  target.wait(100ms);
  target.poke(SIGINT);
  target.wait(100ms);
  target.send(SIGINT);
}

// In the echo window of the first: it counts once. So the third is the second wish.
void doubled_interrupts(Target& target) {
  target.send(SIGINT);
  target.poke(SIGINT);
  target.wait(200ms);
  // The abort moves the end closer: it is a quarter of the grace period away now.
  target.poke(SIGINT);
}

// From another process, to the very end.
void in_a_storm(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.on_signal(SIGUSR1, [](const lastcall::SignalInfo&) {});
  lifetime.spawn("held worker", [](CancellationToken token) {
    token.wait();
    const pid_t target = ::getpid();
    if (::fork() == 0) {
      ::prctl(PR_SET_PDEATHSIG, SIGKILL);
      for (;;) {
        ::kill(target, SIGTERM);
        ::kill(target, SIGUSR1);
      }
    }
    hang();
  });
  stand.ready();
  lifetime.run();
}

void held_worker(Stand& stand) {
  ShutdownOptions options = stand.options();
  options.repeat_window = 100ms;  // the sender may lose the processor between two signals
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    stand.ready();
    hang();
  });
  lifetime.run();
}

// ---- stages ----------------------------------------------------------------------------------------

// The hook of the first stage eats that stage's budget and no other's: the worker of the last one needs
// nearly all of its own, and gets it.
void first_of_three_stages_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  auto& second = lifetime.stage("second", stand.grace() / 4);
  auto& third = lifetime.stage("third", stand.grace() / 4);
  const auto busy = stand.grace() / 8;
  const auto late = [busy](CancellationToken token) {
    token.wait();
    std::this_thread::sleep_for(busy);
  };
  lifetime.on_stop("held hook", [] { hang(); });
  second.spawn("second worker", late);
  second.on_drained("second hook", [] { write_out(STDERR_FILENO, "second drained\n"); });
  third.spawn("third worker", late);
  third.on_drained("third hook", [] { write_out(STDERR_FILENO, "third drained\n"); });
  stand.ready();
  lifetime.run();
}

void every_stage_hangs(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  auto& second = lifetime.stage("second", stand.grace() / 4);
  auto& third = lifetime.stage("third", stand.grace() / 4);
  lifetime.on_stop("held first", [] { hang(); });
  second.on_stop("held second", [] { hang(); });
  third.on_stop("held third", [] { hang(); });
  stand.ready();
  lifetime.run();
}

// Neither before its time nor much later.
void abort_token_in_time(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("worker", [&](CancellationToken token) {
    token.wait();
    const auto begin = lastcall::Clock::now();
    lifetime.abort_token().wait();
    const auto after = lastcall::Clock::now() - begin;
    const auto wanted = stand.grace() - stand.grace() / 4;
    if (after >= wanted - 30ms) write_out(STDERR_FILENO, "not too soon\n");
    if (after < wanted + (sanitized ? 5000ms : 100ms)) write_out(STDERR_FILENO, "not too late\n");
  });
  stand.ready();
  lifetime.run();
}

// A minute's grace, and a second Ctrl-C: what is left is shared out, so that the last stage runs, too.
void abort_in_first_of_three_stages(Stand& stand) {
  ShutdownOptions options = stand.options();
  options.grace_period = 60s;
  options.abort_margin = stand.grace();
  ShutdownCoordinator lifetime(std::move(options));
  auto& second = lifetime.stage("second", 10s);
  auto& third = lifetime.stage("third", 10s);
  lifetime.on_stop("held first", [] { hang(); });
  second.on_stop("held second", [] { hang(); });
  third.on_stop("third hook", [] { write_out(STDERR_FILENO, "third stopped\n"); });
  stand.ready();
  lifetime.run();
}

void interrupt_and_abort(Target& target) {
  target.poke(SIGINT);
  target.wait(100ms);
  target.send(SIGINT);
}

}  // namespace

void add_user_code(std::vector<Adversary>& all) {
  const auto add = [&all](const char* name, const char* how, std::vector<std::string> says,
                          void (*body)(Stand&), Bound bound = Bound::grace) -> Adversary& {
    Adversary adversary;
    adversary.name = name;
    adversary.how = how;
    adversary.says = std::move(says);
    adversary.body = body;
    adversary.bound = bound;
    all.push_back(std::move(adversary));
    return all.back();
  };
  add("on_stop hangs", "exit 124", {"held hook", "the next hook has run"}, on_stop_hangs);
  add("on_drained hangs", "exit 124", {"held hook", "the next hook has run"}, on_drained_hangs);
  add("hooks, 20, hang", "exit 124", {"held stop 0", "held stop 9", "held drained 9"},
      all_hooks_hang);
  add("on_signal hangs", "exit 0", {}, on_signal_hangs, Bound::at_once);
  add("observer hangs", "exit 124", {"the observer", "the next hook has run"}, observer_hangs);
  add("callback hangs", "exit 124", {"a cancellation callback", "the next callback has run"},
      callback_hangs);
  add("callback of the abort hangs", "exit 124", {"a cancellation callback of the abort token"},
      abort_callback_hangs);
  add("callback of a deadline hangs", "exit 0", {}, deadline_callback_hangs, Bound::at_once);
  add("callback of a deadline, in a task", "exit 124", {"held worker"},
      deadline_callback_hangs_in_task);
  add("callback requests, drains, spawns", "exit 0",
      {"drain() was refused", "the late worker was told"}, callback_asks_for_more, Bound::at_once);
  add("destructor of captured state", "exit 124", {"held worker"}, captured_state_hangs);
  add("destructor of a thread_local", "exit 0", {}, thread_local_hangs, Bound::at_once);
  add("hook leaves by pthread_exit()", "exit 0", {"the next hook has run"},
      hook_leaves_by_pthread_exit, Bound::at_once);
  add("everything throws", "exit 1", {}, everything_throws, Bound::at_once);
  add("task throws", "exit 1", {"thrower", "no more"}, task_throws, Bound::at_once).provoke =
      [](Target&) {};
  add("main in read(), before run()", "exit 124", {"main"}, main_before_run);
  add("main on its own mutex", "exit 124", {"main"}, main_on_its_own_mutex);
  add("main ended by a hook", "exit 0", {}, main_ends_by_hook, Bound::at_once);
  add("main in drain(), worker and hook held", "exit 124", {"held worker", "held hook"},
      drains_with_a_held_worker);
  add("main in the destructor, the same", "exit 5", {"held worker", "held hook"},
      destroyed_with_a_held_worker)
      .provoke = [](Target&) {};
  add("wishes: INT INT INT, all hang", "exit 130", {"forced by a third wish", "held worker"},
      all_hangs, Bound::at_once)
      .provoke = three_interrupts;
  add("wishes: TERM INT INT, all hang", "exit 130", {"forced by a third wish", "held worker"},
      all_hangs, Bound::at_once)
      .provoke = terminate_and_two_interrupts;
  add("wishes: INT echo INT", "exit 124", {"held worker"}, held_worker).provoke =
      doubled_interrupts;
  add("wishes: a storm of SIGTERM", "exit 124", {"held worker"}, in_a_storm);
  add("stage 1 of 3 hangs", "exit 124",
      {"held hook", "second drained", "third drained", "stage service overran", "stage second ok",
       "stage third ok"},
      first_of_three_stages_hangs);
  add("stages, 3, all hang", "exit 124", {"held first", "held second", "held third"},
      every_stage_hangs);
  add("abort token, at its time", "exit 0", {"not too soon", "not too late"}, abort_token_in_time);
  add("stages, 3, and a second Ctrl-C", "exit 124", {"held first", "held second", "third stopped"},
      abort_in_first_of_three_stages)
      .provoke = interrupt_and_abort;
}

}  // namespace promise

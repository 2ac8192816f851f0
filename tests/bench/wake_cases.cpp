// From the event until the one who waited for it runs: the last guard leaves, or SIGTERM is sent.
//
// Sender, signal thread and worker share processor 0, so that what counts is work and not how deep an idle
// processor sleeps; the figures named _two have a processor more, and no target.
#include "batch.hpp"
#include "cases.hpp"

#include <lastcall/cancellation.hpp>
#include <lastcall/shutdown_coordinator.hpp>
#include <lastcall/signal_trap.hpp>
#include <lastcall/wait_group.hpp>

#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <condition_variable>
#include <csignal>
#include <cstdint>
#include <latch>
#include <memory>
#include <mutex>
#include <optional>
#include <stop_token>

namespace bench {
namespace {

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::ShutdownOptions;
using lastcall::SignalTrap;
using lastcall::WaitGroup;

void futex_wait(std::atomic<std::uint32_t>& word, std::uint32_t expected) {
  syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}
void futex_wake(std::atomic<std::uint32_t>& word) {
  syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1, nullptr, nullptr, 0);
}

// Until a thread of this process sleeps in the kernel: on one processor it does as soon as it has got the
// processor; on two, one look later.
void let_it_sleep() {
  for (int turn = 0; turn < 4; ++turn) sched_yield();
}

// A sleeper and a waker, on one processor or on two. sleep() blocks until wake(). The median of the times
// from just before wake() until the sleeper runs. prepare() and tidy() are not counted.
template <class Prepare, class Sleep, class Wake, class Tidy>
double wake_latency(bool two, Prepare prepare, Sleep sleep, Wake wake, Tidy tidy) {
  // The sleeper sleeps between rounds, too: who spins has used up its turn when it counts.
  std::atomic<std::uint32_t> asked{0};   // the round that the sleeper shall begin
  std::atomic<std::uint32_t> asleep{0};  // ... is about to sleep in
  std::atomic<std::uint32_t> awake{0};   // ... woke up in
  Clock::time_point woken_at;
  std::vector<double> taken;
  pin_to(two ? 1 : 0);
  std::thread sleeper([&] {
    for (std::uint32_t round = 1;; ++round) {
      while (asked.load(std::memory_order_acquire) < round) futex_wait(asked, round - 1);
      if (asked.load(std::memory_order_acquire) > round) return;
      asleep.store(round, std::memory_order_release);
      sleep();
      woken_at = Clock::now();
      awake.store(round, std::memory_order_release);
    }
  });
  pin_to(0);
  const auto begin = Clock::now();
  std::uint32_t round = 0;
  while (seconds_since(begin) < 2 * shortest_batch || round < 50) {
    ++round;
    prepare();
    asked.store(round, std::memory_order_release);
    futex_wake(asked);
    while (asleep.load(std::memory_order_acquire) != round) sched_yield();
    if (two) {
      for (const auto until = Clock::now() + std::chrono::microseconds(50); Clock::now() < until;) {
      }
    } else {
      let_it_sleep();
    }
    const auto start = Clock::now();
    wake();
    while (awake.load(std::memory_order_acquire) != round) sched_yield();
    taken.push_back(std::chrono::duration<double>(woken_at - start).count());
    tidy();
  }
  asked.store(round + 2, std::memory_order_release);
  futex_wake(asked);
  sleeper.join();
  unpin();
  return median(taken);
}

void nothing() {}

void add_last_out(bool two) {
  const std::string name = two ? "last_out_two@" : "last_out@";
  add_timed_case(name + "lastcall", [two] {
    std::optional<WaitGroup> group;
    WaitGroup::Guard guard;
    return wake_latency(
        two,
        [&] {
          group.emplace();
          guard = group->enter();
        },
        [&] { group->wait(); }, [&] { guard.release(); }, nothing);
  });
  add_timed_case(name + "bare", [two] {
    std::atomic<std::uint32_t> word{0};
    return wake_latency(
        two, [&] { word.store(1); },
        [&] {
          while (word.load(std::memory_order_acquire) != 0) futex_wait(word, 1);
        },
        [&] {
          word.store(0, std::memory_order_release);
          futex_wake(word);
        },
        nothing);
  });
  add_timed_case(name + "std", [two] {
    std::optional<std::latch> latch;
    return wake_latency(
        two, [&] { latch.emplace(1); }, [&] { latch->wait(); }, [&] { latch->count_down(); },
        nothing);
  });
  add_timed_case((two ? "cancel_wake_two@" : "cancel_wake@") + std::string("lastcall"), [two] {
    CancellationSource source;
    CancellationToken token;
    return wake_latency(
        two,
        [&] {
          source = CancellationSource();
          token = source.token();
        },
        [&] { token.wait(); }, [&] { source.cancel(); }, nothing);
  });
}

// ---- signals ----

void send_sigterm() { kill(getpid(), SIGTERM); }

// A coordinator sees one shutdown in its life: everything is made anew for each signal.
double coordinator_latency(bool two) {
  std::optional<ShutdownCoordinator> coordinator;
  CancellationToken token;
  return wake_latency(
      two,
      [&] {
        ShutdownOptions options;
        options.observer = nullptr;
        // Its threads inherit where it may run.
        pin_to(two ? 1 : 0);
        coordinator.emplace(options);
        pin_to(0);
        let_it_sleep();
        token = coordinator->token();
      },
      [&] { token.wait(); }, send_sigterm,
      [&] {
        coordinator->drain();
        coordinator.reset();
      });
}

// The bricks alone: a thread that waits at a trap and cancels a source, a worker that waits on its token.
double trap_latency(bool two) {
  SignalTrap trap({SIGTERM});
  CancellationSource source;
  CancellationToken token;
  std::atomic<bool> over{false};
  pin_to(two ? 1 : 0);
  std::thread reader([&] {
    for (trap.wait(); !over.load(); trap.wait()) source.cancel();
  });
  const double latency = wake_latency(
      two,
      [&] {
        source = CancellationSource();
        token = source.token();
        let_it_sleep();
      },
      [&] { token.wait(); }, send_sigterm, nothing);
  over = true;
  send_sigterm();
  reader.join();
  return latency;
}

int bare_pipe[2];

void write_to_bare_pipe(int) {
  const int saved = errno;
  const char byte = 1;
  const auto written = write(bare_pipe[1], &byte, 1);
  static_cast<void>(written);
  errno = saved;
}

void read_from_bare_pipe() {
  pollfd watched{bare_pipe[0], POLLIN, 0};
  char byte = 0;
  while (read(bare_pipe[0], &byte, 1) != 1) poll(&watched, 1, -1);
}

// A handler that writes a byte, and a thread that sleeps in poll(2): the least that a self-pipe can do.
struct BareTrap {
  BareTrap() {
    if (pipe2(bare_pipe, O_CLOEXEC | O_NONBLOCK) != 0) std::perror("pipe2");
    struct sigaction ours {};
    ours.sa_handler = write_to_bare_pipe;
    ours.sa_flags = SA_RESTART;
    sigaction(SIGTERM, &ours, &before_);
  }
  BareTrap(const BareTrap&) = delete;
  BareTrap& operator=(const BareTrap&) = delete;
  ~BareTrap() {
    sigaction(SIGTERM, &before_, nullptr);
    close(bare_pipe[0]);
    close(bare_pipe[1]);
  }

 private:
  struct sigaction before_ {};
};

double self_pipe_latency(bool two) {
  const BareTrap trap;
  return wake_latency(two, nothing, read_from_bare_pipe, send_sigterm, nothing);
}

// The same, and the hop to the worker, with everything made anew for each signal.
double first_self_pipe_latency(bool two) {
  std::optional<BareTrap> trap;
  std::optional<std::jthread> reader;
  std::atomic<std::uint32_t> word{0};
  return wake_latency(
      two,
      [&] {
        trap.emplace();
        word.store(1);
        pin_to(two ? 1 : 0);
        reader.emplace([&] {
          read_from_bare_pipe();
          word.store(0, std::memory_order_release);
          futex_wake(word);
        });
        pin_to(0);
        let_it_sleep();
      },
      [&] {
        while (word.load(std::memory_order_acquire) != 0) futex_wait(word, 1);
      },
      send_sigterm,
      [&] {
        reader.reset();
        trap.reset();
      });
}

// A thread in sigwait(2) that stops a std::stop_source; the worker waits on it with a
// std::condition_variable_any.
double std_latency(bool two) {
  sigset_t terminate;
  sigset_t before;
  sigemptyset(&terminate);
  sigaddset(&terminate, SIGTERM);
  pthread_sigmask(SIG_BLOCK, &terminate, &before);
  std::optional<std::stop_source> source;
  std::optional<std::jthread> waiter;
  std::mutex mutex;
  std::condition_variable_any stopped;
  std::stop_token token;
  const double latency = wake_latency(
      two,
      [&] {
        source.emplace();
        token = source->get_token();
        pin_to(two ? 1 : 0);
        waiter.emplace([&] {
          int number = 0;
          sigwait(&terminate, &number);
          source->request_stop();
        });
        pin_to(0);
        let_it_sleep();
      },
      [&] {
        std::unique_lock<std::mutex> lock(mutex);
        stopped.wait(lock, token, [] { return false; });
      },
      send_sigterm, [&] { waiter.reset(); });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return latency;
}

void add_signals(bool two) {
  const std::string name = two ? "signal_two@" : "signal@";
  add_timed_case(name + "lastcall", [two] { return trap_latency(two); });
  add_timed_case(name + "bare", [two] { return self_pipe_latency(two); });
  add_timed_case(name + "std", [two] { return std_latency(two); });
  const std::string first = "first_" + name;
  add_timed_case(first + "lastcall", [two] { return coordinator_latency(two); });
  add_timed_case(first + "bare", [two] { return first_self_pipe_latency(two); });
}

}  // namespace

void add_wake_cases() {
  for (const bool two : {false, true}) {
    add_last_out(two);
    add_signals(two);
  }
}

}  // namespace bench

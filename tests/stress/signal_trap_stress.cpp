// Traps that are made and dropped by many threads while others raise signals, fork, ignore, and install
// handlers of their own.
//
// What is checked:
//  [lost]     a kind that was raised while a trap held it is handed out by that trap, whatever else goes on
//  [counted]  of a real-time signal each one sent is one call of the handler beneath the traps: called on by
//             them, or in place itself; none twice
//  [foreign]  what a forked child raises reaches no trap of its parent's
//  [child]    in a forked child the dispositions are those from before the traps, and a new trap works
//  [both]     a number is trapped or ignored, never both at once
//  [back]     at the end of each epoch every disposition, mask and descriptor is as before
//
// Under ThreadSanitizer the tool's own runtime stands between the kernel and every handler, and does what
// no kernel does: README.md of this directory has it. So under it alone, threads take what waits with them
// before they end, one at a time changes the number that has foreign handlers, and the thread that
// joins the others has its signals blocked.
#include <lastcall/cancellation.hpp>
#include <lastcall/signal_trap.hpp>

#include "options.hpp"
#include "process_state.hpp"

#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using lastcall::CancellationSource;
using lastcall::SignalIgnore;
using lastcall::SignalTrap;
using stress::check;
using support::Random;
using namespace std::chrono_literals;

// Kinds that nobody minds by default, and kinds with a handler beneath.
const std::array<int, 6> common = {SIGURG, SIGWINCH, SIGUSR1, SIGUSR2, SIGHUP, SIGTERM};
int counted() { return SIGRTMIN + 1; }      // sent with sigqueue(): each one is delivered
int foreign() { return SIGRTMIN + 2; }      // raised by children only
int contested() { return SIGRTMIN + 3; }    // trapped by some, ignored by others
int fashionable() { return SIGRTMIN + 4; }  // somebody else's handlers come and go on top

std::atomic<long> sent{0};
std::atomic<long> handled{0};
std::atomic<int> trappers{0};
std::atomic<int> ignorers{0};
std::atomic<long> made{0};
std::atomic<long> raised{0};
std::atomic<long> forked{0};

void beneath(int) {}
void count_one(int) { handled.fetch_add(1, std::memory_order_relaxed); }

void install(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

// Blocks all but the alarm of who waits for ever; what has come till then is handled before it returns.
void block_signals() {
  sigset_t all;
  ::sigfillset(&all);
  ::sigdelset(&all, SIGALRM);
  ::pthread_sigmask(SIG_SETMASK, &all, nullptr);
}

// ---- What threads do

void raise_at_own_trap(Random& random) {
  std::vector<int> numbers = {common[random.below(common.size())]};
  if (random.one_in(3)) numbers.push_back(common[random.below(common.size())]);
  if (random.one_in(3)) numbers.push_back(counted());
  SignalTrap trap{std::span<const int>(numbers)};
  ++made;
  for (std::size_t times = 1 + random.below(3); times > 0; --times) {
    const int number = numbers[random.below(numbers.size())];
    while (trap.try_wait()) {
    }
    ++raised;
    const bool to_thread = random.one_in(2);
    if (number == counted()) {
      if (::sigqueue(::getpid(), number, {}) != 0) continue;  // too many are waiting
      ++sent;
    } else if (to_thread) {
      ::raise(number);
    } else {
      ::kill(::getpid(), number);
    }
    // What others raise comes along.
    const auto patience = stress::Clock::now() + support::patience;
    for (;;) {
      const auto got = trap.wait_for(patience - stress::Clock::now());
      if (!got) stress::fail("[lost] " + std::string(lastcall::signal_name(number)));
      if (got->number == number) break;
    }
  }
  // The counted ones stay for whoever comes next only as calls of the handler.
}

void raise_at_large(Random& random) {
  const std::size_t count = random.below(random.one_in(8) ? 400 : 5);
  for (std::size_t at = 0; at < count; ++at) {
    ++raised;
    if (random.one_in(4)) {
      if (::sigqueue(::getpid(), counted(), {}) == 0) ++sent;
    } else {
      ::kill(::getpid(), common[random.below(common.size())]);
    }
  }
}

void fork_a_child() {
  ++forked;
  const pid_t child = ::fork();
  check(child >= 0, "no fork");
  if (child == 0) {
    // Of numbers that only traps change. What a SignalIgnore or somebody else did, a child inherits.
    const std::array<int, 5> numbers = {SIGURG, SIGUSR1, SIGTERM, counted(), foreign()};
    for (const int number : numbers) {
      struct sigaction now {};
      ::sigaction(number, nullptr, &now);
      const auto wanted = number == SIGURG ? SIG_DFL : number == counted() ? count_one : beneath;
      if (now.sa_handler != wanted) ::_exit(1);
    }
    SignalTrap trap{foreign()};
    ::raise(foreign());
    const auto got = trap.wait_for(support::patience);
    ::_exit(got && got->number == foreign() && got->sender_pid == ::getpid() ? 0 : 2);
  }
  const int code = support::outcome_of(child);
  check(code == 0, "[child] ended with " + std::to_string(code));
}

void contest(Random& random) {
  try {
    if (random.one_in(2)) {
      const SignalTrap trap{contested(), SIGURG};
      ++trappers;
      check(ignorers == 0, "[both] trapped while it was ignored");
      ::raise(contested());
      check(trap.fd() >= 0, "[lost] no descriptor");
      if (random.one_in(2)) std::this_thread::yield();
      check(ignorers == 0, "[both] ignored while it was trapped");
      --trappers;
    } else {
      const SignalIgnore ignore(contested());
      ++ignorers;
      check(trappers == 0, "[both] ignored while it was trapped");
      ::raise(contested());
      if (random.one_in(2)) std::this_thread::yield();
      check(trappers == 0, "[both] trapped while it was ignored");
      --ignorers;
    }
  } catch (const std::logic_error&) {
    // Somebody else has it.
  }
}

// A library that puts a handler on top and calls on what it found there, and one that puts its own there
// for good. One at a time: two that save and restore over each other break without us as well.
std::mutex fashion;
std::array<struct sigaction, 16> found;  // every disposition that it has ever found
std::size_t found_count = 0;
std::atomic<const struct sigaction*> below{nullptr};
const struct sigaction* remember(const struct sigaction& now) {
  for (std::size_t at = 0; at < found_count; ++at) {
    if (found[at].sa_sigaction == now.sa_sigaction) return &found[at];
  }
  check(found_count < found.size(), "more handlers than there can be");
  found[found_count] = now;
  return &found[found_count++];
}
void on_top(int number, siginfo_t* info, void* context) {
  // A trap may have come on top of this, and this on top of that.
  thread_local bool inside = false;
  const struct sigaction* const next = below.load();
  if (inside || next == nullptr) return;
  inside = true;
  if ((next->sa_flags & SA_SIGINFO) != 0) {
    next->sa_sigaction(number, info, context);
  } else if (next->sa_handler != SIG_DFL && next->sa_handler != SIG_IGN) {
    next->sa_handler(number);
  }
  inside = false;
}
void dress_up(Random& random) {
  if (random.one_in(2)) {
    std::unique_lock<std::mutex> alone(fashion, std::defer_lock);
    if (support::under_tsan) alone.lock();
    const SignalTrap trap{fashionable()};
    ::raise(fashionable());
    return;
  }
  const std::unique_lock<std::mutex> lock(fashion, std::try_to_lock);
  if (!lock) return;
  struct sigaction mine {};
  mine.sa_sigaction = on_top;
  mine.sa_flags = SA_SIGINFO;
  ::sigemptyset(&mine.sa_mask);
  struct sigaction now {};
  ::sigaction(fashionable(), nullptr, &now);
  below = remember(now);
  ::sigaction(fashionable(), &mine, &now);
  ::raise(fashionable());
  // What was found may be ours, and its trap may have gone meanwhile.
  ::sigaction(fashionable(), &now, nullptr);
  ::raise(fashionable());
}

void read_along(SignalTrap& shared, Random& random) {
  const auto got = random.one_in(2) ? shared.try_wait() : shared.wait_for(200us);
  if (got) check(got->number != foreign(), "[foreign] a child's signal came to its parent");
}

void one_epoch(const stress::Options& options, Random& random) {
  const std::string before = stress::state_of_process();
  const int descriptors = support::open_descriptors();
  sent = 0;
  handled = 0;
  {
    // Held by nobody in particular, throughout: read by all, and by two who block in it.
    SignalTrap shared{SIGURG, SIGUSR1, foreign(), counted()};
    CancellationSource over;
    sigset_t mask;
    ::pthread_sigmask(SIG_SETMASK, nullptr, &mask);
    if (support::under_tsan) block_signals();
    support::Threads readers;
    for (int reader = 0; reader < 2; ++reader) {
      readers.start([&] {
        ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
        while (const auto got = shared.wait(over.token())) {
          check(got->number != foreign(), "[foreign] a child's signal came to its parent");
        }
      });
    }
    {
      const int count = options.some_threads(random);
      support::StartingLine line(count);
      support::Threads threads;
      for (int number = 0; number < count; ++number) {
        threads.start([&, number, seed = random.next()] {
          Random own(seed);
          ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
          line.ready_steady_go();
          for (int turn = 0; turn < (support::under_sanitizer ? 60 : 200); ++turn) {
            switch (own.below(12)) {
              case 0:
              case 1:
              case 2:
              case 3: raise_at_own_trap(own); break;
              case 4:
              case 5: raise_at_large(own); break;
              case 6:
              case 7: contest(own); break;
              case 8:
              case 9: dress_up(own); break;
              case 10:
                // Clang 14's AddressSanitizer may leave its allocator locked in a child.
                if (!support::under_asan && number < 2 && own.one_in(8)) fork_a_child();
                break;
              default: read_along(shared, own); break;
            }
          }
          if (support::under_tsan) block_signals();
        });
      }
    }
    // ThreadSanitizer keeps one signal of a number for each thread, and merges the others itself.
    if (!support::under_tsan) {
      check(support::eventually([] { return handled == sent; }),
            "[counted] sent " + std::to_string(sent) + ", handled " + std::to_string(handled));
    }
    over.cancel();
    readers.join();
    ::pthread_sigmask(SIG_SETMASK, &mask, nullptr);
  }
  check(support::under_tsan ? handled <= sent : handled == sent, "[counted] one was handled twice");
  // The shared trap's own unread signals may be raised again as it goes: harmless kinds only.
  const std::string changed = stress::difference(before, stress::state_of_process());
  check(changed.empty(), "[back] " + changed);
  check(support::open_descriptors() == descriptors, "[back] descriptors are left");
}

}  // namespace

int main(int argc, char** argv) {
  const stress::Options options = stress::begin("signal_trap_stress", argc, argv);
  for (const int number : common) {
    if (number != SIGURG && number != SIGWINCH) install(number, beneath);
  }
  install(counted(), count_one);
  for (const int number : {foreign(), contested(), fashionable()}) install(number, beneath);
  { const SignalTrap first{SIGURG}; }  // what is made once is made now
  stress::run(options, [&](Random& random) { one_epoch(options, random); });
  std::printf("%llu epochs, %ld traps, %ld signals, %ld forks: ok\n",
              static_cast<unsigned long long>(stress::epoch), made.load(), raised.load(),
              forked.load());
  return 0;
}

// One thread and its own signals. What needs other processes, forks, storms and deaths is in
// tests/process/signal_trap_process_test.cpp.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <sys/types.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <initializer_list>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

using namespace std::chrono_literals;
using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;

namespace {

struct sigaction disposition_of(int number) {
  struct sigaction now {};
  ::sigaction(number, nullptr, &now);
  return now;
}

void set_handler(int number, void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  ::sigaction(number, &action, nullptr);
}

bool is_default(int number) { return disposition_of(number).sa_handler == SIG_DFL; }
bool is_ignored(int number) { return disposition_of(number).sa_handler == SIG_IGN; }

bool is_blocked(int number) {
  sigset_t now;
  ::pthread_sigmask(SIG_BLOCK, nullptr, &now);
  return ::sigismember(&now, number) == 1;
}

void change_mask(int how, int number) {
  sigset_t set;
  ::sigemptyset(&set);
  ::sigaddset(&set, number);
  ::pthread_sigmask(how, &set, nullptr);
}

void block(int number) { change_mask(SIG_BLOCK, number); }
void unblock(int number) { change_mask(SIG_UNBLOCK, number); }

std::vector<int> numbers_pending(SignalTrap& trap) {
  std::vector<int> numbers;
  while (const std::optional<SignalInfo> info = trap.try_wait()) numbers.push_back(info->number);
  return numbers;
}

template <class Error, class Body>
std::string message_of(Body body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  } catch (const std::exception& error) {
    return std::string("of another type: ") + error.what();
  }
  return "nothing was thrown";
}

std::string why_not_trapped(int number) {
  return message_of<std::invalid_argument>([&] { const SignalTrap trap{number}; });
}

std::string why_not_ignored(int number) {
  return message_of<std::invalid_argument>([&] { const SignalIgnore ignore(number); });
}

}  // namespace

TEST_CASE("a trap catches SIGINT and SIGTERM unless told otherwise") {
  {
    SignalTrap trap;
    ::raise(SIGTERM);
    CHECK(trap.wait().number == SIGTERM);
    ::raise(SIGINT);
    CHECK(trap.wait().number == SIGINT);
    CHECK(is_default(SIGHUP));
  }
  CHECK(is_default(SIGINT));
  CHECK(is_default(SIGTERM));
  {
    const std::vector<int> listed = {SIGHUP, SIGUSR1};
    SignalTrap trap{std::span<const int>(listed)};
    ::raise(SIGUSR1);
    CHECK(trap.wait().number == SIGUSR1);
    CHECK(is_default(SIGINT));
  }
}

TEST_CASE("a trap can be neither copied nor moved, and is not made by mistake") {
  static_assert(!std::is_copy_constructible_v<SignalTrap> &&
                !std::is_move_constructible_v<SignalTrap>);
  static_assert(!std::is_copy_constructible_v<SignalIgnore> &&
                !std::is_move_constructible_v<SignalIgnore>);
  static_assert(!std::is_convertible_v<std::span<const int>, SignalTrap>);
  static_assert(!std::is_convertible_v<int, SignalIgnore>);
  static_assert(noexcept(std::declval<const SignalTrap&>().fd()));
  SUCCEED();
}

TEST_CASE("what was received says number, code, sender and time") {
  SignalTrap trap{SIGUSR1};
  const auto before = lastcall::Clock::now();
  ::kill(::getpid(), SIGUSR1);
  const SignalInfo info = trap.wait();
  CHECK(info.number == SIGUSR1);
  CHECK(info.code == SI_USER);
  CHECK(info.sender_pid == ::getpid());
  CHECK(info.sender_uid == ::getuid());
  CHECK(info.received >= before);
  CHECK(info.received <= lastcall::Clock::now());
}

#if defined(__linux__)
TEST_CASE("a signal of a timer has no sender") {
  SignalTrap trap{SIGUSR1};
  sigevent event{};
  event.sigev_notify = SIGEV_SIGNAL;
  event.sigev_signo = SIGUSR1;
  event.sigev_value.sival_int = 0x7fffffff;
  // The number of a timer lies where other signals have their sender's: not the first one, which is
  // 0.
  timer_t other{};
  REQUIRE(::timer_create(CLOCK_MONOTONIC, &event, &other) == 0);
  timer_t timer{};
  REQUIRE(::timer_create(CLOCK_MONOTONIC, &event, &timer) == 0);
  itimerspec once{};
  once.it_value.tv_nsec = 1;
  REQUIRE(::timer_settime(timer, 0, &once, nullptr) == 0);
  const SignalInfo info = trap.wait();
  ::timer_delete(timer);
  ::timer_delete(other);
  CHECK(info.code == SI_TIMER);
  CHECK(info.sender_pid == 0);
  CHECK(info.sender_uid == 0);
}
#endif

TEST_CASE("numbers that can't be trapped are refused, by number and name") {
  CHECK(why_not_trapped(SIGKILL) == "lastcall: SIGKILL (9) cannot be trapped");
  CHECK(why_not_trapped(SIGSTOP) ==
        "lastcall: SIGSTOP (" + std::to_string(SIGSTOP) + ") cannot be trapped");
  for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) {
    CHECK(why_not_trapped(fault) == "lastcall: " + std::string(lastcall::signal_name(fault)) +
                                        " (" + std::to_string(fault) +
                                        ") is a synchronous fault and cannot be trapped");
  }
  CHECK(why_not_trapped(0) == "lastcall: 0 is not a signal number");
  CHECK(why_not_trapped(-1) == "lastcall: -1 is not a signal number");
  CHECK(why_not_trapped(999) == "lastcall: 999 is not a signal number");
  CHECK(why_not_trapped(lastcall::detail::signal_limit) ==
        "lastcall: " + std::to_string(lastcall::detail::signal_limit) + " is not a signal number");
  CHECK(why_not_trapped(std::numeric_limits<int>::max()) ==
        "lastcall: 2147483647 is not a signal number");
  CHECK(why_not_trapped(std::numeric_limits<int>::min()) ==
        "lastcall: -2147483648 is not a signal number");
#if defined(__linux__)
  for (int number = 32; number < SIGRTMIN; ++number) {
    CHECK(why_not_trapped(number) == "lastcall: signal " + std::to_string(number) +
                                         " is reserved by the C library and cannot be trapped");
  }
#endif
}

TEST_CASE("an empty list is refused") {
  CHECK(message_of<std::invalid_argument>([] { const SignalTrap trap(std::span<const int>{}); }) ==
        "lastcall: the list of signals to trap is empty");
  CHECK(message_of<std::invalid_argument>([] {
          const SignalTrap trap(std::initializer_list<int>{});
        }) == "lastcall: the list of signals to trap is empty");
}

TEST_CASE("numbers that can't be ignored are refused, by number and name") {
  CHECK(why_not_ignored(SIGKILL) == "lastcall: SIGKILL (9) cannot be ignored");
  CHECK(why_not_ignored(SIGSEGV) ==
        "lastcall: SIGSEGV (11) is a synchronous fault and cannot be ignored");
  CHECK(why_not_ignored(0) == "lastcall: 0 is not a signal number");
  CHECK(why_not_ignored(999) == "lastcall: 999 is not a signal number");
}

TEST_CASE("a trap with one bad number changes nothing") {
  set_handler(SIGUSR2, SIG_IGN);
  for (const int bad : {SIGKILL, 0, 999, SIGSEGV}) {
    CHECK_THROWS_AS(SignalTrap({SIGUSR1, SIGUSR2, bad}), std::invalid_argument);
    CHECK_THROWS_AS(SignalTrap({bad, SIGUSR1, SIGUSR2}), std::invalid_argument);
    CHECK(is_default(SIGUSR1));
    CHECK(is_ignored(SIGUSR2));
  }
  set_handler(SIGUSR2, SIG_DFL);
}

TEST_CASE("every other signal can be trapped, job control too") {
  for (int number = 1; number < lastcall::detail::signal_limit; ++number) {
    switch (number) {
      case SIGKILL:
      case SIGSTOP:
      case SIGSEGV:
      case SIGBUS:
      case SIGFPE:
      case SIGILL: continue;
      default: break;
    }
#if defined(SIGRTMIN)
    if (number > 31 && number < SIGRTMIN) continue;
#endif
    INFO(number);
    const struct sigaction before = disposition_of(number);
    {
      SignalTrap trap{number};
      const bool raised = ::raise(number) == 0;
      // qemu-user takes some of its host's real-time signals for itself, and has no others to send
      // instead of the last ones; these it lets nobody raise.
      if (!raised && number > 60) continue;
      REQUIRE(raised);
      CHECK(trap.wait().number == number);
    }
    CHECK(disposition_of(number).sa_handler == before.sa_handler);
  }
}

TEST_CASE("a number named twice counts once") {
  SignalTrap trap{SIGUSR1, SIGUSR1, SIGUSR1};
  ::raise(SIGUSR1);
  CHECK(numbers_pending(trap) == std::vector<int>{SIGUSR1});
}

TEST_CASE("the handler is installed with SA_RESTART, SA_SIGINFO, SA_ONSTACK and a full mask") {
  const SignalTrap trap{SIGUSR1};
  const struct sigaction now = disposition_of(SIGUSR1);
  CHECK((now.sa_flags & SA_RESTART) != 0);
  CHECK((now.sa_flags & SA_SIGINFO) != 0);
  CHECK((now.sa_flags & SA_ONSTACK) != 0);
  for (int number = 1; number < 32; ++number) {
    if (number == SIGKILL || number == SIGSTOP) continue;  // the kernel takes these out
    CHECK(::sigismember(&now.sa_mask, number) == 1);
  }
}

TEST_CASE("of those pending at once SIGINT is handed out first, then SIGTERM, then by number") {
  SignalTrap trap{SIGHUP, SIGUSR1, SIGTERM, SIGUSR2, SIGINT, SIGCHLD};
  for (const int number : {SIGUSR2, SIGCHLD, SIGTERM, SIGHUP, SIGUSR1, SIGINT}) ::raise(number);
  std::vector<int> by_number = {SIGHUP, SIGUSR1, SIGUSR2, SIGCHLD};
  std::sort(by_number.begin(), by_number.end());
  std::vector<int> wanted = {SIGINT, SIGTERM};
  wanted.insert(wanted.end(), by_number.begin(), by_number.end());
  CHECK(numbers_pending(trap) == wanted);
}

TEST_CASE("one that comes while others are waiting takes its place among them") {
  SignalTrap trap{SIGHUP, SIGTERM, SIGINT};
  ::raise(SIGHUP);
  ::raise(SIGTERM);
  CHECK(trap.wait().number == SIGTERM);
  ::raise(SIGINT);
  CHECK(trap.wait().number == SIGINT);
  CHECK(trap.wait().number == SIGHUP);
}

TEST_CASE("repeats are kept, first come first served") {
  SignalTrap trap{SIGUSR1, SIGTERM};
  for (int turn = 0; turn < 500; ++turn) ::raise(SIGUSR1);
  ::raise(SIGTERM);
  CHECK(trap.wait().number == SIGTERM);
  lastcall::Clock::time_point last{};
  for (int turn = 0; turn < 500; ++turn) {
    const std::optional<SignalInfo> info = trap.try_wait();
    REQUIRE(info);
    REQUIRE(info->received >= last);
    last = info->received;
  }
  CHECK_FALSE(trap.try_wait());
}

TEST_CASE("try_wait never blocks") {
  SignalTrap trap{SIGUSR1};
  CHECK_FALSE(trap.try_wait());
  ::raise(SIGUSR1);
  const std::optional<SignalInfo> info = trap.try_wait();
  REQUIRE(info);
  CHECK(info->number == SIGUSR1);
  CHECK_FALSE(trap.try_wait());
}

TEST_CASE("waiting keeps errno when it finds nothing") {
  SignalTrap trap{SIGUSR1};
  errno = 4711;
  CHECK_FALSE(trap.try_wait());
  CHECK(errno == 4711);
}

TEST_CASE("wait_for gives up at its time and not before") {
  SignalTrap trap{SIGUSR1};
  const auto begin = lastcall::Clock::now();
  CHECK_FALSE(trap.wait_for(30ms));
  CHECK(lastcall::Clock::now() - begin >= 30ms);
  const auto again = lastcall::Clock::now();
  CHECK_FALSE(trap.wait_for(1500us));
  CHECK(lastcall::Clock::now() - again >= 1500us);
  // "Already" still takes what is there.
  CHECK_FALSE(trap.wait_for(0ms));
  CHECK_FALSE(trap.wait_for(std::chrono::hours::min()));
  ::raise(SIGUSR1);
  CHECK(trap.wait_for(-1s));
  ::raise(SIGUSR1);
  CHECK(trap.wait_for(std::chrono::hours::max()));
  ::raise(SIGUSR1);
  CHECK(trap.wait_for(std::chrono::duration<double>(1e300)));
}

TEST_CASE("waiting goes on through signals of others") {
  set_handler(SIGUSR2, [](int) {});
  {
    SignalTrap trap{SIGUSR1};
    const pthread_t waiter = ::pthread_self();
    std::atomic<pid_t> id{support::thread_id()};
    std::thread other([&] {
      support::let_it_block(id);
      for (int turn = 0; turn < 20; ++turn) {
        ::pthread_kill(waiter, SIGUSR2);
        std::this_thread::sleep_for(1ms);
      }
      ::pthread_kill(waiter, SIGUSR1);
    });
    CHECK(trap.wait().number == SIGUSR1);
    other.join();
  }
  set_handler(SIGUSR2, SIG_DFL);
}

TEST_CASE("a time that passes is not stretched by signals of others") {
  set_handler(SIGUSR2, [](int) {});
  {
    SignalTrap trap{SIGUSR1};
    const pthread_t waiter = ::pthread_self();
    std::atomic<bool> over{false};
    std::thread other([&] {
      while (!over) {
        ::pthread_kill(waiter, SIGUSR2);
        std::this_thread::sleep_for(1ms);
      }
    });
    CHECK_FALSE(trap.wait_for(300ms));
    over = true;
    other.join();
  }
  set_handler(SIGUSR2, SIG_DFL);
}

TEST_CASE("fd polls readable while a signal is pending, and only then") {
  SignalTrap trap{SIGUSR1, SIGUSR2};
  CHECK_FALSE(support::is_readable(trap.fd()));
  ::raise(SIGUSR1);
  ::raise(SIGUSR2);
  ::raise(SIGUSR2);
  for (int left = 3; left > 0; --left) {
    CHECK(support::is_readable(trap.fd()));
    CHECK(trap.try_wait());
  }
  // The bell may lie there still; the next look takes it away.
  CHECK_FALSE(trap.try_wait());
  CHECK_FALSE(support::is_readable(trap.fd()));
  CHECK(::fcntl(trap.fd(), F_GETFD) == FD_CLOEXEC);
}

TEST_CASE("a wait with a token ends with a signal or with the token") {
  SignalTrap trap{SIGUSR1};
  CancellationSource source;
  const int descriptors = support::open_descriptors();
  ::raise(SIGUSR1);
  CHECK(trap.wait(source.token()));
  CHECK(support::open_descriptors() == descriptors);  // none for the token while none is needed

  // A token that can never be cancelled is none.
  ::raise(SIGUSR1);
  CHECK(trap.wait(CancellationToken()));

  std::atomic<pid_t> id{support::thread_id()};
  std::thread canceller([&] {
    support::let_it_block(id);
    source.cancel();
  });
  CHECK_FALSE(trap.wait(source.token()));
  canceller.join();
}

TEST_CASE("a token that is cancelled already goes before a signal, which stays pending") {
  SignalTrap trap{SIGUSR1};
  CancellationSource source;
  source.cancel();
  ::raise(SIGUSR1);
  CHECK_FALSE(trap.wait(source.token()));
  CHECK(support::is_readable(trap.fd()));
  CHECK(trap.try_wait());
}

TEST_CASE("every trap gets a copy of its own") {
  SignalTrap first{SIGUSR1};
  SignalTrap second{SIGUSR1, SIGUSR2};
  {
    SignalTrap third{SIGUSR1};
    ::raise(SIGUSR1);
    CHECK(numbers_pending(third) == std::vector<int>{SIGUSR1});
  }
  ::raise(SIGUSR1);
  ::raise(SIGUSR2);
  CHECK(numbers_pending(first) == std::vector<int>{SIGUSR1, SIGUSR1});
  CHECK(numbers_pending(second) == std::vector<int>{SIGUSR1, SIGUSR1, SIGUSR2});
}

TEST_CASE("the constructor unblocks its signals in its thread, the destructor blocks them again") {
  block(SIGUSR1);
  block(SIGHUP);
  {
    SignalTrap trap{SIGUSR1, SIGUSR2};
    CHECK_FALSE(is_blocked(SIGUSR1));
    CHECK(is_blocked(SIGHUP));
    ::raise(SIGUSR1);
    CHECK(trap.try_wait());
  }
  CHECK(is_blocked(SIGUSR1));
  CHECK_FALSE(is_blocked(SIGUSR2));
  CHECK(is_blocked(SIGHUP));
  unblock(SIGUSR1);
  unblock(SIGHUP);
}

TEST_CASE("a signal that was pending and blocked is caught by the trap that unblocks it") {
  block(SIGUSR1);
  ::raise(SIGUSR1);
  {
    SignalTrap trap{SIGUSR1};
    CHECK(trap.try_wait());
  }
  unblock(SIGUSR1);
}

TEST_CASE("the mask is as before when the last trap of the thread has gone, in either order") {
  for (const bool older_first : {true, false}) {
    block(SIGUSR1);
    std::optional<SignalTrap> older;
    older.emplace(std::initializer_list<int>{SIGUSR1});
    std::optional<SignalTrap> newer;
    newer.emplace(std::initializer_list<int>{SIGUSR1});
    (older_first ? older : newer).reset();
    CHECK_FALSE(is_blocked(SIGUSR1));
    (older_first ? newer : older).reset();
    CHECK(is_blocked(SIGUSR1));
    unblock(SIGUSR1);
  }
}

TEST_CASE("a trap that another thread destroys leaves that thread's mask alone") {
  block(SIGUSR1);
  std::optional<SignalTrap> trap;
  trap.emplace(std::initializer_list<int>{SIGUSR1});
  unblock(SIGUSR2);
  bool blocked_there = true;
  std::thread other([&] {
    trap.reset();
    blocked_there = is_blocked(SIGUSR1);
  });
  other.join();
  CHECK_FALSE(blocked_there);
  CHECK_FALSE(is_blocked(SIGUSR1));
}

TEST_CASE(
    "a trap that a later thread destroys leaves that thread's mask alone, whoever it looks like") {
  // A thread that starts when another has ended mostly gets its pthread_t.
  bool were_equal = false;
  for (int turn = 0; turn < 100 && !were_equal; ++turn) {
    std::optional<SignalTrap> trap;
    std::optional<SignalTrap> others;
    pthread_t maker{};
    std::thread first([&] {
      block(SIGUSR1);
      maker = ::pthread_self();
      trap.emplace(std::initializer_list<int>{SIGUSR1});
    });
    first.join();
    bool blocked_by_the_first = true;
    bool blocked_by_its_own = true;
    std::thread second([&] {
      were_equal = ::pthread_equal(maker, ::pthread_self()) != 0;
      unblock(SIGUSR1);
      others.emplace(std::initializer_list<int>{SIGUSR1});
      trap.reset();
      blocked_by_the_first = is_blocked(SIGUSR1);
      others.reset();  // nor is it heir to what the first had to block
      blocked_by_its_own = is_blocked(SIGUSR1);
    });
    second.join();
    CHECK_FALSE(blocked_by_the_first);
    CHECK_FALSE(blocked_by_its_own);
  }
}

TEST_CASE("a trap and a SignalIgnore of one number exclude each other") {
  {
    const SignalTrap trap{SIGUSR1};
    CHECK(message_of<std::logic_error>([] { const SignalIgnore ignore(SIGUSR1); }) ==
          "lastcall: SIGUSR1 (" + std::to_string(SIGUSR1) +
              ") can't be ignored: a live trap holds it");
    const SignalIgnore other(SIGUSR2);
    CHECK(message_of<std::logic_error>([] {
            const SignalTrap both{SIGHUP, SIGUSR2};
          }) == "lastcall: SIGUSR2 (" + std::to_string(SIGUSR2) +
                    ") can't be trapped: a SignalIgnore holds it");
    CHECK(is_default(SIGHUP));
    CHECK(is_ignored(SIGUSR2));
    CHECK_FALSE(is_default(SIGUSR1));
  }
  // And not for longer than they live.
  const SignalIgnore ignore(SIGUSR1);
  const SignalTrap trap{SIGUSR2};
}

TEST_CASE("a SignalIgnore ignores, and restores on destruction; several count") {
  set_handler(SIGUSR1, [](int) {});
  const auto handler = disposition_of(SIGUSR1).sa_handler;
  {
    std::optional<SignalIgnore> first;
    first.emplace(SIGUSR1);
    CHECK(is_ignored(SIGUSR1));
    const SignalIgnore second(SIGUSR1);
    first.reset();
    CHECK(is_ignored(SIGUSR1));
    ::raise(SIGUSR1);
  }
  CHECK(disposition_of(SIGUSR1).sa_handler == handler);
  {
    const SignalIgnore ignore(SIGUSR1);
    set_handler(SIGUSR1, SIG_DFL);
  }
  CHECK(is_default(SIGUSR1));  // somebody else changed it: not touched
  {
    const SignalIgnore first(SIGUSR1);
    set_handler(SIGUSR1, handler);
    const SignalIgnore second(SIGUSR1);
    CHECK(is_ignored(SIGUSR1));
  }
  CHECK(disposition_of(SIGUSR1).sa_handler == handler);
  set_handler(SIGUSR1, SIG_DFL);
}

TEST_CASE("numbers that were ignored are trapped, and ignored again afterwards") {
  set_handler(SIGUSR1, SIG_IGN);
  CHECK(lastcall::detail::is_ignored(SIGUSR1));
  {
    SignalTrap trap{SIGUSR1};
    CHECK_FALSE(lastcall::detail::is_ignored(SIGUSR1));
    ::raise(SIGUSR1);
    CHECK(trap.try_wait());
    ::raise(SIGUSR1);  // not read: not raised again, since SIG_IGN is what is restored
  }
  CHECK(is_ignored(SIGUSR1));
  set_handler(SIGUSR1, SIG_DFL);
  CHECK_FALSE(lastcall::detail::is_ignored(SIGUSR1));
  CHECK_FALSE(lastcall::detail::is_ignored(0));
  CHECK_FALSE(lastcall::detail::is_ignored(999));
}

TEST_CASE("no descriptor is left behind") {
  const int before = support::open_descriptors();
  {
    const SignalTrap one{SIGUSR1};
    const SignalTrap two{SIGUSR1, SIGUSR2};
    CHECK(support::open_descriptors() == before + 4);
  }
  CHECK_THROWS_AS(SignalTrap({SIGUSR1, SIGKILL}), std::invalid_argument);
  CHECK(support::open_descriptors() == before);
}

TEST_CASE("a trap whose descriptor was closed says so instead of spinning") {
  SignalTrap trap{SIGUSR1};
  const int fd = trap.fd();
  const int spare = ::dup(fd);
  ::close(fd);
  const std::string why = message_of<std::system_error>([&] { trap.wait_for(10s); });
  CHECK(why.find("descriptor " + std::to_string(fd)) != std::string::npos);
  ::dup2(spare, fd);
  ::close(spare);
}

TEST_CASE("the core hands out batches, most urgent first, and takes numbers on later") {
  using lastcall::detail::TrapCore;
  using lastcall::detail::Unread;
  TrapCore core;
  std::array<SignalInfo, 4> batch{};
  CHECK(core.read_batch(batch.data(), batch.size()) == 0);
  core.subscribe(SIGUSR1);
  const int more[] = {SIGTERM, SIGINT};
  core.subscribe(more);
  core.subscribe(SIGUSR1);  // twice is once
  CHECK(core.holds(SIGUSR1));
  CHECK_FALSE(core.holds(SIGHUP));
  CHECK_FALSE(core.holds(999));
  for (int turn = 0; turn < 3; ++turn) ::raise(SIGUSR1);
  ::raise(SIGTERM);
  ::raise(SIGINT);
  REQUIRE(core.read_batch(batch.data(), batch.size()) == 4);
  CHECK(batch[0].number == SIGINT);
  CHECK(batch[1].number == SIGTERM);
  CHECK(batch[2].number == SIGUSR1);
  CHECK(batch[3].number == SIGUSR1);
  CHECK(support::is_readable(core.fd()));
  CHECK(core.read_batch(batch.data(), 0) == 0);
  CHECK(core.read_batch(batch.data(), batch.size()) == 1);
  CHECK_FALSE(support::is_readable(core.fd()));

  ::raise(SIGTERM);
  core.unsubscribe_all(Unread::drop);  // nothing is raised again: this process lives on
  CHECK(is_default(SIGTERM));
  core.unsubscribe_all(Unread::raise_again);
  CHECK_THROWS_AS(core.subscribe(SIGTERM), std::logic_error);
  CHECK(is_default(SIGTERM));
}

TEST_CASE("the core leaves the thread's mask alone") {
  block(SIGUSR1);
  {
    lastcall::detail::TrapCore core;
    core.subscribe(SIGUSR1);
    CHECK(is_blocked(SIGUSR1));
  }
  CHECK(is_blocked(SIGUSR1));
  unblock(SIGUSR1);
  CHECK_FALSE(is_blocked(SIGUSR1));
}

TEST_CASE("many waiters on one trap: each signal is handed out once") {
  constexpr int waiters = 8;
  constexpr int signals = 1000;
  SignalTrap trap{SIGUSR1, SIGTERM};
  std::atomic<int> got{0};
  std::atomic<int> ended{0};
  support::Threads threads;
  for (int at = 0; at < waiters; ++at) {
    threads.start([&] {
      while (trap.wait().number != SIGTERM) ++got;
      ++ended;
    });
  }
  for (int sent = 0; sent < signals; ++sent) {
    ::raise(SIGUSR1);
    if (sent % 100 == 0) std::this_thread::yield();
  }
  CHECK(support::eventually([&] { return got == signals; }));
  for (int at = 0; at < waiters; ++at) ::raise(SIGTERM);
  CHECK(support::eventually([&] { return ended == waiters; }));
  threads.join();
  CHECK(got == signals);
  CHECK_FALSE(trap.try_wait());
}

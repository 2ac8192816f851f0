// Somebody else calls sigaction(2) at the very moment between our look at a disposition and our change of
// it: theirs is the newer one, and stays.
#include <lastcall/signal_trap.hpp>

#include "support/catch.hpp"
#include "support/signals.hpp"
#include "support/threads.hpp"

#include <dlfcn.h>
#include <signal.h>

#include <atomic>
#include <csignal>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

// ThreadSanitizer has to be asked for every handler, so nobody may stand in its way.
#if !defined(LASTCALL_TSAN)

using lastcall::SignalIgnore;
using lastcall::SignalTrap;
using support::handler_of;
using support::set_handler;

namespace {

constexpr int number = SIGUSR1;

std::atomic<int> beneath_calls{0};
std::atomic<int> rival_calls{0};
void beneath(int) { ++beneath_calls; }
void rival(int) { ++rival_calls; }
void second_rival(int) {}

// What somebody else puts in place just before our next changes, one for each.
std::vector<struct sigaction> planned;
bool in_a_rival = false;

struct sigaction plain(void (*handler)(int)) {
  struct sigaction action {};
  action.sa_handler = handler;
  ::sigemptyset(&action.sa_mask);
  return action;
}

/// Before our next changes of the disposition somebody else puts these there.
class Rivals {
 public:
  explicit Rivals(const std::vector<void (*)(int)>& handlers) {
    for (auto at = handlers.rbegin(); at != handlers.rend(); ++at) planned.push_back(plain(*at));
  }
  explicit Rivals(const struct sigaction& action) { planned.push_back(action); }
  Rivals(const Rivals&) = delete;
  Rivals& operator=(const Rivals&) = delete;
  ~Rivals() {
    CHECK(planned.empty());  // each had its moment
    planned.clear();
  }
};

struct Beneath {
  struct sigaction before = support::disposition_of(number);
  Beneath() {
    set_handler(number, beneath);
    beneath_calls = rival_calls = 0;
  }
  Beneath(const Beneath&) = delete;
  Beneath& operator=(const Beneath&) = delete;
  ~Beneath() { ::sigaction(number, &before, nullptr); }
};

/// A trap was covered by somebody else's handler when it went, and its layer is kept for who may call it.
void leave_a_covered_layer() {
  std::optional<SignalTrap> covered(std::in_place, std::initializer_list<int>{number});
  const auto ours = support::disposition_of(number);
  set_handler(number, second_rival);
  covered.reset();
  REQUIRE(handler_of(number) == second_rival);
  REQUIRE(ours.sa_handler != beneath);
  set_handler(number, beneath);
}

}  // namespace

extern "C" int sigaction(int which, const struct sigaction* action, struct sigaction* before)
#if defined(__GLIBC__)
    noexcept
#endif
{
  using Function = int (*)(int, const struct sigaction*, struct sigaction*);
  static const auto real = reinterpret_cast<Function>(::dlsym(RTLD_NEXT, "sigaction"));
  if (which == number && action != nullptr && !planned.empty() && !in_a_rival) {
    in_a_rival = true;
    ::sigaction(number, &planned.back(), nullptr);
    planned.pop_back();
    in_a_rival = false;
  }
  return real(which, action, before);
}

TEST_CASE("a handler that comes while a trap is made is what was there before it") {
  const Beneath handler;
  {
    std::optional<Rivals> now(std::in_place, plain(rival));
    const SignalTrap trap{number};
    now.reset();
    ::raise(number);
    CHECK(rival_calls == 1);
    CHECK(beneath_calls == 0);
  }
  CHECK(handler_of(number) == rival);
}

TEST_CASE("the same with a layer that is used again") {
  const Beneath handler;
  leave_a_covered_layer();
  {
    std::optional<Rivals> now(std::in_place, plain(rival));
    SignalTrap trap{number};
    now.reset();
    ::raise(number);
    CHECK(trap.try_wait());
    CHECK_FALSE(trap.try_wait());
    CHECK(rival_calls == 1);
    CHECK(beneath_calls == 0);
  }
  CHECK(handler_of(number) == rival);
}

TEST_CASE("what comes back while a trap is made may be ours") {
  const Beneath handler;
  std::optional<SignalTrap> first(std::in_place, std::initializer_list<int>{number});
  const auto ours = support::disposition_of(number);
  set_handler(number, SIG_IGN);  // as system() does it for a while
  std::optional<Rivals> now(std::in_place, ours);
  std::optional<SignalTrap> second(std::in_place, std::initializer_list<int>{number});
  now.reset();
  ::raise(number);
  CHECK(first->try_wait());
  CHECK(second->try_wait());
  CHECK(beneath_calls == 1);
  first.reset();
  second.reset();
  CHECK(handler_of(number) == beneath);
}

TEST_CASE("a handler that comes while a trap goes stays") {
  const Beneath handler;
  {
    std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{number});
    const Rivals now(plain(rival));
    trap.reset();
  }
  CHECK(handler_of(number) == rival);
  ::raise(number);
  CHECK(rival_calls == 1);
}

TEST_CASE("of two handlers that come while a trap goes the later stays") {
  const Beneath handler;
  {
    std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{number});
    const Rivals now(std::vector<void (*)(int)>{rival, second_rival});
    trap.reset();
  }
  CHECK(handler_of(number) == second_rival);
}

TEST_CASE("a handler that comes as ours steps aside stays") {
  const Beneath handler;
  std::optional<SignalTrap> trap(std::in_place, std::initializer_list<int>{number});
  const auto ours = support::disposition_of(number);
  set_handler(number, rival);
  trap.reset();
  ::sigaction(number, &ours, nullptr);  // as who saved it and puts it back
  {
    const Rivals now(plain(second_rival));
    ::raise(number);
  }
  CHECK(handler_of(number) == second_rival);
  CHECK(beneath_calls == 1);  // what ours would have put back
}

TEST_CASE("a handler that comes while a signal is being ignored is put back later") {
  const Beneath handler;
  {
    std::optional<Rivals> now(std::in_place, plain(rival));
    const SignalIgnore ignore(number);
    now.reset();
    CHECK(handler_of(number) == SIG_IGN);
  }
  CHECK(handler_of(number) == rival);
}

TEST_CASE("a handler that comes as a signal is no longer ignored stays") {
  const Beneath handler;
  {
    std::optional<SignalIgnore> ignore(std::in_place, number);
    const Rivals now(plain(rival));
    ignore.reset();
  }
  CHECK(handler_of(number) == rival);
}

#endif

// cause.hpp: why something was cancelled.
#include <lastcall/cause.hpp>

#include "support/catch.hpp"
#include "support/threads.hpp"

#include <sys/types.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <cstdio>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

using lastcall::Cause;
using lastcall::CauseKind;
using lastcall::Clock;
using lastcall::OperationCancelled;
using lastcall::SignalInfo;

namespace {

// What the contract says in types.
static_assert(std::is_same_v<std::underlying_type_t<CauseKind>, std::uint8_t>);
static_assert(std::is_nothrow_default_constructible_v<Cause>);
static_assert(std::is_nothrow_copy_constructible_v<Cause>);
static_assert(std::is_nothrow_copy_assignable_v<Cause>);
static_assert(std::is_nothrow_move_constructible_v<Cause>);
static_assert(std::is_nothrow_move_assignable_v<Cause>);
static_assert(std::is_nothrow_destructible_v<Cause>);
static_assert(noexcept(Cause::deadline_exceeded()));
static_assert(noexcept(std::declval<const Cause&>().kind()));
static_assert(noexcept(std::declval<const Cause&>().message()));
static_assert(noexcept(std::declval<const Cause&>().signal()));
static_assert(noexcept(std::declval<const Cause&>().exception()));
static_assert(noexcept(static_cast<bool>(std::declval<const Cause&>())));
static_assert(std::is_same_v<decltype(std::declval<const Cause&>().message()), std::string_view>);
static_assert(std::is_same_v<decltype(std::declval<Cause&>().message()), std::string_view>);
static_assert(std::is_same_v<decltype(std::declval<Cause>().message()), std::string>);
static_assert(std::is_constructible_v<bool, Cause> && !std::is_convertible_v<Cause, bool>);
static_assert(!std::is_convertible_v<std::string, Cause>);
static_assert(std::is_base_of_v<std::exception, OperationCancelled>);
static_assert(std::is_constructible_v<OperationCancelled, Cause>);
static_assert(!std::is_convertible_v<Cause, OperationCancelled>);
static_assert(std::is_nothrow_copy_constructible_v<OperationCancelled>);
static_assert(noexcept(std::declval<const OperationCancelled&>().cause()));
static_assert(
    std::is_same_v<decltype(std::declval<const OperationCancelled&>().cause()), const Cause&>);

SignalInfo signal_from(int number, pid_t sender, int code = SI_USER) {
  SignalInfo info{};
  info.number = number;
  info.code = code;
  info.sender_pid = sender;
  info.sender_uid = ::getuid();
  info.received = Clock::now();
  return info;
}

std::string text(const Cause& cause) { return std::string(cause.message()); }

struct SaysNothing : std::exception {
  const char* what() const noexcept override { return ""; }
};

#if LASTCALL_LINUX
// The name that the kernel has for this process, as a reader of /proc sees it.
std::string own_name() {
  char name[64] = {};
  if (std::FILE* file = std::fopen("/proc/self/comm", "re")) {
    if (std::fgets(name, sizeof name, file) == nullptr) name[0] = '\0';
    std::fclose(file);
  }
  std::string out(name);
  while (!out.empty() && out.back() == '\n') out.pop_back();
  return out;
}
#endif

}  // namespace

TEST_CASE("A default cause is none: false, no signal, no exception") {
  const Cause none;
  CHECK(none.kind() == CauseKind::none);
  CHECK_FALSE(static_cast<bool>(none));
  CHECK(none.signal() == nullptr);
  CHECK(none.exception() == nullptr);
  CHECK(none.message().empty());
  CHECK(Cause().message().empty());
}

TEST_CASE("A plain cancellation has a message even if none was given") {
  const Cause plain = Cause::cancelled();
  CHECK(plain.kind() == CauseKind::cancelled);
  CHECK(static_cast<bool>(plain));
  CHECK_FALSE(plain.message().empty());
  CHECK(plain.signal() == nullptr);
  CHECK(plain.exception() == nullptr);
  CHECK(text(Cause::cancelled("")) == text(plain));
}

TEST_CASE("A cancellation's message is the one given") {
  const std::vector<std::string> messages = {
      "the load balancer asked",
      " ",
      "requested",
      "coordinator destroyed",
      "cancelled",
      "a message far longer than any small string optimisation has room for, so it is on the heap"};
  for (const std::string& given : messages) {
    const Cause cause = Cause::cancelled(given);
    CHECK(cause.kind() == CauseKind::cancelled);
    CHECK(text(cause) == given);
    CHECK(Cause::cancelled(given).message() == given);
  }
}

TEST_CASE("A message may hold any bytes, a NUL among them") {
  const std::string given("one\0two\xff", 8);
  const Cause cause = Cause::cancelled(given);
  CHECK(text(cause) == given);
  CHECK(Cause(cause).message() == given);
}

TEST_CASE("An exceeded deadline says so") {
  const Cause cause = Cause::deadline_exceeded();
  CHECK(cause.kind() == CauseKind::deadline_exceeded);
  CHECK(static_cast<bool>(cause));
  CHECK_FALSE(cause.message().empty());
  CHECK(text(cause).find("deadline") != std::string::npos);
  CHECK(cause.signal() == nullptr);
  CHECK(cause.exception() == nullptr);
}

TEST_CASE("A signal's cause keeps the whole record") {
  const SignalInfo info = signal_from(SIGTERM, ::getpid());
  const Cause cause = Cause::signal(info);
  CHECK(cause.kind() == CauseKind::signal);
  CHECK(cause.exception() == nullptr);
  REQUIRE(cause.signal() != nullptr);
  CHECK(cause.signal()->number == SIGTERM);
  CHECK(cause.signal()->code == SI_USER);
  CHECK(cause.signal()->sender_pid == ::getpid());
  CHECK(cause.signal()->sender_uid == ::getuid());
  CHECK(cause.signal()->received == info.received);
}

#if LASTCALL_LINUX
TEST_CASE("A signal's message names the signal, the sender's pid and the sender's name") {
  REQUIRE_FALSE(own_name().empty());
  const std::string expected =
      "SIGTERM from pid " + std::to_string(::getpid()) + " (" + own_name() + ")";
  CHECK(text(Cause::signal(signal_from(SIGTERM, ::getpid()))) == expected);
}
#endif

TEST_CASE("A sender that is gone already is named by its pid alone") {
  const pid_t gone = ::fork();
  if (gone == 0) ::_exit(0);
  REQUIRE(gone > 0);
  REQUIRE(support::outcome_of(gone) == 0);
  const Cause cause = Cause::signal(signal_from(SIGINT, gone));
  CHECK(text(cause) == "SIGINT from pid " + std::to_string(gone));
}

TEST_CASE("A signal without a sender is not said to come from pid 0") {
  const Cause cause = Cause::signal(signal_from(SIGALRM, 0, SI_TIMER));
  CHECK(text(cause).rfind("SIGALRM", 0) == 0);
  CHECK(text(cause).find("pid 0") == std::string::npos);
  CHECK(cause.signal()->sender_pid == 0);
}

TEST_CASE("A signal that has no name is named by its number") {
  const Cause cause = Cause::signal(signal_from(99, 0));
  CHECK(text(cause).rfind("signal 99", 0) == 0);
  // The name is the cause's own: the next unknown one in this thread doesn't change it.
  CHECK(lastcall::signal_name(98) == "signal 98");
  CHECK(text(cause).rfind("signal 99", 0) == 0);
}

TEST_CASE("A failure's message is what() unless one is given") {
  const auto error = std::make_exception_ptr(std::runtime_error("disk full"));
  const Cause plain = Cause::failure(error);
  CHECK(plain.kind() == CauseKind::failure);
  CHECK(plain.signal() == nullptr);
  CHECK(text(plain) == "disk full");
  CHECK(plain.exception() == error);
  const Cause told = Cause::failure(error, "flusher: no space");
  CHECK(text(told) == "flusher: no space");
  CHECK(told.exception() == error);
}

TEST_CASE("What std::current_exception() has no pointer for is an exception of another language") {
  CHECK(lastcall::detail::describe_exception(nullptr) == "an exception of another language");
}

TEST_CASE("A failure that is no std::exception, or says nothing, still has a message") {
  CHECK_FALSE(Cause::failure(std::make_exception_ptr(42)).message().empty());
  CHECK_FALSE(Cause::failure(std::make_exception_ptr(SaysNothing())).message().empty());
  CHECK_FALSE(Cause::failure(std::make_exception_ptr(std::string("text"))).message().empty());
}

TEST_CASE("A failure's exception is the one that was caught") {
  std::exception_ptr caught;
  try {
    throw std::out_of_range("row 7");
  } catch (...) {
    caught = std::current_exception();
  }
  const Cause cause = Cause::failure(caught);
  caught = nullptr;
  try {
    std::rethrow_exception(cause.exception());
    FAIL("nothing was thrown");
  } catch (const std::out_of_range& error) {
    CHECK(std::string(error.what()) == "row 7");
  }
}

TEST_CASE("A failure without an exception is a bad argument") {
  CHECK_THROWS_AS(Cause::failure(nullptr), std::invalid_argument);
  CHECK_THROWS_AS(Cause::failure(std::exception_ptr(), "with a message"), std::invalid_argument);
  try {
    Cause::failure(nullptr);
  } catch (const std::invalid_argument& error) {
    CHECK(std::string(error.what()).find("null") != std::string::npos);
  }
}

TEST_CASE("A failure lets go of its exception with its last copy") {
  const auto tracked = std::make_shared<int>(7);
  struct Holds : std::runtime_error {
    explicit Holds(std::shared_ptr<int> value) : runtime_error("holds"), held(std::move(value)) {}
    std::shared_ptr<int> held;
  };
  {
    auto first = std::make_unique<Cause>(Cause::failure(std::make_exception_ptr(Holds(tracked))));
    const Cause second = *first;
    first.reset();
    CHECK(tracked.use_count() == 2);
    CHECK(text(second) == "holds");
  }
  CHECK(tracked.use_count() == 1);
}

TEST_CASE("Copies are equal in every respect and live on their own") {
  auto original = std::make_unique<Cause>(Cause::signal(signal_from(SIGTERM, ::getpid())));
  const std::string before = text(*original);
  const Cause copy = *original;
  original.reset();
  CHECK(copy.kind() == CauseKind::signal);
  CHECK(text(copy) == before);
  CHECK(copy.signal()->number == SIGTERM);
}

TEST_CASE("A message's view lives as long as the cause that gave it") {
  auto other = std::make_unique<Cause>(Cause::cancelled("a message that needs a heap allocation"));
  const Cause kept = *other;
  const std::string_view view = kept.message();
  *other = Cause::cancelled("something else, that is as long as the first message was");
  other.reset();
  CHECK(view == "a message that needs a heap allocation");
}

TEST_CASE("A message taken from a temporary can't dangle, and leaves the copies alone") {
  const Cause kept = Cause::cancelled("immutable, whatever is asked of its copies, for ever");
  Cause copy = kept;
  const std::string taken = std::move(copy).message();
  CHECK(taken == "immutable, whatever is asked of its copies, for ever");
  CHECK(text(kept) == taken);
}

TEST_CASE("Assigning replaces, also from itself and from a moved-from cause") {
  Cause cause = Cause::cancelled("first");
  Cause& same = cause;
  cause = same;
  CHECK(text(cause) == "first");
  cause = std::move(same);
  CHECK(text(cause) == "first");
  cause = Cause::deadline_exceeded();
  CHECK(cause.kind() == CauseKind::deadline_exceeded);
  Cause target = std::move(cause);
  CHECK(target.kind() == CauseKind::deadline_exceeded);
  cause = Cause::cancelled("again");
  CHECK(text(cause) == "again");
  target = Cause();
  CHECK_FALSE(static_cast<bool>(target));
}

TEST_CASE("A cause is thread-safe: copies are read and dropped on many threads at once") {
  auto shared = std::make_unique<const Cause>(
      Cause::failure(std::make_exception_ptr(std::runtime_error("shared by everybody")), ""));
  std::atomic<int> wrong{0};
  {
    support::StartingLine line(4);
    support::Threads threads;
    for (int i = 0; i < 4; ++i) {
      threads.start([&wrong, &line, mine = *shared] {
        line.ready_steady_go();
        for (int round = 0; round < 2000; ++round) {
          Cause copy = mine;
          const Cause other = copy;
          copy = Cause();
          if (other.message() != "shared by everybody" || !other.exception()) ++wrong;
        }
      });
    }
    shared.reset();
  }
  CHECK(wrong == 0);
}

TEST_CASE("OperationCancelled carries the cause and says its message") {
  const OperationCancelled error(Cause::cancelled("shutting down"));
  CHECK(std::string(error.what()) == "shutting down");
  CHECK(error.cause().kind() == CauseKind::cancelled);
  CHECK(error.cause().message() == "shutting down");
  try {
    throw OperationCancelled(Cause::deadline_exceeded());
  } catch (const std::exception& caught) {
    CHECK(std::string(caught.what()) == text(Cause::deadline_exceeded()));
  }
}

TEST_CASE("A copy of OperationCancelled outlives the original, what() included") {
  auto original = std::make_unique<OperationCancelled>(
      Cause::cancelled("a message that is long enough to live on the heap somewhere"));
  const OperationCancelled copy = *original;
  original.reset();
  CHECK(std::string(copy.what()) == "a message that is long enough to live on the heap somewhere");
}

TEST_CASE("OperationCancelled made of no cause still says something") {
  const OperationCancelled error{Cause()};
  REQUIRE(error.what() != nullptr);
  CHECK(std::string(error.what()).size() > 0);
  CHECK(error.cause().kind() == CauseKind::none);
}

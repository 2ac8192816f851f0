// The umbrella header, and with it every name of the public interface: that it exists, that it is
// spelled so, that it takes and gives these types. What the names do is tested header by header.
#include <lastcall/lastcall.hpp>

#include "support/catch.hpp"

#include <array>
#include <condition_variable>
#include <csignal>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

using namespace lastcall;
using namespace std::chrono_literals;

namespace {

template <class T, class U>
constexpr bool same = std::is_same_v<T, U>;

// ---- signal_info.hpp, cause.hpp

static_assert(same<Clock, std::chrono::steady_clock>);
static_assert(same<decltype(SignalInfo{}.number), int> && same<decltype(SignalInfo{}.code), int>);
static_assert(same<decltype(SignalInfo{}.sender_pid), pid_t>);
static_assert(same<decltype(SignalInfo{}.sender_uid), uid_t>);
static_assert(same<decltype(SignalInfo{}.received), Clock::time_point>);
static_assert(noexcept(signal_name(SIGTERM)));
static_assert(same<decltype(signal_name(SIGTERM)), std::string_view>);

static_assert(same<std::underlying_type_t<CauseKind>, std::uint8_t>);
static_assert(std::is_nothrow_default_constructible_v<Cause> &&
              std::is_copy_constructible_v<Cause>);
static_assert(same<decltype(std::declval<const Cause&>().message()), std::string_view>);
static_assert(same<decltype(Cause().message()), std::string>);  // so that it can't dangle
static_assert(noexcept(std::declval<const Cause&>().message()));
static_assert(same<decltype(Cause().signal()), const SignalInfo*>);
static_assert(same<decltype(Cause().exception()), std::exception_ptr>);
static_assert(noexcept(Cause::deadline_exceeded()));
static_assert(!std::is_convertible_v<Cause, bool> && std::is_constructible_v<bool, Cause>);
static_assert(std::is_base_of_v<std::exception, OperationCancelled>);
static_assert(!std::is_convertible_v<Cause, OperationCancelled>);
static_assert(same<decltype(std::declval<const OperationCancelled&>().cause()), const Cause&>);

// ---- cancellation.hpp

using Token = CancellationToken;
using Source = CancellationSource;
static_assert(std::is_nothrow_default_constructible_v<Token> &&
              std::is_copy_constructible_v<Token>);
static_assert(noexcept(std::declval<const Token&>().is_cancelled()));
static_assert(noexcept(std::declval<const Token&>().can_be_cancelled()));
static_assert(noexcept(std::declval<const Token&>().cause()));
static_assert(noexcept(std::declval<const Token&>().deadline()));
static_assert(same<decltype(Token().deadline()), std::optional<Clock::time_point>>);
static_assert(noexcept(std::declval<const Token&>() == std::declval<const Token&>()));
static_assert(same<Token::callback_type<void (*)()>, CancellationCallback<void (*)()>>);
static_assert(same<CancellationCallback<void (*)()>::callback_type, void (*)()>);
static_assert(!std::is_copy_constructible_v<Source>);
static_assert(std::is_nothrow_move_constructible_v<Source> &&
              std::is_nothrow_move_assignable_v<Source>);
static_assert(!std::is_convertible_v<Token, Source>);
static_assert(noexcept(std::declval<Source&>().cancel(std::declval<Cause>())));
static_assert(noexcept(std::declval<const Source&>().token()));
static_assert(noexcept(std::declval<Source&>().disarm()));
static_assert(!std::is_move_constructible_v<CancellationCallback<void (*)()>>);

// ---- wait_group.hpp, signal_trap.hpp

static_assert(std::is_nothrow_default_constructible_v<WaitGroup>);
static_assert(!std::is_move_constructible_v<WaitGroup> && !std::is_copy_constructible_v<WaitGroup>);
static_assert(std::is_nothrow_default_constructible_v<WaitGroup::Guard>);
static_assert(std::is_nothrow_move_constructible_v<WaitGroup::Guard>);
static_assert(std::is_copy_constructible_v<WaitGroup::Guard>);
static_assert(noexcept(std::declval<WaitGroup&>().try_enter()));
static_assert(noexcept(std::declval<WaitGroup::Guard&>().release()));
static_assert(noexcept(std::declval<WaitGroup&>().close()));
static_assert(same<decltype(std::declval<WaitGroup&>().members()), std::vector<WaitGroup::Member>>);
static_assert(!std::is_move_constructible_v<SignalTrap> &&
              !std::is_move_constructible_v<SignalIgnore>);
static_assert(std::is_constructible_v<SignalTrap, std::vector<int>&>);
static_assert(!std::is_convertible_v<std::vector<int>&, SignalTrap>);
static_assert(same<decltype(std::declval<SignalTrap&>().wait()), SignalInfo>);
static_assert(!std::is_default_constructible_v<SignalIgnore>);

// ---- task_group.hpp, ticker.hpp, blocking.hpp

static_assert(!std::is_move_constructible_v<TaskGroup>);
static_assert(same<decltype(Failure{}.task), std::string>);
static_assert(same<decltype(Failure{}.error), std::exception_ptr>);
static_assert(noexcept(std::declval<const TaskGroup&>().token()));
static_assert(noexcept(std::declval<TaskGroup&>().cancel(std::declval<Cause>())));
static_assert(same<decltype(std::declval<const TaskGroup&>().failures()), std::vector<Failure>>);
static_assert(std::is_constructible_v<Ticker, std::chrono::hours>);
static_assert(!std::is_convertible_v<Clock::duration, Ticker>);
static_assert(same<decltype(poll(0, 0, Token())), Ready>);
static_assert(same<decltype(accept(0, Token())), std::optional<int>>);

// ---- the roof

static_assert(same<std::underlying_type_t<Outcome>, int> &&
              same<std::underlying_type_t<Phase>, int>);
static_assert(same<std::underlying_type_t<Ready>, int> &&
              same<std::underlying_type_t<OnFailure>, int>);
static_assert(same<std::underlying_type_t<EventKind>, std::uint8_t>);
static_assert(same<std::underlying_type_t<EventResult>, std::uint8_t>);
static_assert(std::has_virtual_destructor_v<Observer> && std::is_abstract_v<Observer>);
static_assert(!std::is_move_constructible_v<ShutdownCoordinator>);
static_assert(!std::is_convertible_v<ShutdownOptions, ShutdownCoordinator>);
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().token()));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().abort_token()));
static_assert(noexcept(std::declval<const ShutdownCoordinator&>().is_ready()));
static_assert(same<decltype(std::declval<const Stage&>().name()), const std::string&>);
static_assert(same<decltype(json_observer(1)), std::shared_ptr<Observer>>);

struct SilentToo : Observer {
  void on_event(const Event& /*event*/) override {}
};

TEST_CASE("any member of an aggregate may be named alone, without a warning") {
  CHECK(ShutdownOptions{.grace_period = 5s}.grace_period == 5s);
  CHECK(ShutdownOptions{.exit_codes = {.failed = 3}}.exit_codes.overrun == 124);
  CHECK(lastcall::Event{.name = "mine"}.detail.empty());
  CHECK(lastcall::Straggler{.name = "mine"}.stack.empty());
  CHECK(lastcall::ShutdownReport{.exit_code = 3}.events.empty());
  CHECK(lastcall::Failure{.task = "mine"}.error == nullptr);
  CHECK(lastcall::LiveStatus{.in_flight = 3}.names.empty());
  CHECK(lastcall::WaitGroup::Member{.name = "mine"}.thread_id == 0);
}

TEST_CASE("a program that uses every call of the interface in its documented form drains cleanly") {
  ShutdownCoordinator coordinator(ShutdownOptions{.signals = {SIGTERM},
                                                  .grace_period = 20s,
                                                  .announce_delay = 1ms,
                                                  .abort_margin = 100ms,
                                                  .repeat_window = 500ms,
                                                  .respect_ignored = true,
                                                  .ignore_sigpipe = true,
                                                  .stop_when_idle = false,
                                                  .exit_by_signal = false,
                                                  .dump_signal = SIGQUIT,
                                                  .exit_codes = {.clean = 3},
                                                  .observer = std::make_shared<SilentToo>(),
                                                  .last_words = -1});
  Stage& storage = coordinator.stage("storage", 500ms);
  const std::string& name = storage.name();
  CHECK(name == "storage");
  std::atomic<int> ran{0};
  CHECK(coordinator.spawn("waits", [&](CancellationToken token) {
    token.wait();
    ++ran;
  }));
  CHECK(storage.spawn("takes no token", [&] { ++ran; }));
  auto wrapped = coordinator.wrap("wrapped", [&](const CancellationToken&) { ++ran; });
  CHECK(static_cast<bool>(wrapped));
  wrapped();
  std::function<void()> copyable = storage.wrap("also wrapped", [&] { ++ran; });
  copyable();
  copyable = nullptr;
  auto movable = storage.wrap("moved", [&, owned = std::make_unique<int>(1)] { ran += *owned; });
  movable();
  coordinator.on_stop("stop", [&] { ++ran; });
  coordinator.on_drained("drained", [&] { ++ran; });
  storage.on_stop("stop", [&] { ++ran; });
  storage.on_drained("drained", [&] { ++ran; });
  coordinator.on_signal(SIGHUP, [](const SignalInfo&) {});
  {
    const WaitGroup::Guard a = coordinator.enter();
    const WaitGroup::Guard b = coordinator.enter("named", SourceLocation::current());
    const WaitGroup::Guard c = coordinator.try_enter();
    const WaitGroup::Guard d = coordinator.try_enter("named too");
    const WaitGroup::Guard e = storage.enter();
    const WaitGroup::Guard f = storage.enter("named");
    const WaitGroup::Guard g = storage.try_enter();
    const WaitGroup::Guard h = storage.try_enter("named too");
    const std::vector<Straggler> in = coordinator.snapshot();
    CHECK(in.size() >= 5);
    for (const Straggler& straggler : in) {
      CHECK_FALSE(straggler.name.empty());
      CHECK_FALSE(straggler.stage.empty());
      CHECK(straggler.age >= Clock::duration::zero());
    }
  }
  CHECK(coordinator.phase() == Phase::running);
  CHECK(coordinator.request_shutdown());
  CHECK_FALSE(coordinator.request_shutdown(Cause::cancelled("too late")));
  const ShutdownReport report = coordinator.drain();
  CHECK(report.outcome == Outcome::clean);
  CHECK(report.cause.message() == "requested");
  CHECK(report.exit_code == 3);
  CHECK(report.stragglers.empty());
  CHECK(report.failures.empty());
  CHECK_FALSE(report.events.empty());
  CHECK_FALSE(report.to_text().empty());
  CHECK_FALSE(report.to_json().empty());
  CHECK_FALSE(report.to_trace().empty());
  CHECK(coordinator.phase() == Phase::finished);
  CHECK(ran == 9);
}

TEST_CASE("sources, tokens and callbacks take what the contract says") {
  Source root;
  const Token token = root.token();
  const Source timed(token, std::chrono::hours::max());
  const Source fractional(token, std::chrono::duration<double>(1000.5));
  const Source until(token, Clock::time_point::max());
  const Source coarse(token, std::chrono::time_point_cast<std::chrono::seconds>(Clock::now()) + 1h);
  const std::vector<Token> parents{token};
  const Source any_of_list = Source::any_of({token, timed.token()});
  const Source any_of_span = Source::any_of(parents);
  const Source any_of_none = Source::any_of({});
  int called = 0;
  const CancellationCallback deduced(token, [&] { ++called; });
  const CancellationCallback<std::function<void()>> spelled(root.token(), [&] { ++called; });
  CHECK_FALSE(token.wait_for(0s));
  CHECK_FALSE(token.wait_for(-1h));
  CHECK_FALSE(token.wait_until(Clock::now()));
  CHECK(token.fd() >= 0);
  CHECK(Token().fd() == -1);
  CHECK(token.stop_possible());
  CHECK(root.cancel());
  token.wait();
  CHECK(token.stop_requested());
  CHECK(called == 2);
  CHECK(fractional.is_cancelled());
  CHECK(until.is_cancelled());
  CHECK(coarse.is_cancelled());
  CHECK(any_of_list.is_cancelled());
  CHECK(any_of_span.is_cancelled());
  CHECK_FALSE(any_of_none.is_cancelled());
  CHECK_THROWS_AS(token.throw_if_cancelled(), OperationCancelled);
}

TEST_CASE("traps, groups and blocking calls take what the contract says") {
  const std::array<int, 2> numbers{SIGUSR1, SIGUSR2};
  SignalTrap of_span(numbers);
  SignalTrap of_list{SIGUSR1};
  const SignalTrap of_defaults;
  CHECK_FALSE(of_span.try_wait());
  CHECK_FALSE(of_list.wait_for(0s));
  CHECK(of_defaults.fd() >= 0);
  CHECK_THROWS_AS(SignalIgnore(SIGUSR1), std::logic_error);

  TaskGroup group({}, OnFailure::keep_going);
  CHECK(group.spawn("one", [] {}));
  auto wrapped = group.wrap("two", [] {});
  wrapped();
  CHECK(group.wait_for(1min));
  group.wait();
  CHECK_FALSE(group.spawn("late", [] {}));
  CHECK(group.failures().empty());
  CHECK(group.cancel());
  CHECK_FALSE(group.cancel(Cause::cancelled("again")));

  const Token cancelled = group.token();
  std::mutex mutex;
  std::condition_variable changed;
  std::unique_lock lock(mutex);
  CHECK(lastcall::wait(changed, lock, cancelled, [] { return true; }));
  CHECK_FALSE(lastcall::wait(changed, lock, cancelled, [] { return false; }));
  CHECK_FALSE(lastcall::sleep_for(1h, cancelled));
  CHECK(lastcall::sleep_for(1us, Token()));
  CHECK(Ticker(1ms).wait(Token()));
  CHECK_FALSE(Ticker(1ms).wait(cancelled));
  CHECK(lastcall::poll(0, 0, cancelled) == Ready::cancelled);
  CHECK(lastcall::poll(0, 0, Token(), 1us) == Ready::timed_out);
  CHECK_FALSE(lastcall::accept(0, cancelled));
}

}  // namespace

// A thread that was stopped, for ever, in the middle of the library itself: by a tracer, by a signal
// handler that hangs, by the scheduler. Its few instructions with a lock can't be hit from outside, so
// these adversaries take the lock themselves.
#include "adversary.hpp"

#include <lastcall/detail/cancel_tree.hpp>
#include <lastcall/detail/wait_group_impl.hpp>

#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <string>
#include <thread>
#include <utility>

namespace promise {
namespace {

using lastcall::CancellationSource;
using lastcall::CancellationToken;
using lastcall::ShutdownCoordinator;
using lastcall::detail::TreeAccess;

// In the lane of the stage's own token: nothing below it can be cancelled.
void root_lane_held(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
    stand.ready();
    hang();
  });
  lifetime.run();
}

// In the lane of one child of many: the others are cancelled all the same.
void child_lane_held(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  CancellationSource before(lifetime.token());
  CancellationSource held(lifetime.token());
  CancellationSource after(lifetime.token());
  lifetime.spawn("held worker", [&stand, token = held.token()](CancellationToken) {
    lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
    stand.ready();
    hang();
  });
  lifetime.spawn("worker", [token = before.token()](CancellationToken) {
    token.wait();
    write_out(STDERR_FILENO, "the one before was told\n");
  });
  lifetime.spawn("worker", [token = after.token()](CancellationToken) {
    token.wait();
    write_out(STDERR_FILENO, "the one after was told\n");
  });
  lifetime.on_stop("hook", [] { write_out(STDERR_FILENO, "the hook has run\n"); });
  lifetime.run();
}

// The thread that asks is itself stopped, half way through.
void root_lane_held_and_request(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
    stand.ready();
    hang();
  });
  lifetime.spawn("asking worker", [&](CancellationToken) {
    std::this_thread::sleep_for(60ms);
    stand.requested();
    lifetime.request_shutdown();
  });
  lifetime.run();
}

void root_lane_held_for_long(Stand& stand) {
  lastcall::ShutdownOptions options = stand.options();
  options.grace_period = 60s;
  options.abort_margin = 20s;
  ShutdownCoordinator lifetime(std::move(options));
  lifetime.spawn("held worker", [&stand](CancellationToken token) {
    lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
    stand.ready();
    hang();
  });
  lifetime.run();
}

// By a thread that nobody waits for: main goes on in time, and what the thread uses outlives the
// coordinator.
void root_lane_held_by_stranger(Stand& stand) {
  {
    ShutdownCoordinator lifetime(stand.options());
    const CancellationToken token = lifetime.token();
    std::thread([&stand, token] {
      lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
      stand.ready();
      hang();
    }).detach();
    static_cast<void>(lifetime.drain());
  }
  std::_Exit(5);
}

void abort_lane_held(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  lifetime.spawn("held worker", [&stand, &lifetime](CancellationToken) {
    const CancellationToken token = lifetime.abort_token();
    lastcall::detail::lock_bit(TreeAccess::peek(token)->state);
    stand.ready();
    hang();
  });
  lifetime.run();
}

// Among the names of those who are in: last words pass by what they can't read.
void names_held(Stand& stand) {
  ShutdownCoordinator lifetime(stand.options());
  static lastcall::WaitGroup::Guard guard = lifetime.enter("held guard");
  lifetime.spawn("held worker", [&stand](CancellationToken) {
    const lastcall::WaitGroup* const group = lastcall::detail::WaitGroupAccess::group_of(guard);
    lastcall::detail::WaitGroupAccess::visit_members(
        *group, [&stand](const lastcall::detail::MemberView&) noexcept {
          stand.ready();
          hang();
        });
  });
  lifetime.run();
}

void three_interrupts(Target& target) {
  target.poke(SIGINT);
  target.wait(150ms);
  target.poke(SIGINT);
  target.wait(150ms);
  target.send(SIGINT);
}

}  // namespace

void add_inside(std::vector<Adversary>& all) {
  const auto add = [&all](const char* name, const char* how, std::vector<std::string> says,
                          void (*body)(Stand&)) -> Adversary& {
    Adversary adversary;
    adversary.name = name;
    adversary.how = how;
    adversary.says = std::move(says);
    adversary.body = body;
    all.push_back(std::move(adversary));
    return all.back();
  };
  add("tree: the root's lock held", "exit 124", {"held worker"}, root_lane_held);
  add("tree: a child's lock held", "exit 124",
      {"held worker", "the one before was told", "the one after was told", "the hook has run"},
      child_lane_held);
  add("tree: held, asked by a worker", "exit 124", {"held worker"}, root_lane_held_and_request)
      .provoke = [](Target&) {};
  add("tree: held, main in drain()", "exit 5", {}, root_lane_held_by_stranger);
  Adversary& wishes =
      add("tree: held, INT INT INT", "exit 130", {"held worker"}, root_lane_held_for_long);
  wishes.provoke = three_interrupts;
  wishes.bound = Bound::at_once;
  add("tree: the abort token's lock held", "exit 124", {"held worker"}, abort_lane_held);
  add("names: their lock held", "exit 124", {}, names_held);
}

}  // namespace promise

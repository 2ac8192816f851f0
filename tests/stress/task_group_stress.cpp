// Task groups whose tasks spawn, throw, cancel and are wrapped for a pool, while others wait, ask and close.
//
// What is checked:
//  [ran]      a task that was spawned runs once, one that was refused never; a wrapped one at most once
//  [left]     when wait() has returned every task has left, and what it had captured is gone
//  [closed]   after wait() nobody gets in
//  [failed]   failures() lists who threw, and nobody else; wait() rethrows the first of them, each time
//  [token]    with cancel_group a failure cancels the token, with Cause::failure unless somebody was quicker
//  [member]   a wrapped callable is a member until it has run or its last copy has gone
#include <lastcall/task_group.hpp>

#include "options.hpp"

#include <atomic>
#include <chrono>
#include <cstddef>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using lastcall::CancellationToken;
using lastcall::OnFailure;
using lastcall::TaskGroup;
using stress::check;
using support::Random;
using namespace std::chrono_literals;

std::atomic<long> groups{0};
std::atomic<long> tasks{0};

struct Story {
  std::atomic<long> accepted{0};
  std::atomic<long> ran{0};
  std::atomic<long> captured{0};  // things that tasks hold
  std::atomic<long> thrown{0};
  std::atomic<long> wrapped{0};
  std::atomic<long> wrapped_ran{0};
  std::atomic<bool> waited{false};
};

struct Held {
  explicit Held(Story& of) : story(&of) { ++story->captured; }
  Held(const Held& other) : story(other.story) { ++story->captured; }
  Held(Held&& other) noexcept : story(other.story) { ++story->captured; }
  Held& operator=(const Held&) = delete;
  ~Held() { --story->captured; }
  Story* story;
};

/// Where wrapped callables wait for somebody to run or drop them.
class Pool {
 public:
  void put(std::function<void()> job) {
    const std::lock_guard<std::mutex> lock(mutex_);
    jobs_.push_back(std::move(job));
  }
  std::function<void()> take(Random& random) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (jobs_.empty()) return {};
    std::swap(jobs_[random.below(jobs_.size())], jobs_.back());
    std::function<void()> job = std::move(jobs_.back());
    jobs_.pop_back();
    return job;
  }

 private:
  std::mutex mutex_;
  std::vector<std::function<void()>> jobs_;
};

struct Game {
  Game(OnFailure on_failure, CancellationToken parent) : group(std::move(parent), on_failure) {}
  Story story;
  Pool pool;
  TaskGroup group;
};

void spawn_one(Game& game, Random& random, int depth);

void be_a_task(Game& game, std::uint64_t seed, int depth, const CancellationToken& token) {
  Random random(seed);
  check(!game.story.waited, "[left] a task runs after wait()");
  if (random.one_in(3)) token.wait_for(std::chrono::microseconds(random.below(800)));
  if (depth < 3 && random.one_in(3)) spawn_one(game, random, depth + 1);
  if (random.one_in(12)) {
    // Stopped by the group: no failure.
    if (token.is_cancelled()) token.throw_if_cancelled();
  }
  if (random.one_in(8)) {
    ++game.story.thrown;
    if (random.one_in(2)) throw std::runtime_error("thrown on purpose");
    throw 7;
  }
  if (random.one_in(30)) game.group.cancel();
}

void spawn_one(Game& game, Random& random, int depth) {
  const auto seed = random.next();
  const auto name = "task " + std::to_string(depth);
  Held held(game.story);
  if (random.one_in(3)) {
    auto job = game.group.wrap(name, [&game, seed, depth, held](const CancellationToken& token) {
      ++game.story.wrapped_ran;
      be_a_task(game, seed, depth, token);
    });
    if (!job) return;
    ++game.story.wrapped;
    if (random.one_in(4)) return;  // dropped: it leaves without having run
    if (random.one_in(2)) {
      auto copy = job;  // they share one membership, and only the first call runs it
      game.pool.put(std::move(copy));
    }
    game.pool.put(std::move(job));
    return;
  }
  // Counted before: the task may run before spawn() returns.
  ++game.story.accepted;
  const bool in =
      game.group.spawn(name, [&game, seed, depth, held](const CancellationToken& token) {
        ++game.story.ran;
        be_a_task(game, seed, depth, token);
      });
  if (!in) --game.story.accepted;
}

void check_failures(Game& game, OnFailure on_failure) {
  const auto failures = game.group.failures();
  check(static_cast<long>(failures.size()) == game.story.thrown,
        "[failed] " + std::to_string(failures.size()) + " listed, " +
            std::to_string(game.story.thrown) + " threw");
  for (int turn = 0; turn < 2; ++turn) {
    std::exception_ptr caught;
    try {
      game.group.wait();
    } catch (...) {
      caught = std::current_exception();
    }
    check((caught != nullptr) == !failures.empty(), "[failed] wait() throws, or not");
    if (caught) check(caught == failures.front().error, "[failed] not the first failure");
  }
  if (!failures.empty() && on_failure == OnFailure::cancel_group) {
    check(game.group.token().is_cancelled(), "[token] a failure cancelled nobody");
  }
}

void one_epoch(const stress::Options& options, Random& random) {
  const auto on_failure = random.one_in(2) ? OnFailure::cancel_group : OnFailure::keep_going;
  const lastcall::CancellationSource parent;
  auto game = std::make_unique<Game>(on_failure, parent.token());
  std::atomic<bool> over{false};
  {
    // The pool, and who waits without closing.
    support::Threads others;
    const int count = options.some_threads(random);
    for (int number = 0; number < count; ++number) {
      others.start([&, number, seed = random.next()] {
        Random own(seed);
        for (int turn = 0; turn < 20; ++turn) {
          if (number % 2 == 0) spawn_one(*game, own, 0);
          if (auto job = game->pool.take(own)) {
            if (own.one_in(8)) continue;  // dropped
            job();
            if (own.one_in(4)) job();  // does nothing
          }
          if (own.one_in(20)) game->group.wait_for(std::chrono::microseconds(own.below(200)));
          if (own.one_in(20)) static_cast<void>(game->group.failures());
        }
        while (!over) {
          if (auto job = game->pool.take(own)) {
            job();
          } else {
            std::this_thread::sleep_for(100us);
          }
        }
      });
    }
    if (random.one_in(3))
      std::this_thread::sleep_for(std::chrono::microseconds(random.below(3000)));
    if (random.one_in(6)) game->group.cancel();
    try {
      game->group.wait();
    } catch (...) {
    }
    Story& story = game->story;
    // The pool's own threads may still be on their way out of a job() that was refused or came second.
    check(story.ran == story.accepted ||
              support::eventually([&] { return story.ran == story.accepted; }),
          "[ran] " + std::to_string(story.accepted) + " were let in, " + std::to_string(story.ran) +
              " ran");
    check(story.wrapped_ran <= story.wrapped, "[ran] a wrapped one twice");
    check(!game->group.spawn("late", [] { stress::fail("[closed] a task was let in"); }),
          "[closed] spawn() after wait()");
    over = true;
  }
  check_failures(*game, on_failure);
  while (game->pool.take(random)) {
  }
  check(game->story.captured == 0, "[left] something that a task had captured is left");
  tasks += game->story.ran + game->story.wrapped_ran;
  ++groups;
  game.reset();
}

}  // namespace

int main(int argc, char** argv) {
  const stress::Options options = stress::begin("task_group_stress", argc, argv);
  stress::run(options, [&](Random& random) { one_epoch(options, random); });
  std::printf("%ld groups, %ld tasks: ok\n", groups.load(), tasks.load());
  return 0;
}

// The cancellation tree of the contract, slow and obviously right: one mutex for everything, one
// condition variable that everybody waits on, the whole subtree marked in one critical section.
// Tests of the tree can be compiled against it (is the test right?), and the fuzzer and the stress
// compare the library with it (is the library right?).
#pragma once

#include <lastcall/cause.hpp>
#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/posix.hpp>

#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <initializer_list>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

namespace reference {

using lastcall::Cause;
using lastcall::Clock;
using lastcall::OperationCancelled;

inline std::mutex& big_lock() {
  static std::mutex* const mutex = new std::mutex;
  return *mutex;
}
inline std::condition_variable& changed() {
  static std::condition_variable* const condition = new std::condition_variable;
  return *condition;
}

struct Registration {
  enum class State { idle, waiting, running, done };
  State state = State::idle;
  std::list<Registration*>* in = nullptr;  // the list that it waits in
  std::thread::id runner;
  bool* destroyed_inside = nullptr;
  virtual void run() noexcept = 0;

 protected:
  ~Registration() = default;
};

struct Node;
void schedule(const std::shared_ptr<Node>& node);
void unschedule(const Node* node);

struct Node {
  std::vector<std::shared_ptr<Node>> parents;
  std::vector<std::weak_ptr<Node>> children;
  std::list<Registration*> callbacks;
  int sources = 0;
  bool cancelled = false;
  Cause cause;
  std::optional<Clock::time_point> deadline;  // the nearest of its own and its ancestors'
  std::optional<Clock::time_point> timer;     // its own, if that is the nearest
  std::optional<lastcall::detail::PollableFlag> flag;

  ~Node() {
    {
      const std::lock_guard<std::mutex> lock(big_lock());
      unschedule(this);
      for (const std::shared_ptr<Node>& parent : parents) {
        std::erase_if(parent->children, [](const auto& child) { return child.expired(); });
      }
    }
    parents.clear();  // may destroy them in turn
  }

  bool can_be_cancelled() const {
    if (cancelled || sources > 0 || (timer && *timer != Clock::time_point::max())) return true;
    return std::any_of(parents.begin(), parents.end(),
                       [](const auto& parent) { return parent->can_be_cancelled(); });
  }
};

// `seen` holds all that was looked at, so that nothing is destroyed under the big lock.
inline void collect(const std::shared_ptr<Node>& node, std::vector<std::shared_ptr<Node>>& seen,
                    std::vector<Node*>& uncancelled) {
  seen.push_back(node);
  if (node->cancelled || std::count(uncancelled.begin(), uncancelled.end(), node.get()) != 0)
    return;
  uncancelled.push_back(node.get());
  for (const std::weak_ptr<Node>& child : node->children) {
    if (std::shared_ptr<Node> living = child.lock()) collect(living, seen, uncancelled);
  }
}

inline bool cancel(const std::shared_ptr<Node>& node, Cause cause) {
  if (!cause) cause = Cause::cancelled();
  std::vector<std::shared_ptr<Node>> seen;
  std::vector<Node*> subtree;
  std::list<Registration*> to_run;
  std::unique_lock<std::mutex> lock(big_lock());
  collect(node, seen, subtree);
  for (Node* const member : subtree) {
    member->cancelled = true;
    member->cause = cause;
    unschedule(member);
    if (member->flag) member->flag->raise();
    for (Registration* callback : member->callbacks) callback->in = &to_run;
    to_run.splice(to_run.end(), member->callbacks);
  }
  changed().notify_all();
  while (!to_run.empty()) {
    Registration* const callback = to_run.front();
    to_run.pop_front();
    bool destroyed = false;
    callback->in = nullptr;
    callback->state = Registration::State::running;
    callback->runner = std::this_thread::get_id();
    callback->destroyed_inside = &destroyed;
    lock.unlock();
    callback->run();
    lock.lock();
    if (!destroyed) {
      callback->state = Registration::State::done;
      callback->destroyed_inside = nullptr;
      changed().notify_all();
    }
  }
  lock.unlock();
  return !subtree.empty();
}

struct Timers {
  struct Entry {
    const Node* node;
    std::weak_ptr<Node> living;
  };
  std::multimap<Clock::time_point, Entry> queue;
  std::condition_variable sooner;
  pid_t process = 0;
  Timers* older = nullptr;  // of the process that this one was forked from: never freed
};
inline Timers*& timers() {
  static Timers* instance = new Timers;
  return instance;
}

inline void keep_time(Timers* mine) {
  std::unique_lock<std::mutex> lock(big_lock());
  for (;;) {
    if (mine->queue.empty()) {
      mine->sooner.wait(lock);
      continue;
    }
    const Clock::time_point next = mine->queue.begin()->first;
    if (Clock::now() < next) {
      if (next == Clock::time_point::max()) {
        mine->sooner.wait(lock);
      } else {
        mine->sooner.wait_until(lock, next);
      }
      continue;
    }
    std::shared_ptr<Node> node = mine->queue.begin()->second.living.lock();
    mine->queue.erase(mine->queue.begin());
    lock.unlock();
    if (node) cancel(node, Cause::deadline_exceeded());
    node.reset();  // its destructor takes the lock
    lock.lock();
  }
}

inline void schedule(const std::shared_ptr<Node>& node) {
  const std::lock_guard<std::mutex> lock(big_lock());
  if (node->cancelled) return;
  if (timers()->process != ::getpid()) {
    auto* const fresh = new Timers;  // a thread doesn't survive a fork, nor does what it slept on
    fresh->queue = timers()->queue;
    fresh->process = ::getpid();
    fresh->older = timers();
    timers() = fresh;
    std::thread(keep_time, fresh).detach();
  }
  timers()->queue.emplace(*node->timer, Timers::Entry{node.get(), node});
  timers()->sooner.notify_all();
}

inline void unschedule(const Node* node) {
  if (!node->timer) return;
  std::erase_if(timers()->queue, [&](const auto& entry) { return entry.second.node == node; });
}

template <class F>
class CancellationCallback;

class CancellationToken {
 public:
  CancellationToken() noexcept = default;

  bool is_cancelled() const noexcept {
    const std::lock_guard<std::mutex> lock(big_lock());
    return node_ && node_->cancelled;
  }
  bool can_be_cancelled() const noexcept {
    const std::lock_guard<std::mutex> lock(big_lock());
    return node_ && node_->can_be_cancelled();
  }
  Cause cause() const noexcept {
    const std::lock_guard<std::mutex> lock(big_lock());
    return node_ ? node_->cause : Cause();
  }
  std::optional<Clock::time_point> deadline() const noexcept {
    const std::lock_guard<std::mutex> lock(big_lock());
    return node_ ? node_->deadline : std::nullopt;
  }
  void wait() const { wait_to(Clock::time_point::max()); }
  template <class Rep, class Period>
  bool wait_for(std::chrono::duration<Rep, Period> span) const {
    return wait_to(lastcall::detail::deadline_after(span));
  }
  template <class Duration>
  bool wait_until(std::chrono::time_point<Clock, Duration> point) const {
    return wait_to(lastcall::detail::saturated(point));
  }
  void throw_if_cancelled() const {
    if (is_cancelled()) throw OperationCancelled(cause());
  }
  int fd() const {
    const std::lock_guard<std::mutex> lock(big_lock());
    if (node_ && node_->flag) return node_->flag->fd();
    if (!node_ || !node_->can_be_cancelled()) return -1;
    node_->flag.emplace("making a token's descriptor");
    if (node_->cancelled) node_->flag->raise();
    return node_->flag->fd();
  }
  bool stop_requested() const noexcept { return is_cancelled(); }
  bool stop_possible() const noexcept { return can_be_cancelled(); }
  template <class F>
  using callback_type = CancellationCallback<F>;
  friend bool operator==(const CancellationToken& a, const CancellationToken& b) noexcept {
    return a.node_ == b.node_;
  }

 private:
  friend class CancellationSource;
  template <class F>
  friend class CancellationCallback;

  bool wait_to(Clock::time_point end) const {
    std::unique_lock<std::mutex> lock(big_lock());
    for (;;) {
      if (node_ && node_->cancelled) return true;
      if (end == Clock::time_point::max()) {
        changed().wait(lock);
      } else {
        if (Clock::now() >= end) return false;
        changed().wait_until(lock, end);
      }
    }
  }

  std::shared_ptr<Node> node_;
};

class CancellationSource {
 public:
  CancellationSource() : CancellationSource({}, std::nullopt) {}
  explicit CancellationSource(const CancellationToken& parent)
      : CancellationSource({&parent, 1}, std::nullopt) {}
  template <class Rep, class Period>
  CancellationSource(const CancellationToken& parent, std::chrono::duration<Rep, Period> timeout)
      : CancellationSource({&parent, 1}, lastcall::detail::deadline_after(timeout)) {}
  template <class Duration>
  CancellationSource(const CancellationToken& parent,
                     std::chrono::time_point<Clock, Duration> deadline)
      : CancellationSource({&parent, 1}, lastcall::detail::saturated(deadline)) {}
  static CancellationSource any_of(std::span<const CancellationToken> parents) {
    return CancellationSource(parents, std::nullopt);
  }
  static CancellationSource any_of(std::initializer_list<CancellationToken> parents) {
    return any_of(std::span<const CancellationToken>(parents.begin(), parents.size()));
  }

  CancellationSource(CancellationSource&& other) noexcept
      : node_(std::move(other.node_)), armed_(other.armed_) {}
  CancellationSource& operator=(CancellationSource&& other) noexcept {
    if (this == &other) return *this;
    const CancellationSource old(std::move(*this));
    node_ = std::move(other.node_);
    armed_ = other.armed_;
    return *this;
  }
  ~CancellationSource() {
    if (!node_) return;
    if (armed_) cancel();
    const std::lock_guard<std::mutex> lock(big_lock());
    --node_->sources;
  }

  void disarm() noexcept { armed_ = false; }
  CancellationToken token() const noexcept {
    CancellationToken token;
    token.node_ = node_;
    return token;
  }
  bool cancel(Cause cause = Cause::cancelled()) noexcept {
    const std::shared_ptr<Node> keep = node_;
    return keep && reference::cancel(keep, std::move(cause));
  }
  bool is_cancelled() const noexcept { return token().is_cancelled(); }

 private:
  CancellationSource(std::span<const CancellationToken> parents,
                     std::optional<Clock::time_point> own)
      : node_(std::make_shared<Node>()) {
    node_->sources = 1;
    {
      const std::lock_guard<std::mutex> lock(big_lock());
      for (const CancellationToken& parent : parents) {
        if (!parent.node_) continue;
        const std::optional<Clock::time_point> theirs = parent.node_->deadline;
        if (theirs && (!node_->deadline || *theirs < *node_->deadline)) node_->deadline = theirs;
        if (parent.node_->cancelled && !node_->cancelled) {
          node_->cancelled = true;
          node_->cause = parent.node_->cause;
        }
        node_->parents.push_back(parent.node_);
        parent.node_->children.push_back(node_);
      }
      if (own && (!node_->deadline || *own < *node_->deadline))
        node_->deadline = node_->timer = own;
      if (!node_->cancelled && own && *own <= Clock::now()) {
        node_->cancelled = true;
        node_->cause = Cause::deadline_exceeded();
      }
    }
    if (node_->timer) schedule(node_);
  }

  std::shared_ptr<Node> node_;
  bool armed_ = true;
};

template <class F>
class CancellationCallback final : private Registration {
 public:
  using callback_type = F;

  template <class Init>
  requires std::is_constructible_v<F, Init> CancellationCallback(CancellationToken token, Init&& f)
  noexcept(std::is_nothrow_constructible_v<F, Init>)
      : node_(std::move(token.node_)), f_(std::forward<Init>(f)) {
    {
      const std::lock_guard<std::mutex> lock(big_lock());
      if (!node_) return;
      if (!node_->cancelled) {
        in = &node_->callbacks;
        in->push_back(this);
        state = State::waiting;
        return;
      }
      state = State::done;
    }
    run();
  }
  CancellationCallback(const CancellationCallback&) = delete;
  CancellationCallback& operator=(const CancellationCallback&) = delete;
  ~CancellationCallback() {
    std::unique_lock<std::mutex> lock(big_lock());
    if (in != nullptr) {
      in->remove(this);
    } else if (state == State::running && runner == std::this_thread::get_id()) {
      *destroyed_inside = true;
    } else {
      changed().wait(lock, [this] { return state != State::running; });
    }
  }

 private:
  void run() noexcept override { std::forward<F>(f_)(); }

  std::shared_ptr<Node> node_;
  F f_;
};
template <class F>
CancellationCallback(CancellationToken, F) -> CancellationCallback<F>;

}  // namespace reference

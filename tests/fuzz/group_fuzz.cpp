// WaitGroup against a list of who is in: by guards, by names and by hand, on three threads, with threads
// that wait. Whoever waits returns when the list is empty and not before.
#include <lastcall/wait_group.hpp>

#include "input.hpp"

#include "support/wait_group_tools.hpp"

#include <array>
#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <list>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

namespace {

using fuzz::require;
using lastcall::WaitGroup;
using Guard = WaitGroup::Guard;
using lastcall::detail::WaitGroupAccess;

/// A thread that does what it is told, one thing at a time: counts of one thread are left on another.
class Hand {
 public:
  Hand() : thread_([this] { work(); }) {}
  void run(const std::function<void()>& deed) {
    std::unique_lock<std::mutex> lock(mutex_);
    deed_ = &deed;
    changed_.notify_all();
    changed_.wait(lock, [this] { return deed_ == nullptr; });
  }

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      changed_.wait(lock, [this] { return deed_ != nullptr; });
      (*deed_)();
      deed_ = nullptr;
      changed_.notify_all();
    }
  }
  std::mutex mutex_;
  std::condition_variable changed_;
  const std::function<void()>* deed_ = nullptr;
  std::thread thread_;
};

/// Who is in, without any cleverness.
struct Reference {
  struct Member {
    std::optional<std::string> name;
  };
  std::list<Member> members;
  std::size_t added = 0;
  bool closed = false;

  std::size_t count() const { return members.size() + added; }
};

struct Place {
  Guard guard;
  std::optional<std::list<Reference::Member>::iterator> member;
};

struct Waiter {
  std::atomic<bool> returned{false};
  std::thread thread;
};

class Game {
 public:
  explicit Game(fuzz::Input& input) : input_(input), group_(std::make_unique<WaitGroup>()) {}

  void play() {
    // Threads are dear: at most so many of their deeds an input.
    for (int turn = 0; turn < 200 && !input_.empty(); ++turn) {
      const std::uint8_t what = input_.byte();
      const std::size_t who = what >> 6U;
      const std::function<void()> deed = [this, what] { one_operation(what & 63U); };
      if (who == 1 || who == 2) {
        hand(who - 1).run(deed);
      } else {
        deed();
      }
      look();
    }
    for (Place& place : places_) leave(place);
    while (reference_.added > 0) done();
    look();
    require(waiters_.empty(), "somebody waits for nobody");
    group_->wait();
    group_.reset();
  }

 private:
  static Hand& hand(std::size_t number) {
    static Hand* const hands[] = {new Hand, new Hand};
    return *hands[number];
  }

  Place& some_place() { return places_[input_.below(places_.size())]; }

  void one_operation(unsigned what) {
    switch (what % 16) {
      case 0:
      case 1: enter(some_place(), input_.below(4)); break;
      case 2:
      case 3: leave(some_place()); break;
      case 4: copy(some_place(), some_place()); break;
      case 5: move(some_place(), some_place()); break;
      case 6: swap(some_place(), some_place()); break;
      case 7: add(); break;
      case 8: done(); break;
      case 9:
        if (input_.below(4) == 1) {
          group_->close();
          reference_.closed = true;
        }
        break;
      case 10: burst(input_.byte()); break;
      case 11: glance(); break;
      case 12: wait_along(); break;
      case 13: list(); break;
      case 14: {  // leaves early, and is an empty guard from then on
        Place& place = some_place();
        place.guard.release();
        gone(place);
        place.guard.release();
        break;
      }
      default: enter(some_place(), 3); break;
    }
  }

  void gone(Place& place) {
    if (place.member) reference_.members.erase(*place.member);
    place.member.reset();
  }
  void came(Place& place, std::optional<std::string> name) {
    reference_.members.push_back({std::move(name)});
    place.member = std::prev(reference_.members.end());
  }

  void enter(Place& place, std::size_t how) {
    leave(place);
    look();  // those who wait for this zero have to be gone before somebody enters
    std::optional<std::string> name;
    if (how % 2 == 1) name = input_.text(20);
    if (how < 2) {
      place.guard = name ? group_->try_enter(*name) : group_->try_enter();
      require(static_cast<bool>(place.guard) == !reference_.closed,
              "try_enter() and the door disagree");
      if (place.guard) came(place, name);
      return;
    }
    bool refused = false;
    try {
      place.guard = name ? group_->enter(*name) : group_->enter();
    } catch (const std::logic_error&) {
      refused = true;
    }
    require(refused == reference_.closed, "enter() and the door disagree");
    if (!refused) came(place, name);
  }

  void leave(Place& place) {
    place.guard = Guard();
    gone(place);
  }

  void copy(Place& from, Place& to) {
    to.guard = from.guard;
    if (&from == &to) return;
    gone(to);
    if (from.member) came(to, (*from.member)->name);
  }

  void move(Place& from, Place& to) {
    Guard taken(std::move(from.guard));
    require(!from.guard, "a guard that was moved from holds something");
    to.guard = std::move(taken);
    if (&from == &to) return;
    gone(to);
    to.member = std::exchange(from.member, std::nullopt);
  }

  void swap(Place& one, Place& other) {
    one.guard.swap(other.guard);
    std::swap(one.member, other.member);
  }

  void add() {
    // A few, or more than any sum can hold.
    const std::size_t n = input_.below(8) == 7 ? ~std::size_t{0} - input_.byte() : input_.below(4);
    int thrown = 0;
    try {
      group_->add(n);
    } catch (const std::invalid_argument&) {
      thrown = 1;
    } catch (const std::logic_error&) {
      thrown = 2;
    }
    const int wanted = reference_.closed ? 2 : n > 1000 ? 1 : 0;
    require(thrown == wanted, "add() threw something else");
    if (thrown == 0) reference_.added += n;
  }

  void done() {
    bool thrown = false;
    try {
      group_->done();
    } catch (const std::logic_error&) {
      thrown = true;
    }
    require(thrown == (reference_.added == 0), "done() took what nobody added, or refused");
    if (!thrown) --reference_.added;
  }

  // Some dozens of entries without a wait between them make the group fast.
  void burst(std::size_t count) {
    for (; count > 0; --count) {
      const Guard brief = group_->try_enter();
      require(static_cast<bool>(brief) == !reference_.closed, "a burst was let in, or not");
    }
  }

  void glance() {
    const bool zero = reference_.count() == 0;
    switch (input_.below(3)) {
      case 0: require(group_->wait_for(std::chrono::seconds(-1)) == zero, "wait_for()"); break;
      case 1: require(group_->wait_for(std::chrono::nanoseconds(1)) == zero, "wait_for()"); break;
      default: require(group_->wait_until(lastcall::Clock::now()) == zero, "wait_until()"); break;
    }
  }

  void wait_along() {
    if (reference_.count() == 0 || waiters_.size() >= 3) return;
    const std::size_t before = WaitGroupAccess::waiters(*group_);
    waiters_.push_back(std::make_unique<Waiter>());
    Waiter* const waiter = waiters_.back().get();
    WaitGroup* const group = group_.get();
    waiter->thread = std::thread([waiter, group] {
      group->wait();
      waiter->returned = true;
    });
    while (WaitGroupAccess::waiters(*group_) == before && !waiter->returned)
      std::this_thread::yield();
  }

  void list() const {
    const std::vector<WaitGroup::Member> members = group_->members();
    std::size_t at = 0;
    for (const Reference::Member& member : reference_.members) {
      if (!member.name) continue;
      require(at < members.size(), "a member isn't listed");
      require(members[at].name == *member.name, "another member is listed, or in another order");
      ++at;
    }
    require(at == members.size(), "somebody is listed who has left");
  }

  void look() {
    require(group_->is_closed() == reference_.closed, "closed, or not");
    require(group_->count() == reference_.count(), "another count");
    for (const Place& place : places_) {
      require(static_cast<bool>(place.guard) == place.member.has_value(), "a guard holds, or not");
    }
    if (reference_.count() > 0) {
      for (const auto& waiter : waiters_) require(!waiter->returned, "a wait ended early");
      return;
    }
    for (const auto& waiter : waiters_) waiter->thread.join();  // or libFuzzer calls it a time-out
    waiters_.clear();
  }

  fuzz::Input& input_;
  std::unique_ptr<WaitGroup> group_;
  Reference reference_;
  std::array<Place, 10> places_;
  std::vector<std::unique_ptr<Waiter>> waiters_;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  Game(input).play();
  return 0;
}

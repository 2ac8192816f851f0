// The cancellation tree against tests/support/reference_tree.hpp: the same script is played on both, and
// what they say of it has to be the same.
//
// Callbacks of one cancel() run in no particular order, so what they do doesn't depend on it: whoever they
// cancel gets the same cause from each of them, and whom they destroy says nothing. What they say is
// sorted before it is compared.
#include <lastcall/cancellation.hpp>

#include "input.hpp"

#include "support/reference_tree.hpp"
#include "support/threads.hpp"

#include <algorithm>
#include <array>
#include <bitset>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

using fuzz::require;
using lastcall::Cause;
using lastcall::Clock;
using namespace std::chrono_literals;

struct Library {
  using Source = lastcall::CancellationSource;
  using Token = lastcall::CancellationToken;
  using Callback = lastcall::CancellationCallback<std::function<void()>>;
  /// What contention does: the node gets a lane a thread, and must act as before.
  static void grow(const Token& token) {
    if (auto* const node = lastcall::detail::TreeAccess::peek(token)) {
      lastcall::detail::grow_shards(node);
    }
  }
};

struct Reference {
  using Source = reference::CancellationSource;
  using Token = reference::CancellationToken;
  using Callback = reference::CancellationCallback<std::function<void()>>;
  static void grow(const Token& token) { static_cast<void>(token); }
};

constexpr std::size_t places = 10;
constexpr std::size_t most_nodes = 64;

template <class Tree>
class Game {
 public:
  using Source = typename Tree::Source;
  using Token = typename Tree::Token;
  using Callback = typename Tree::Callback;

  Game(fuzz::Input input, Clock::time_point later) : input_(input), later_(later) {}

  /// What there was to see, a line for each operation.
  std::vector<std::string> play() {
    for (int turn = 0; turn < 300 && !input_.empty(); ++turn) {
      one_operation();
      write_down();
    }
    say_all();
    write_down();
    // Everything goes, in an order that the input knows.
    while (!input_.empty()) destroy_something();
    for (auto& callback : callbacks_) callback.reset();
    for (auto& source : sources_) drop(source);
    write_down();
    return std::move(story_);
  }

 private:
  struct OwnedSource {
    std::optional<Source> source;
    std::size_t node = 0;
  };
  struct HeldToken {
    Token token;
    std::size_t node = 0;  // 0: the empty token
  };
  struct Hanging {
    std::unique_ptr<Callback> callback;
    bool victim = false;  // others may destroy it
    int runs = 0;
    void reset() {
      callback.reset();
      victim = false;
      runs = 0;
    }
  };
  using Ancestors = std::bitset<most_nodes>;

  void say(const std::string& words) { now_.push_back(words); }
  void write_down() {
    std::sort(now_.begin(), now_.end());
    std::string line;
    for (const std::string& words : now_) line += words + "; ";
    story_.push_back(line);
    now_.clear();
  }

  std::size_t place() { return input_.below(places); }

  void one_operation() {
    switch (input_.below(17)) {
      case 0: make(place(), {}, 0); break;
      case 1:
      case 2: {
        const HeldToken& parent = tokens_[place()];
        make(place(), {parent}, 1);
        break;
      }
      case 3: {
        const HeldToken& parent = tokens_[place()];
        make(place(), {parent}, 2);
        break;
      }
      case 4: {
        std::vector<HeldToken> parents;
        for (std::size_t count = input_.below(5); count > 0; --count)
          parents.push_back(tokens_[place()]);
        make(place(), parents, 3);
        break;
      }
      case 5:
      case 6: take_token(place(), place()); break;
      case 7: tokens_[place()] = HeldToken(tokens_[place()]); break;
      case 8: tokens_[place()] = HeldToken{}; break;
      case 9: move_source(place(), place()); break;
      case 10: cancel(place()); break;
      case 11: {
        OwnedSource& source = sources_[place()];
        if (source.source) source.source->disarm();
        break;
      }
      case 12: drop(sources_[place()]); break;
      case 13: hang(place(), place()); break;
      case 14: callbacks_[place()].reset(); break;
      case 15: Tree::grow(tokens_[place()].token); break;
      default:
        if (input_.flag()) {
          say_all();
        } else {
          ask(tokens_[place()]);
        }
    }
  }

  void destroy_something() {
    switch (input_.below(3)) {
      case 0: drop(sources_[place()]); break;
      case 1: tokens_[place()] = HeldToken{}; break;
      default: callbacks_[place()].reset(); break;
    }
  }

  void make(std::size_t where, const std::vector<HeldToken>& parents, int how) {
    if (next_node_ >= most_nodes) return;
    const std::size_t node = next_node_++;
    ancestors_[node].set(node);
    for (const HeldToken& parent : parents) ancestors_[node] |= ancestors_[parent.node];
    std::optional<Source> made;
    switch (how) {
      case 0: made.emplace(); break;
      case 1: made.emplace(parents[0].token); break;
      case 2: made.emplace(timed(parents[0].token)); break;
      default: {
        std::vector<Token> tokens;
        for (const HeldToken& parent : parents) tokens.push_back(parent.token);
        made.emplace(Source::any_of(tokens));
      }
    }
    if (input_.below(4) == 1) made->disarm();
    // Assigning over a source cancels what it owned.
    OwnedSource& old = sources_[where];
    old.node = node;
    say(made->is_cancelled() ? "made cancelled" : "made alive");
    if (old.source) {
      *old.source = std::move(*made);
    } else {
      old.source = std::move(made);
    }
  }

  // No deadline ever comes while the script runs, unless it has come already.
  Source timed(const Token& parent) {
    const std::size_t far = input_.below(6);
    switch (input_.below(7)) {
      case 0: return Source(parent, 0ms);
      case 1: return Source(parent, -1h);
      case 2: return Source(parent, std::chrono::hours::max());
      case 3: return Source(parent, Clock::time_point::min());
      case 4: return Source(parent, Clock::time_point::max());
      case 5: return Source(parent, later_ - 1h * static_cast<int>(far));
      default: return Source(parent, later_ + 1s * static_cast<int>(far));
    }
  }

  void take_token(std::size_t from, std::size_t to) {
    const OwnedSource& source = sources_[from];
    if (!source.source) return;
    HeldToken taken{source.source->token(), source.node};
    require(taken.token == source.source->token(), "two tokens of one source are not equal");
    tokens_[to] = taken;
  }

  void move_source(std::size_t from, std::size_t to) {
    if (from == to || !sources_[from].source) return;
    OwnedSource& target = sources_[to];
    Source moved(std::move(*sources_[from].source));
    require(!sources_[from].source->cancel(), "a source that was moved from cancelled something");
    require(sources_[from].source->token() == Token(), "a source that was moved from has a token");
    sources_[from].source.reset();
    target.node = sources_[from].node;
    if (target.source) {
      *target.source = std::move(moved);
    } else {
      target.source.emplace(std::move(moved));
    }
  }

  void cancel(std::size_t from) {
    OwnedSource& source = sources_[from];
    if (!source.source) return;
    // A callback may empty the place.
    const Token token = source.source->token();
    bool first = false;
    switch (input_.below(4)) {
      case 0: first = source.source->cancel(); break;
      case 1: first = source.source->cancel(Cause()); break;
      case 2:
        first = source.source->cancel(
            Cause::failure(std::make_exception_ptr(std::runtime_error("bad"))));
        break;
      default:
        first = source.source->cancel(Cause::cancelled(std::to_string(input_.byte())));
        break;
    }
    require(token.is_cancelled(), "cancel() has returned, and the node is not cancelled");
    say(first ? "first" : "not first");
  }

  // std::optional says that it is empty before it destroys what it holds: callbacks may look there.
  static void drop(OwnedSource& owned) { owned.source.reset(); }

  void hang(std::size_t on, std::size_t where) {
    Hanging& old = callbacks_[where];
    old.reset();
    const HeldToken held = tokens_[on];
    const std::size_t deed = input_.below(7);
    const std::size_t whom = place();
    const std::size_t number = next_callback_++;
    old.victim = deed == 6;
    // In its constructor it runs if the token is cancelled: then it is not in its place yet.
    old.callback = std::make_unique<Callback>(
        held.token, std::function<void()>([this, held, deed, whom, number, where] {
          called(held, deed, whom, number, where);
        }));
  }

  // Nothing of the closure may be used after it has destroyed itself: so copies come in.
  void called(HeldToken held, std::size_t deed, std::size_t whom, std::size_t number,
              std::size_t where) {
    require(held.token.is_cancelled(), "a callback met its own token uncancelled");
    for (const HeldToken& other : tokens_) {
      require(
          !ancestors_[other.node].test(held.node) || held.node == 0 || other.token.is_cancelled(),
          "a callback met an uncancelled descendant");
    }
    if (deed == 6) {  // whether it gets its turn before somebody destroys it is nobody's promise
      require(++callbacks_[where].runs == 1 || callbacks_[where].callback == nullptr,
              "called twice");
      return;
    }
    say("call " + std::to_string(number) + " " + std::string(held.token.cause().message()));
    switch (deed) {
      case 0: callbacks_[where].reset(); break;  // itself; in its constructor: nobody
      case 1:
        if (sources_[whom].source) sources_[whom].source->cancel();
        break;
      case 2:  // the source whose cancel() or destructor this is
        if (sources_[whom].source && sources_[whom].node == held.node) drop(sources_[whom]);
        break;
      case 3: {
        bool ran = false;
        const Callback inner(held.token, std::function<void()>([&ran] { ran = true; }));
        require(ran, "one made on a cancelled token has not run in its constructor");
        break;
      }
      case 4: {
        const Source born(held.token);
        require(born.is_cancelled(), "a child of a cancelled node is born alive");
        require(born.token().cause().message() == held.token.cause().message(),
                "with another cause");
        break;
      }
      case 5:
        if (callbacks_[whom].victim) callbacks_[whom].reset();
        break;
      default: break;
    }
  }

  void ask(const HeldToken& held) {
    const Token& token = held.token;
    require(token.wait_for(-1s) == token.is_cancelled(), "wait_for() says something else");
    require(token.wait_until(Clock::now()) == token.is_cancelled(),
            "wait_until() says something else");
    bool thrown = false;
    try {
      token.throw_if_cancelled();
    } catch (const lastcall::OperationCancelled& error) {
      thrown = true;
      require(error.cause().message() == token.cause().message(), "thrown with another cause");
    }
    require(thrown == token.is_cancelled(), "throw_if_cancelled()");
    const int fd = token.fd();
    require(fd == token.fd(), "another descriptor");
    say(fd < 0 ? "no descriptor" : support::is_readable(fd) ? "readable" : "silent");
  }

  void say_all() {
    for (std::size_t at = 0; at < places; ++at) {
      const Token& token = tokens_[at].token;
      std::string words = std::to_string(at) + ":";
      words += token.is_cancelled() ? " cancelled" : " alive";
      words += token.can_be_cancelled() ? " mortal" : " safe";
      words += " " + std::to_string(static_cast<int>(token.cause().kind()));
      words += " '" + token.cause().message() + "'";
      if (const auto deadline = token.deadline()) {
        // What has come already was set when the script ran, in two runs at two moments.
        const bool passed = *deadline <= Clock::now();
        const bool never = *deadline == Clock::time_point::max();
        words += passed  ? " past"
                 : never ? " never"
                         : " " + std::to_string((*deadline - later_) / 1s);
      }
      for (std::size_t other = 0; other < at; ++other) {
        if (tokens_[other].token == token) words += " =" + std::to_string(other);
      }
      say(words);
    }
  }

  fuzz::Input input_;
  const Clock::time_point later_;
  std::vector<std::string> story_;
  std::vector<std::string> now_;
  std::array<OwnedSource, places> sources_;
  std::array<HeldToken, places> tokens_;
  std::array<Hanging, places> callbacks_;
  std::array<Ancestors, most_nodes> ancestors_;
  std::size_t next_node_ = 1;
  std::size_t next_callback_ = 1;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fuzz::Input input(data, size);
  const auto later = Clock::now() + 1000h;
  const std::vector<std::string> wanted = Game<Reference>(input, later).play();
  const std::vector<std::string> got = Game<Library>(input, later).play();
  for (std::size_t at = 0; at < wanted.size() || at < got.size(); ++at) {
    const std::string there = at < wanted.size() ? wanted[at] : "nothing";
    const std::string here = at < got.size() ? got[at] : "nothing";
    if (here != there) {
      fuzz::fail("operation " + std::to_string(at) + "\n  the reference: " + there +
                 "\n  the library:   " + here);
    }
  }
  return 0;
}

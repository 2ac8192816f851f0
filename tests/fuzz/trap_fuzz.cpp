// Traps, ignorers, somebody else's handlers and a blocked mask in one process, against a model of what the
// contract says: which dispositions are in place, who has which signal pending, what is raised again.
//
// The model of one number is a chain: the disposition in place is somebody else's, or ours with the traps
// that hold it and the disposition that it replaced. One thread alone takes the signals, so each has been
// handled when kill() returns (or waits, blocked).
#include <lastcall/cancellation.hpp>
#include <lastcall/signal_trap.hpp>

#include "input.hpp"

#include "support/threads.hpp"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace {

using fuzz::require;
using lastcall::SignalIgnore;
using lastcall::SignalInfo;
using lastcall::SignalTrap;

// By urgency. Some end the process by default, some do nothing.
constexpr std::array<int, 8> numbers = {SIGINT,  SIGTERM, SIGHUP, SIGUSR1,
                                        SIGUSR2, SIGCHLD, SIGURG, SIGWINCH};
constexpr std::size_t kinds = numbers.size();
bool is_harmless(std::size_t kind) { return kind >= 5; }

// ---- Somebody else's dispositions: SIG_DFL, SIG_IGN, and four handlers.

// `spent` is what the kernel makes of `once` when it has called it: SIG_DFL with other flags.
enum class Foreign { by_default, spent, ignored, plain, with_info, other, once };
constexpr std::size_t foreign_handlers = 4;
std::array<std::array<int, foreign_handlers>, 65> calls{};

template <std::size_t Which>
void plain_handler(int number) {
  ++calls[static_cast<std::size_t>(number)][Which];
}
void info_handler(int number, siginfo_t* info, void* context) {
  if (info == nullptr || info->si_signo != number || context == nullptr)
    fuzz::fail("a handler got no siginfo");
  ++calls[static_cast<std::size_t>(number)][1];
}

bool is_function(Foreign what) { return what >= Foreign::plain; }
bool is_default(Foreign what) { return what <= Foreign::spent; }
std::size_t index_of(Foreign what) {
  return static_cast<std::size_t>(what) - static_cast<std::size_t>(Foreign::plain);
}

struct sigaction action_of(Foreign what) {
  struct sigaction action {};
  ::sigemptyset(&action.sa_mask);
  switch (what) {
    case Foreign::by_default:
    case Foreign::spent: action.sa_handler = SIG_DFL; break;
    case Foreign::ignored: action.sa_handler = SIG_IGN; break;
    case Foreign::plain: action.sa_handler = plain_handler<0>; break;
    case Foreign::with_info:
      action.sa_sigaction = info_handler;
      action.sa_flags = SA_SIGINFO;
      break;
    case Foreign::other: action.sa_handler = plain_handler<2>; break;
    case Foreign::once:
      action.sa_handler = plain_handler<3>;
      action.sa_flags = static_cast<int>(static_cast<unsigned>(SA_RESETHAND));
      break;
  }
  return action;
}

// ---- The model

constexpr std::size_t records_a_page = 4096 / sizeof(lastcall::detail::SignalRecord);

struct Level;

/// What can be in place: somebody else's, or a level of ours.
struct Disposition {
  Foreign foreign = Foreign::by_default;
  Level* level = nullptr;
  bool operator==(const Disposition&) const = default;
};

/// What is pending at one trap of one number. Once a pipe is full, repeats may merge: then it is `sure` that
/// so many are left, and no more than there are records here.
struct Pending {
  std::deque<bool> records;  // whether no other trap got it
  std::size_t sure = 0;

  bool is_exact() const { return sure == records.size(); }
  /// Whether a record is left that no other trap got; empty: that can't be said.
  std::optional<bool> holds_exclusive() const {
    const auto count = static_cast<std::size_t>(std::count(records.begin(), records.end(), true));
    if (is_exact()) return count > 0;
    if (count == 0) return false;
    if (sure > 0 && count == records.size()) return true;
    return std::nullopt;
  }
};

struct Trap {
  std::unique_ptr<SignalTrap> trap;
  std::map<std::size_t, Level*> holds;  // kind -> where
  std::map<std::size_t, Pending> pending;
  std::size_t in_pipe = 0;  // records and bells since it was last read, at most
  std::size_t room = 0;
  std::size_t most_waiting = 0;
};

struct Level {
  std::vector<Trap*> traps;
  Disposition before;
  bool was_left = false;  // its last trap went while somebody else's handler covered it
  void (*entry)(int, siginfo_t*,
                void*) = nullptr;  // our handler, as it was seen when it was put there
};

enum class Again { no, yes, perhaps };

struct Kind {
  std::vector<std::unique_ptr<Level>> levels;
  Disposition now;
  std::optional<Disposition> saved;  // by somebody who means to put it back
  bool saved_is_stale = false;       // a trap came since the saved level was left
  int ignorers = 0;
  Disposition before_ignored;
  bool blocked = false;
  bool to_block = false;  // a trap unblocked it
  bool kernel_pending = false;
  Again again = Again::no;  // a trap that has just gone raised it
  std::array<int, foreign_handlers> calls{};

  std::size_t covered() const {
    return static_cast<std::size_t>(std::count_if(
        levels.begin(), levels.end(), [](const auto& level) { return level->was_left; }));
  }
  std::size_t live() const {
    return static_cast<std::size_t>(std::count_if(
        levels.begin(), levels.end(), [](const auto& level) { return !level->traps.empty(); }));
  }
  bool is_trapped() const { return live() > 0; }
};

class Game {
 public:
  explicit Game(fuzz::Input& input) : input_(input) {
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      ::sigaction(numbers[kind], nullptr, &found_[kind]);
      set_foreign(kind, Foreign::by_default);
    }
    ::pthread_sigmask(SIG_SETMASK, nullptr, &found_mask_);
    sigset_t ours;
    ::sigemptyset(&ours);
    for (const int number : numbers) ::sigaddset(&ours, number);
    ::pthread_sigmask(SIG_UNBLOCK, &ours, nullptr);
    calls = {};
  }
  Game(const Game&) = delete;
  Game& operator=(const Game&) = delete;

  // Leaves the process as it was found, so that each input starts from the same.
  ~Game() {
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      struct sigaction ignore {};
      ignore.sa_handler = SIG_IGN;
      ::sigaction(numbers[kind], &ignore, nullptr);  // forgets what is pending
      ::sigaction(numbers[kind], &found_[kind], nullptr);
      // Levels that were covered once would be remembered, as they have to be.
      for (auto& layer : lastcall::detail::signal_registry.layers) {
        layer[numbers[kind]].taken = false;
        layer[numbers[kind]].previous = nullptr;
        layer[numbers[kind]].seat = 0;
      }
    }
    ::pthread_sigmask(SIG_SETMASK, &found_mask_, nullptr);
  }

  void play() {
    while (!input_.empty()) {
      one_operation();
      look();
    }
    for (std::size_t at = 0; at < traps_.size(); ++at) {
      drain_deadly(at);
      drop(at);
      look();
    }
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      while (kinds_[kind].ignorers > 0) stop_ignoring(kind);
    }
    look();
  }

 private:
  std::size_t some_kind() { return input_.below(kinds); }
  std::size_t some_trap() { return input_.below(traps_.size()); }

  void one_operation() {
    switch (input_.below(14)) {
      case 0:
      case 1: make(some_trap()); break;
      case 2: {
        const std::size_t at = some_trap();
        drain_deadly(at);
        drop(at);
        break;
      }
      case 3:
      case 4: raise_some(some_kind(), 1); break;
      case 5: raise_some(some_kind(), input_.byte()); break;
      case 6:
      case 7: read(some_trap(), input_.below(4)); break;
      case 8: ignore(some_kind()); break;
      case 9: stop_ignoring(some_kind()); break;
      case 10: {
        static constexpr std::array<Foreign, 6> choices = {Foreign::by_default, Foreign::once,
                                                           Foreign::ignored,    Foreign::plain,
                                                           Foreign::with_info,  Foreign::other};
        const std::size_t kind = some_kind();
        set_foreign(kind, choices[input_.below(choices.size())]);
        break;
      }
      case 11: save_or_put_back(some_kind()); break;
      case 12: block(some_kind(), input_.flag()); break;
      default: shrink(some_trap()); break;
    }
  }

  // ---- Making and dropping

  void make(std::size_t at) {
    drain_deadly(at);
    drop(at);
    look();  // what was raised again as it went
    std::vector<int> list;
    std::set<std::size_t> wanted;
    const std::uint8_t bits = input_.byte();
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      if ((bits >> kind & 1U) != 0) wanted.insert(kind);
    }
    for (const std::size_t kind : wanted) list.push_back(numbers[kind]);
    const std::size_t odd = input_.below(16);
    if (odd == 1 && !list.empty()) list.push_back(list.front());  // twice counts once
    static constexpr int wrong[] = {0, -1, SIGKILL, SIGSTOP, SIGSEGV, SIGILL, 32, 65, 1000};
    const bool is_wrong = odd == 2 || list.empty();
    if (odd == 2) list.push_back(wrong[input_.below(9)]);
    bool ignored = false;
    bool no_level = false;
    for (const std::size_t kind : wanted) {
      const Kind& about = kinds_[kind];
      ignored |= about.ignorers > 0;
      // Ours are eight; those that others have covered may still be needed.
      no_level |= about.now.level == nullptr && about.live() + about.covered() >= 8;
    }

    // A blocked signal that waits for this trap's making comes in the constructor, when the thread's mask
    // changes: after all is in place. If there is no trap in the end, it stays where it is.
    std::unique_ptr<SignalTrap> made;
    std::string refused;
    try {
      made = std::make_unique<SignalTrap>(std::span<const int>(list));
    } catch (const std::invalid_argument&) {
      refused = "invalid";
    } catch (const std::logic_error&) {
      refused = "logic";
    }
    if (is_wrong) {
      require(refused == "invalid", "a list that is no good was taken");
      return;
    }
    if (ignored) {
      require(refused == "logic", "a number that is ignored was trapped");
      return;
    }
    if (no_level && refused == "logic") {
      // Levels that nobody is in may have changed hands on the way.
      for (const std::size_t kind : wanted) kinds_[kind].saved_is_stale = true;
      return;
    }
    require(refused.empty() && made != nullptr, "a trap was refused");

    Trap& trap = traps_[at];
    trap.trap = std::move(made);
    const int bytes = ::fcntl(trap.trap->fd(), F_GETPIPE_SZ);
    require(bytes > 0, "the descriptor is no pipe");
    trap.room = static_cast<std::size_t>(bytes) / 4096 * records_a_page;
    trap.most_waiting = trap.room;
    for (const std::size_t kind : wanted) hold(trap, kind);
    for (const std::size_t kind : wanted) {
      Kind& about = kinds_[kind];
      if (!about.blocked) continue;
      about.blocked = false;
      about.to_block = true;
      deliver_waiting(kind);
    }
  }

  void hold(Trap& trap, std::size_t kind) {
    Kind& about = kinds_[kind];
    if (about.now.level == nullptr) {
      about.levels.push_back(std::make_unique<Level>());
      about.levels.back()->before = about.now;
      about.now = {Foreign::by_default, about.levels.back().get()};
      struct sigaction seen {};
      ::sigaction(numbers[kind], nullptr, &seen);
      about.now.level->entry = seen.sa_sigaction;
      require((static_cast<unsigned>(seen.sa_flags) &
               static_cast<unsigned>(SA_RESTART | SA_SIGINFO | SA_ONSTACK)) ==
                  static_cast<unsigned>(SA_RESTART | SA_SIGINFO | SA_ONSTACK),
              "our handler has other flags");
      for (const int other : numbers)
        require(::sigismember(&seen.sa_mask, other) == 1, "not a full mask");
    }
    // A handler of ours whose level nobody was in may be another level's by now: so it isn't put back.
    if (about.saved && about.saved->level != nullptr && about.saved->level->traps.empty() &&
        about.saved->level != about.now.level) {
      about.saved_is_stale = true;
    }
    about.now.level->traps.push_back(&trap);
    trap.holds[kind] = about.now.level;
  }

  // Nothing may be raised again that ends the process: such signals are read first. The others are
  // left, and have to be raised again.
  void drain_deadly(std::size_t at) {
    Trap& trap = traps_[at];
    if (!trap.trap) return;
    const auto deadly = [&trap] {
      return std::any_of(trap.pending.begin(), trap.pending.end(), [](const auto& entry) {
        return !is_harmless(entry.first) && !entry.second.records.empty();
      });
    };
    while (deadly()) read(at, 0);
  }

  void drop(std::size_t at) {
    Trap& trap = traps_[at];
    if (!trap.trap) return;
    trap.trap.reset();
    for (const auto& [kind, level] : trap.holds) {
      Kind& about = kinds_[kind];
      std::erase(level->traps, &trap);
      if (!about.is_trapped() && about.to_block) {
        about.to_block = false;
        about.blocked = true;
      }
      if (!level->traps.empty()) continue;
      const bool in_place = about.now.level == level;
      const bool as_before = about.now == level->before;
      // A function that has come back may call the level that it was beneath.
      const bool is_function =
          about.now.level != nullptr ||
          !(is_default(about.now.foreign) || about.now.foreign == Foreign::ignored);
      level->was_left = !in_place && (!as_before || is_function);
      if (in_place) set_now(about, kind, level->before);
      if (level->was_left || !is_default(level->before.foreign)) continue;
      const std::optional<bool> unseen = trap.pending[kind].holds_exclusive();
      about.again = !unseen ? Again::perhaps : *unseen ? Again::yes : Again::no;
      require(about.again == Again::no || is_harmless(kind), "the model would end the process");
    }
    trap.holds.clear();
    trap.pending.clear();
    trap.in_pipe = 0;
  }

  // ---- Raising

  /// Whether a signal that is delivered now would end the process.
  bool is_deadly(std::size_t kind) const {
    const Kind& about = kinds_[kind];
    if (is_harmless(kind)) return false;
    Disposition at = about.now;
    if (at.level != nullptr && at.level->traps.empty()) at = at.level->before;
    return at.level == nullptr && is_default(at.foreign);
  }

  void raise_some(std::size_t kind, std::size_t count) {
    Kind& about = kinds_[kind];
    for (; count > 0; --count) {
      if (!about.blocked && is_deadly(kind)) return;
      // To the process, as what a trap raises again: one to the thread could be pending beside it.
      ::kill(::getpid(), numbers[kind]);
      if (about.blocked) {
        // One that is ignored is kept while it is blocked (Linux), and looked at when it is delivered.
        about.kernel_pending = true;
      } else {
        deliver(kind);
      }
    }
  }

  void deliver_waiting(std::size_t kind) {
    if (!kinds_[kind].kernel_pending) return;
    kinds_[kind].kernel_pending = false;
    deliver(kind);
  }

  void deliver(std::size_t kind) {
    Kind& about = kinds_[kind];
    if (about.now.level == nullptr) {
      call(kind, about.now);
      return;
    }
    Level& level = *about.now.level;
    if (level.traps.empty()) {
      // Ours, put back by somebody, with no trap left: it gives way and acts as what was there before.
      set_now(about, kind, level.before);
      call(kind, level.before);
      about.now = level.before;
      return;
    }
    for (Trap* const trap : level.traps) {
      Pending& pending = trap->pending[kind];
      pending.records.push_back(level.traps.size() == 1);
      // Where the pipe is full, or a pipe's worth is waiting, it may merge with another of its number; but
      // some record is left after it.
      std::size_t waiting = 0;
      for (const auto& [other, left] : trap->pending) waiting += left.records.size();
      const bool fits = ++trap->in_pipe <= trap->room && waiting <= trap->most_waiting;
      pending.sure = fits ? pending.sure + 1 : std::max<std::size_t>(pending.sure, 1);
    }
    call(kind, level.before);
  }

  void call(std::size_t kind, Disposition& what) {
    require(what.level == nullptr, "the model's chain has another shape");
    if (!is_function(what.foreign)) return;
    ++kinds_[kind].calls[index_of(what.foreign)];
    if (what.foreign == Foreign::once) what.foreign = Foreign::spent;
  }

  // ---- Reading

  void read(std::size_t at, std::size_t how) {
    Trap& trap = traps_[at];
    if (!trap.trap) return;
    std::optional<SignalInfo> got;
    switch (how) {
      case 0: got = trap.trap->try_wait(); break;
      case 1: got = trap.trap->wait_for(std::chrono::seconds(-1)); break;
      case 2: {
        // Cancelled already: it goes first, and the signal stays.
        lastcall::CancellationSource source;
        source.cancel();
        require(!trap.trap->wait(source.token()), "a cancelled wait took a signal");
        return;
      }
      default:
        if (most_urgent(trap) == kinds) return;
        got = trap.trap->wait();
        break;
    }
    // All that is more urgent than what came was not there: it had merged.
    std::size_t kind = 0;
    for (; kind < kinds && (!got || numbers[kind] != got->number); ++kind) {
      Pending& pending = trap.pending[kind];
      require(pending.sure == 0,
              got ? "handed out in another order, or one was lost" : "a signal was lost");
      pending.records.clear();
    }
    trap.in_pipe = 0;
    if (!got) return;
    require(kind != kinds, "another signal");
    require(got->sender_pid == ::getpid() && got->sender_uid == ::getuid(), "from somebody else");
    Pending& pending = trap.pending[kind];
    require(!pending.records.empty(), "a signal came that nobody raised");
    pending.records.pop_front();
    if (pending.sure > 0) --pending.sure;
    // What is left is in the trap's own memory by now, with a bell in the pipe.
    trap.in_pipe = 1;
  }

  /// The first that is pending for certain; `kinds` if there is none.
  static std::size_t most_urgent(Trap& trap) {
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      if (trap.pending[kind].sure > 0) return kind;
    }
    return kinds;
  }

  // ---- Ignoring

  void ignore(std::size_t kind) {
    if (ignorers_[kind].size() >= 3) return;
    Kind& about = kinds_[kind];
    std::unique_ptr<SignalIgnore> made;
    try {
      made = std::make_unique<SignalIgnore>(numbers[kind]);
    } catch (const std::logic_error&) {
    }
    require((made == nullptr) == about.is_trapped(), "ignoring what is trapped, or not what isn't");
    if (made == nullptr) return;
    ignorers_[kind].push_back(std::move(made));
    const Disposition ignored{Foreign::ignored, nullptr};
    if (about.ignorers == 0 || about.now != ignored) {
      about.before_ignored = about.now;
      set_now(about, kind, ignored);
    }
    ++about.ignorers;
  }

  void stop_ignoring(std::size_t kind) {
    Kind& about = kinds_[kind];
    if (about.ignorers == 0) return;
    ignorers_[kind].pop_back();
    if (--about.ignorers > 0) return;
    if (about.now == Disposition{Foreign::ignored, nullptr})
      set_now(about, kind, about.before_ignored);
  }

  // ---- Somebody else

  void set_foreign(std::size_t kind, Foreign what) {
    const struct sigaction action = action_of(what);
    ::sigaction(numbers[kind], &action, nullptr);
    set_now(kinds_[kind], kind, {what, nullptr});
  }

  void save_or_put_back(std::size_t kind) {
    Kind& about = kinds_[kind];
    if (!about.saved) {
      about.saved = about.now;
      about.saved_is_stale = false;
      ::sigaction(numbers[kind], nullptr, &kept_[kind]);
      return;
    }
    const Disposition saved = *about.saved;
    about.saved.reset();
    if (about.saved_is_stale) return;
    ::sigaction(numbers[kind], &kept_[kind], nullptr);
    set_now(about, kind, saved);
  }

  void block(std::size_t kind, bool blocked) {
    Kind& about = kinds_[kind];
    if (!blocked && about.kernel_pending && is_deadly(kind)) return;
    sigset_t set;
    ::sigemptyset(&set);
    ::sigaddset(&set, numbers[kind]);
    ::pthread_sigmask(blocked ? SIG_BLOCK : SIG_UNBLOCK, &set, nullptr);
    about.blocked = blocked;
    if (!blocked) deliver_waiting(kind);
  }

  /// So that a pipe gets full.
  void shrink(std::size_t at) {
    Trap& trap = traps_[at];
    if (!trap.trap || trap.in_pipe != 0) return;
    if (::fcntl(trap.trap->fd(), F_SETPIPE_SZ, 4096) == 4096) {
      trap.room = records_a_page;
    }
  }

  /// What POSIX says of a new disposition: one that ignores forgets what is pending.
  static void set_now(Kind& about, std::size_t kind, Disposition what) {
    about.now = what;
    const bool ignores = what.level == nullptr && (what.foreign == Foreign::ignored ||
                                                   (is_default(what.foreign) && is_harmless(kind)));
    if (ignores) about.kernel_pending = false;
  }

  // ---- What can be seen from outside

  void look() {
    sigset_t mask;
    ::pthread_sigmask(SIG_BLOCK, nullptr, &mask);
    sigset_t waiting;
    ::sigpending(&waiting);
    for (std::size_t kind = 0; kind < kinds; ++kind) {
      Kind& about = kinds_[kind];
      const int number = numbers[kind];
      require((::sigismember(&mask, number) == 1) == about.blocked, "another mask");
      // What a trap left unread and was raised again while it was blocked waits, where there was SIG_DFL.
      const Again again = std::exchange(about.again, Again::no);
      if (again != Again::no && about.blocked) {
        about.kernel_pending |= again == Again::yes || ::sigismember(&waiting, number) == 1;
      }
      require(
          (::sigismember(&waiting, number) == 1) == about.kernel_pending,
          "pending in the kernel, or not: what nobody read was lost, or raised again for nothing");
      struct sigaction now {};
      ::sigaction(number, nullptr, &now);
      if (about.now.level != nullptr) {
        require(now.sa_sigaction == about.now.level->entry, "our handler is not in place");
      } else {
        require(now.sa_handler == action_of(about.now.foreign).sa_handler,
                "the disposition is not what somebody else left, or what was there before");
      }
      require(calls[static_cast<std::size_t>(number)] == about.calls,
              "handlers were called more or less");
    }
    for (Trap& trap : traps_) {
      if (!trap.trap) continue;
      const bool exact = std::all_of(trap.pending.begin(), trap.pending.end(),
                                     [](const auto& entry) { return entry.second.is_exact(); });
      const bool pending = most_urgent(trap) != kinds;
      const bool readable = support::is_readable(trap.trap->fd());
      if (pending) require(readable, "pending, and the descriptor says nothing");
      if (!pending && exact)
        require(!readable, "nothing is pending, and the descriptor is readable");
    }
  }

  fuzz::Input& input_;
  std::array<struct sigaction, kinds> found_{};
  sigset_t found_mask_{};
  std::array<Kind, kinds> kinds_;
  std::array<struct sigaction, kinds> kept_{};
  std::array<std::vector<std::unique_ptr<SignalIgnore>>, kinds> ignorers_;
  std::array<Trap, 4> traps_;
};

}  // namespace

// libFuzzer's own thread has what is blocked here blocked, too; a game unblocks it for this thread.
extern "C" int LLVMFuzzerInitialize(int* /*count*/, char*** /*arguments*/) {
  sigset_t ours;
  ::sigemptyset(&ours);
  for (const int number : numbers) ::sigaddset(&ours, number);
  ::pthread_sigmask(SIG_BLOCK, &ours, nullptr);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  Game(input).play();
  return 0;
}

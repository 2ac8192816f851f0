// The longer functions of WaitGroup, and what the upper floors need to know of it.
#pragma once

#include <lastcall/detail/bounded_text.hpp>
#include <lastcall/detail/thread_id.hpp>
#include <lastcall/detail/throw.hpp>
#include <lastcall/wait_group.hpp>

#include <unistd.h>

#include <exception>

namespace lastcall {

inline WaitGroup::Guard::Guard(const Guard& other) {
  if (other.group_ == nullptr) return;
  if (other.member_ != nullptr) {
    std::string name = other.member_->name;
    member_ = other.group_->list(name, other.member_->where, 0);
  } else {
    other.group_->count_.enter(0);
  }
  group_ = other.group_;
}

inline WaitGroup::Guard WaitGroup::enter(std::string name, SourceLocation where) {
  detail::NamedMember* const member = list(name, where, detail::GroupCount::closed);
  if (member == nullptr) {
    refuse("enter(\"" + name + "\") at " + where.file_name() + ":" + std::to_string(where.line()));
  }
  return Guard(this, member);
}

inline WaitGroup::Guard WaitGroup::try_enter(std::string name, SourceLocation where) {
  detail::NamedMember* const member = list(name, where, detail::GroupCount::closed);
  return member == nullptr ? Guard() : Guard(this, member);
}

// All that can fail comes before the entry. Null: refused, and the name is given back.
inline detail::NamedMember* WaitGroup::list(std::string& name, SourceLocation where,
                                            std::uint64_t refuse) {
  members_.prepare();
  auto* const member = new detail::NamedMember(std::move(name), where, detail::current_thread_id());
  if (!count_.enter(refuse)) {
    name = std::move(member->name);
    member->let_go();
    return nullptr;
  }
  members_.link(*member);
  return member;
}

// G9. relaxed: an entry publishes nothing, and as a read-modify-write it carries the releases of done() on; the
// plain loads are guesses for the exchanges, or figures for a message.
inline void WaitGroup::add(std::size_t n) {
  std::size_t before = added_.load(std::memory_order_relaxed);
  if (is_closed()) refuse("add(" + std::to_string(n) + ")");
  if (n > most_added) refuse_number(n);
  if (n == 0) return;
  // Some are in already, and stay in until this has succeeded: no need to enter.
  while (before != 0) {
    if (n > most_added - before) refuse_number(n);
    if (added_.compare_exchange_weak(before, before + n, std::memory_order_relaxed)) return;
  }
  if (!count_.enter(detail::GroupCount::closed)) refuse("add(" + std::to_string(n) + ")");
  while (n <= most_added - before) {
    if (!added_.compare_exchange_weak(before, before + n, std::memory_order_relaxed)) continue;
    if (before != 0) count_.leave();  // another add() was quicker, and is the member for all
    return;
  }
  count_.leave();
  refuse_number(n);
}

inline void WaitGroup::done() {
  std::size_t before = added_.load(std::memory_order_relaxed);
  do {
    if (before == 0) {
      detail::throw_logic_error("WaitGroup::done(): 0 are left of what was added, " +
                                std::to_string(count()) + " guards are in");
    }
    // acq_rel: who takes the last one back hands on what the others did.
  } while (!added_.compare_exchange_weak(before, before - 1, std::memory_order_acq_rel,
                                         std::memory_order_relaxed));
  if (before == 1) count_.leave();
}

inline std::size_t WaitGroup::count() const noexcept {
  const std::size_t members = count_.value();
  const std::size_t added = added_.load(std::memory_order_relaxed);
  return added == 0 || members == 0 ? members + added : members - 1 + added;
}

inline std::vector<WaitGroup::Member> WaitGroup::members() const {
  const detail::NamedMembers::Pins pins(members_);
  std::vector<Member> out;
  out.reserve(pins.list().size());
  for (const detail::NamedMember* const member : pins.list()) {
    out.push_back(Member{member->name, member->where,
                         member->thread.load(std::memory_order_relaxed), member->entered});
  }
  return out;
}

inline void WaitGroup::refuse(const std::string& call) const {
  detail::throw_logic_error("WaitGroup::" + call + ": the group is closed, with " +
                            std::to_string(count()) + " still in");
}

inline void WaitGroup::refuse_number(std::size_t n) const {
  detail::throw_invalid_argument("WaitGroup::add(" + std::to_string(n) + "): with " +
                                 std::to_string(added_.load(std::memory_order_relaxed)) +
                                 " in, more than " + std::to_string(most_added));
}

namespace detail {

/// For TaskGroup, the coordinator and the tests; not for users.
struct WaitGroupAccess {
  /// The thread that a named guard is listed with from now on: a spawned task's own. Any thread may call
  /// it, but not while another releases the guard. Does nothing for an unnamed or empty one.
  static void set_thread(WaitGroup::Guard& guard, pid_t thread) noexcept {
    if (guard.member_ != nullptr) guard.member_->thread.store(thread, std::memory_order_relaxed);
  }
  /// MemberView::id of a named guard; null for any other.
  static const void* member_id(const WaitGroup::Guard& guard) noexcept { return guard.member_; }
  static const WaitGroup* group_of(const WaitGroup::Guard& guard) noexcept { return guard.group_; }

  /// For last words: allocates nothing, waits for nobody. See NamedMembers::visit().
  template <class See>
  static bool visit_members(const WaitGroup& group, See&& see) noexcept {
    return group.members_.visit(see);
  }
  static std::size_t named_count(const WaitGroup& group) noexcept { return group.members_.size(); }
  /// Guards without a name, and bare add()s. Bounded too; exact when nobody enters, leaves or begins to
  /// wait.
  static std::size_t unnamed_count(const WaitGroup& group) noexcept {
    const std::size_t named = named_count(group);
    const std::size_t added = group.added_.load(std::memory_order_relaxed);
    const std::size_t members = group.count_.glance();
    const std::size_t all = added == 0 || members == 0 ? members + added : members - 1 + added;
    return all > named ? all - named : 0;
  }

  /// For tests: whether threads count in slots now, how many wait, the list, a word of the calling thread's slot.
  static bool is_fast(const WaitGroup& group) noexcept { return group.count_.is_fast(); }
  static std::size_t waiters(const WaitGroup& group) noexcept { return group.count_.waiters(); }
  static const NamedMembers& named_members(const WaitGroup& group) noexcept {
    return group.members_;
  }
  static SectionWord* own_word(const WaitGroup& group) noexcept { return group.count_.own_word(); }
};

// "lastcall: WaitGroup destroyed with 2 members still in: 'flush' (db.cpp:42), 1 unnamed". Out of a
// buffer of its own: nothing is known of the state that the program is in.
inline std::size_t describe_members(const WaitGroup& group, std::size_t all, char* out,
                                    std::size_t size) noexcept {
  BoundedText text(out, size - 1);
  text.add("lastcall: WaitGroup destroyed with ").add_digits(all);
  text.add(all == 1 ? " member still in:" : " members still in:");
  std::size_t listed = 0;
  std::size_t unlisted = 0;
  WaitGroupAccess::visit_members(group, [&](const MemberView& member) noexcept {
    const std::string_view file = member.where.file_name();
    if (text.length() + member.name.size() + file.size() + 60 > size) {
      ++unlisted;
      return;
    }
    text.add(listed++ == 0 ? " '" : ", '");
    for (const char letter : member.name) {
      const bool printable = static_cast<unsigned char>(letter) >= 0x20 && letter != 0x7f;
      text.add(printable ? letter : '?');
    }
    text.add("' (").add(file).add(':').add_digits(member.where.line()).add(')');
  });
  if (unlisted != 0) text.add(", ").add_digits(unlisted).add(" more with names");
  if (const std::size_t named = listed + unlisted; all > named) {
    text.add(named == 0 ? " " : ", ").add_digits(all - named).add(" unnamed");
  }
  out[text.length()] = '\n';
  return text.length() + 1;
}

}  // namespace detail

[[gnu::cold]] inline void WaitGroup::terminate_with_members() const noexcept {
  char message[2048];
  std::size_t left = detail::describe_members(*this, count(), message, sizeof message);
  for (const char* from = message; left != 0;) {
    const ssize_t written = ::write(STDERR_FILENO, from, left);
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) break;
    from += written;
    left -= static_cast<std::size_t>(written);
  }
  std::terminate();
}

}  // namespace lastcall

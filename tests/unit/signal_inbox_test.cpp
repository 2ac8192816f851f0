// The place between the handler and the reader, with the system calls of its pipe in the test's
// hands: what two threads would have to do at just the right moment is done here in one.
#include "support/catch.hpp"
#include "support/threads.hpp"

#include <lastcall/detail/clock.hpp>
#include <lastcall/detail/posix.hpp>
#include <lastcall/detail/signal_numbers.hpp>
#include <lastcall/signal_info.hpp>

#include <sys/types.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace {

// Called after a write that failed, before its caller knows.
void (*after_failed_write)() = nullptr;
// So many writes, and reads, are interrupted before anything has happened.
int interrupted_writes = 0;
int interrupted_reads = 0;

ssize_t hooked_write(int fd, const void* from, std::size_t size) {
  if (interrupted_writes > 0) {
    --interrupted_writes;
    errno = EINTR;
    return -1;
  }
  const ssize_t done = ::write(fd, from, size);
  if (done < 0 && after_failed_write != nullptr) {
    const int error = errno;
    after_failed_write();
    errno = error;
  }
  return done;
}

ssize_t hooked_read(int fd, void* to, std::size_t size) {
  if (interrupted_reads > 0) {
    --interrupted_reads;
    errno = EINTR;
    return -1;
  }
  return ::read(fd, to, size);
}

}  // namespace

// The inbox's own calls, and nobody else's: all other headers were read before.
#define bare_read hooked_read
#define bare_write hooked_write
#include <lastcall/detail/signal_inbox.hpp>
#undef bare_read
#undef bare_write

using lastcall::SignalInfo;
using lastcall::detail::SignalInbox;
using lastcall::detail::SignalRecord;
using lastcall::detail::SignalSet;
using lastcall::detail::UnseenSignals;

namespace {

SignalRecord record_of(int number, bool exclusive = false, pid_t sender = 1) {
  SignalRecord record;
  record.number = static_cast<std::uint16_t>(number);
  record.exclusive = exclusive;
  record.sender_pid = sender;
  return record;
}

// As a reader with nothing better to do.
std::vector<SignalInfo> take_all(SignalInbox& inbox) {
  std::vector<SignalInfo> all;
  SignalInfo info;
  while (inbox.take(&info, 1) == 1) all.push_back(info);
  return all;
}

void fill(SignalInbox& inbox, int number, bool exclusive = false) {
  const std::size_t more_than_it_holds = 4000;
  for (std::size_t count = 0; count < more_than_it_holds; ++count) {
    inbox.post(record_of(number, exclusive));
  }
}

SignalInbox* emptied = nullptr;

}  // namespace

TEST_CASE(
    "a signal that found the pipe full is announced, even if the reader has emptied it since") {
  SignalInbox inbox;
  fill(inbox, SIGUSR1);
  emptied = &inbox;
  // The reader comes between the write that failed and the spill, finds nothing more, and sleeps.
  after_failed_write = [] {
    after_failed_write = nullptr;
    take_all(*emptied);
  };
  inbox.post(record_of(SIGTERM, false, 812));
  REQUIRE(after_failed_write == nullptr);
  CHECK(support::is_readable(inbox.fd()));
  const std::vector<SignalInfo> got = take_all(inbox);
  REQUIRE(got.size() == 1);
  CHECK(got[0].number == SIGTERM);
  CHECK(got[0].sender_pid == 812);
  CHECK_FALSE(support::is_readable(inbox.fd()));
}

TEST_CASE("of the repeats that found the pipe full the first is kept, with its sender") {
  SignalInbox inbox;
  fill(inbox, SIGUSR1);
  for (const pid_t sender : {7, 8, 9}) inbox.post(record_of(SIGTERM, false, sender));
  SignalInfo info;
  REQUIRE(inbox.take(&info, 1) == 1);
  CHECK(info.number == SIGTERM);
  CHECK(info.sender_pid == 7);
  REQUIRE(inbox.take(&info, 1) == 1);
  CHECK(info.number == SIGUSR1);
}

TEST_CASE(
    "each time that the pipe was full and has been emptied, the place beside it is free again") {
  SignalInbox inbox;
  for (int round = 1; round <= 3; ++round) {
    fill(inbox, SIGUSR1);
    inbox.post(record_of(SIGTERM, false, round));
    const std::vector<SignalInfo> got = take_all(inbox);
    REQUIRE(got.size() > 1000);
    CHECK(got[0].number == SIGTERM);
    CHECK(got[0].sender_pid == round);
    CHECK(got[1].number == SIGUSR1);
  }
}

TEST_CASE("a write or a read that was interrupted is done again") {
  SignalInbox inbox;
  interrupted_writes = 3;
  inbox.post(record_of(SIGTERM));
  CHECK(interrupted_writes == 0);
  interrupted_reads = 3;
  CHECK(take_all(inbox).size() == 1);
  CHECK(interrupted_reads == 0);
}

TEST_CASE("signals that merge are as exclusive as the most exclusive of them") {
  struct Case {
    bool first;
    bool second;
    bool unseen;
  };
  SignalSet term;
  term.add(SIGTERM);
  for (const Case& each : {Case{false, false, false}, Case{true, false, true},
                           Case{false, true, true}, Case{true, true, true}}) {
    SignalInbox inbox;
    // In the spill.
    fill(inbox, SIGUSR1);
    inbox.post(record_of(SIGTERM, each.first));
    inbox.post(record_of(SIGTERM, each.second));
    CHECK(inbox.discard(term).has(SIGTERM) == each.unseen);
    // And that is forgotten with them.
    fill(inbox, SIGUSR1);
    inbox.post(record_of(SIGTERM, false));
    CHECK_FALSE(inbox.discard(term).has(SIGTERM));
  }
}

TEST_CASE("signals that merge in a full buffer are as exclusive as the most exclusive of them") {
  SignalSet usr1;
  usr1.add(SIGUSR1);
  for (const bool exclusive : {false, true}) {
    SignalInbox inbox;
    SignalInfo info;
    for (int turn = 0; turn < 3; ++turn) {  // the pipe into the buffer, until that is full, too
      fill(inbox, SIGUSR1);
      inbox.post(record_of(SIGTERM));
      REQUIRE(inbox.take(&info, 1) == 1);
    }
    inbox.post(record_of(SIGUSR1, exclusive));
    CHECK(inbox.discard(usr1).has(SIGUSR1) == exclusive);
  }
}

TEST_CASE("what is thrown away is of the numbers asked for, and the rest stays readable") {
  SignalInbox inbox;
  inbox.post(record_of(SIGTERM, true));
  inbox.post(record_of(SIGUSR1, true));
  SignalSet term;
  term.add(SIGTERM);
  const UnseenSignals unseen = inbox.discard(term);
  CHECK(unseen.has(SIGTERM));
  CHECK_FALSE(unseen.has(SIGUSR1));
  CHECK(support::is_readable(inbox.fd()));
  const std::vector<SignalInfo> rest = take_all(inbox);
  REQUIRE(rest.size() == 1);
  CHECK(rest[0].number == SIGUSR1);
}

TEST_CASE("signals that nobody has seen come out in the order in which the first of each came") {
  SignalInbox inbox;
  SignalSet all;
  lastcall::Clock::rep now = 0;
  for (const int number : {SIGTERM, SIGUSR2, SIGINT, SIGUSR1, SIGTERM}) {
    SignalRecord record = record_of(number, true);
    record.received = ++now;
    inbox.post(record);
    all.add(number);
  }
  UnseenSignals unseen = inbox.discard(all);
  for (const int number : {SIGTERM, SIGUSR2, SIGINT, SIGUSR1}) CHECK(unseen.pop() == number);
  CHECK(unseen.empty());
  // At once: the more urgent first.
  for (const int number : {SIGUSR1, SIGTERM, SIGINT}) unseen.add(number, 7);
  for (const int number : {SIGINT, SIGTERM, SIGUSR1}) CHECK(unseen.pop() == number);
}

TEST_CASE("of a signal that stops the process and SIGCONT the later one undoes the other") {
  struct Case {
    std::vector<int> came;
    std::vector<int> left;
  };
  for (const Case& one : {Case{{SIGTSTP, SIGCONT}, {SIGCONT}}, Case{{SIGCONT, SIGTTIN}, {SIGTTIN}},
                          Case{{SIGTSTP, SIGCONT, SIGTTOU, SIGTERM}, {SIGTTOU, SIGTERM}},
                          Case{{SIGTSTP, SIGTERM}, {SIGTSTP, SIGTERM}},
                          Case{{SIGCONT, SIGTERM}, {SIGCONT, SIGTERM}}}) {
    INFO(one.came.size() << " signals, from " << one.came[0] << " to " << one.came.back());
    UnseenSignals unseen;
    lastcall::Clock::rep now = 0;
    for (const int number : one.came) unseen.add(number, ++now);
    unseen.drop_undone();
    for (const int number : one.left) CHECK(unseen.pop() == number);
    CHECK(unseen.empty());
  }
}

TEST_CASE("places in the buffer are used again, for however long") {
  SignalInbox inbox;
  for (int round = 0; round < 20; ++round) {
    for (int count = 0; count < 500; ++count) {
      inbox.post(record_of(count % 2 == 0 ? SIGUSR1 : SIGUSR2, false, count));
    }
    const std::vector<SignalInfo> got = take_all(inbox);
    REQUIRE(got.size() == 500);
    for (std::size_t at = 0; at < 250; ++at) {
      REQUIRE(got[at].sender_pid == static_cast<pid_t>(2 * at));
      REQUIRE(got[at + 250].sender_pid == static_cast<pid_t>(2 * at + 1));
    }
  }
}

TEST_CASE("what a stranger writes into the pipe is no signal") {
  SignalInbox inbox;
  for (const int number : {lastcall::detail::signal_limit, 8224, 65535}) {
    inbox.post(record_of(number));
    CHECK(take_all(inbox).empty());
  }
  inbox.post(record_of(SIGUSR1));
  CHECK(take_all(inbox).size() == 1);
}

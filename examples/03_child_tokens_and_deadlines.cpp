// 03: child tokens and deadlines. No coordinator and no signal: the tree alone. Ends by itself.
//
// What to watch for: cancelling goes down and never up or sideways, and everybody below learns the
// first cause and no other. A source cancels when it goes out of scope, so nobody can forget to:
// that is the `defer cancel()` of Go, done by the destructor.
#include <lastcall/cancellation.hpp>

#include <chrono>
#include <cstdio>
#include <string>

using namespace std::chrono_literals;

namespace {

void show(const char* who, const lastcall::CancellationToken& token) {
  const std::string why = token.is_cancelled() ? token.cause().message() : "still going";
  std::printf("  %-10s %s\n", who, why.c_str());
}

}  // namespace

int main() {
  lastcall::CancellationSource server;  // a root
  lastcall::CancellationSource slow_client(server.token());
  lastcall::CancellationSource query(slow_client.token());
  lastcall::CancellationSource timed_client(server.token(), 50ms);

  std::puts("at first");
  show("server", server.token());
  show("slow", slow_client.token());
  show("query", query.token());
  show("timed", timed_client.token());

  std::puts("a deadline passes");
  timed_client.token().wait();
  show("server", server.token());
  show("slow", slow_client.token());
  show("timed", timed_client.token());

  std::puts("one client goes away");
  slow_client.cancel(lastcall::Cause::cancelled("client hung up"));
  show("server", server.token());
  show("slow", slow_client.token());
  show("query", query.token());

  std::puts("the server goes: whoever has a cause keeps it");
  lastcall::CancellationSource late_client(server.token(), 1h);
  server.cancel(lastcall::Cause::cancelled("closing time"));
  show("server", server.token());
  show("late", late_client.token());
  show("query", query.token());
  show("timed", timed_client.token());

  std::puts("born too late");
  lastcall::CancellationSource newborn(server.token());
  show("newborn", newborn.token());

  std::puts("out of scope");
  lastcall::CancellationToken orphan;
  {
    lastcall::CancellationSource forgotten;
    orphan = forgotten.token();
  }
  show("orphan", orphan);
}

// 04: callbacks, and calls that block. A server that echoes; it connects to itself once, so that
// there is a conversation going on when you press Ctrl-C.
//
// What to watch for: two ways out of a blocking call, neither of them a polling loop.
//   - lastcall::accept() takes the token, as lastcall::poll() does for any other descriptor.
//   - A call that takes no token (recv on a blocking socket) is ended by a callback, which does
//     what ends such a call: shutdown(2) of the socket. The callback's destructor takes it back, so
//     that it can never touch a descriptor that has meanwhile become somebody else's.
#include <lastcall/lastcall.hpp>

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>

namespace {

// A listening socket on 127.0.0.1, at a port that the kernel chooses.
int listen_locally(sockaddr_in& address) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t length = sizeof address;
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (listener < 0 || ::bind(listener, generic, length) != 0 || ::listen(listener, 16) != 0 ||
      ::getsockname(listener, generic, &length) != 0) {
    std::perror("listening on 127.0.0.1");
    std::exit(1);
  }
  return listener;
}

void echo(int connection, const lastcall::CancellationToken& token) {
  {
    // In a scope of its own, so that it is taken back before the descriptor is closed.
    lastcall::CancellationCallback hang_up(token, [connection] {
      std::puts("callback: hanging up, so that recv() returns");
      ::shutdown(connection, SHUT_RDWR);
    });
    char buffer[256];
    for (ssize_t got = 0; (got = ::recv(connection, buffer, sizeof buffer, 0)) > 0;) {
      std::printf("echo: %.*s\n", static_cast<int>(got), buffer);
      if (::send(connection, buffer, static_cast<size_t>(got), MSG_NOSIGNAL) != got) break;
    }
  }
  ::close(connection);
  std::puts("echo: the conversation is over");
}

}  // namespace

int main() {
  sockaddr_in address;
  const int listener = listen_locally(address);

  lastcall::ShutdownCoordinator coordinator;
  coordinator.spawn("acceptor", [&](lastcall::CancellationToken token) {
    while (const auto connection = lastcall::accept(listener, token)) {
      const int fd = *connection;
      const bool taken =
          coordinator.spawn("echo", [fd](lastcall::CancellationToken stop) { echo(fd, stop); });
      if (!taken) ::close(fd);  // the signal came in between
    }
    ::close(listener);  // whoever has connected and was not accepted hears of it
    std::puts("acceptor: left accept()");
  });

  // It has one thing to say, and then waits for the server to hang up.
  coordinator.spawn("client", [&address] {
    const int client = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (::connect(client, reinterpret_cast<sockaddr*>(&address), sizeof address) == 0 &&
        ::send(client, "good evening", 12, MSG_NOSIGNAL) == 12) {
      char buffer[256];
      while (::recv(client, buffer, sizeof buffer, 0) > 0) std::puts("client: got its answer");
      std::puts("client: the server has hung up");
    }
    ::close(client);
  });

  coordinator.run();
}

// What every consumer project here builds: the smallest program with a coordinator. It asks for its
// own shutdown, and exits by run() with code 0 if the one worker has been told and has been waited
// for.
#include <lastcall/lastcall.hpp>

int elsewhere(const lastcall::CancellationToken& token);

int main() {
  lastcall::ShutdownCoordinator coordinator;
  coordinator.spawn("worker", [](lastcall::CancellationToken token) {
    token.wait();
    if (elsewhere(token) != 1) throw lastcall::OperationCancelled(token.cause());
  });
  coordinator.request_shutdown();
  coordinator.run();
}

// A service, the last of the course. HTTP by cpp-httplib, storage in SQLite, and a shutdown that loses nothing.
//
//   order_service DATABASE [--host ADDRESS] [--port N] [--announce MS] [--grace MS]
//
//   POST /orders       201 and {"order": n}, when the order is on disk and not before
//   GET  /slow?ms=n    a request that takes its time
//   GET  /healthz      200, or 503 from the moment that a shutdown is announced
//
// What to watch for, when a SIGTERM arrives:
//   1. announced: /healthz says 503, and everything else goes on as if nothing were the matter. The
//      load balancer catches up. Every answer now carries "Connection: close".
//   2. draining: the hook "http server" ends listen(), in which main() has been sitting all the
//      time. Requests in flight are guards with names: they are waited for, and listed if they
//      don't end.
//   3. the stage "storage" is next, so the flusher stops after the last request and not before.
//   4. main() comes to run(), and out of it with exit code 0.
#include "order_store.hpp"

#include <lastcall/lastcall.hpp>

#include <httplib.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <stdexcept>
#include <string>
#include <string_view>
#include <thread>

using std::chrono::milliseconds;

namespace {

struct Settings {
  std::string database;
  std::string host = "127.0.0.1";
  int port = 0;  // 0: one that is free
  milliseconds announce{500};
  milliseconds grace{10'000};
};

// Throws std::invalid_argument for what is no number.
Settings parse(int argc, char** argv) {
  Settings settings;
  settings.database = argv[1];
  for (int i = 2; i + 1 < argc; i += 2) {
    const std::string_view option = argv[i];
    const std::string value = argv[i + 1];
    if (option == "--host") settings.host = value;
    if (option == "--port") settings.port = std::stoi(value);
    if (option == "--announce") settings.announce = milliseconds(std::stoi(value));
    if (option == "--grace") settings.grace = milliseconds(std::stoi(value));
  }
  return settings;
}

void refuse(httplib::Response& response) {
  response.status = 503;
  response.set_header("Connection", "close");
  response.set_content("shutting down\n", "text/plain");
}

void add_routes(httplib::Server& server, lastcall::ShutdownCoordinator& coordinator,
                orders::OrderStore& store) {
  server.set_pre_routing_handler([&](const httplib::Request&, httplib::Response& response) {
    // A client that keeps its connection would come back by it to a server that has gone.
    if (!coordinator.is_ready()) response.set_header("Connection", "close");
    return httplib::Server::HandlerResponse::Unhandled;
  });

  server.Get("/healthz", [&](const httplib::Request&, httplib::Response& response) {
    response.status = coordinator.is_ready() ? 200 : 503;
    response.set_content(coordinator.is_ready() ? "ready\n" : "shutting down\n", "text/plain");
  });

  server.Post("/orders", [&](const httplib::Request& request, httplib::Response& response) {
    const auto in_flight = coordinator.try_enter("POST /orders");
    if (!in_flight) return refuse(response);
    const auto number = store.place(request.body, coordinator.abort_token());
    if (!number) return refuse(response);
    response.status = 201;
    response.set_content("{\"order\": " + std::to_string(*number) + "}\n", "application/json");
  });

  server.Get("/slow", [&](const httplib::Request& request, httplib::Response& response) {
    const milliseconds span(
        std::clamp(std::atoi(request.get_param_value("ms").c_str()), 0, 60'000));
    const auto in_flight = coordinator.try_enter("GET /slow?ms=" + std::to_string(span.count()));
    // The abort token, not token(): this request was accepted, and is dropped only if time runs
    // out.
    if (!in_flight || !lastcall::sleep_for(span, coordinator.abort_token()))
      return refuse(response);
    response.set_content("slept\n", "text/plain");
  });
}

[[noreturn]] void serve(const Settings& settings) {
  // Declared before the coordinator, and therefore still there as long as anything of it runs.
  orders::OrderStore store(settings.database);
  httplib::Server server;
  std::atomic<bool> listens{false};
  std::atomic<bool> served{false};
  std::atomic<bool> stopped{false};

  lastcall::ShutdownOptions options;
  options.grace_period = settings.grace;
  options.announce_delay = settings.announce;
  lastcall::ShutdownCoordinator coordinator(options);

  try {
    lastcall::Stage& storage = coordinator.stage("storage", settings.grace / 4);
    storage.spawn("flusher", [&](lastcall::CancellationToken token) { store.flush_until(token); });
    storage.on_drained("close database", [&] { store.close(); });
  } catch (const std::logic_error&) {
    // A signal came before all of it was declared: nobody has been served, and nothing can be lost.
    if (coordinator.is_ready()) throw;
    coordinator.run();
  }

  server.new_task_queue = [] {
    return new httplib::ThreadPool(32);
  };  // most of them wait for the disk
  add_routes(server, coordinator, store);
  const bool any_port = settings.port == 0;
  const int port = any_port ? server.bind_to_any_port(settings.host) : settings.port;
  if (port < 0 || (!any_port && !server.bind_to_port(settings.host, port))) {
    throw std::runtime_error("cannot listen on " + settings.host + ":" +
                             std::to_string(settings.port));
  }

  coordinator.on_stop("http server", [&] {
    // cpp-httplib forgets a stop() that comes before listen(), as it may: signals come when they
    // like. Before this line even, and then the hook runs here.
    stopped = true;
    while (listens && !server.is_running() && !served) {
      std::this_thread::sleep_for(milliseconds(1));
    }
    server.stop();
  });

  std::printf("order_service: pid %d listens on %s:%d\n", ::getpid(), settings.host.c_str(), port);
  std::fflush(stdout);
  listens = true;
  if (!stopped) server.listen_after_bind();  // until the hook
  served = true;
  coordinator.run();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) {
    std::fputs(
        "usage: order_service DATABASE [--host ADDRESS] [--port N] [--announce MS] [--grace MS]\n",
        stderr);
    return 2;
  }
  try {
    serve(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "order_service: %s\n", error.what());
    return 1;
  }
}

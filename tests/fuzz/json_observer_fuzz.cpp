// json_observer with any events: every line is one JSON object, and says what the event said.
#include <lastcall/observer.hpp>

#include "story.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

namespace {

using fuzz::require;

struct Channel {
  int ends[2] = {-1, -1};
  Channel() {
    if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
    // Three names of 12,240 bytes, each of which may become six, are more than a pipe usually has room for.
    if (::fcntl(ends[1], F_SETPIPE_SZ, 1 << 20) < 3 * 6 * 12'240) std::abort();
  }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;
  ~Channel() {
    ::close(ends[0]);
    ::close(ends[1]);
  }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const Channel pipe;
  const auto observer = lastcall::json_observer(pipe.ends[1]);
  std::optional<lastcall::Clock::time_point> origin;
  bool requested = false;  // and not finished since
  for (int turn = 0; turn < 30 && !input.empty(); ++turn) {
    if (input.below(8) == 1) {
      const auto when = fuzz::some_time(input);
      observer->on_request(when);
      origin = when;
      requested = true;
    }
    const lastcall::Event event = fuzz::some_event(input);
    const bool is_phase = event.kind == lastcall::EventKind::phase;
    if (is_phase && !std::exchange(requested, true)) origin = event.begin;
    if (is_phase && event.name == "finished") requested = false;
    observer->on_event(event);

    // Read at once: so every line finds the pipe empty.
    std::string line;
    char buffer[8192];
    for (ssize_t got = 0; (got = ::read(pipe.ends[0], buffer, sizeof buffer)) > 0;) {
      line.append(buffer, static_cast<std::size_t>(got));
    }
    require(!line.empty() && line.find('\n') == line.size() - 1, "an event is not one line");
    const auto json = support::read_json(std::string_view(line).substr(0, line.size() - 1));
    require(json.has_value(), "a line is no JSON");
    // Before any request times count from the making of the observer, which only it knows.
    if (origin) {
      fuzz::require_event(*json, event, *origin);
    } else {
      require((*json)["name"].text == fuzz::repaired(event.name), "another name");
    }
  }
  return 0;
}

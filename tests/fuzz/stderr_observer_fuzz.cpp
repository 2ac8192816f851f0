// stderr_observer with any events and any status: whole lines, each with its prefix, that hold no
// character that could harm a terminal but the library's own colours.
#include <lastcall/observer.hpp>

#include "story.hpp"

#include <fcntl.h>
#include <stdlib.h>
#include <termios.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <string>
#include <string_view>

namespace {

using fuzz::require;

/// What the observer writes to: a pipe, or a terminal that changes nothing.
struct Channel {
  int reader = -1;
  int writer = -1;
  explicit Channel(bool terminal) {
    if (!terminal) {
      int ends[2];
      if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
      reader = ends[0];
      writer = ends[1];
    } else {
      reader = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
      if (reader < 0 || ::grantpt(reader) != 0 || ::unlockpt(reader) != 0) std::abort();
      char name[64];
      if (::ptsname_r(reader, name, sizeof name) != 0) std::abort();
      writer = ::open(name, O_RDWR | O_NOCTTY | O_CLOEXEC);
      termios raw{};
      ::tcgetattr(writer, &raw);
      ::cfmakeraw(&raw);
      ::tcsetattr(writer, TCSANOW, &raw);
    }
    ::fcntl(reader, F_SETFL, O_NONBLOCK);
  }
  Channel(const Channel&) = delete;
  Channel& operator=(const Channel&) = delete;

  std::string read() const {
    std::string text;
    char buffer[8192];
    for (ssize_t got = 0; (got = ::read(reader, buffer, sizeof buffer)) > 0;) {
      text.append(buffer, static_cast<std::size_t>(got));
    }
    return text;
  }
};

constexpr std::size_t kept_by_terminal = 12 * 1024;

void remove_all(std::string& text, std::string_view part) {
  for (std::size_t at = 0; (at = text.find(part, at)) != std::string::npos;)
    text.erase(at, part.size());
}

// Without the library's own escape sequences. A name's escape character comes out as the four letters
// "\x1b", so that none of these can have come from a name.
std::string without_colours(std::string text) {
  for (const std::string_view colour :
       {"\x1b[0m", "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[32m", "\x1b[33m"}) {
    remove_all(text, colour);
  }
  return text;
}

void check_lines(std::string_view text) {
  require(text.empty() || text.back() == '\n', "the last line has no end");
  while (!text.empty()) {
    const std::size_t end = text.find('\n');
    const std::string_view line = text.substr(0, end);
    require(line.substr(0, 10) == "lastcall: ", "a line without its prefix");
    require(line.size() < 4096, "a line too long to go out in one piece");
    fuzz::require_harmless(line);
    text.remove_prefix(end + 1);
  }
}

lastcall::LiveStatus some_status(fuzz::Input& input) {
  lastcall::LiveStatus status{};
  status.since_request = fuzz::some_time(input).time_since_epoch();
  status.until_end = fuzz::some_time(input).time_since_epoch();
  status.in_flight = input.below(20);
  status.stage = fuzz::some_name(input);
  for (std::size_t count = input.below(5); count > 0; --count) {
    status.names.push_back(fuzz::some_name(input));
  }
  return status;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // Made once: a terminal is dear.
  static const Channel* const channels[] = {new Channel(false), new Channel(true)};
  static const bool environment = ::setenv("TERM", "xterm", 1) == 0 && ::unsetenv("NO_COLOR") == 0;
  require(environment, "no environment");

  fuzz::Input input(data, size);
  const bool terminal = input.flag();
  const Channel& channel = *channels[terminal ? 1 : 0];
  lastcall::detail::StderrObserver observer(channel.writer);
  require(observer.wants_status() == terminal, "taken for a terminal, or not");
  bool drawn = false;
  for (int turn = 0; turn < 30 && !input.empty(); ++turn) {
    switch (input.below(8)) {
      case 0: observer.on_request(fuzz::some_time(input)); continue;
      case 1: {
        observer.on_status(some_status(input));
        std::string text = channel.read();
        if (!terminal) {
          require(text.empty(), "a countdown where there is no terminal");
          break;
        }
        require(text.substr(0, 4) == "\r\x1b[K", "a countdown that doesn't begin its line anew");
        text.erase(0, 4);
        // To the last column, so that what others print has a line of its own.
        const std::string_view end = "\x1b[999C ";
        require(text.size() >= end.size() && text.substr(text.size() - end.size()) == end,
                "a countdown with no way to the end of its line");
        text.resize(text.size() - end.size());
        fuzz::require_harmless(text);
        require(lastcall::detail::columns_of(text) < 80,
                "a countdown that is too long for its line");
        drawn = true;
        break;
      }
      default: {
        observer.on_event(fuzz::some_event(input));
        std::string text = channel.read();
        require(!text.empty(), "an event without a line");
        if (drawn) {
          require(text.substr(0, 4) == "\r\x1b[K", "the countdown stays in the line");
          text.erase(0, 4);
          drawn = false;
        }
        // Nobody reads meanwhile, and a terminal keeps some 16 KiB: what is more is given up, rightly, and
        // maybe in the middle of a letter.
        if (text.size() > kept_by_terminal) return 0;
        if (terminal) text = without_colours(std::move(text));
        check_lines(text);
      }
    }
  }
  return 0;
}

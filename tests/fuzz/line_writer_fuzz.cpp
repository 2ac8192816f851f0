// The writer under the two observers, on a pipe that is read now and then: lines are whole, what is lost is
// counted, and what was torn is ended.
#include <lastcall/detail/line_writer.hpp>

#include "input.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

namespace {

using fuzz::require;
using lastcall::detail::LineWriter;

std::string notice_of(std::size_t lost) { return "lost " + std::to_string(lost) + "\n"; }

/// A pipe of one page, whose write end blocks, as a program's stderr does.
struct Page {
  int ends[2] = {-1, -1};
  Page() {
    if (::pipe2(ends, O_CLOEXEC) != 0) std::abort();
    ::fcntl(ends[1], F_SETPIPE_SZ, 4096);
    ::fcntl(ends[0], F_SETFL, O_NONBLOCK);
  }
  Page(const Page&) = delete;
  Page& operator=(const Page&) = delete;
  ~Page() {
    ::close(ends[0]);
    ::close(ends[1]);
  }
};

class Reader {
 public:
  explicit Reader(int fd) : fd_(fd) {}
  void read(std::size_t most) {
    std::string buffer(most, '\0');
    const ssize_t got = ::read(fd_, buffer.data(), most);
    if (got > 0) stream.append(buffer, 0, static_cast<std::size_t>(got));
  }
  void read_all() {
    for (std::size_t before = stream.size() + 1; before != stream.size();) {
      before = stream.size();
      read(8192);
    }
  }
  std::string stream;

 private:
  int fd_;
};

// Line n is "n xxx...x n": a torn one can't be mistaken for a whole one.
std::string line_of(std::size_t number, std::size_t padding) {
  const std::string name = std::to_string(number);
  return name + " " + std::string(padding, 'x') + " " + name + "\n";
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  fuzz::Input input(data, size);
  const Page pipe;
  Reader reader(pipe.ends[0]);
  LineWriter writer(pipe.ends[1], notice_of, lastcall::Clock::duration::zero());
  std::size_t lines = 0;
  while (!input.empty()) {
    switch (input.below(4)) {
      case 0: {
        std::string text;
        for (std::size_t count = input.below(6) + 1; count > 0; --count) {
          text += line_of(lines++, input.below(3) == 0 ? input.word(2) % 5000 : input.below(60));
        }
        writer.write(text);
        break;
      }
      case 1:
        for (std::size_t count = input.byte(); count > 0; --count)
          writer.write(line_of(lines++, 30));
        break;
      case 2: reader.read(input.word(2) % 5000 + 1); break;
      default: reader.read_all(); break;
    }
  }
  // Everything is read, so this one gets through, with the last notice before it.
  reader.read_all();
  writer.write(line_of(lines++, 1));
  reader.read_all();

  std::size_t whole = 0;
  std::size_t lost = 0;
  std::size_t next = 0;  // the line that comes next, if none is lost
  std::string_view rest = reader.stream;
  while (!rest.empty()) {
    const std::size_t end = rest.find('\n');
    require(end != std::string_view::npos, "the last line has no end");
    const std::string line(rest.substr(0, end + 1));
    rest.remove_prefix(end + 1);
    if (line.rfind("lost ", 0) == 0) {
      const auto count = static_cast<std::size_t>(std::atoll(line.c_str() + 5));
      require(line == notice_of(count) && count > 0, "a notice that is torn, or of nothing");
      lost += count;
      next += count;
      continue;
    }
    const auto number = static_cast<std::size_t>(std::atoll(line.c_str()));
    const bool is_whole =
        line.size() >= 5 &&
        line == line_of(number, line.size() - 3 - 2 * std::to_string(number).size());
    if (!is_whole) continue;  // torn: among the lost; the notice that follows counts it
    require(number == next, "a line is missing that nobody counted, or came twice");
    ++next;
    ++whole;
  }
  require(whole + lost == lines, "lines read and lines lost are not all lines");
  return 0;
}

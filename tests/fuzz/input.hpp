// What every fuzz target has in common: an input that decides, and a check that ends the process.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>

namespace fuzz {

/// Ends the process with a message, which libFuzzer reports as a crash of this input.
[[noreturn]] inline void fail(std::string_view what) {
  std::fprintf(stderr, "NOT SO: %.*s\n", static_cast<int>(what.size()), what.data());
  std::fflush(stderr);
  std::abort();
}
inline void require(bool holds, std::string_view what) {
  if (!holds) fail(what);
}

/// The bytes of an input, taken from the front. When they are used up everything is zero.
class Input {
 public:
  Input(const std::uint8_t* data, std::size_t size)
      : rest_(reinterpret_cast<const char*>(data), size) {}

  bool empty() const { return rest_.empty(); }

  std::uint8_t byte() {
    if (rest_.empty()) return 0;
    const auto first = static_cast<std::uint8_t>(rest_.front());
    rest_.remove_prefix(1);
    return first;
  }
  bool flag() { return (byte() & 1U) != 0; }
  /// From 0 to `bound` - 1, for bounds up to 256.
  std::size_t below(std::size_t bound) { return byte() % bound; }

  std::uint64_t word(std::size_t bytes = 8) {
    std::uint64_t value = 0;
    for (std::size_t at = 0; at < bytes; ++at) value = (value << 8U) | byte();
    return value;
  }
  /// Any number of up to 64 bits; small ones are as likely as large ones.
  std::uint64_t any_size() {
    const std::size_t bits = below(65);
    if (bits == 0) return 0;
    const std::uint64_t value = word((bits + 7) / 8);
    return bits == 64 ? value : value & ((std::uint64_t{1} << bits) - 1);
  }

  /// A length, and as many bytes, whatever they are.
  std::string text(std::size_t most = 64) {
    std::size_t length = below(most + 1);
    if (length > rest_.size()) length = rest_.size();
    std::string out(rest_.substr(0, length));
    rest_.remove_prefix(length);
    return out;
  }

 private:
  std::string_view rest_;
};

}  // namespace fuzz

// clang asks for a declaration before the definition.
extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

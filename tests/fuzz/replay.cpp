// Stands in for libFuzzer where there is none: runs a target once for every file that it is given, and for
// every file of every directory.
#include "input.hpp"

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

namespace {

std::size_t played = 0;

void play(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fuzz::fail("can't read " + path.string());
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  std::fprintf(stderr, "%s\n", path.c_str());
  LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
  ++played;
}

}  // namespace

int main(int argc, char** argv) {
  for (int at = 1; at < argc; ++at) {
    const std::filesystem::path path = argv[at];
    if (!std::filesystem::is_directory(path)) {
      play(path);
      continue;
    }
    for (const auto& entry : std::filesystem::directory_iterator(path)) play(entry.path());
  }
  std::printf("%zu inputs\n", played);
  return played > 0 ? 0 : 1;
}

// What a child of a std::stop_source is: a source of its own, and a callback on the parent that stops it.
#pragma once

#include <stop_token>

namespace bench {

struct StdChild {
  struct Stop {
    std::stop_source* child;
    void operator()() const { child->request_stop(); }
  };
  explicit StdChild(const std::stop_token& parent) : link(parent, Stop{&source}) {}
  std::stop_source source;
  std::stop_callback<Stop> link;
};

}  // namespace bench

// The cancellation tree beside the standard library's stop tokens, and beside one bare load.
#include "batch.hpp"
#include "cases.hpp"
#include "std_child.hpp"

#include <lastcall/cancellation.hpp>

#include <pthread.h>

#include <memory>
#include <optional>
#include <stop_token>
#include <vector>

namespace bench {
namespace {

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;

struct Nothing {
  void operator()() const noexcept {}
};

template <class Ask>
auto repeated(Ask ask) {
  return [ask](std::size_t operations) {
    for (std::size_t i = 0; i < operations; ++i) benchmark::DoNotOptimize(ask());
  };
}

void add_checks() {
  static std::atomic<int> word{0};
  static std::stop_source source;
  static std::vector<CancellationSource> chain;
  while (chain.size() < 8) {
    chain.emplace_back(chain.empty() ? CancellationToken() : chain.back().token());
  }
  for (const std::string name : {"check", "check8"}) {
    // Once more for each depth: all beside each other see the same moods of the machine.
    add_pair(name, "bare", [] {
      return repeated([] { return (word.load(std::memory_order_acquire) & 2) != 0; });
    });
    const CancellationToken token = chain[name == "check" ? 0 : 7].token();
    add_pair(name, "lastcall", [&] { return repeated([token] { return token.is_cancelled(); }); });
  }
  add_pair("check", "std", [] {
    return repeated([token = source.get_token()] { return token.stop_requested(); });
  });
}

void add_children() {
  add_pair("child", "lastcall", [] {
    auto parent = std::make_shared<CancellationSource>();
    return [parent, token = parent->token()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        CancellationSource child(token);
        benchmark::DoNotOptimize(child);
      }
    };
  });
  add_pair("child", "std", [] {
    auto parent = std::make_shared<std::stop_source>();
    return [parent, token = parent->get_token()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        StdChild child(token);
        benchmark::DoNotOptimize(child);
      }
    };
  });
  add_pair("child", "bare", [] {
    return [](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        void* node = std::malloc(56);
        benchmark::DoNotOptimize(node);
        std::free(node);
      }
    };
  });
  add_pair("callback", "lastcall", [] {
    auto parent = std::make_shared<CancellationSource>();
    return [parent, token = parent->token()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        CancellationCallback callback(token, Nothing{});
        benchmark::DoNotOptimize(callback);
      }
    };
  });
  add_pair("callback", "std", [] {
    auto parent = std::make_shared<std::stop_source>();
    return [parent, token = parent->get_token()](std::size_t operations) {
      for (std::size_t i = 0; i < operations; ++i) {
        std::stop_callback callback(token, Nothing{});
        benchmark::DoNotOptimize(callback);
      }
    };
  });
}

// ---- big trees ----

constexpr std::size_t many = 1'000'000;

// Runs a function on a thread with a stack of 128 KiB.
template <class F>
double on_small_stack(F run) {
  struct Call {
    F* run;
    double result;
  } call{&run, -1};
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, std::size_t{128} << 10U);
  pthread_t thread{};
  const auto body = [](void* argument) -> void* {
    auto* const given = static_cast<Call*>(argument);
    given->result = (*given->run)();
    return nullptr;
  };
  if (pthread_create(&thread, &attributes, body, &call) == 0) pthread_join(thread, nullptr);
  pthread_attr_destroy(&attributes);
  return call.result;
}

// Seconds a node to cancel, or to destroy when cancelled, what `grow` makes.
template <class Grow>
void add_our_tree(const std::string& shape, Grow grow) {
  for (const bool destroying : {false, true}) {
    add_timed_case((destroying ? "destroy_" : "cancel_") + shape + "@lastcall", [=] {
      return on_small_stack([&] {
        std::vector<CancellationSource> nodes;
        nodes.reserve(many + 1);
        nodes.emplace_back();
        grow(nodes);
        auto start = Clock::now();
        nodes.front().cancel();
        const double cancelling = seconds_since(start) / many;
        if (!nodes.back().is_cancelled()) return -1.0;
        start = Clock::now();
        nodes.clear();
        return destroying ? seconds_since(start) / many : cancelling;
      });
    });
  }
}

void add_trees() {
  add_our_tree("wide", [](std::vector<CancellationSource>& nodes) {
    const CancellationToken root = nodes.front().token();
    for (std::size_t i = 0; i < many; ++i) nodes.emplace_back(root);
  });
  add_our_tree("deep", [](std::vector<CancellationSource>& nodes) {
    for (std::size_t i = 0; i < many; ++i) nodes.emplace_back(nodes.back().token());
  });
  // A deep one overflows the stack: request_stop() recurses.
  for (const bool destroying : {false, true}) {
    add_timed_case(destroying ? "destroy_wide@std" : "cancel_wide@std", [destroying] {
      std::stop_source root;
      std::vector<std::unique_ptr<StdChild>> nodes;
      nodes.reserve(many);
      for (std::size_t i = 0; i < many; ++i) {
        nodes.push_back(std::make_unique<StdChild>(root.get_token()));
      }
      auto start = Clock::now();
      root.request_stop();
      const double cancelling = seconds_since(start) / many;
      start = Clock::now();
      nodes.clear();
      return destroying ? seconds_since(start) / many : cancelling;
    });
  }
  // The allocator's share of destroying.
  add_timed_case("destroy_wide@bare", [] {
    std::vector<void*> blocks(many);
    for (void*& block : blocks) block = std::malloc(56);
    const auto start = Clock::now();
    for (void* const block : blocks) std::free(block);
    return seconds_since(start) / many;
  });
}

}  // namespace

void add_tree_cases() {
  add_checks();
  add_children();
  add_trees();
}

}  // namespace bench

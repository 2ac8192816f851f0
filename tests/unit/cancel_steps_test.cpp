// cancellation.hpp: what two threads may do to one node, the second at each instruction of the first.
#include <lastcall/cancellation.hpp>

#include "support/catch.hpp"
#include "support/single_step.hpp"

#include <atomic>
#include <optional>
#include <utility>

using lastcall::CancellationCallback;
using lastcall::CancellationSource;
using lastcall::CancellationToken;

namespace {

struct Count {
  std::atomic<int>* calls;
  void operator()() const noexcept { ++*calls; }
};

// What is hung on a token while its source goes, by who then has the token no more, is cancelled all the same.
template <class MakeSource>
int callbacks_missed(MakeSource make_source) {
  std::optional<CancellationSource> source;
  CancellationToken given;
  std::atomic<int> calls{0};
  std::optional<CancellationCallback<Count>> callback;
  return support::step_through(
      [&] {
        callback.reset();
        calls = 0;
        make_source(source);
        given = source->token();
      },
      [&] { source.reset(); }, [&] { callback.emplace(std::move(given), Count{&calls}); },
      [&] { return calls == 1; });
}

template <class MakeSource, class MakeChild>
int children_missed(MakeSource make_source, MakeChild make_child) {
  std::optional<CancellationSource> source;
  CancellationToken given;
  std::optional<CancellationSource> child;
  return support::step_through(
      [&] {
        child.reset();
        make_source(source);
        given = source->token();
      },
      [&] { source.reset(); },
      [&] {
        const CancellationToken mine = std::move(given);
        make_child(child, mine);
      },
      [&] { return child->is_cancelled(); });
}

}  // namespace

TEST_CASE("Whatever is hung on a token while its source is destroyed is cancelled") {
  const CancellationSource root;
  const CancellationToken token = root.token();
  const auto as_root = [](auto& source) { source.emplace(); };
  const auto as_child = [&](auto& source) { source.emplace(token); };
  const auto child = [](auto& made, const CancellationToken& of) { made.emplace(of); };
  const auto merged = [](auto& made, const CancellationToken& of) {
    made.emplace(CancellationSource::any_of({of}));
  };
  CHECK(callbacks_missed(as_root) == 0);
  CHECK(callbacks_missed(as_child) == 0);
  CHECK(children_missed(as_child, child) == 0);
  CHECK(children_missed(as_child, merged) == 0);
}

TEST_CASE(
    "A child that goes at any moment of its parent's cancel neither breaks it nor escapes it") {
  std::optional<CancellationSource> parent;
  std::optional<CancellationSource> first;
  std::optional<CancellationSource> second;
  std::atomic<int> calls{0};
  std::optional<CancellationCallback<Count>> callback;
  CHECK(support::step_through(
            [&] {
              callback.reset();
              parent.emplace();
              first.emplace(parent->token());
              second.emplace(first->token());
              calls = 0;
              callback.emplace(second->token(), Count{&calls});
            },
            [&] { parent->cancel(); }, [&] { first.reset(); },
            [&] { return second->is_cancelled() && calls == 1; }) == 0);
}

TEST_CASE(
    "Nobody meets a node that is cancelled for some and not for others, also where it has grown") {
  std::optional<CancellationSource> root;
  std::optional<CancellationSource> child;
  std::atomic<bool> consistent{true};
  const auto prepare = [&] {
    consistent = true;
    child.reset();
    root.emplace();
    child.emplace(root->token());
    lastcall::detail::grow_shards(lastcall::detail::TreeAccess::node_of(*child));
  };
  const auto cancel = [&] { root->cancel(); };
  const auto holds = [&] { return consistent.load(); };
  const auto callback = [&] {
    const CancellationToken token = child->token();
    const CancellationCallback made(token, [&] {
      if (!token.is_cancelled() || !token.cause()) consistent = false;
    });
  };
  CHECK(support::step_through(prepare, cancel, callback, holds) == 0);
  const auto wait = [&] {
    const CancellationToken token = child->token();
    token.wait();
    if (!token.is_cancelled()) consistent = false;
  };
  CHECK(support::step_through(prepare, cancel, wait, holds) == 0);
  const auto make_child = [&] {
    const CancellationToken token = child->token();
    const CancellationSource made(token);
    if (made.is_cancelled() && !token.is_cancelled()) consistent = false;
  };
  CHECK(support::step_through(prepare, cancel, make_child, holds) == 0);
}

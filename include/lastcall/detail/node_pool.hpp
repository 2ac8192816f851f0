// Memory for the plain nodes of the cancellation tree: blocks of one size, cut from slabs that the kernel
// gives and gets back, with a small store of free blocks for each thread.
//
// Why not malloc: a block needs no word of its own in front (a node is 56 bytes, and 64 with malloc's word), a
// child that comes and goes costs a list's head instead of malloc and free (the head of cancellation.hpp has
// the figures), and what was made together stands together, which a walk over a large tree feels.
//
//  P1 A free block is in one thread's store, or in its slab. A store is touched by its own thread alone; a slab
//     and the lists of slabs under the lock of the slab's shelf only, whichever that is: shared objects with
//     hidden symbols have a pool each, and tokens pass from one to the other. A shelf is never taken down, so
//     that it survives the object that made it.
//  P2 Under the lock there are loads and stores, a few for each of `most` blocks at most, and no call of
//     anybody. So a fork can hold it, and the child finds the slabs whole. The stores of threads that the child
//     doesn't have are lost to it: `most` blocks each. The object with the handlers of forks and of threads'
//     ends stays loaded for good (signal_pin.hpp).
//  P3 A slab goes back to the kernel when none of its blocks is in use or in a store, but for one spare. A store
//     goes back to the slabs when its thread ends, holds `most` blocks at most, and `few` while three quarters
//     of a large pool are free: each of its blocks might keep a slab.
//  P4 take() may answer null, at any time and for whatever reason: no memory, no key, a forked child whose
//     parent was just making the pool. The caller has operator new for that, and remembers which it was.
//
// Why stores and a lock, and not slabs that belong to threads: who frees is often not who made. A slab's owner
// would have to be told, and would not look while it sleeps; so memory would stay with it.
//
// The sanitizers get each node from operator new, so that they see what becomes of it. So do systems that are not
// Linux: where thread_local is made of a pthread key, it may be gone before our own key's destructor runs.
#pragma once

#include <lastcall/detail/config.hpp>
#include <lastcall/detail/owned.hpp>
#include <lastcall/detail/signal_pin.hpp>
#include <lastcall/detail/spin_bit.hpp>

#include <pthread.h>
#include <sys/mman.h>

#include <atomic>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

#if LASTCALL_LINUX && !defined(__ANDROID__) && !defined(LASTCALL_ASAN) && !defined(LASTCALL_TSAN)
#define LASTCALL_HAS_NODE_POOL 1
#else
#define LASTCALL_HAS_NODE_POOL 0
#endif

namespace lastcall::detail {

/// Blocks of `size` bytes, aligned for a pointer. All of it is static: there is one pool for a size in a
/// process, or in a shared object with hidden symbols. It takes no memory before the first take().
template <std::size_t size>
class BlockPool {
  struct Block {
    Block* next;
  };
  static_assert(size >= sizeof(Block) && size % alignof(Block) == 0);

 public:
  static constexpr bool is_used = LASTCALL_HAS_NODE_POOL != 0;
  static constexpr std::size_t slab_bytes = std::size_t{1} << 18;
  static constexpr std::size_t slab_head = 64;  // a line of the cache
  static constexpr unsigned blocks_a_slab = (slab_bytes - slab_head) / size;
  static constexpr unsigned most = 128;
  static constexpr unsigned batch = most / 2;
  static constexpr unsigned few = 8;

  /// A block, or null (P4). Keeps errno. No system call but for a new slab, once in `blocks_a_slab`.
  static void* take() noexcept {
    if constexpr (!is_used) return nullptr;
    Store& store = own_store;
    Block* const block = store.first;
    if (block == nullptr) return refill();
    store.first = block->next;
    ++store.room;
    return block;
  }

  /// Gives back what take() gave, on any thread. No allocation; munmap(2) when a slab is empty.
  static void give(void* memory) noexcept {
    Store& store = own_store;
    if (store.room == 0) return overflow(memory);
    put(store, memory);
  }

  /// For tests: slabs that exist; blocks that are with users or in stores; blocks in this thread's store.
  struct Census {
    std::size_t slabs;
    std::size_t used;
    std::size_t stored;
  };
  static Census census() noexcept {
    Census found{0, 0, 0};
    if (is_ready()) {
      const Held<SpinLock> held(shelf->lock);
      found = {shelf->slabs, shelf->used, 0};
    }
    for (const Block* block = own_store.first; block != nullptr; block = block->next) {
      ++found.stored;
    }
    return found;
  }

 private:
  struct Shelf;

  // At the start of each 256 KiB; a block finds it by its own address.
  struct Slab {
    explicit Slab(Shelf* of) noexcept : shelf(of) {}

    Shelf* const shelf;
    Slab* next = nullptr;  // among those with room
    Slab* previous = nullptr;
    Block* free = nullptr;
    unsigned cut = 0;   // blocks that were given out at least once; behind them all is untouched
    unsigned used = 0;  // blocks that are not in the slab
  };
  static_assert(sizeof(Slab) <= slab_head);

  // Constant-initialised and trivially destroyed, so that reading it is one instruction in an executable.
  struct Store {
    Block* first = nullptr;
    unsigned room =
        0;  // blocks that it would still take; none without a key's destructor to empty it
    bool attached = false;
    bool ended = false;  // the destructor has run: what runs later in a thread's life has no store
  };

  // All of it under the lock.
  struct Shelf {
    SpinLock lock;
    Slab* with_room = nullptr;
    Slab* spare = nullptr;  // empty
    std::size_t slabs = 0;
    std::size_t used = 0;

    void put_with_room(Slab* slab) noexcept {
      slab->previous = nullptr;
      slab->next = with_room;
      if (slab->next != nullptr) slab->next->previous = slab;
      with_room = slab;
    }

    void take_from_room(Slab* slab) noexcept {
      if (slab->next != nullptr) slab->next->previous = slab->previous;
      if (slab->previous != nullptr) {
        slab->previous->next = slab->next;
      } else {
        with_room = slab->next;
      }
    }

    // A list of up to `wanted` blocks, in the order of their addresses where they are new.
    Block* take(unsigned wanted, unsigned& got) noexcept {
      Block* first = nullptr;
      Block** tail = &first;
      got = 0;
      while (got < wanted) {
        if (with_room == nullptr && spare != nullptr) put_with_room(std::exchange(spare, nullptr));
        Slab* const slab = with_room;
        if (slab == nullptr) break;
        Block* block = slab->free;
        if (block != nullptr) {
          slab->free = block->next;
        } else {
          char* const blocks = reinterpret_cast<char*>(slab) + slab_head;
          block = ::new (static_cast<void*>(blocks + slab->cut * size)) Block{nullptr};
          ++slab->cut;
        }
        *tail = block;
        tail = &block->next;
        ++got;
        ++used;
        if (++slab->used == blocks_a_slab) take_from_room(slab);
      }
      *tail = nullptr;
      return first;
    }

    // Adds a slab that became empty, and is not to be kept, to `dead`.
    void give(Block* block, Slab*& dead) noexcept {
      Slab* const slab = slab_of(block);
      if (slab->used == blocks_a_slab) put_with_room(slab);
      --slab->used;
      --used;
      if (slab->used != 0) {
        block->next = slab->free;
        slab->free = block;
        return;
      }
      take_from_room(slab);
      // As new, and so in order again.
      slab->free = nullptr;
      slab->cut = 0;
      if (spare == nullptr) {
        spare = slab;
      } else {
        slab->next = dead;
        dead = slab;
        --slabs;
      }
    }

    bool is_sparse() const noexcept { return slabs > 4 && used * 4 < slabs * blocks_a_slab; }
  };

  enum class Stage : std::uint8_t { unmade, making, made, refused };

  static Slab* slab_of(Block* block) noexcept {
    const auto address = reinterpret_cast<std::uintptr_t>(block);
    return reinterpret_cast<Slab*>(address & ~(std::uintptr_t{slab_bytes} - 1));
  }

  // ---- the slow ways

  [[gnu::always_inline]] static void put(Store& store, void* memory) noexcept {
    --store.room;
    store.first = ::new (memory) Block{store.first};
  }

  [[gnu::noinline]] static void* refill() noexcept {
    if (!is_ready()) return nullptr;
    Store& store = own_store;
    if (!store.attached) attach(store, true);
    Slab* made = nullptr;
    for (;;) {
      unsigned got = 0;
      Block* first = nullptr;
      {
        const Held<SpinLock> held(shelf->lock);
        if (made != nullptr) {
          shelf->put_with_room(made);
          ++shelf->slabs;
        }
        first = shelf->take(store.attached ? batch : 1, got);
      }
      if (first != nullptr) {
        store.first = first->next;
        store.room = store.attached ? most - (got - 1) : 0;
        return first;
      }
      made = make_slab();
      if (made == nullptr) return nullptr;
    }
  }

  [[gnu::noinline]] static void overflow(void* memory) noexcept {
    Store& store = own_store;
    if (!store.attached && attach(store, false)) return put(store, memory);
    auto* const block = ::new (memory) Block{store.first};
    if (!store.attached) {
      give_back(block, 1);
      return;
    }
    store.first = give_back(block, batch);
    store.room = store.first != nullptr ? batch - 1 : most;
    if (!is_sparse()) return;
    give_back(store.first, most);
    store.first = nullptr;
    store.room = few;
  }

  static bool is_sparse() noexcept {
    const Held<SpinLock> held(shelf->lock);
    return shelf->is_sparse();
  }

  // So many of a list; returns what is left of it.
  static Block* give_back(Block* first, unsigned count) noexcept {
    while (count != 0 && first != nullptr) {
      Shelf* const home = slab_of(first)->shelf;
      Slab* dead = nullptr;
      {
        const Held<SpinLock> held(home->lock);
        do {
          Block* const block = first;
          first = block->next;
          home->give(block, dead);
          --count;
        } while (count != 0 && first != nullptr && slab_of(first)->shelf == home);
      }
      unmap_all(dead);
    }
    return first;
  }

  // Not by the address that the key has: see the head.
  static void thread_ends(void* /*of the store*/) noexcept {
    give_back(own_store.first, most);
    own_store = Store{nullptr, 0, false, true};
  }

  // Without `may_allocate` a key beyond the first 32 is none: glibc has no room for its value yet.
  static bool attach(Store& store, bool may_allocate) noexcept {
    constexpr pthread_key_t first_keys = 32;
    // acquire: the key. Who only gives has not asked for it before.
    if (store.ended || stage.load(std::memory_order_acquire) != Stage::made || !has_key)
      return false;
    if (!may_allocate && key >= first_keys) return false;
    const int saved = errno;
    const int refused = ::pthread_setspecific(key, &store);
    errno = saved;
    if (refused != 0) return false;
    store.attached = true;
    store.room = most;
    return true;
  }

  // ---- slabs

  static void unmap(void* from, std::size_t bytes) noexcept {
    const int saved = errno;
    ::munmap(from, bytes);
    errno = saved;
  }
  static void unmap_all(Slab* dead) noexcept {
    while (dead != nullptr) {
      Slab* const slab = dead;
      dead = slab->next;
      unmap(slab, slab_bytes);
    }
  }
  static char* map(std::size_t bytes) noexcept {
#if LASTCALL_HAS_NODE_POOL
    const int saved = errno;
    void* const room =
        ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    errno = saved;
    return room == MAP_FAILED ? nullptr : static_cast<char*>(room);
#else
    static_cast<void>(bytes);  // POSIX has no memory without a file
    return nullptr;
#endif
  }
  static std::size_t bytes_beyond(const char* room) noexcept {
    return reinterpret_cast<std::uintptr_t>(room) & (slab_bytes - 1);
  }

  static Slab* make_slab() noexcept {
    // A kernel puts one mapping beside the other, so what follows an aligned one is aligned.
    char* room = map(slab_bytes);
    if (room != nullptr && bytes_beyond(room) != 0) {
      unmap(room, slab_bytes);
      room = map(2 * slab_bytes);
      if (room != nullptr) {
        const std::size_t before = (slab_bytes - bytes_beyond(room)) % slab_bytes;
        if (before != 0) unmap(room, before);
        unmap(room + before + slab_bytes, slab_bytes - before);
        room += before;
      }
    }
    return room == nullptr ? nullptr : ::new (static_cast<void*>(room)) Slab(shelf);
  }

  // ---- the pool itself

  static bool is_ready() noexcept {
    // acquire: the shelf and the key.
    return stage.load(std::memory_order_acquire) == Stage::made || make();
  }

  // False while another thread makes it: a child that is forked meanwhile would wait for that thread for ever.
  [[gnu::cold, gnu::noinline]] static bool make() noexcept {
    Stage seen = Stage::unmade;
    if (!stage.compare_exchange_strong(seen, Stage::making, std::memory_order_relaxed)) {
      return false;
    }
    const int saved = errno;
    pin_module_of(reinterpret_cast<const void*>(&thread_ends));
    char* const room = map(sizeof(Shelf));
    if (room != nullptr) shelf = ::new (static_cast<void*>(room)) Shelf;
    if (room == nullptr || ::pthread_atfork(&lock_shelf, &unlock_shelf, &unlock_shelf) != 0) {
      if (room != nullptr) unmap(room, sizeof(Shelf));
      stage.store(Stage::refused, std::memory_order_relaxed);
      errno = saved;
      return false;
    }
    has_key = ::pthread_key_create(&key, &thread_ends) == 0;
    errno = saved;
    stage.store(Stage::made, std::memory_order_release);
    return true;
  }

  static void lock_shelf() noexcept { shelf->lock.lock(); }
  static void unlock_shelf() noexcept { shelf->lock.unlock(); }

  // NOLINTBEGIN(readability-identifier-naming): private, if static
  static inline constinit thread_local Store own_store{};
  static inline constinit Shelf* shelf = nullptr;  // constant once it is made
  static inline constinit std::atomic<Stage> stage{Stage::unmade};
  static inline constinit bool has_key = false;
  static inline constinit pthread_key_t key{};
  // NOLINTEND(readability-identifier-naming)
};

}  // namespace lastcall::detail

#undef LASTCALL_HAS_NODE_POOL

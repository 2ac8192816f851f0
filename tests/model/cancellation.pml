/* The protocol of the cancellation tree (include/lastcall/detail/cancel_tree.hpp) on a small tree, with
 * the invariants I1 to I9 that are numbered at the head of include/lastcall/cancellation.hpp.
 *
 *   spin -DWHO=3 -a cancellation.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 * must end with "errors: 0"; with -DBUG=n, and the WHO that stands behind the bug, it must find one. Who
 * can't end is an invalid end state: a waiter that nobody wakes, a destructor that waits for ever, a lock
 * that is never let go.
 *
 * The tree is a line: node 0 is the root, 1 its child, 2 a child of 1 that is made on the way. Threads:
 *   A  owns the root's source: cancels it, gives its handle up
 *   B  owns node 1's source: cancels it, or destroys it armed or disarmed; gives its handle up
 *   R  has a token of node 1: registers a callback, may drop the token first, destroys the callback
 *   K  has a token of node 1: makes node 2 under it, drops the token, drops node 2
 *   W  has a token of node 1: waits, with or without a deadline, drops the token
 *   T  the timer thread, for which node 1 has a deadline: it may come due at any moment, or never
 * A runs always; WHO is the sum of those with it: B 1, R 2, K 4, W 8, T 16; and 32 if node 1 has a descriptor,
 * for which a canceller keeps the node though nothing is linked to it.
 *
 * Every lock, unlock, load and read-modify-write of the code is one step here, and so is every look at a
 * node's memory, which must not have been freed. What is modelled is sequentially consistent; the code's
 * weaker orders are argued where they stand, and in README.md.
 *
 * What is not: shards (the same lists behind more locks, taken in the same order), nodes with several
 * parents, marking with a deadline (try_mark), a callback that destroys itself, and the
 * timers' own wake-up (litmus/timer.c).
 *
 *   BUG  1 (I2) WHO=3   a node is flagged on the way down, before its descendants
 *        2 (I2) WHO=3   the cause is written after the flag
 *        3 (I3) WHO=3   a canceller passes by a child that another one has locked
 *        4 (I3) WHO=3   the parent is unlocked before the child is locked
 *        5 (I5) WHO=33  the last handle is looked for without the parent's lock
 *        6 (I6) WHO=2   who empties an orphan's lane leaves it alone
 *        7 (I5) WHO=3   the worklist holds no handle of its nodes
 *        8 (I7) WHO=2   the destructor doesn't wait for its running callback
 *        9 (I7) WHO=2   the runner looks at the callback after it has said that it is finished
 *       10 (I7) WHO=2   the runner stores `finished` without looking whether somebody waits
 *       11 (I8) WHO=8   a waiter asks whether the node is cancelled before it takes the lock, not after
 *       12 (I8) WHO=8   a waiter whose time is up leaves without the lock
 *       13 (I1) WHO=4   a child is linked to a parent that was uncancelled before the lock was taken
 *       14 (I3) WHO=1   a node that goes locks itself first, then its parent
 *       15 (I7) WHO=2   the callback is taken without being marked as running
 *       16 (I8) WHO=9   waiters are woken before the whole subtree is marked
 *       17 (I5) WHO=2   who finds that it hasn't the last handle gives it up without looking again
 *       18 (I5) WHO=17  a node with a timer is let go without disarming it
 *       19 (I5) WHO=17  the timer thread takes its handle after it has let its lock go
 *       20 (I5) WHO=17  handles are not counted again after the timer was disarmed
 *       21 (I8) WHO=9   who waits for the node that is cancelled is woken before that is published
 *       22 (I5) WHO=3   a source that goes looks at what is linked before it looks at the handles
 */
#ifndef BUG
#define BUG 0
#endif
#ifndef WHO
#define WHO 3
#endif

#define WITH_B (WHO & 1)
#define WITH_R ((WHO >> 1) & 1)
#define WITH_K ((WHO >> 2) & 1)
#define WITH_W ((WHO >> 3) & 1)
#define WITH_T ((WHO >> 4) & 1)
#define WITH_DESCRIPTOR ((WHO >> 5) & 1)

#define NONE 3

/* Nodes. A node is linked to its parent while linked[n]; node 0 never is. */
bool exists[3];
bool freed[3];
bool locked[3];
bool flagged[3];
byte cause[3];
byte handles[3];
bool orphan[3];
bool linked[3];

/* The one callback, on node 1. */
mtype = { idle, pending, running, awaited, finished };
mtype stage = idle;
bool cb_linked;
bool cb_freed;
byte cb_runs;
bool cb_sleeps;   /* its destructor sleeps on its word */

/* The one waiter, on node 1. */
bool w_linked;
bool w_gone;      /* its stack frame */
bool w_word;
bool w_sleeps;

/* The timer of node 1. */
#define timed(n) (WITH_T && (n) == 1)
bool t_armed = WITH_T;
bool t_locked;

byte done;        /* threads that have ended */

#define on_node(n) (((n) == 1 && (cb_linked || w_linked)) || ((n) < 2 && linked[(n) + 1]))

inline touch(n) { assert(exists[n] && !freed[n]) }

inline lock(n) {
  touch(n);
  atomic { !locked[n] || freed[n]; assert(!freed[n]); locked[n] = true }
}
inline unlock(n) { atomic { touch(n); locked[n] = false } }

/* ---- letting go: release(), retire(), left_as_orphan(), claim_orphan() ---------------------------- */

/* Under the lock of n, from which a link was taken: takes a handle if n must be released now. */
inline claim_orphan(n, claimed) {
  claimed = NONE;
  if
  :: !on_node(n) && orphan[n] && BUG != 6 ->
     if
     :: !timed(n) && handles[n] == 0 -> handles[n] = 1; claimed = n
     :: else -> handles[n] = handles[n] + 1; claimed = n
     fi
  :: else
  fi
}

inline disarm() {
  atomic { !t_locked -> t_locked = true };
  t_armed = false;
  t_locked = false
}

/* Gives up a handle of `first`, and of whoever has to go with it. Uses the caller's r_... */
inline release(first) {
  r_node = first;
  do
  :: r_node == NONE -> break
  :: else ->
     touch(r_node);
     if
     :: atomic { handles[r_node] > 1 -> handles[r_node] = handles[r_node] - 1 };
        r_node = NONE
     :: handles[r_node] == 1 ->
        /* retire(). First the glance: something hangs on it? Then left_as_orphan(). */
        r_stop = false;
        if
        :: on_node(r_node) ->
           lock(r_node);
           if
           :: on_node(r_node) ->
              if
              :: !timed(r_node) && handles[r_node] == 1 -> handles[r_node] = 0; orphan[r_node] = true
              :: else -> atomic {
                   handles[r_node] = handles[r_node] - 1;
                   if :: handles[r_node] == 0 -> orphan[r_node] = true :: else fi
                 }
              fi;
              r_stop = true
           :: else
           fi;
           unlock(r_node)
        :: else
        fi;
        if
        :: r_stop -> r_node = NONE
        :: else ->
           r_up = (linked[r_node] -> r_node - 1 : NONE);
#if BUG == 14
           lock(r_node);
           if :: r_up != NONE -> lock(r_up) :: else fi;
           unlock(r_node);
#elif BUG != 5
           if :: r_up != NONE -> lock(r_up) :: else fi;
#endif
           /* Two loads: the state word, then the handles. */
           touch(r_node);
           r_last = false;
           if
           :: !timed(r_node) && !locked[r_node] && !on_node(r_node) ->
              touch(r_node);
              r_last = (handles[r_node] == 1)
           :: else
           fi;
           if
           :: !r_last ->
              lock(r_node);
              r_linked = on_node(r_node);
              r_disarmed = !timed(r_node);
              r_seen = handles[r_node];
              do
              :: !r_linked && r_seen == 1 && r_disarmed -> r_last = true; break
              :: !r_linked && r_seen == 1 && !r_disarmed ->
#if BUG != 18
                 disarm();
#endif
                 r_disarmed = true;
#if BUG != 20
                 r_seen = handles[r_node]
#endif
              :: else ->
#if BUG == 17
                 atomic {
                   handles[r_node] = handles[r_node] - 1;
                   r_seen = handles[r_node] + 1
                 };
                 break
#else
                 atomic {
                   if
                   :: handles[r_node] == r_seen -> handles[r_node] = handles[r_node] - 1; break
                   :: else -> r_seen = handles[r_node]
                   fi
                 }
#endif
              od;
              if :: !r_last && r_seen == 1 -> orphan[r_node] = true :: else fi;
              atomic { r_seen = 0; r_linked = false; r_disarmed = false };
              unlock(r_node)
           :: else
           fi;
#if BUG == 5
           if :: r_last && r_up != NONE -> lock(r_up) :: else fi;
#endif
           if
           :: r_last ->
              if
              :: r_up != NONE ->
                 linked[r_node] = false;
                 claim_orphan(r_up, r_claimed);
                 unlock(r_up)
              :: else -> r_claimed = NONE
              fi;
              touch(r_node);
              assert(!timed(r_node) || !t_armed);
              atomic { freed[r_node] = true; r_node = r_claimed; r_claimed = 0; r_last = false; r_up = 0 }
           :: else ->
#if BUG != 5
              if :: r_up != NONE -> unlock(r_up) :: else fi;
#endif
              atomic { r_node = NONE; r_up = 0 }
           fi
        fi;
        r_stop = false
     fi
  od
}

/* ---- cancelling: Marking, CancelWork ---------------------------------------------------------------- */

/* What a callback, a woken waiter and the caller of a cancel() that was true may rely on. */
inline assert_marked_below(n) {
  d_step {
    assert(n > 0 || !linked[1] || flagged[1]);
    assert(n > 1 || !linked[1] || !linked[2] || flagged[2])
  }
}

inline wake(n) {
  /* Under the lock of n: the waiter is taken out, its word set, and it is woken by address. */
  if
  :: w_linked ->
     w_linked = false;
     assert(!w_gone);
     w_word = true;
     w_sleeps = false
  :: else
  fi
}

/* Uses the caller's c_node, c_child, c_work1, c_asleep, c_up, c_go. */
inline cancel(root, who, won) {
  won = false;
  touch(root);
  if
  :: flagged[root]
  :: else ->
     lock(root);
     if
     :: flagged[root] -> unlock(root)
     :: else ->
        won = true;
        c_work1 = false;
        c_asleep = false;
        c_node = root;
        c_go = true;
#if BUG != 2
        cause[root] = who;
#endif
#if BUG == 1
        flagged[root] = true;
#endif
        do
        :: c_go && c_node < 2 && linked[c_node + 1] ->
           /* descend() */
           c_child = c_node + 1;
#if BUG == 4
           unlock(c_node);
#endif
           touch(c_child);
           if
           :: flagged[c_child] && !locked[c_child] -> c_go = false
#if BUG == 3
           :: locked[c_child] -> c_go = false
#endif
           :: else ->
              lock(c_child);
              if
              :: flagged[c_child] -> unlock(c_child); c_go = false
              :: else ->
#if BUG != 2
                 cause[c_child] = who;
#endif
#if BUG == 1
                 flagged[c_child] = true;
#endif
                 c_node = c_child
              fi
           fi;
#if BUG == 4
           if :: !c_go -> lock(c_node) :: else fi
#endif
        :: else ->
           /* leave() */
           if :: timed(c_node) -> disarm() :: else fi;
           if
           :: c_node == root ->
              /* Its subtree is marked: it is published, and who waits is awake, under this lock. */
#if BUG == 21
              if :: root == 1 -> wake(1) :: else fi;
#endif
              atomic { touch(c_node); flagged[c_node] = true };
#if BUG != 21
              if :: root == 1 -> wake(1) :: else fi;
#endif
              if :: root == 1 -> c_work1 = cb_linked :: else fi
           :: else ->
              c_asleep = (c_node == 1 && (cb_linked || w_linked || WITH_DESCRIPTOR));
              c_work1 = c_asleep
#if BUG == 16
              ;
              if :: c_asleep -> wake(1) :: else fi
#endif
           fi;
#if BUG != 7
           if :: c_node == 1 && c_work1 -> handles[1] = handles[1] + 1 :: else fi;
#endif
           atomic { touch(c_node); flagged[c_node] = true; locked[c_node] = false };
#if BUG == 2
           cause[c_node] = who;
#endif
           if
           :: c_node == root -> break
           :: else ->
#if BUG == 4
              lock(c_node - 1);
#endif
              c_node = c_node - 1;
              c_go = false
           fi
        od;
        assert_marked_below(root);
        /* wake(), then run_one() until there is nothing left. */
        if
        :: c_asleep ->
           lock(1);
           wake(1);
           unlock(1)
        :: else
        fi;
        if
        :: c_work1 ->
           lock(1);
           if
           :: cb_linked && stage == pending ->
              assert(!cb_freed);
#if BUG != 15
              stage = running;
#endif
              unlock(1);
              /* The last of the node: its link keeps it from here on. */
#if BUG != 7
              release(1);
#endif
              /* run() */
              assert(!cb_freed);
              cb_runs = cb_runs + 1;
              assert(flagged[1] && cause[1] != 0);
              assert_marked_below(1);
              if :: root == 0 -> assert_marked_below(0) :: else fi;
              assert(!cb_freed);
#if BUG == 10
              stage = finished
#else
              atomic {
                if :: stage == awaited -> c_go = true :: else -> c_go = false fi;
                stage = finished
              };
              if :: c_go -> cb_sleeps = false :: else fi
#endif
#if BUG == 9
              ;
              assert(!cb_freed)
#endif
           :: else ->
              unlock(1)
#if BUG != 7
              ;
              release(1)
#endif
           fi
        :: else
        fi
     fi
  fi
}

/* ---- the threads ------------------------------------------------------------------------------------ */

#define LOCALS \
  byte r_node; byte r_up; byte r_claimed; byte r_seen; bool r_last; bool r_stop; bool r_linked; \
  bool r_disarmed; \
  byte c_node; byte c_child; bool c_work1; bool c_asleep; bool c_go; bool won

proctype A() {
  LOCALS;
  cancel(0, 1, won);
  assert(won);              /* nobody else cancels the root */
  release(0);
  done++
}

#if WITH_B
proctype B() {
  LOCALS;
  bool alone; bool bare; bool disarmed;
  if
  :: cancel(1, 2, won);
     assert(flagged[1]);
     if :: won -> assert(cause[1] == 2) :: else -> assert(cause[1] != 2) fi
  :: disarmed = true
  :: /* abandon_node(): who has the last handle of a node with nothing on it need not cancel it. */
#if BUG == 22
     atomic { touch(1); bare = !locked[1] && !cb_linked && !w_linked && !linked[2] };
     atomic { touch(1); alone = (handles[1] == 1) };
#else
     atomic { touch(1); alone = (handles[1] == 1) };
     atomic { touch(1); bare = !locked[1] && !cb_linked && !w_linked && !linked[2] };
#endif
     if :: alone && bare :: else -> cancel(1, 2, won); bare = false fi
  fi;
  release(1);
  /* Nobody is left who would cancel it; but for the timer's thread, or a canceller that is in the middle of it. */
  assert(disarmed || freed[1] || flagged[1] || WITH_T || WITH_DESCRIPTOR);
  done++
}
#endif

#if WITH_R
proctype R() {
  LOCALS;
  bool in_place;
  byte claimed;
  bool wait_for_it;
  /* The constructor: attach(). */
  lock(1);
  if
  :: flagged[1] -> unlock(1); in_place = true; cb_runs = cb_runs + 1; stage = finished
  :: else -> cb_linked = true; stage = pending; unlock(1)
  fi;
  /* The link keeps the node: the token may go before the callback, or after it. */
  if
  :: release(1); won = true
  :: won = false
  fi;
  /* The destructor: remove_callback(). */
  if
  :: in_place
  :: else ->
     lock(1);
     cb_linked = false;
     claim_orphan(1, claimed);
     wait_for_it = (stage == running);
     unlock(1);
     if :: claimed != NONE -> release(1) :: else fi;
#if BUG == 8
     wait_for_it = false;
#endif
     if
     :: wait_for_it ->
        atomic { if :: stage == running -> stage = awaited :: else fi };
        do
        :: stage == finished -> break
        :: else ->
           /* futex_wait(): sleeps if the word is still `awaited`. */
           atomic { if :: stage == awaited -> cb_sleeps = true :: else fi };
           !cb_sleeps
        od
     :: else
     fi
  fi;
  cb_freed = true;
  assert(cb_runs <= 1);
  if :: !won -> release(1) :: else fi;
  done++
}
#endif

#if WITH_K
proctype K() {
  LOCALS;
  bool seen;
  touch(1);
  seen = flagged[1];
  /* make_child() */
  atomic { exists[2] = true; handles[2] = 1 };
  lock(1);
#if BUG == 13
  if
  :: seen -> unlock(1); flagged[2] = true; cause[2] = cause[1]
#else
  if
  :: flagged[1] -> unlock(1); flagged[2] = true; cause[2] = cause[1]
#endif
  :: else -> linked[2] = true; unlock(1)
  fi;
  if :: seen -> assert(flagged[2]) :: else fi;
  if :: flagged[2] -> assert(cause[2] != 0) :: else fi;
  release(1);
  release(2);
  done++
}
#endif

#if WITH_W
proctype W() {
  LOCALS;
  bool timed_out; bool has_deadline;
  if :: has_deadline = true :: skip fi;
#if BUG == 11
  touch(1);
  won = flagged[1];
  lock(1);
  if
  :: won -> unlock(1)
#else
  lock(1);
  if
  :: flagged[1] -> unlock(1)
#endif
  :: else ->
     w_linked = true;
     unlock(1);
     do
     :: w_word -> break
     :: else ->
        atomic { if :: !w_word -> w_sleeps = true :: else fi };
        if
        :: !w_sleeps
        :: has_deadline -> timed_out = true; w_sleeps = false
        fi;
        if
        :: timed_out ->
#if BUG != 12
           lock(1);
           if :: !w_word -> w_linked = false :: else fi;
           unlock(1);
#endif
           break
        :: else
        fi
     od
  fi;
  if
  :: !timed_out ->
     assert(flagged[1] && cause[1] != 0);
     assert_marked_below(1)
  :: else
  fi;
  w_gone = true;
  release(1);
  done++
}
#endif

#if WITH_T
proctype T() {
  LOCALS;
  bool due;
  if
  :: atomic { !t_locked -> t_locked = true };
     due = t_armed;
     t_armed = false;
#if BUG == 19
     t_locked = false;
#endif
     if
     :: due -> touch(1); handles[1] = handles[1] + 1  /* hold() */
     :: else
     fi;
#if BUG != 19
     t_locked = false;
#endif
     if
     :: due -> cancel(1, 3, won); release(1)          /* due() */
     :: else
     fi
  :: true                   /* never due */
  fi;
  done++
}
#endif

#define THREADS (1 + WITH_B + WITH_R + WITH_K + WITH_W + WITH_T)

init {
  atomic {
    exists[0] = true; handles[0] = 1;
    exists[1] = true; linked[1] = true;
    /* Node 1's source, and a token for each of R, K and W. */
    handles[1] = WITH_B + WITH_R + WITH_K + WITH_W;
    run A();
#if WITH_B
    run B();
#endif
#if WITH_R
    run R();
#endif
#if WITH_K
    run K();
#endif
#if WITH_W
    run W();
#endif
#if WITH_T
    run T();
#endif
  };
  done == THREADS;
  /* Nothing is left (I5, I6), and nobody holds a lock. */
  assert(freed[0] && freed[1]);
  assert(!exists[2] || freed[2]);
  assert(!locked[0] && !locked[1] && !locked[2]);
  assert(!cb_linked && !w_linked && !t_locked);
  /* A timer must not outlive its node: the timer thread would look at it. */
  assert(!t_armed)
}

/* I2 in every state: who sees a node cancelled sees its cause, and its descendants cancelled. */
active proctype Observer() {
  end:
  do
  :: atomic { flagged[0] && !freed[0] && cause[0] == 0 -> assert(false) }
  :: atomic { flagged[1] && !freed[1] && cause[1] == 0 -> assert(false) }
  :: atomic { flagged[0] && linked[1] && !flagged[1] -> assert(false) }
  :: atomic { flagged[1] && linked[2] && !flagged[2] -> assert(false) }
  od
}

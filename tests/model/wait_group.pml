/* The protocol of WaitGroup: sections and slots, the move to the exact count, closing, the last leaver,
 * waiters with and without a deadline, destruction. G1 to G8 are the invariants at the head of
 * include/lastcall/wait_group.hpp, S1 to S3 and W1 to W3 those of include/lastcall/detail/thread_sections.hpp.
 *
 * Check it (safety, and that nobody is stuck: a process that can't end is an invalid end state):
 *
 *   spin -a wait_group.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 * Without membarrier (S1 is a sequentially consistent exchange): spin -DSYMMETRIC -a wait_group.pml.
 * With a second waiter that may give up at any time: spin -DTIMED -a wait_group.pml.
 * With fewer states: -DSIMPLE, without a copy; -DALONE, without a second waiter.
 * All must end with "errors: 0". Each planted bug must be found ("errors: 1"), N from 1 to 13:
 *
 *   spin -DBUG=N -a wait_group.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 *    1  W2 left out: no fence in the threads that are in sections
 *    2  W3 left out: the slots are summed up while a thread is in a section
 *    3  S2 left out: a section trusts the look that it took before S1
 *    4  the last leaver counts down and doesn't look for waiters
 *    5  a waiter raises `waiting` without looking at the count again
 *    6  the last leaver lets the waiters go before it unlocks
 *    7  no bias while the count is moved: the central part goes below zero
 *    8  an entry looks at `closed` first and counts afterwards
 *    9  the group becomes fast while somebody waits
 *   10  what was moved to the word is moved again the next time
 *   11  a waiter takes a zero that it sees without the lock
 *   12  who moves the sum empties the slots: a thread at S1 stores the old value once more
 *   13  who gives up doesn't look whether the last leaver took it off the list (needs -DTIMED)
 *
 * What is modelled: processors with store buffers (total store order), since S1 and S3 are plain
 * stores; an atomic read-modify-write waits until the buffer is empty. The word's fields are one word:
 * they change together, in one step. A compare-exchange loop is the step in which it succeeds.
 * A slot's two words are one, since a thread is in one section at a time.
 * What is not: orders weaker than TSO (each memory order has its reason beside it in the code), more
 * than two threads with slots, names, bare add()s (two of them are one member, G9).
 */

#ifndef BUG
#define BUG 0
#endif

#define THREADS 2
#define BIAS 20

/* The word. */
bool fast, closed, waiting;
short central;

bool locked;
short moved_before; /* the part of the slots' sum that the word has */
bool freed;

/* The slots: a value, and whether its thread is inside. */
short slot[THREADS];
bool touching[THREADS];

/* Store buffers of slots. */
chan buffer0 = [4] of { bit, short };
chan buffer1 = [4] of { bit, short };
short slot_as_seen[THREADS]; /* by its own thread, past its buffer */

/* Waiters: 0 is the one that closes and destroys, 1 another. */
bool linked[2], released[2];
bool gone[2]; /* its stack frame, and the link in it */
bool asleep;  /* waiter 1 sleeps in wait(), or is about to */
#ifdef ALONE
bool idle = true;
#else
bool idle;    /* it has returned */
#endif

/* What is true, as opposed to what is counted. A bit for each membership: in, from the return of its
 * entry to the call of its leaving. */
byte in;
bool zero_after_close; /* waited for once closed: from here on nobody is let in (G3) */

#define GROUP assert(!freed)

/* Who still makes calls without being a member, or waits, must have returned before destruction. To be
 * asleep in wait() is enough, but with a deadline one may be awake any moment. */
bool callers_are_done;
#ifdef TIMED
#define waiter_is_done idle
#else
#define waiter_is_done (idle || asleep)
#endif

#define drained(i) ((i == 0 && empty(buffer0)) || (i == 1 && empty(buffer1)))

inline store(i, inside, value) {
  if
  :: i == 0 -> buffer0 ! inside, value
  :: i == 1 -> buffer1 ! inside, value
  fi
}

inline commit(i, inside, value) { GROUP; touching[i] = inside; slot[i] = value }

active proctype flush0() {
  bit inside; short value;
end:
  do
  :: atomic { buffer0 ? inside, value -> commit(0, inside, value) }
  od
}
active proctype flush1() {
  bit inside; short value;
end:
  do
  :: atomic { buffer1 ? inside, value -> commit(1, inside, value) }
  od
}

inline fence_everybody() {
  atomic {
    do
    :: nempty(buffer0) -> buffer0 ? inside, value; commit(0, inside, value)
    :: nempty(buffer1) -> buffer1 ? inside, value; commit(1, inside, value)
    :: empty(buffer0) && empty(buffer1) -> break
    od;
    inside = 0; value = 0
  }
}

inline take_lock() { atomic { (!locked || freed) -> GROUP; locked = true } }
inline drop_lock() { GROUP; locked = false }

#define open(refuse) (fast && !(refuse && closed))

/* S1 to S3 in thread `i`. It reads its slot a step before S1. */
inline move_fast(i, by, refuse) {
  moved = false;
  atomic { GROUP; go = open(refuse) };
  if
  :: go ->
     atomic { GROUP; own = slot_as_seen[i] };
#ifdef SYMMETRIC
#if BUG == 1
     atomic { slot_as_seen[i] = own; store(i, 1, own) };
#else
     atomic { drained(i) -> GROUP; slot_as_seen[i] = own; touching[i] = true; slot[i] = own };
#endif
#else
     atomic { slot_as_seen[i] = own; store(i, 1, own) }; /* S1 */
#endif
#if BUG != 3
     atomic { GROUP; go = open(refuse) }; /* S2 */
#endif
     atomic { /* S3 */
       if
       :: go -> own = own + by; moved = true
       :: else
       fi;
       slot_as_seen[i] = own;
       store(i, 0, own);
       own = 0
     }
  :: else
  fi;
  go = false
}

#define exact (central < BIAS / 2)
#if BUG == 7
#define the_bias 0
#else
#define the_bias BIAS
#endif
#define in_range assert(central >= 0)

/* Sets `moved` if let in. */
inline enter(i, refuse, bit_of_it) {
  move_fast(i, 1, refuse);
  if
  :: moved
  :: else ->
#if BUG == 8
     atomic { drained(i) -> GROUP; go = !(refuse && closed) };
     if
     :: go -> atomic { GROUP; central++; moved = true }
     :: else
     fi
#else
     atomic {
       drained(i) -> GROUP;
       if
       :: !(refuse && closed) -> central++; moved = true
       :: else
       fi
     }
#endif
  fi;
  go = false;
  if
  :: moved -> atomic { assert(!refuse || !zero_after_close); in = in | bit_of_it }
  :: else
  fi
}

#define last (exact && central == 1 && waiting)

inline let_go(w) {
  if
  :: taken[w] -> atomic { assert(!gone[w]); released[w] = true; taken[w] = false }
  :: else
  fi
}

inline leave(i, bit_of_it) {
  in = in & ~bit_of_it;
  move_fast(i, -1, false);
  do
  :: moved -> break
  :: else ->
     atomic {
       drained(i) -> GROUP;
       if
#if BUG == 4
#else
       :: last -> go = true
#endif
       :: else -> central--; in_range; moved = true
       fi
     };
     if
     :: go ->
        go = false;
        take_lock();
        atomic {
          GROUP;
          if
          :: last ->
             central = 0; waiting = false; moved = true;
             taken[0] = linked[0]; taken[1] = linked[1];
             linked[0] = false; linked[1] = false
          :: else
          fi
        };
#if BUG == 6
        let_go(0); let_go(1);
        drop_lock()
#else
        drop_lock();
        let_go(0); let_go(1)
#endif
     :: else
     fi
  od;
  moved = false
}

inline become_fast() {
  if
  :: atomic { drained(0) && (!locked || freed) -> GROUP; locked = true };
     atomic {
       GROUP;
       if
#if BUG == 9
       :: !fast && !closed -> fast = true; central = central + the_bias
#else
       :: !fast && !closed && !waiting -> fast = true; central = central + the_bias
#endif
       :: else
       fi
     };
     drop_lock()
  :: skip
  fi
}

/* Under the lock; sets `gave_up` and is fast again if time ran out at W3. */
inline become_exact(may_give_up) {
  atomic { GROUP; fast = false }; /* W1 */
#if BUG != 1 && !defined(SYMMETRIC)
  fence_everybody(); /* W2 */
#endif
#if BUG != 2
  if
  :: !touching[0]
  :: may_give_up && touching[0] -> gave_up = true
  fi;
  if
  :: gave_up
  :: !gave_up && !touching[1]
  :: !gave_up && may_give_up && touching[1] -> gave_up = true
  fi;
#endif
  if
  :: gave_up -> atomic { GROUP; fast = true }
  :: else ->
     atomic { GROUP; sum = slot[0] };
     atomic { GROUP; sum = sum + slot[1] };
#if BUG == 12
     atomic { GROUP; slot[0] = 0; slot_as_seen[0] = 0 };
     atomic { GROUP; slot[1] = 0; slot_as_seen[1] = 0 };
     atomic { GROUP; central = central + sum - the_bias; in_range; sum = 0 }
#else
     atomic {
       GROUP;
       central = central + sum - moved_before - the_bias;
       in_range;
#if BUG != 10
       moved_before = sum;
#endif
       sum = 0
     }
#endif
  fi
}

/* Sets `zero`. */
inline wait(w, may_give_up) {
  atomic { zero = false; before = in };
#if BUG == 11
  atomic { GROUP; zero = !fast && exact && central == 0 };
#endif
  if
  :: zero
  :: else ->
     take_lock();
     if
     :: atomic { fast -> GROUP }; become_exact(may_give_up)
     :: atomic { else -> GROUP; assert(slot[0] + slot[1] == moved_before) } /* G4 */
     fi;
     if
     :: gave_up -> drop_lock(); gave_up = false
     :: else ->
#if BUG == 5
        atomic { GROUP; zero = central == 0 };
        if
        :: !zero -> atomic { GROUP; waiting = true; linked[w] = true }
        :: else
        fi;
#else
        atomic {
          GROUP;
          if
          :: central == 0 -> zero = true
          :: else -> waiting = true; linked[w] = true
          fi
        };
#endif
        drop_lock();
        if
        :: zero
        :: else ->
           asleep = (asleep || w == 1);
           if
           :: released[w] -> zero = true
           :: may_give_up && !released[w] ->
              take_lock();
              if
              :: linked[w] ->
                 linked[w] = false;
                 if
                 :: !linked[1 - w] -> waiting = false
                 :: else
                 fi;
                 drop_lock()
              :: else ->
                 drop_lock();
#if BUG != 13
                 released[w] -> zero = true
#endif
              fi
           fi
        fi
     fi
  fi;
  /* Neither early, nor is anybody missed that was in all the time. */
  atomic { assert(!zero || (before & in) == 0); before = 0; gone[w] = true }
}

/* Enters twice, makes the group fast at times; what it enters first, the other thread leaves. */
chan handed = [1] of { bit };

active proctype thread0() {
  bool moved, go; short own; bool taken[2];
  enter(0, true, 1);
  if
  :: moved -> moved = false; become_fast(); handed ! 1
  :: else -> handed ! 0
  fi;
  enter(0, true, 2);
  callers_are_done = true;
  if
  :: moved -> moved = false; become_fast(); leave(0, 2)
  :: else
  fi
}

/* Takes over a membership, copies it (let in also once closed), leaves with both. */
active proctype thread1() {
  bool moved, go; short own; bool taken[2]; bit is_in;
  handed ? is_in;
  if
  :: is_in ->
     if
#if !defined(TIMED) && !defined(SIMPLE) /* enough states without it */
     :: enter(1, false, 4); moved = false; leave(1, 1); leave(1, 4)
#endif
     :: leave(1, 1)
     fi
  :: else
  fi
}

active proctype closer() {
  bit inside; short value; short sum; bool zero, gave_up; byte before;
  closed = true;
  wait(0, false);
  assert(zero);
  zero_after_close = true;
  callers_are_done && waiter_is_done;
  freed = true
}

#ifndef ALONE
active proctype waiter() {
  bit inside; short value; short sum; bool zero, gave_up; byte before;
  wait(1,
#ifdef TIMED
       true
#else
       false
#endif
  );
  idle = true
}
#endif

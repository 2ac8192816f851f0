/* The protocol of SignalTrap: handlers on any thread against a reader, against traps that come and go, and
 * against fork(). I1 to I11 are the invariants at the head of include/lastcall/signal_trap.hpp.
 *
 *   spin -DPART=1 -a signal_trap.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 * must end with "errors: 0" for PART 1 to 4; with -DBUG=n of its part it must find one. Who can't end
 * is an invalid end state: a reader that sleeps while something is pending, a trap that waits for handlers
 * for ever. For PART 2, where handlers retry instead of waiting, that all come to their end in a fair
 * schedule is the claim `ends`:
 *
 *   spin -DPART=2 -DLIVE -DSIGNALS=1 -a signal_trap.pml && cc -O2 -DCOLLAPSE -o pan pan.c && ./pan -a -f -m200000
 *
 * PART 1: the inbox (detail/signal_inbox.hpp). Handlers on three threads (-DMORE: four) post two numbers
 *   into a pipe for one record and its spills; the reader sleeps in poll(2) and takes one at a time, or
 *   all are discarded at the end, which must know of each number whether it was exclusive.
 *   BUG  1 (I2) no bell is rung after a spill
 *        2 (I2) the reader looks at the spills first, and at the pipe afterwards
 *        3 (I2) the bell is rung before the spill is filled
 *        4 (I3) the reader rings no bell for what it leaves
 *        5 (I4) no place is kept for a number that has none
 *        6 (I2) the reader takes a spill that is still being filled
 *        7 (I2) a spill is said to be full by a store, over what was merged meanwhile
 *        8 (I2) the reader empties a spill before it has copied the record
 * PART 2: the registry (detail/signal_links.hpp, signal_handler.hpp) for one number. Two traps come and go
 *   on two threads; a handler runs on a third, and once more for what is raised again. What was there
 *   before is SIG_DFL, or a function that may hang.
 *   BUG 11 (I6) what is unlinked is freed without waiting for handlers
 *       12 (I6) one side is waited for, not both
 *       13 (I6) a handler reads the list first and counts itself in flight afterwards
 *       14 (I5) a subscription is linked before it points to the next
 *       15 (I8) a handler that gives way doesn't look at the list again under the flag
 *       16 (I8) a handler gives way without the flag
 *       17 (I7) the previous handler is called in flight
 *       18 (I8) SIG_DFL was put back, and the signal isn't raised again
 *       19 (I6) what nobody read is discarded before handlers are waited for
 *       20 (I8) a handler that finds the flag taken drops the signal
 * PART 3: fork() while a handler is in flight on another thread, with a signal in the child at any moment
 *   (before our hook ran, too), a new trap there, and its end.
 *   BUG 21 (I10) fork() doesn't take the lock
 *       22 (I10) the child keeps the parent's counts of handlers in flight
 *       23 (I10) the child keeps the list
 *       24 (I10) a handler reads the lists of a process that isn't its own
 *       25 (I10) the child leaves the disposition as it was
 *       26 (I10) the process id is set before the lists are emptied
 * PART 4: the lock in a child that fork's hooks missed, or that somebody else's hook is in before ours. Two threads
 *   of the child want it, while the parent's copy is in whatever state it was.
 *   BUG 27 (I10) the child takes the lock as it is
 *       28 (I10) each thread of the child that finds it the parent's makes it anew
 *       29 (I10) it is made anew although the forking thread has it
 *       30 (I10) whether the forking thread has it is looked at when the lock has been claimed
 *       31 (I10) the forking thread lets go before it has written down whose the lock is
 *       32 (I10) the child believes that a thread that is inside fork() in the parent has the lock here, too
 *
 * What is not modelled: layers under other people's handlers (I9, I11), SignalIgnore, masks, SA_RESETHAND,
 * refused system calls, two numbers in the registry (they share its lock and counts, nothing else), fork hooks
 * of others (in the child, who comes before our hook does first what it would have done). All is
 * sequentially consistent here; weaker orders are argued in the code, in litmus/, and in README.md.
 */

#ifndef BUG
#define BUG 0
#endif
#ifndef PART
#define PART 1
#endif

#if PART == 1
/* ---- the inbox -------------------------------------------------------------------------------------- */

#define NUMBERS 2
#ifndef PIPE
#define PIPE 1
#endif
#ifdef MORE
#define POSTERS 4
#else
#define POSTERS 3
#endif

/* number, exclusive. Number 0 is a bell. */
chan pipe = [PIPE] of { byte, bool };

#define EMPTY 0
#define FILLING 1
#define FULL 2
byte phase[3];
bool merged_exclusive[3];
byte record[3];      /* whose number it says */
bool copying[3];

/* The reader's queues, as counts. */
byte queued[3];
bool queued_exclusive[3];
byte used;

/* What is true: posted, and not handed out since. */
bool owed[3], owed_exclusive[3];
byte in_pipe[3];
byte posted;

inline put(n, exclusive, done) {
  atomic {
    if
    :: nfull(pipe) ->
       pipe ! n, exclusive;
       in_pipe[n]++;
       done = true;
       if
       :: n != 0 -> owed[n] = true; owed_exclusive[n] = owed_exclusive[n] || exclusive
       :: else
       fi
    :: full(pipe) -> done = false
    fi
  }
}

proctype poster(byte n; bool exclusive) {
  bool done; byte seen; bool seen_exclusive;
  put(n, exclusive, done);
  if
  :: done
  :: else ->
#if BUG == 3
     put(0, false, done);
#endif
     do
     :: atomic { seen = phase[n]; seen_exclusive = merged_exclusive[n] };
        atomic {
          if
          :: phase[n] == seen && merged_exclusive[n] == seen_exclusive ->
             owed[n] = true;
             owed_exclusive[n] = owed_exclusive[n] || exclusive;
             if
             :: seen == EMPTY -> phase[n] = FILLING; merged_exclusive[n] = exclusive
             :: else -> merged_exclusive[n] = merged_exclusive[n] || exclusive
             fi;
             break
          :: else
          fi
        }
     od;
     if
     :: seen == EMPTY ->
        assert(!copying[n]);
        record[n] = 0;   /* half written */
        record[n] = n;
#if BUG == 7
        atomic { phase[n] = FULL; merged_exclusive[n] = exclusive }
#else
        atomic { assert(phase[n] == FILLING); phase[n] = FULL }
#endif
     :: else
     fi;
#if BUG != 1 && BUG != 3
     put(0, false, done)
#endif
  fi;
  atomic { seen = 0; seen_exclusive = false; done = false; posted++ }
}

inline push(n, exclusive) {
  if
  :: n == 0
#if BUG == 5
  :: n != 0 && used >= PIPE /* dropped */
  :: n != 0 && used < PIPE ->
#else
  :: n != 0 && used >= PIPE && queued[n] > 0 -> queued_exclusive[n] = queued_exclusive[n] || exclusive
  :: n != 0 && !(used >= PIPE && queued[n] > 0) ->
#endif
     queued[n]++;
     used++;
     queued_exclusive[n] = queued_exclusive[n] || exclusive;
     assert(used <= PIPE + NUMBERS)
  fi
}

inline read_pipe() {
  atomic {
    do
    :: nempty(pipe) -> pipe ? n, exclusive; in_pipe[n]--; push(n, exclusive)
    :: empty(pipe) -> break
    od;
    n = 0; exclusive = false
  }
}

inline read_spill(m) {
  if
#if BUG == 6
  :: phase[m] != EMPTY ->
#else
  :: phase[m] == FULL ->
#endif
#if BUG == 8
     atomic { exclusive = merged_exclusive[m]; merged_exclusive[m] = false; phase[m] = EMPTY };
#endif
     copying[m] = true;
     assert(record[m] == m);
     copying[m] = false;
     atomic {
#if BUG != 8
       exclusive = merged_exclusive[m]; merged_exclusive[m] = false; phase[m] = EMPTY;
#endif
       push(m, exclusive);
       exclusive = false
     }
  :: else
  fi
}

inline gather() {
#if BUG == 2
  read_spill(1); read_spill(2);
  read_pipe()
#else
  read_pipe();
  read_spill(1); read_spill(2)
#endif
}

proctype reader() {
  byte n; bool exclusive, done; byte m;
  if
  :: /* discard(), once no handler can come any more */
     posted == POSTERS;
     gather();
     atomic {
       for (m : 1 .. NUMBERS) {
         assert(owed[m] == (queued[m] > 0));
         assert(owed_exclusive[m] == (queued[m] > 0 && queued_exclusive[m]))
       }
     }
  :: /* wait(), again and again */
     do
     :: nempty(pipe) ->
        gather();
        if
        :: used > 0 ->
           atomic {
             m = (queued[1] > 0 -> 1 : 2);
             assert(queued[m] > 0);
             queued[m]--;
             used--;
             /* With a later one in the queue, the spill or the pipe something is still owed. */
             if
             :: queued[m] == 0 && phase[m] == EMPTY && in_pipe[m] == 0 -> owed[m] = false
             :: else
             fi;
             m = 0
           };
           if
#if BUG != 4
           :: used > 0 -> put(0, false, done); done = false
#endif
           :: else
           fi
        :: else
        fi
     :: empty(pipe) && posted == POSTERS -> break
     od;
     /* It would sleep for ever now. */
     assert(used == 0 && queued[1] == 0 && queued[2] == 0);
     assert(phase[1] == EMPTY && phase[2] == EMPTY);
     assert(!owed[1] && !owed[2])
  fi
}

init {
  atomic {
    run reader();
    run poster(1, true);
    run poster(1, false);
    run poster(2, true);
#ifdef MORE
    run poster(2, false);
#endif
  }
}
#endif

#if PART == 2
/* ---- the registry ----------------------------------------------------------------------------------- */

#define DFL 0
#define FUNCTION 1
#define OURS 2
#ifndef SIGNALS
#define SIGNALS 2
#endif

byte disposition;
byte previous;
byte head;           /* 0: nobody */
byte next[3];
bool freed[3];
bool subscribed[3];  /* from the constructor's return to the destructor's call */
bool locked, changing;
byte epoch;
byte in_flight[2];

/* A bit for each signal. */
byte pending[3];     /* in a trap's inbox */
byte exclusive[3];
byte seen;           /* somebody was told, or it did what it would have done, or it may be dropped */
byte again;          /* raised by a destructor, to be delivered */
byte done;

inline lock() {
  atomic { !locked -> locked = true };
  atomic { !changing -> changing = true }
}
inline unlock() {
  changing = false;
  locked = false
}

inline wait_for_side() {
  atomic { side = epoch; epoch = 1 - epoch };
  in_flight[side] == 0
}
inline wait_for_handlers() {
#if BUG != 11
  wait_for_side();
#if BUG != 12
  wait_for_side();
#endif
#endif
  side = 0
}

proctype trap(byte me) {
  byte side; bool join, restored; byte unread;
  /* subscribe() */
  lock();
  join = (disposition == OURS);
  if :: !join -> previous = disposition :: else fi;
#if BUG == 14
  side = head;
  head = me;
  next[me] = side;
  side = 0;
#else
  next[me] = head;
  head = me;
#endif
  if :: !join -> disposition = OURS :: else fi;
  unlock();
  subscribed[me] = true;
  /* Nobody undoes a trap (I8): the next signal finds our handler in place. */
  assert(disposition == OURS);
  /* It may read what has come. */
  if
  :: atomic { seen = seen | pending[me]; pending[me] = 0; exclusive[me] = 0 }
  :: skip
  fi;
  assert(disposition == OURS);
  subscribed[me] = false;
  /* unsubscribe_all() */
#if BUG == 19
  atomic { unread = pending[me] & exclusive[me]; seen = seen | (pending[me] & ~exclusive[me]); pending[me] = 0 };
#endif
  lock();
  if
  :: head == me -> head = next[me]
  :: else -> assert(next[3 - me] == me); next[3 - me] = next[me]
  fi;
  restored = false;
  if
  :: head == 0 ->
     if
     :: disposition == OURS -> disposition = previous; restored = (previous == DFL)
     :: else -> restored = (previous == DFL)
     fi
  :: else
  fi;
  wait_for_handlers();
  unlock();
#if BUG != 19
  atomic { unread = pending[me] & exclusive[me]; seen = seen | (pending[me] & ~exclusive[me]) };
#endif
  atomic {
    freed[me] = true;
    if
    :: restored -> again = again | unread
    :: else -> seen = seen | unread
    fi;
    unread = 0
  };
  done++
}

/* Delivers signal `s` on this thread until it has acted. */
inline deliver(s) {
  back = true;
  do
  :: !back -> break
  :: else ->
     back = false;
     atomic {
       now = disposition;
       must = (subscribed[1] -> 1 : 0) | (subscribed[2] -> 2 : 0)
     };
     if
     :: now == DFL -> seen = seen | (1 << s)      /* the process ends */
     :: now == FUNCTION -> seen = seen | (1 << s)
     :: now == OURS ->
        do
        :: /* hand_round() */
#if BUG == 13
           at = head;
           atomic { side = epoch };
           in_flight[side]++;
#else
           side = epoch;
           in_flight[side]++;
           at = head;
#endif
           any = (at != 0);
           alone = true;
           got = 0;
           do
           :: at == 0 -> break
           :: else ->
              assert(!freed[at]);
              atomic { after = next[at]; if :: got == 0 -> alone = (after == 0) :: else fi };
              assert(!freed[at]);
              atomic {
                pending[at] = pending[at] | (1 << s);
                if :: alone -> exclusive[at] = exclusive[at] | (1 << s) :: else fi;
                got = got | at
              };
              at = after
           od;
           after = 0;
           /* Who was there all the time has got it. */
           if
           :: any -> atomic {
                assert(!(must & 1) || !subscribed[1] || (got & 1));
                assert(!(must & 2) || !subscribed[2] || (got & 2));
                got = 0
              }
           :: else
           fi;
#if BUG == 17
           if :: any -> call_previous(s) :: else fi;
#endif
           in_flight[side]--;
           side = 0;
           if
           :: any ->
#if BUG != 17
              call_previous(s);
#endif
              break
           :: else
           fi;
           /* act_as_previous() */
           now = disposition;
           if
           :: now == OURS ->
#if BUG != 16
              atomic {
                if
                :: changing -> back = true
                :: else -> changing = true
                fi
              };
              if
              :: back ->
#if BUG == 20
                 back = false;
#endif
                 break                     /* raised again, and back at once */
              :: else
              fi;
#endif
              if
#if BUG != 15
              :: head != 0 ->
#if BUG != 16
                 changing = false
#else
                 skip
#endif
#else
              :: false
#endif
              :: else ->
                 disposition = previous;
                 now = previous;
#if BUG != 16
                 changing = false;
#endif
                 goto_previous = true
              fi
           :: else -> goto_previous = true
           fi;
           if
           :: goto_previous ->
              goto_previous = false;
              if
              :: previous == FUNCTION -> call_previous(s)
              :: previous != FUNCTION && now == DFL ->
#if BUG != 18
                 back = true
#endif
              :: else -> seen = seen | (1 << s)
              fi;
              break
           :: else
           fi
        od
     fi
  od;
  atomic { now = 0; must = 0; any = false; alone = false; got = 0; at = 0 }
}

inline call_previous(s) {
  if
  :: previous == FUNCTION ->
     seen = seen | (1 << s);
     if
     :: skip
     :: hung = true
     fi;
     if
     :: hung ->
end_hang: false
     :: else
     fi
  :: else
  fi
}

bool hung;

proctype signals() {
  byte side, at, after, now, must, got; bool any, alone, back, goto_previous; byte s;
  do
  :: s == SIGNALS -> break
  :: else -> deliver(s); s++
  od;
  s = 0;
  /* What the destructors raised again. */
  do
  :: again & 1 -> atomic { again = again & ~1 }; deliver(0)
  :: again & 2 -> atomic { again = again & ~2 }; deliver(1)
  :: done == 2 && again == 0 -> break
  od;
  /* No signal is lost. */
  assert(seen == (1 << SIGNALS) - 1);
  assert(disposition != OURS || head != 0);
  done++
}

init {
  atomic {
    if
    :: disposition = DFL
    :: disposition = FUNCTION
    fi;
    run trap(1);
    run trap(2);
    run signals()
  };
  /* Traps go, whatever a previous handler does (I7). */
  done >= 2 && (done == 3 || hung)
}

#ifdef LIVE
ltl ends { <> (done >= 2 && (done == 3 || hung)) }
#endif
#endif

#if PART == 3
/* ---- fork() ----------------------------------------------------------------------------------------- */

#define DFL 0
#define OURS 2

/* Twice: the parent's and the child's. The trap of the parent is 1; the child's own, made later, is 2. */
byte disposition[2];
byte head[2];
bool taken[2];
byte in_flight[2];
byte process[2];   /* whom the lists speak of: 0 the parent, 1 the child */
bool locked[2], changing[2];
bool child_done;
bool half;         /* the parent is in the middle of a change */
bool unlinked;     /* the parent's trap has gone */
bool new_got, acted;

/* One signal in process p; `mine` is who it really is. */
inline handler(p) {
  if
  :: disposition[p] == DFL -> if :: p == 1 -> acted = true :: else fi
  :: else ->
     own = (process[p] == p);
#if BUG == 24
     own = true;
#endif
     any = false;
     if
     :: own ->
        in_flight[p]++;
        at = head[p];
        if
        :: at != 0 ->
           any = true;
           /* A child's signals never reach the parent's trap. */
           assert(p == 0 || at != 1);
           if :: p == 1 && at == 2 -> new_got = true :: else fi
        :: else
        fi;
        in_flight[p]--
     :: else
     fi;
     if
     :: any
     :: else ->
        /* act_as_previous() */
        if
        :: disposition[p] == OURS ->
           if
           :: own && changing[p]   /* raised again: another time */
           :: else ->
              if
              :: own && head[p] != 0
              :: else -> disposition[p] = DFL; if :: p == 1 -> acted = true :: else fi
              fi
           fi
        :: else -> if :: p == 1 -> acted = true :: else fi
        fi
     fi;
     at = 0
  fi
}

/* In the parent, at any time. */
proctype parents_handler() {
  byte at; bool own, any;
  handler(0);
  handler(0)
}

/* Another thread of the parent ends its trap meanwhile. */
proctype parents_other() {
  atomic { !locked[0] -> locked[0] = true };
  changing[0] = true;
  half = true;
  head[0] = 0;
  if :: disposition[0] == OURS -> disposition[0] = DFL :: else fi;
  taken[0] = false;
  half = false;
  in_flight[0] == 0;
  unlinked = true;
  changing[0] = false;
  locked[0] = false
}

proctype child() {
  byte at; bool own, any;
  /* Before our hook: another's may have unblocked signals. */
  if
  :: handler(1)
  :: skip
  fi;
  /* become_child() */
#if BUG == 26
  process[1] = 1;
  if :: handler(1) :: skip fi;
#endif
  if
  :: taken[1] ->
#if BUG != 23
     head[1] = 0;
#endif
#if BUG != 25
     if :: disposition[1] == OURS -> disposition[1] = DFL :: else fi;
#endif
     taken[1] = false
  :: else
  fi;
#if BUG != 22
  in_flight[1] = 0;
#endif
  if :: handler(1) :: skip fi;
  process[1] = 1;
  changing[1] = false;
  locked[1] = false;
  /* A trap made before the fork acts as if it weren't there. */
  assert(head[1] == 0 && disposition[1] == DFL);
  acted = false;
  handler(1);
  assert(acted);
  /* A new one works. */
  !locked[1];
  locked[1] = true; changing[1] = true;
  head[1] = 2;
  disposition[1] = OURS;
  taken[1] = true;
  changing[1] = false; locked[1] = false;
  handler(1);
  assert(new_got);
  /* And its end waits for nobody of the parent's. */
  locked[1] = true;
  head[1] = 0;
  disposition[1] = DFL;
  in_flight[1] == 0;
  locked[1] = false;
  child_done = true
}

proctype parents_fork() {
#if BUG != 21
  atomic { !locked[0] -> locked[0] = true };
  atomic { !changing[0] -> changing[0] = true };
#endif
  atomic {
    /* The lists are whole in the child. */
    assert(!half);
    disposition[1] = disposition[0];
    head[1] = head[0];
    taken[1] = taken[0];
    in_flight[1] = in_flight[0];
    process[1] = process[0];
    locked[1] = locked[0];
    changing[1] = changing[0];
    run child()
  };
#if BUG != 21
  changing[0] = false;
  locked[0] = false
#endif
}

init {
  atomic {
    disposition[0] = OURS; head[0] = 1; taken[0] = true;
    run parents_handler();
    run parents_other();
    run parents_fork()
  };
  unlinked && child_done
}
#endif

#if PART == 4
/* ---- the lock after fork() ---------------------------------------------------------------------------- */

#define NOBODY 0
#define PARENT 1
#define CHILD 2
#define OF(p) (p + 1)
#define CLAIMED_BY(p) (p + 3)

/* Twice: the parent's and the child's. */
byte owner[2];     /* lock_process */
bool locked[2];
bool by_fork[2];   /* is_held_by_fork */
byte inside[2];
byte ended;
bool forked;

inline claim(p) {
  seen = owner[p];
  do
  :: seen == OF(p) -> break
  :: seen == CLAIMED_BY(p) ->
     owner[p] != CLAIMED_BY(p);
     seen = owner[p]
  :: else ->
#if BUG != 30
     held = by_fork[p];
#endif
     atomic {
       if
       :: owner[p] == seen -> mine = true; owner[p] = (BUG == 28 -> owner[p] : CLAIMED_BY(p))
       :: else -> seen = owner[p]; mine = false
       fi
     };
     if
     :: mine ->
#if BUG == 30
        held = by_fork[p];
#endif
#if BUG == 29
        held = false;
#endif
        /* Who forked is the child's first thread, and what it has itself it knows. */
        if :: p == 1 && forked_here && BUG != 32 -> held = false :: else fi;
        if
        :: seen != NOBODY && !held && BUG != 27 -> locked[p] = false; by_fork[p] = false
        :: else
        fi;
        owner[p] = OF(p);
        break
     :: else
     fi
  od
}

inline lock(p) {
  claim(p);
  atomic { !locked[p] -> locked[p] = true };
  inside[p]++;
  assert(inside[p] == 1)
}

inline unlock(p) {
  inside[p]--;
  if
  :: by_fork[p] ->
#if BUG == 31
     by_fork[p] = false;
     owner[p] = OF(p)
#else
     owner[p] = OF(p);
     by_fork[p] = false
#endif
  :: else
  fi;
  locked[p] = false
}

proctype user(byte p; bool forked_here) {
  byte seen; bool held, mine;
  lock(p);
  unlock(p);
  ended++
}

/* A thread of the parent that is in another fork. */
proctype other_forker() {
  byte seen; bool held, mine, forked_here;
  lock(0);
  by_fork[0] = true;
  unlock(0);
  ended++
}

/* Our hook in the child. Hooks of others come before it, and may start threads. */
proctype forker_in_child() {
  assert(inside[1] == 1);
  unlock(1);
  ended++
}

proctype forker() {
  byte seen; bool held, mine, forked_here;
  if
  :: /* our hooks run */
     lock(0);
     by_fork[0] = true;
     atomic {
       owner[1] = owner[0]; locked[1] = locked[0]; by_fork[1] = by_fork[0];
       inside[1] = 1;
       forked = true;
       run forker_in_child(); run user(1, false); run user(1, false)
     };
     unlock(0)
  :: /* they don't: nobody who is inside comes along */
     atomic {
       owner[1] = owner[0]; locked[1] = locked[0]; by_fork[1] = by_fork[0];
       forked = true;
       ended++;
       run user(1, true)
     };
     /* Others of its threads come later, when the lock is held by a fork. Else they may come first. */
     if
     :: by_fork[1] -> owner[1] == CHILD
     :: else
     fi;
     run user(1, false)
  fi
}

init {
  atomic { run user(0, false); run other_forker(); run forker() };
  forked && ended == 5
}
#endif

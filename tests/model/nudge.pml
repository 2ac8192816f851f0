/* How a cancel gets a thread out of a user's condition variable (WHAT=1), or out of a blocking system call (2):
 * the waiter, whoever cancels, and the thread that nudges. It follows include/lastcall/detail/nudge.hpp,
 * condition_wait.hpp and interruptible.hpp.
 *
 *   spin -DWHAT=1 -a nudge.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -m200000
 *
 * must end with "errors: 0"; with -DBUG=n (and WHAT=1) it must find one. A waiter that sleeps for ever is an invalid end state.
 *
 * What it claims, of every schedule:
 *   N1  the waiter comes out, though nobody else notifies, and though the canceller holds the user's mutex
 *       while it cancels, and waits for the waiter in a callback
 *   N2  neither the waker nor the nudging thread touches the waiter when it is out: it is on a stack, and so
 *       may the mutex and the condition variable be
 *   N3  the nudging thread sleeps in the end
 *
 * The waiter's predicate is false; it may be woken for nothing, once. A tick of the clock comes when nothing else
 * goes on any more (`timeout`), and once at any time. Of the former there may be two: an attempt that is made
 * when all are at rest has to be heard.
 *
 *   BUG  1 (N1) an attempt is taken as heard if the waiter was `blocking`, whoever had the mutex
 *        2 (N2) the waiter doesn't wait until the nudging thread has let go of it
 *        3 (N2) its destructor doesn't take the lane's lock, under which the waker runs
 *        4 (N1) the waiter looks whether it is cancelled, and then says that it blocks
 *        5 (N1) who lets go of the waiter doesn't look whether it waits for that
 *        6 (N1) the nudging thread looks at its bell after its look at the list
 *        7 (N1) callbacks are called before the waker
 *        8 (N1) what is tried again is tried by the thread that calls callbacks
 *        9 (N1) the canceller tries, by locking the mutex, which it may have itself
 */
#ifndef BUG
#define BUG 0
#endif
#ifndef WHAT
#define WHAT 1
#endif

/* The user's. */
bool mutex;
bool sleeps;      /* on the condition variable, or in the call */
bool out;         /* wait() has returned */

/* The lane, and the waker's link. */
bool lane;
bool flagged;     /* is_cancelled() */
bool linked;
bool pending;     /* the waker is to be called */

/* Nudge::state_ */
bool blocking;
bool cancelled;
bool leaving;
bool released;
bool naps;        /* the waiter waits for `released` */
bool handed;      /* is_handed_over_ */

/* The nudging thread. */
bool listed;      /* in handed_over */
bool known;       /* in its own list */
byte bell;
bool rests;       /* it sleeps on the bell */


inline acquire(lock) { atomic { !lock -> lock = true } }
inline ring() { atomic { bell++; rests = false } }
inline touch() { assert(!out) }

/* The attempt: `heard`. */
inline attempt(heard) {
  touch();
#if WHAT == 2
  heard = false;
#elif BUG == 1
  heard = true;
#else
  atomic { heard = !mutex; if :: heard -> mutex = true :: else fi };
  touch();
  if :: heard -> mutex = false :: else fi;
#endif
  touch();
  sleeps = false
}

active proctype Waiter() {
  bool spurious; bool stop;
#if WHAT == 1
  acquire(mutex);
#endif
  /* The constructor. */
  acquire(lane);
  if
  :: flagged -> cancelled = true
  :: else -> linked = true; pending = true
  fi;
  lane = false;
  do
  :: /* enter() */
#if BUG == 4
     stop = cancelled;
     blocking = true;
#else
     atomic { blocking = true; stop = cancelled };
#endif
     if :: stop -> break :: else fi;
     /* From here on a notification is heard, and a signal interrupts. */
#if WHAT == 1
     atomic { sleeps = true; mutex = false };
#else
     sleeps = true;
#endif
     if
     :: !sleeps
     :: !spurious -> spurious = true; sleeps = false
     fi;
#if WHAT == 1
     acquire(mutex);
#endif
     atomic { blocking = false; stop = cancelled };
     if :: stop || flagged -> break :: else fi
  od;
  blocking = false;
  /* The destructor. */
#if BUG == 3
  linked = false;
#else
  if
  :: linked -> acquire(lane); linked = false; lane = false
  :: else
  fi;
#endif
#if BUG != 2
  if
  :: handed ->
     atomic { leaving = true; stop = released };
     if
     :: !stop ->
        ring();
        do
        :: atomic { released -> break }
        :: atomic { !released -> naps = true };
           !naps
        od
     :: else
     fi
  :: else
  fi;
#endif
  out = true
#if WHAT == 1
  ;
  mutex = false
#endif
}

inline call_waker() {
  acquire(lane);
  if
  :: linked && pending ->
     touch();
     pending = false;
     bool seen;
     atomic { cancelled = true; seen = blocking };
     if
     :: seen ->
#if BUG == 9
        acquire(mutex); sleeps = false; mutex = false;
#else
        touch();
        handed = true;
        listed = true;
        ring();
#endif
     :: else
     fi
  :: else
  fi;
  lane = false
}

active proctype Canceller() {
  bool holds;
#if WHAT == 1
  if
  :: acquire(mutex); holds = true
  :: skip
  fi;
#endif
  acquire(lane);
  flagged = true;
  lane = false;
#if BUG == 7
  if :: !holds -> out :: else fi;
#endif
  call_waker();
  if
  :: holds -> mutex = false
  :: else
  fi;
#if BUG != 8
  /* A callback that waits for the waiter. */
  out;
#endif
  skip
}

active proctype Nudger() {
  byte rung; byte ticks; bool fresh; bool again; bool heard; bool early; bool tell;
  do
  ::
#if BUG != 6
     rung = bell;
#endif
     /* Those that it knows, if a tick has come; then the new one. */
     if
     :: known || listed ->
        fresh = false;
        if
        :: atomic { listed -> listed = false; fresh = true }
        :: else
        fi;
        known = true;
        heard = false;
        touch();
        if
        :: !blocking -> heard = true
        :: else ->
           if :: fresh || again -> attempt(heard) :: else fi
        fi;
        again = false;
        if
        :: heard ->
           known = false;
           touch();
           atomic { released = true; tell = leaving };
           /* It may be gone now: by its address alone. */
#if BUG != 5
           if :: tell -> naps = false :: else fi
#endif
        :: else
        fi
     :: else
     fi;
#if BUG == 6
     rung = bell;
#endif
     if
     :: atomic { rung == bell -> rests = true };
end_rest:
        if
        :: !rests
        :: known && !early && rests -> early = true; again = true; rests = false
#if BUG == 8
        :: known && timeout && out -> again = true; rests = false
#else
        :: known && timeout -> ticks++; assert(ticks <= 2); again = true; rests = false
#endif
        fi
     :: rung != bell
     fi
  od
}

/* The protocol of the coordinator: a request by anybody, wishes that grow, drain threads that hang in user
 * code and are abandoned, the end that is handed to drain()'s caller or that ends the process. It follows
 * include/lastcall/detail/engine_state.hpp, engine_signal.hpp, engine_drain.hpp and engine.hpp.
 *
 *   spin -DSCENE=1 -a coordinator.pml && cc -O2 -DSAFETY -DCOLLAPSE -o pan pan.c && ./pan -E -m200000
 *
 * must end with "errors: 0" for each SCENE, and with -DBUG=n, and the SCENE that stands behind it, find one.
 * User code may hang for ever, so not every end state in which somebody is stuck is wrong (-E); what is, says
 * the assertion behind `timeout`: nothing goes on any more, and the process has neither ended nor drained.
 *
 * What it claims (C1 and so on, as the assertions have it):
 *   C1  each hook is called once, in its order, whatever the ones before it do
 *   C2  only the current drain thread touches the drain's state; one that was abandoned touches nothing
 *   C3  a hook that hangs is abandoned in time: the signal thread never sleeps past a section's deadline
 *   C4  from the return of drain() on nothing ends the process; and either drain() returns or it ends
 *   C5  whoever finds a report finds it complete
 *   C6  the first wish asks, the second SIGINT aborts, the third ends the process, whatever hangs
 *   C7  once somebody asked, the end of time ends the process, or drain()'s wait, whatever hangs
 *   C8  the last words are never said by two at once
 *
 * SCENE 1: time never runs out. Hooks return or hang; main calls drain(). All is run, drain() returns.
 *       2: time may run out; hooks and the flush hang; main calls run(). The process ends.
 *       3: time may run out; main calls drain(), late or in time; no thread is to be had to go on.
 *       4: three SIGINT; hooks hang; main never comes; time doesn't run out. The process ends.
 *       5: whoever asks is stopped in the middle of it; then a SIGINT comes, and time may run out.
 *
 *   BUG  1 SCENE=1 (C3) who enters a section doesn't ring the signal thread
 *        2 SCENE=1 (C3) the signal thread looks at the sections first and says afterwards when it will wake (HOOKS=2)
 *        3 SCENE=1 (C2) a section is abandoned by a store, though it may just have ended
 *        4 SCENE=1 (C2) one that was abandoned and comes back goes on
 *        5 SCENE=1 (C3) the successor is given its turn and not woken
 *        6 SCENE=1 (C1) a hook is taken off the list after it was called, not before (HOOKS=2)
 *        7 SCENE=5 (C6) the signal thread leaves a request to who began it
 *        8 SCENE=3 (C4) drain() returns before the signal thread has been stopped
 *        9 SCENE=1 (C5) the end is announced before the report is made
 *       10 SCENE=1 (C4) the waiter for the end looks at `done` and then sleeps, whatever it is by then
 *       11 SCENE=3 (C4) the drain thread ends the process though drain() has come in the last moment
 *       12 SCENE=2 (C7) a request doesn't ring the signal thread
 *       13 SCENE=1 (C3) the signal thread lowers its bell before it sleeps, not after
 *       14 SCENE=1 (C1) a drain thread looks at its bell after its look at what there is to do
 *       15 SCENE=4 (C6) a second wish waits for the hook that runs
 *       16 SCENE=2 (C7) who is leaving counts as having handed over the end, and its flush hangs
 *       17 SCENE=4 (C6) the thread that keeps the clock runs the handler beneath the trap, too, and hangs there
 *       18 SCENE=4 (C6) other threads take the signals, and nobody does when all of them hang there
 *       19 SCENE=2 (C7) who finds that the last words are being said waits until they are, and that hangs
 *       20 SCENE=2 (C8) who says the last words looks whether they are being said, and then says that it does
 *
 * With -DHOOKS=2 there are two hooks and a third drain thread: ten times the states.
 *
 * A signal is taken by a thread of the program's, where a handler that was there before is called on, and may hang;
 * or, if none does, by the signal thread, without that handler.
 *
 * What is not modelled: stages after the first and the sharing out of their time, the group (wait_group.pml)
 * and the tree (cancellation.pml), observers and the naming of stacks (called as hooks are), the announce
 * delay, the destructor, the on_signal thread, marks that are owed. All is sequentially consistent.
 */

#ifndef BUG
#define BUG 0
#endif
#ifndef SCENE
#define SCENE 1
#endif

#if SCENE == 1
#define TIME_RUNS_OUT 0
#define WISHES 1
#define MAIN_DRAINS 1
#define MAIN_RUNS 0
#elif SCENE == 2
#define TIME_RUNS_OUT 1
#define WISHES 0
#define MAIN_DRAINS 0
#define MAIN_RUNS 1
#elif SCENE == 3
#define TIME_RUNS_OUT 1
#define WISHES 0
#define MAIN_DRAINS 1
#define MAIN_RUNS 0
#elif SCENE == 4
#define TIME_RUNS_OUT 0
#define WISHES 3
#define MAIN_DRAINS 0
#define MAIN_RUNS 0
#else
#define TIME_RUNS_OUT 1
#define WISHES 1
#define MAIN_DRAINS 0
#define MAIN_RUNS 0
#endif

#ifndef HOOKS
#define HOOKS 1
#endif
/* Of these the last calls nobody; or there is none to be had for the last hook's successor. */
#define DRIVERS (SCENE == 3 -> HOOKS : HOOKS + 1)

/* Deadlines, nearest first: those of the hooks' sections, by their number; the end; never. */
#define END 8
#define NEVER 9

/* Sections: one a drain thread. */
mtype = { idle, inside, abandoned, returned };
mtype section[3] = idle;
byte section_hook[3];

/* The request. */
byte cause;               /* 0: none; 1: by a call; 2: by a signal */
bool requested, aborted;

/* Time. */
bool late[4];             /* the deadline of that hook has passed */
bool begun[4];
bool out_of_time;         /* the end has */

/* The signal thread. */
byte signals;             /* in the trap's pipe */
#define PROGRAM_THREADS 2
byte hung;                /* of those, in the handler beneath */
bool clock_hangs;         /* BUG 17 */
byte sent;
bool bell;
byte wakes_at = NEVER;
bool quit, signal_thread_gone;

/* The drain threads. */
byte current;
byte standbys;
bool quits;               /* no more turns */
bool sleeps_for_turn[4];
bool rung;                /* the drain thread's bell, since the current driver noted what it says */

/* The drain's state, the current driver's. */
#define RUNNING 0
#define IN_HOOKS 1
#define LINGERING 2
#define REPORTING 3
#define ENDED 4
byte at;
byte taken;               /* hooks taken off the list */
bool calling;             /* a hook: written down by the successor if it hangs */
byte calls[3];
byte written[3];

/* The end. */
#define NOBODY 0
#define DRAIN 1
#define RUN 2
byte ending;
#define NOT_DONE 0
#define WITH_REPORT 1
#define WITHOUT 2
byte done;
bool report, taken_over, leaving;
bool words, told;         /* words_begun; the drain thread is past them */
byte saying;              /* so many say them */
bool moment_over;         /* what the one who says them has more */
bool main_sleeps;
bool drain_returned;
bool over;                /* the process is gone */

inline exit_process() {
  atomic { assert(over || !drain_returned); over = true };  /* C4 */
  false
}
#define ring_drain() rung = true
inline set_done(how) {
  atomic {
    if :: done == NOT_DONE -> done = how :: else fi
  };
  main_sleeps = false
}
inline begin() {
  requested = true;
  atomic {
#if BUG != 12
    bell = true;
#endif
    ring_drain()
  }
}

/* ---- the signal thread ------------------------------------------------------------------------------ */

#define drain_is_late (done == WITHOUT && ending == DRAIN && !taken_over)
#if BUG == 16
#define handed_over (done != NOT_DONE && !drain_is_late)
#else
#define handed_over (done != NOT_DONE && !leaving && !drain_is_late)
#endif

#define being_said (words && !told && (leaving || done == NOT_DONE))
#if BUG == 19
#define forced (out_of_time && !being_said)
#else
#define forced (out_of_time && (!being_said || moment_over))
#endif

inline begin_words(first) {
#if BUG == 20
  first = !words;
  words = true
#else
  atomic { first = !words; words = true }
#endif
}
inline say_words() {
  atomic { assert(saying == 0); saying++ }  /* C8 */
}

/* `current` changes by the one that looks alone. */
inline look(next) {
  next = (section[current] == inside && standbys > current -> section_hook[current] : NEVER);
  if
  :: requested && !handed_over && next == NEVER -> next = END
  :: else
  fi
}

inline wish() {
  taken_wish = false;
  if
  :: atomic { cause == 0 -> cause = 2; taken_wish = true };
     begin()
  :: cause != 0
  fi;
  if
  :: taken_wish
  :: else ->
#if BUG != 7
     if :: !requested -> begin() :: else fi;
#endif
     if
     :: !aborted ->
#if BUG == 15
        section[current] != inside;
#endif
        aborted = true
     :: else -> exit_process()
     fi
  fi
}

proctype signal_thread() {
  byte plan, again; bool taken_wish, won;
  {
    do
    :: quit || over -> break
    :: else ->
       look(plan);
#if BUG != 2
       wakes_at = plan;
       look(again);
       if :: again < plan -> plan = again :: else fi;
#else
       wakes_at = plan;
#endif
#if BUG == 13
       bell = false;
#endif
       /* poll() */
       if
       :: bell
       :: signals > 0
       :: plan < END && late[plan]
       :: plan == END && forced
       fi;
#if BUG == 17
       !clock_hangs;
#endif
       atomic {
#if BUG != 13
         bell = false;
#endif
         plan = 0;
         again = 0
       };
#if WISHES
       do
       :: signals > 0 -> atomic { signals--; taken_wish = false }; wish(); taken_wish = false
       :: signals == 0 -> break
       od;
#endif
       /* look_at_clock(): a section past its deadline? */
#if BUG == 3
       if
       :: section[current] == inside && standbys > current && late[section_hook[current]] ->
          section[current] = abandoned; won = true
       :: else
       fi;
#else
       atomic {
         if
         :: section[current] == inside && standbys > current && late[section_hook[current]] ->
            section[current] = abandoned; won = true
         :: else
         fi
       };
#endif
       if
       :: won ->
          atomic { current = current + 1; won = false };
#if BUG != 5
          sleeps_for_turn[current] = false;
#endif
          ring_drain()
       :: else
       fi;
       /* end_by_force() */
       if
       :: requested && forced ->
          if
          :: handed_over
          :: else ->
             if
             :: done == NOT_DONE && ending == DRAIN ->
                if :: report -> set_done(WITH_REPORT) :: else -> set_done(WITHOUT) fi
             :: else ->
                if
                :: told -> say_words(); exit_process()
                :: else ->
                   begin_words(won);
                   if
                   :: won -> say_words(); exit_process()
                   :: !won && moment_over -> exit_process()
                   :: else  /* the drain thread has just begun */
                   fi
                fi
             fi
          fi
       :: else
       fi
    od;
    signal_thread_gone = true
  }
}

/* ---- the drain threads ------------------------------------------------------------------------------ */

/* C2. */
#define my_hook section_hook[mine]
#define mine_is_it assert(current == mine && section[mine] != abandoned)

proctype driver(byte mine) {
  bool has_standby, won;
  {
    /* Its turn? */
    do
    :: quits -> goto out
    :: !quits && current == mine -> break
    :: !quits && current != mine ->
       /* The futex sleeps only if the word is still what was seen. */
       atomic { if :: current != mine && !quits -> sleeps_for_turn[mine] = true :: else fi };
       !sleeps_for_turn[mine]
    od;
    /* write_down_abandoned() */
    atomic {
      mine_is_it;
      if
      :: calling ->
         calling = false;
         if :: taken > 0 -> written[taken - 1]++ :: else fi
      :: else
      fi
    };
    do
    :: quits || over -> goto out
    :: else ->
       atomic {
         mine_is_it;
#if BUG != 14
         rung = false
#endif
       };
       if
       :: atomic { at == RUNNING && requested -> mine_is_it; at = IN_HOOKS }
       :: at == RUNNING && !requested ->
#if BUG == 14
          rung = false;
#endif
          rung
       :: atomic { at == IN_HOOKS && (taken == HOOKS || out_of_time) -> mine_is_it; at = LINGERING }
       :: /* The last thread that there is a place for calls nobody. */
          atomic {
            at == IN_HOOKS && taken < HOOKS && mine + 1 == DRIVERS && SCENE != 3 ->
            mine_is_it;
            written[taken]++;
            taken++
          }
       :: /* guarded() */
          atomic {
            at == IN_HOOKS && taken < HOOKS && !out_of_time && (mine + 1 < DRIVERS || SCENE == 3) ->
            mine_is_it;
            section_hook[mine] = taken;
#if BUG != 6
            taken++;
#endif
            begun[section_hook[mine]] = true;
            if
            :: !has_standby && mine + 1 < DRIVERS ->
               run driver(mine + 1);
               has_standby = true;
               standbys = mine + 1
            :: else
            fi;
            calling = true
          };
          section[mine] = inside;
#if BUG != 1
          atomic {
            if
            :: section_hook[mine] < wakes_at -> bell = true
            :: else
            fi
          };
#endif
          /* The user's. */
          atomic {
            calls[my_hook]++;
            assert(calls[my_hook] == 1); /* C1 */
            assert(my_hook == 0 || calls[my_hook - 1] == 1 || written[my_hook - 1] == 1)
          };
          if
          :: skip
          :: true ->
             false
          fi;
          atomic { if :: section[mine] == inside -> section[mine] = idle; won = true :: else fi };
          if
          :: won ->
             atomic {
               won = false;
               mine_is_it;
#if BUG == 6
               taken++;
#endif
               calling = false;
               written[my_hook]++;
               assert(written[my_hook] == 1)
             }
          :: else ->
#if BUG == 4
             section[mine] = idle;
             calling = false
#else
             section[mine] = returned;
             ring_drain();
             goto out
#endif
          fi
       :: at == LINGERING ->
          if
          :: ending != NOBODY || out_of_time ->
#if BUG == 9
             if :: ending == DRAIN -> set_done(WITH_REPORT) :: else fi;
#endif
             at = REPORTING
          :: else ->
             rung || out_of_time
          fi
       :: atomic {
            at == REPORTING ->
            mine_is_it;
            /* Every hook has its line, unless time ran out. */
            assert(out_of_time || (written[0] == 1 && written[HOOKS - 1] == 1));
            report = true;
            at = ENDED
          }
       :: at == ENDED ->
#if BUG == 11
          won = (ending != DRAIN);
          ending = (won -> RUN : ending);
#else
          atomic {
            if
            :: ending == DRAIN -> won = false
            :: else -> ending = RUN; won = true
            fi
          };
#endif
          if
          :: !won -> set_done(WITH_REPORT); goto out
          :: else ->
             leaving = true;
             set_done(WITH_REPORT);
             /* say_what_was_missed(), if anything was */
             won = false;
             if
             :: skip
             :: SCENE == 2 && out_of_time -> begin_words(won)
             fi;
             if
             :: won ->
                say_words();
                if
                :: skip
                :: true ->
             false
                fi;
                saying--
             :: else
             fi;
             told = true;
             /* The flush. */
             if
             :: skip
             :: SCENE == 2 || SCENE == 5 ->
             false
             fi;
             exit_process()
          fi
       fi
    od;
out: skip
  }
}

/* ---- the others ------------------------------------------------------------------------------------- */

proctype main_thread() {
  byte how; bool put_off;
  {
    how = (MAIN_DRAINS -> DRAIN : RUN);
#if SCENE == 3
    /* In time, or late. */
    if
    :: skip
    :: out_of_time
    fi;
#endif
    atomic {
      if
      :: ending == NOBODY -> ending = how
      :: else
      fi
    };
    ring_drain();
#if BUG == 10
    put_off = (done == NOT_DONE);
    if :: put_off -> main_sleeps = true; !main_sleeps :: else fi;
#endif
    do
    :: done != NOT_DONE -> break
    :: else ->
       atomic { if :: done == NOT_DONE -> main_sleeps = true :: else fi };
       !main_sleeps
    od;
    if
    :: leaving ->
             false
    :: else
    fi;
    /* make_late_report() */
    if
    :: done == WITHOUT && ending == DRAIN -> report = true; taken_over = true
    :: else
    fi;
    if
    :: MAIN_RUNS && ending == RUN ->
             false
    :: else
    fi;
    assert(over || report);                                                     /* C5 */
    /* put_away() */
#if BUG == 8
    drain_returned = true;
#endif
    quit = true;
    bell = true;
    signal_thread_gone;
    atomic {
      quits = true;
      sleeps_for_turn[0] = false; sleeps_for_turn[1] = false; sleeps_for_turn[2] = false
    };
    ring_drain();
    drain_returned = true
  }
}

proctype requester() {
  bool won;
  {
    atomic { if :: cause == 0 -> cause = 1; won = true :: else fi };
    if
    :: !won
    :: won ->
#if SCENE == 5
       /* Stopped in the middle. */
       if
       :: skip
       :: true ->
             false
       fi;
#endif
       begin()
    fi
  }
}

/* The world: time goes by, signals come. */
proctype world() {
  {
    do
    :: !over && begun[0] && !late[0] -> late[0] = true
    :: !over && begun[1] && late[0] && !late[1] -> late[1] = true
    :: !over && TIME_RUNS_OUT && requested && !out_of_time -> out_of_time = true
    :: !over && out_of_time && words && !moment_over -> moment_over = true
    :: !over && sent < WISHES && !quit && hung < PROGRAM_THREADS ->
       atomic { sent++; signals++; if :: hung++ :: skip fi }
#if BUG == 17
    :: !over && sent < WISHES && !quit && hung == PROGRAM_THREADS && !clock_hangs ->
       atomic { sent++; signals++; clock_hangs = true }
#elif BUG != 18
    :: !over && sent < WISHES && !quit && hung == PROGRAM_THREADS -> atomic { sent++; signals++ }
#endif
    od
  }
}

init {
  atomic {
    run signal_thread();
    run driver(0);
    if :: MAIN_DRAINS || MAIN_RUNS -> run main_thread() :: else fi;
    if :: SCENE != 4 && SCENE != 1 -> run requester() :: else fi;
    run world()
  };
  /* Nothing goes on any more. */
  timeout;
#if SCENE == 5
  /* If who asked was stopped, and no signal came, nobody knows of the request. */
  assert(over || (cause != 0 && !requested && sent == 0))
#else
  assert(over || drain_returned)
#endif
}

/* What comes after the process's end is no matter. */
never {
  do
  :: !over
  od
}

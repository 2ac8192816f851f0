/* I2 of signal_trap.hpp: a handler that finds the pipe full fills its number's spill and then tries to write
 * a bell; the reader reads the pipe, then looks at the spills. A second handler merges by an exchange, also
 * where that changes nothing.
 *   BUG 1 (tso, pso) the reader looks at the spills first
 *   BUG 2 (pso)      the spill is said to be full without release
 *   BUG 3 (tso, pso) who merges looks at the spill only
 *   BUG 4 (tso, pso) no bell
 */
#include "order.h"

enum { empty, filling, full };
int in_pipe = 1; /* a pipe for one record, and it is full */
int state, record;
int done_before; /* by the thread that the second signal interrupted */
int merged;
int ended[2];

void handlers(void) {
  int taken;
  ATOMIC(taken = state == empty; if (taken) state = filling);
  record = 7;
#if BUG != 2
  RELEASE;
#endif
  state = full;
#if BUG != 4
  ATOMIC(if (in_pipe == 0) in_pipe = 1);
#endif
  END(ended[0]);
}

/* On another thread: it finds the pipe full as well. */
void second(void) {
  done_before = 1;
#if BUG == 3
  merged = state == full;
#else
  ATOMIC(merged = state == full);
#endif
  END(ended[1]);
}

int main(void) {
  START(1, handlers);
  START(2, second);
  int bell = 0, found = 0, saw_before = 0;
#if BUG == 1
  found = state == full;
  ATOMIC(bell = in_pipe; in_pipe = 0);
#else
  ATOMIC(bell = in_pipe; in_pipe = 0);
  found = state == full;
  ACQUIRE;
#endif
  if (found) {
    const int copy = record;
    ATOMIC(state = empty);
    saw_before = done_before;
    __CPROVER_assert(copy == 7, "a spill that is full is whole");
  }
  JOIN(ended[0]);
  JOIN(ended[1]);
  /* It was full when the second one looked: so that was before the reader took it. */
  __CPROVER_assert(!(found && merged) || saw_before, "what the second one did before is seen");
  __CPROVER_assert(found || in_pipe, "something is readable, or it has been taken");
}

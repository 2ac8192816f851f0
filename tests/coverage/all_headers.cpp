// Compiled with -fkeep-inline-functions and never run: what no test calls is counted, too.
#include <lastcall/lastcall.hpp>

// A second translation unit with the whole library: linking fails if anything in it is not inline.
#include <lastcall/lastcall.hpp>

int elsewhere(const lastcall::CancellationToken& token);

int elsewhere(const lastcall::CancellationToken& token) { return token.is_cancelled() ? 1 : 0; }

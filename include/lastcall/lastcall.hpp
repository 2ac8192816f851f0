// The whole library. Each header also works alone.
#pragma once

#include <lastcall/blocking.hpp>
#include <lastcall/cancellation.hpp>
#include <lastcall/cause.hpp>
#include <lastcall/detail/version.hpp>
#include <lastcall/observer.hpp>
#include <lastcall/shutdown_coordinator.hpp>
#include <lastcall/shutdown_report.hpp>
#include <lastcall/signal_info.hpp>
#include <lastcall/signal_trap.hpp>
#include <lastcall/stage.hpp>
#include <lastcall/task_group.hpp>
#include <lastcall/ticker.hpp>
#include <lastcall/wait_group.hpp>

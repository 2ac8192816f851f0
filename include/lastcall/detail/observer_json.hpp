// The observer for machines; its schema is at the top of observer.hpp.
#pragma once

#include <lastcall/detail/event_json.hpp>
#include <lastcall/detail/json.hpp>
#include <lastcall/detail/line_writer.hpp>
#include <lastcall/detail/throw_system_error.hpp>
#include <lastcall/observer.hpp>

#include <fcntl.h>

#include <cerrno>
#include <cstddef>
#include <memory>
#include <mutex>
#include <string>
#include <utility>

namespace lastcall::detail {

class JsonObserver final : public Observer {
 public:
  explicit JsonObserver(int fd) : writer_(checked(fd), lost_notice), origin_(Clock::now()) {}

  void on_request(Clock::time_point when) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    origin_ = when;
    requested_ = true;
  }

  void on_time_limit(Clock::duration most) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    writer_.share_time_limit(most);
  }

  void on_event(const Event& event) override {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (event.kind == EventKind::phase && !std::exchange(requested_, true)) origin_ = event.begin;
    JsonWriter json;
    write_event(json, event, origin_);
    writer_.write(json.take() + "\n");
    // There may be another coordinator.
    if (event.kind == EventKind::phase && event.name == "finished") requested_ = false;
  }

 private:
  static int checked(int fd) {
    const std::string which = "json_observer: " + std::to_string(fd);
    if (fd < 0) throw_invalid_argument(which + " is no open descriptor");
    const int status = ::fcntl(fd, F_GETFL);
    if (status == -1) throw_system_error(errno, which + " is no open descriptor");
    if ((status & O_ACCMODE) == O_RDONLY)
      throw_system_error(EBADF, which + " is open for reading only");
    return fd;
  }
  static std::string lost_notice(std::size_t lost) {
    return "{\"lost\":" + std::to_string(lost) + "}\n";
  }

  std::mutex mutex_;
  LineWriter writer_;
  Clock::time_point origin_;
  bool requested_ = false;
};

}  // namespace lastcall::detail

namespace lastcall {

inline std::shared_ptr<Observer> json_observer(int fd) {
  return std::make_shared<detail::JsonObserver>(fd);
}

}  // namespace lastcall

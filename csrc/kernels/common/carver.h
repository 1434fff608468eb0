// Parts of one allocation.
#pragma once

#include <cstdint>

#include "kernels/params.h"

namespace prism {

// Hands out parts that begin on lines of 128 bytes. From null on it only counts.
class Carver {
 public:
  PRISM_HOST_DEVICE explicit Carver(void* begin)
      : begin_(static_cast<char*>(begin)), next_(begin_) {}

  template <typename T>
  PRISM_HOST_DEVICE T* take(int64_t count) {
    char* part = next_;
    next_ += (count * static_cast<int64_t>(sizeof(T)) + 127) / 128 * 128;
    return reinterpret_cast<T*>(part);
  }

  PRISM_HOST_DEVICE int64_t bytes() const { return next_ - begin_; }

 private:
  char* begin_;
  char* next_;
};

}  // namespace prism

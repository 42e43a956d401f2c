// Exceptions as texts.

#pragma once

#include <cstring>
#include <exception>

// Runs `work`. Where it throws, returns false and sets `error` to a text; free it with `interlace_text_free`.
template <typename F>
bool caught(char** error, F work) {
  try {
    work();
    return true;
  } catch (const std::exception& e) {
    *error = strdup(e.what());
  } catch (...) {
    *error = strdup("an exception of unknown kind");
  }
  return false;
}

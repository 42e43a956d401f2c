//! LibTorch's errors as the library's.

use crate::base::Error;

/// Turns LibTorch's error into the library's; only its first line speaks of the problem, the rest is a C++ trace.
pub fn torch_error(subject: impl Into<String>) -> impl FnOnce(tch::TchError) -> Error {
    let subject = subject.into();
    move |error| {
        let text = error.to_string();
        Error::engine("LibTorch", subject, text.lines().next().unwrap_or_default())
    }
}

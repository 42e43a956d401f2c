//! Conversion of LibTorch's errors to the library's.

use crate::base::Error;

/// Converts a LibTorch error to an `Error::Engine` about `subject`. Only the first line of its message is kept; the
/// rest is a C++ stack trace.
pub fn torch_error(subject: impl Into<String>) -> impl FnOnce(tch::TchError) -> Error {
    let subject = subject.into();
    move |error| {
        let text = error.to_string();
        Error::engine("LibTorch", subject, text.lines().next().unwrap_or_default())
    }
}

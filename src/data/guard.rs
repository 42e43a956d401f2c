//! Catches panics of third-party decoders on malformed input.

use std::cell::Cell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    static SILENT: Cell<bool> = const { Cell::new(false) };
}

/// Runs a decoder. A panic becomes `Err` with the panic's message; nothing is printed.
///
/// Values that the closure borrows mutably must not be used after an `Err`: the panic may have left them inconsistent.
pub(super) fn guarded<T>(decode: impl FnOnce() -> T) -> Result<T, String> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if !SILENT.get() {
                previous(info);
            }
        }));
    });
    let before = SILENT.replace(true);
    let result = panic::catch_unwind(AssertUnwindSafe(decode));
    SILENT.set(before);
    result.map_err(|payload| {
        let text = payload.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| payload.downcast_ref::<&str>().copied());
        format!("is malformed ({})", text.unwrap_or("its decoder gave up"))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_becomes_an_error_with_its_message() {
        assert_eq!(guarded(|| 3), Ok(3));
        let error = guarded(|| -> u8 { panic!("index out of range") });
        assert_eq!(error, Err("is malformed (index out of range)".into()));
    }
}

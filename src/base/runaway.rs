//! Stops the process before work on a file from a stranger takes all memory.
//!
//! Some libraries cannot be given a limit: a chat template can double a text with every step. The work is watched from
//! beside it, and a program that has said how it ends is ended.

use std::fs;
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use super::error::Error;

/// Growth of the resident memory, in bytes, at which watched work has run away.
const MOST_GROWTH: u64 = 1 << 30;
/// Time between two looks at the memory. Honest work is done before the first.
const INTERVAL: Duration = Duration::from_millis(20);

type Handler = Box<dyn Fn(Error) + Send + Sync>;

static HANDLER: OnceLock<Handler> = OnceLock::new();

/// Sets what is done with the error of work that runs away: report it and end the process. The first call counts; without
/// one, work is not watched.
pub fn on_runaway(handler: impl Fn(Error) + Send + Sync + 'static) {
    let _ = HANDLER.set(Box::new(handler));
}

/// Does the work, and hands `error` to the handler when the process grows by more than 1 GiB meanwhile.
pub fn watched<T>(error: impl FnOnce() -> Error + Send, work: impl FnOnce() -> T) -> T {
    let Some(handler) = HANDLER.get() else { return work() };
    let (finished, is_finished) = channel::<()>();
    thread::scope(|scope| {
        scope.spawn(move || {
            let before = resident_bytes();
            while is_finished.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if resident_bytes().saturating_sub(before) > MOST_GROWTH {
                    return handler(error());
                }
            }
        });
        let result = work();
        drop(finished);
        result
    })
}

/// Resident memory now, in bytes; 0 where the system does not report it.
fn resident_bytes() -> u64 {
    let statm = fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split_whitespace().nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: reads a constant of the system.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.saturating_mul(u64::try_from(page).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn watched_work_returns_its_result() {
        assert!(resident_bytes() > 1 << 20);
        assert_eq!(watched(|| Error::invalid("work", "ran away"), || 3), 3);
    }
}

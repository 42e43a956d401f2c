//! Limits on the time, memory and stack of work on a file from a stranger.
//!
//! Some libraries cannot be given such limits: a chat template can double a text with every step, sort a list for hours, or
//! nest values so deep that a recursive function overflows its stack. The work runs in a thread with a large stack and is
//! watched from outside.

use std::cell::RefCell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::OnceLock;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use super::cancel::installed_cancel;
use super::error::{Error, Result};

/// Growth of the resident memory, in bytes, at which confined work has run away.
const MOST_GROWTH: u64 = 1 << 30;
/// Time between two looks at the work. Honest work is done before the first.
const INTERVAL: Duration = Duration::from_millis(20);
/// Time after which confined work no longer delays Ctrl-C.
const PATIENCE: Duration = Duration::from_secs(1);
/// Stack of the thread in bytes. The system provides pages as they are used.
const STACK_BYTES: usize = 512 << 20;

type Handler = Box<dyn Fn(Error) + Send + Sync>;

type Job = Box<dyn FnOnce() + Send>;

static HANDLER: OnceLock<Handler> = OnceLock::new();

thread_local! {
    /// The thread that does this thread's confined work, while it is idle. It ends with this one.
    static IDLE: RefCell<Option<Sender<Job>>> = const { RefCell::new(None) };
}

/// Sets what is done with the error of work that takes all memory: report it and end the process. The first call counts;
/// without one, the memory of confined work is not limited.
pub fn on_runaway(handler: impl Fn(Error) + Send + Sync + 'static) {
    let _ = HANDLER.set(Box::new(handler));
}

/// Does the work in a thread with a stack of 512 MiB, which the calling thread keeps for its next work: starting one takes
/// longer than most work. When the process grows by more than 1 GiB after the first 20 ms, the handler of `on_runaway` gets an
/// error. `error` makes errors from what the work did wrong. Work that is over its time is left behind with its thread, which
/// ends with the process or the work.
///
/// Errors: that of `error` when the work takes longer than `limit`, and `Error::Interrupted` when the user asks to stop and
/// it has run for a second; `Error::Io` when the thread cannot be started.
pub fn confined<T: Send + 'static>(
    limit: Duration,
    error: impl Fn(&str) -> Error,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T> {
    let (finished, is_finished) = channel();
    let worker = started(Box::new(move || drop(finished.send(catch_unwind(AssertUnwindSafe(work))))))?;
    let (begun, mut before) = (Instant::now(), None);
    loop {
        match is_finished.recv_timeout(INTERVAL) {
            Ok(result) => {
                IDLE.with_borrow_mut(|idle| *idle = Some(worker));
                return result.or_else(|panic| resume_unwind(panic));
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(error("ended without a result")),
        }
        if let Some(handler) = HANDLER.get() {
            let now = resident_bytes();
            if now.saturating_sub(*before.get_or_insert(now)) > MOST_GROWTH {
                handler(error("takes more than 1 GB of memory"));
            }
        }
        if begun.elapsed() > limit {
            return Err(error(&format!("takes longer than {} s", limit.as_secs_f64())));
        }
        if begun.elapsed() > PATIENCE {
            installed_cancel().check("nothing was written by the step in progress")?;
        }
    }
}

/// Gives the job to this thread's worker, or to a new one.
///
/// Errors: `Error::Io` when no thread can be started.
fn started(job: Job) -> Result<Sender<Job>> {
    let job = match IDLE.take() {
        // A worker ends only when its sender is dropped.
        Some(worker) => match worker.send(job) {
            Ok(()) => return Ok(worker),
            Err(returned) => returned.0,
        },
        None => job,
    };
    let (worker, jobs) = channel::<Job>();
    let loops = move || jobs.into_iter().for_each(|job| job());
    let thread = thread::Builder::new().stack_size(STACK_BYTES).spawn(loops);
    thread.map_err(|e| Error::io("reserve a stack of 512 MiB for", "a thread", e))?;
    worker.send(job).map_err(|_| Error::invalid("a thread", "ended before its first work"))?;
    Ok(worker)
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
    fn confined_work_returns_its_result_or_is_over_its_time() {
        assert!(resident_bytes() > 1 << 20);
        let error = |problem: &str| Error::invalid("work", problem);
        assert_eq!(confined(Duration::from_secs(60), error, || 3).unwrap(), 3);
        let endless = || thread::sleep(Duration::from_secs(3600));
        let begun = Instant::now();
        let late = confined(Duration::from_millis(50), error, endless).unwrap_err().to_string();
        assert!(late.contains("work") && late.contains("longer than 0.05 s"), "{late}");
        assert!(begun.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn one_thread_does_all_confined_work_of_a_thread_and_late_work_keeps_its_own() {
        let error = |problem: &str| Error::invalid("work", problem);
        let id = || confined(Duration::from_secs(60), error, || thread::current().id()).unwrap();
        let first = id();
        assert_eq!(id(), first);
        let panics = || confined(Duration::from_secs(60), error, || panic!("a fault of the work"));
        assert!(catch_unwind(panics).is_err());
        assert_eq!(id(), first, "a panic ends the work, not its thread");
        let endless = || thread::sleep(Duration::from_secs(3600));
        confined(Duration::from_millis(30), error, endless).unwrap_err();
        assert_ne!(id(), first, "the late work still has its thread");
    }

    #[test]
    fn confined_work_has_a_deep_stack() {
        fn depth(left: u64) -> u64 {
            let frame = std::hint::black_box([left; 128]);
            if left == 0 { 0 } else { 1 + depth(frame[1] - 1) }
        }
        let error = |problem: &str| Error::invalid("work", problem);
        assert_eq!(confined(Duration::from_secs(60), error, || depth(100_000)).unwrap(), 100_000);
    }
}

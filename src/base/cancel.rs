//! Ctrl-C as a flag that long loops poll.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

use super::error::{Error, Result};

/// The flag of the installed handler.
static INSTALLED: OnceLock<Cancel> = OnceLock::new();

/// A shared flag that Ctrl-C sets once. Cloning and reading it are cheap.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

impl Cancel {
    /// True once the user has asked to stop.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Asks to stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Errors: `Error::Interrupted` once the user has asked to stop; `kept` names the files that remain usable.
    pub fn check(&self, kept: &str) -> Result<()> {
        if self.requested() {
            return Err(Error::Interrupted { kept: kept.to_string() });
        }
        Ok(())
    }

    /// Waits for this long.
    ///
    /// Errors: as [`Cancel::check`], at most 100 ms after the user has asked to stop.
    pub fn sleep(&self, kept: &str, duration: Duration) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.check(kept)?;
            let left = duration.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Ok(());
            }
            thread::sleep(left.min(Duration::from_millis(100)));
        }
    }

    /// Does the work in a thread of its own, which is left behind when the user asks to stop, and after `limit`; `None` then.
    ///
    /// Errors: as [`Cancel::check`]; `Error::Invalid` when the work panicked.
    pub fn waiting<T: Send + 'static>(
        &self,
        kept: &str,
        limit: Option<Duration>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Option<T>> {
        let (finished, is_finished) = channel();
        let begun = Instant::now();
        thread::spawn(move || drop(finished.send(work())));
        loop {
            match is_finished.recv_timeout(Duration::from_millis(50)) {
                Ok(result) => return Ok(Some(result)),
                Err(RecvTimeoutError::Disconnected) => {
                    return Err(Error::invalid("a request", "ended without a result"));
                }
                Err(RecvTimeoutError::Timeout) => self.check(kept)?,
            }
            if limit.is_some_and(|limit| begun.elapsed() > limit) {
                return Ok(None);
            }
        }
    }
}

/// Installs the handler: the first Ctrl-C sets the flag, the second one ends the process with status 130.
///
/// Errors: `Error::Invalid` when a handler is installed already.
pub fn install_ctrl_c() -> Result<Cancel> {
    let cancel = Cancel::default();
    let flag = cancel.clone();
    ctrlc::set_handler(move || {
        if flag.requested() {
            std::process::exit(130);
        }
        flag.request();
        eprintln!("stopping after the current step; press Ctrl-C again to stop at once");
    })
    .map_err(|e| Error::invalid("Ctrl-C handler", e.to_string()))?;
    let _ = INSTALLED.set(cancel.clone());
    Ok(cancel)
}

/// The flag of the installed handler, for waits deep below a verb; a flag that nobody sets without a handler.
pub(super) fn installed_cancel() -> Cancel {
    INSTALLED.get().cloned().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_lasts_as_asked_and_ends_on_request() {
        let (cancel, begun) = (Cancel::default(), Instant::now());
        cancel.sleep("nothing", Duration::from_millis(150)).unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(150));
        let other = cancel.clone();
        thread::spawn(move || other.request());
        let stopped = cancel.sleep("nothing", Duration::from_secs(3600));
        assert!(matches!(stopped, Err(Error::Interrupted { kept }) if kept == "nothing"));
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
}

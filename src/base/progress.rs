//! Progress on standard error: a bar with rate and remaining time on terminals, a line every minute elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

use super::text::printable;

/// Time between two lines where standard error is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(60);

static QUIET: AtomicBool = AtomicBool::new(false);

/// Turns all progress output off (for `--json` and tests).
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Prints a line about a side effect on standard error, unless output is off.
pub fn notice(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        // A closed standard error must not end the work.
        let _ = writeln!(std::io::stderr().lock(), "{}", printable(&text.to_string()));
    }
}

/// One running task; finished and cleared when dropped.
pub struct Progress {
    bar: ProgressBar,
    lines: Option<Mutex<Lines>>,
}

/// What lines about a task need besides its bar.
struct Lines {
    task: String,
    unit: String,
    /// Position at which this process began; the rate counts from there.
    first: u64,
    began: Instant,
    next: Instant,
}

impl Progress {
    /// A bar over `total` items named `unit` (plural), for instance `Progress::new("score", "samples", 500)`.
    pub fn new(task: &str, unit: &str, total: u64) -> Self {
        let counts = format!("{{pos}}/{{len}} {unit} {{per_sec}}");
        Self::with_counts(task, unit, &counts, total)
    }

    /// A bar over `total` bytes.
    pub fn of_bytes(task: &str, total: u64) -> Self {
        Self::with_counts(task, "bytes", "{bytes}/{total_bytes} {bytes_per_sec}", total)
    }

    fn with_counts(task: &str, unit: &str, counts: &str, total: u64) -> Self {
        let (quiet, terminal) = (QUIET.load(Ordering::Relaxed), std::io::stderr().is_terminal());
        let hidden = quiet || !terminal;
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = format!("{task} {{wide_bar}} {counts} {{eta}} left {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        let lines = (!quiet && !terminal).then(|| Mutex::new(Lines::new(task, unit, Instant::now())));
        Progress { bar, lines }
    }

    /// Advances the bar by `count` items.
    pub fn advance(&self, count: u64) {
        self.bar.inc(count);
        self.line();
    }

    /// Takes `count` items back, which are done again.
    pub fn take_back(&self, count: u64) {
        self.bar.dec(count);
    }

    /// Sets the position directly, for example on resume.
    pub fn set_position(&self, position: u64) {
        self.bar.set_position(position);
        if let Some(Ok(mut lines)) = self.lines.as_ref().map(Mutex::lock) {
            (lines.first, lines.began) = (position, Instant::now());
        }
    }

    /// Replaces the total, for example when the exact count becomes known.
    pub fn set_total(&self, total: u64) {
        self.bar.set_length(total);
    }

    /// Shows a short text after the bar, such as the current loss.
    pub fn note(&self, text: impl Into<String>) {
        self.bar.set_message(text.into());
    }

    /// Prints a line if it is time for one. Another thread that holds the lock is printing it.
    fn line(&self) {
        let Some(Ok(mut lines)) = self.lines.as_ref().map(Mutex::try_lock) else { return };
        let (position, total) = (self.bar.position(), self.bar.length().unwrap_or(0));
        if let Some(text) = lines.due(Instant::now(), position, total, &self.bar.message()) {
            notice(text);
        }
    }
}

impl Lines {
    fn new(task: &str, unit: &str, now: Instant) -> Self {
        Lines { task: task.to_string(), unit: unit.to_string(), first: 0, began: now, next: now + LINE_EVERY }
    }

    /// The line, if one is due: `train: 120 of 400 steps, 3 min left, loss 1.2`.
    fn due(&mut self, now: Instant, position: u64, total: u64, note: &str) -> Option<String> {
        if now < self.next {
            return None;
        }
        self.next = now + LINE_EVERY;
        let (done, left) = (position.saturating_sub(self.first), total.saturating_sub(position));
        let mut text = format!("{}: {position} of {total} {}", self.task, self.unit);
        if done > 0 && left > 0 {
            let seconds = (now - self.began).as_secs_f64() * left as f64 / done as f64;
            text += &format!(", {} left", short(seconds));
        }
        if !note.is_empty() {
            text += &format!(", {note}");
        }
        Some(text)
    }
}

/// A time in its largest unit, rounded: `50 s`, `3 min`, `2.5 h`.
fn short(seconds: f64) -> String {
    match seconds {
        ..90.0 => format!("{seconds:.0} s"),
        ..5400.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.1} h", seconds / 3600.0),
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_gets_a_line_every_minute_with_the_time_that_is_left() {
        let began = Instant::now();
        let after = |seconds| began + Duration::from_secs(seconds);
        let mut lines = Lines::new("train", "steps", began);
        lines.first = 20;
        assert_eq!(lines.due(after(59), 30, 100, ""), None);
        let line = lines.due(after(61), 40, 100, "loss 1.5").unwrap();
        assert_eq!(line, "train: 40 of 100 steps, 3 min left, loss 1.5");
        assert_eq!(lines.due(after(100), 60, 100, ""), None);
        assert_eq!(lines.due(after(122), 81, 100, "").unwrap(), "train: 81 of 100 steps, 38 s left");
        assert_eq!(lines.due(after(200), 100, 100, "").unwrap(), "train: 100 of 100 steps");
        assert_eq!(Lines::new("list", "rows", began).due(after(60), 0, 9, "").unwrap(), "list: 0 of 9 rows");
        assert_eq!(short(9000.0), "2.5 h");
    }
}

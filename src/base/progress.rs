//! Progress on standard error: a bar with rate and remaining time on terminals, nothing elsewhere.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

static QUIET: AtomicBool = AtomicBool::new(false);

/// Turns all progress output off (for `--json` and tests).
pub fn set_quiet(quiet: bool) {
    QUIET.store(quiet, Ordering::Relaxed);
}

/// Prints a line about a side effect on standard error, unless output is off.
pub fn notice(text: impl std::fmt::Display) {
    if !QUIET.load(Ordering::Relaxed) {
        // A closed standard error must not end the work.
        let _ = writeln!(std::io::stderr().lock(), "{text}");
    }
}

/// One running task; finished and cleared when dropped.
pub struct Progress(ProgressBar);

impl Progress {
    /// A bar over `total` items named `unit` (plural), for instance `Progress::new("score", "samples", 500)`.
    pub fn new(task: &str, unit: &str, total: u64) -> Self {
        let counts = format!("{{pos}}/{{len}} {unit} {{per_sec}}");
        Self::with_counts(task, &counts, total)
    }

    /// A bar over `total` bytes.
    pub fn of_bytes(task: &str, total: u64) -> Self {
        Self::with_counts(task, "{bytes}/{total_bytes} {bytes_per_sec}", total)
    }

    fn with_counts(task: &str, counts: &str, total: u64) -> Self {
        let hidden = QUIET.load(Ordering::Relaxed) || !std::io::stderr().is_terminal();
        let target = if hidden { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
        let bar = ProgressBar::with_draw_target(Some(total), target);
        let template = format!("{task} {{wide_bar}} {counts} {{eta}} left {{msg}}");
        if let Ok(style) = ProgressStyle::with_template(&template) {
            bar.set_style(style);
        }
        Progress(bar)
    }

    /// Advances the bar by `count` items.
    pub fn advance(&self, count: u64) {
        self.0.inc(count);
    }

    /// Takes `count` items back, which are done again.
    pub fn take_back(&self, count: u64) {
        self.0.dec(count);
    }

    /// Sets the position directly, for example on resume.
    pub fn set_position(&self, position: u64) {
        self.0.set_position(position);
    }

    /// Replaces the total, for example when the exact count becomes known.
    pub fn set_total(&self, total: u64) {
        self.0.set_length(total);
    }

    /// Shows a short text after the bar, such as the current loss.
    pub fn note(&self, text: impl Into<String>) {
        self.0.set_message(text.into());
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

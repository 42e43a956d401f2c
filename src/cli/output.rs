//! Prints results and errors.

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};

use owo_colors::OwoColorize;
use serde::Serialize;

pub use crate::base::table;
use crate::base::{Error, printable, printable_json};
use crate::runtime::Profile;

/// Form of the printed results.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    /// JSON in place of text.
    pub json: bool,
    /// Prints no progress.
    pub quiet: bool,
}

impl Output {
    /// Prints a line of the result on standard output; colours are kept on terminals only.
    ///
    /// Errors: when standard output cannot be written.
    pub fn line(&self, text: impl Display) -> io::Result<()> {
        writeln!(anstream::stdout().lock(), "{}", printable(&text.to_string()))
    }

    /// Prints the whole result as indented JSON on standard output.
    ///
    /// Errors: when it cannot be written.
    pub fn json<T: Serialize>(&self, value: &T) -> anyhow::Result<()> {
        Ok(writeln!(io::stdout().lock(), "{}", printable_json(&serde_json::to_string_pretty(value)?))?)
    }

    /// Prints a message on standard error, unless `--quiet`.
    pub fn note(&self, text: impl Display) {
        if !self.quiet {
            let _ = writeln!(anstream::stderr().lock(), "{}", printable(&text.to_string()));
        }
    }

    /// Prints a warning on standard error, even with `--quiet`.
    pub fn warn(&self, text: impl Display) {
        let _ = writeln!(anstream::stderr().lock(), "{} {}", "warning:".yellow().bold(), printable(&text.to_string()));
    }
}

/// The time profile of a run: seconds and fraction of the total for each part.
pub fn profile_table(profile: &Profile) -> String {
    let mut rows = vec![["time", "seconds", "part"].map(String::from).to_vec()];
    for (part, seconds) in profile.parts() {
        let share = 100.0 * seconds / profile.total_s.max(f64::MIN_POSITIVE);
        rows.push(vec![part.to_string(), format!("{seconds:.2}"), format!("{share:.1}%")]);
    }
    table(&rows)
}

/// Output of a failed verb with `--json`.
#[derive(Serialize)]
struct Failure<'a> {
    error: FailureText<'a>,
}

#[derive(Serialize)]
struct FailureText<'a> {
    /// The value of [`Error::code`]; `usage` for a wrong command line, `other` for errors of other libraries.
    code: &'a str,
    message: String,
    caused_by: &'a [String],
}

/// Prints an error and its causes, the outermost first, on standard error; with `json` also on standard output as
/// `{"error": {"code", "message", "caused_by"}}`.
pub fn print_error(error: &anyhow::Error, json: bool) {
    let mut causes = Vec::new();
    let mut previous = error.to_string();
    for cause in error.chain().skip(1) {
        // An error whose text ends with its cause already contains it.
        let text = cause.to_string();
        if !previous.ends_with(&text) {
            causes.push(text.clone());
        }
        previous = text;
    }
    let mut stream = anstream::stderr().lock();
    let _ = writeln!(stream, "{} {}", "error:".red().bold(), printable(&error.to_string()));
    for cause in &causes {
        let _ = writeln!(stream, "  caused by: {}", printable(cause));
    }
    if json {
        let code = error.chain().find_map(|cause| cause.downcast_ref::<Error>()).map_or("other", Error::code);
        print_failure(FailureText { code, message: error.to_string(), caused_by: &causes });
    }
}

fn print_failure(error: FailureText<'_>) {
    if let Ok(text) = serde_json::to_string_pretty(&Failure { error }) {
        let _ = writeln!(io::stdout().lock(), "{}", printable_json(&text));
    }
}

/// Prints an error of the command line, given as clap renders it, on standard output as [`print_error`] does with `json`.
pub fn print_usage_error(rendered: &str) {
    print_failure(FailureText { code: "usage", message: usage_message(rendered), caused_by: &[] });
}

/// True when a command line that could not be parsed asks for JSON.
pub fn json_is_asked(mut arguments: impl Iterator<Item = OsString>) -> bool {
    arguments.by_ref().take_while(|argument| argument != "--").any(|argument| argument == "--json")
}

/// What is wrong and what clap suggests, without the usage behind it.
fn usage_message(rendered: &str) -> String {
    let text = rendered.strip_prefix("error:").unwrap_or(rendered);
    let ends = ["\n\nUsage:", "\n\nFor more information"].into_iter().filter_map(|start| text.find(start));
    let text = &text[..ends.min().unwrap_or(text.len())];
    let parts = text.split("\n\n").map(|part| part.split_whitespace().collect::<Vec<_>>().join(" "));
    parts.filter(|part| !part.is_empty()).collect::<Vec<_>>().join("; ")
}

/// True when the reader of standard output has closed the pipe, as in `interlace inspect MODEL | head`.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    let closed = |error: &io::Error| error.kind() == io::ErrorKind::BrokenPipe;
    error.chain().any(|cause| cause.downcast_ref::<io::Error>().is_some_and(closed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_message_of_a_usage_error_is_one_line_without_the_usage() {
        let rendered = "error: unexpected argument '--drp' found\n\n  tip: a similar argument exists: '--drop'\n\n\
                        Usage: interlace prune MODEL\n\nFor more information, try '--help'.\n";
        assert_eq!(
            usage_message(rendered),
            "unexpected argument '--drp' found; tip: a similar argument exists: '--drop'"
        );
        let rendered = "error: these are missing:\n  --output <FILE>\n\nFor more information, try '--help'.\n";
        assert_eq!(usage_message(rendered), "these are missing: --output <FILE>");
    }

    #[test]
    fn json_behind_the_end_of_flags_is_a_value() {
        let asked = |arguments: &[&str]| json_is_asked(arguments.iter().map(OsString::from));
        assert!(asked(&["plan", "--json", "--", "m"]));
        assert!(!asked(&["plan", "--", "--json"]) && !asked(&["plan", "--jsonl"]));
    }
}

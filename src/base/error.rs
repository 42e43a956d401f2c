//! The library's error type. Messages are lower case without a full stop and have a subject, a problem and a remedy.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

/// Result of every fallible function of the library.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// All errors of the library, grouped by the kind of remedy that they need.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to read, write or change a file.
    #[error("cannot {action} `{}`: {source}", path.display())]
    Io {
        /// Infinitive: `read`, `create`.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file, an argument or a graph breaks a rule.
    #[error("{subject}: {problem}{}", Remedy(remedy))]
    Invalid {
        /// The file, argument, node or tensor.
        subject: String,
        /// The value found and the value expected.
        problem: String,
        /// What the user can do.
        remedy: Option<String>,
    },
    /// Well-formed input that needs a feature which interlace does not have.
    #[error("{subject}: not supported: {problem}{}", Remedy(remedy))]
    Unsupported {
        /// The file, argument, node or tensor.
        subject: String,
        /// The feature found and the supported ones.
        problem: String,
        /// What the user can do.
        remedy: Option<String>,
    },
    /// A computation produced an infinity or NaN.
    #[error("{subject}: {problem}{}", Remedy(remedy))]
    NotFinite {
        /// The tensor or computation.
        subject: String,
        /// Position of the first such value.
        problem: String,
        /// What the user can do.
        remedy: Option<String>,
    },
    /// ONNX Runtime, LibTorch or tract reported a failure.
    #[error("{}{engine} failed on {subject}: {message}{}", During(during), EngineRemedy(engine))]
    Engine {
        /// `ONNX Runtime`, `LibTorch` or `tract`.
        engine: &'static str,
        /// The graph, operator or tensor.
        subject: String,
        /// The engine's own message.
        message: String,
        /// The action during which the engine failed.
        during: Option<String>,
    },
    /// The user asked to stop. Finished work is kept.
    #[error("interrupted: {kept}")]
    Interrupted {
        /// The files that remain and how to continue.
        kept: String,
    },
}

struct Remedy<'a>(&'a Option<String>);

impl fmt::Display for Remedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(remedy) => write!(f, "; {remedy}"),
            None => Ok(()),
        }
    }
}

struct During<'a>(&'a Option<String>);

impl fmt::Display for During<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(work) => write!(f, "{work}: "),
            None => Ok(()),
        }
    }
}

/// Remedy for a failure inside an engine.
struct EngineRemedy<'a>(&'a str);

impl fmt::Display for EngineRemedy<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            "ONNX Runtime" | "LibTorch" => {
                write!(f, "; `interlace verify` runs each component by itself and names the one that fails")
            }
            _ => Ok(()),
        }
    }
}

impl Error {
    /// A stable name of the error's kind, for programs: `--json` prints it as `error.code`.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Io { .. } => "file",
            Error::Invalid { .. } => "invalid",
            Error::Unsupported { .. } => "unsupported",
            Error::NotFinite { .. } => "not-finite",
            Error::Engine { .. } => "engine",
            Error::Interrupted { .. } => "interrupted",
        }
    }

    /// An interruption as the user of a work folder meets it: finished steps are kept there. Other errors stay as they are.
    pub fn kept_in(self, work: &Path) -> Self {
        match self {
            Error::Interrupted { .. } => Error::Interrupted {
                kept: format!(
                    "finished steps, if any, are in `{}`, and the same call continues after them",
                    work.display()
                ),
            },
            error => error,
        }
    }

    /// An `Invalid` error about `subject`, for instance ``node `/layers.3/Add` (Add)``.
    pub fn invalid(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Invalid { subject: subject.into(), problem: problem.into(), remedy: None }
    }

    /// An `Unsupported` error about `subject`.
    pub fn unsupported(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::Unsupported { subject: subject.into(), problem: problem.into(), remedy: None }
    }

    /// A `NotFinite` error about `subject`.
    pub fn not_finite(subject: impl Into<String>, problem: impl Into<String>) -> Self {
        Error::NotFinite { subject: subject.into(), problem: problem.into(), remedy: None }
    }

    /// An `Engine` error: `engine` is the library's name, `subject` the graph, operator or tensor that it worked on.
    pub fn engine(engine: &'static str, subject: impl Into<String>, message: impl fmt::Display) -> Self {
        Error::Engine { engine, subject: subject.into(), message: message.to_string(), during: None }
    }

    /// Adds the action to an engine's error unless it has one. Other errors are unchanged.
    #[must_use]
    pub fn during(mut self, work: impl Into<String>) -> Self {
        if let Error::Engine { during: during @ None, .. } = &mut self {
            *during = Some(work.into());
        }
        self
    }

    /// An `Io` error; use as `.map_err(|e| Error::io("read", path, e))`, the action in the infinitive.
    pub fn io(action: &'static str, path: impl AsRef<Path>, source: io::Error) -> Self {
        Error::Io { action, path: path.as_ref().to_path_buf(), source }
    }

    /// Adds a remedy unless the error has one; for callers that know the whole file or row.
    #[must_use]
    pub fn or_remedy(self, text: &str) -> Self {
        match self {
            Error::Invalid { remedy: None, .. }
            | Error::Unsupported { remedy: None, .. }
            | Error::NotFinite { remedy: None, .. } => self.remedy(text),
            error => error,
        }
    }

    /// Removes the remedy; for callers that name a better one.
    #[must_use]
    pub fn without_remedy(mut self) -> Self {
        if let Error::Invalid { remedy, .. } | Error::Unsupported { remedy, .. } | Error::NotFinite { remedy, .. } =
            &mut self
        {
            *remedy = None;
        }
        self
    }

    /// Sets the remedy: an action of the user.
    #[must_use]
    pub fn remedy(mut self, text: impl Into<String>) -> Self {
        if let Error::Invalid { remedy, .. } | Error::Unsupported { remedy, .. } | Error::NotFinite { remedy, .. } =
            &mut self
        {
            *remedy = Some(text.into());
        }
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interrupted_step_of_a_work_folder_says_that_finished_ones_are_kept() {
        let stopped = Error::Interrupted { kept: "no scores are written".to_string() }.kept_in(Path::new("out"));
        assert_eq!(
            stopped.to_string(),
            "interrupted: finished steps, if any, are in `out`, and the same call continues after them"
        );
        let other = Error::invalid("plan", "is empty").kept_in(Path::new("out"));
        assert_eq!(other.to_string(), Error::invalid("plan", "is empty").to_string());
    }
}

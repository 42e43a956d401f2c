//! Remedies for files that the operating system refuses.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use crate::base::Error;

/// The error with what to do, where the operating system refused a file: a missing file is looked for on the command line.
pub fn explained(error: anyhow::Error) -> anyhow::Error {
    // The context of an error would be lost below.
    if !error.chain().next().is_some_and(|outermost| outermost.is::<Error>()) {
        return error;
    }
    match error.downcast::<Error>() {
        Ok(Error::Io { action, path, source }) => {
            let remedy = match source.kind() {
                io::ErrorKind::NotFound => match argument_of(&path, std::env::args_os()) {
                    Some(place) => format!("check the path {place}"),
                    None => "check the path".to_string(),
                },
                io::ErrorKind::PermissionDenied => "change its permissions, or run as a user who has them".to_string(),
                io::ErrorKind::StorageFull => "free disk space, or write to another disk".to_string(),
                _ => return Error::Io { action, path, source }.into(),
            };
            let source = io::Error::new(source.kind(), format!("{source}; {remedy}"));
            Error::Io { action, path, source }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// The place of a path on the command line: after a flag, or by itself.
fn argument_of(path: &Path, arguments: impl Iterator<Item = OsString>) -> Option<String> {
    let mut before = String::new();
    for argument in arguments.skip(1) {
        let text = argument.to_string_lossy().into_owned();
        if Path::new(&argument) == path {
            return Some(if before.starts_with('-') {
                format!("after `{before}`")
            } else {
                "on the command line".into()
            });
        }
        if let Some((flag, value)) = text.split_once('=').filter(|(flag, _)| flag.starts_with('-'))
            && Path::new(value) == path
        {
            return Some(format!("after `{flag}`"));
        }
        before = text;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_path_is_found_on_the_command_line() {
        let place = |path: &str| {
            let arguments = ["interlace", "eval", "model", "--data", "no.tsv", "--baseline=b.json", "-o", "out"];
            argument_of(Path::new(path), arguments.iter().map(OsString::from))
        };
        assert_eq!(place("no.tsv").as_deref(), Some("after `--data`"));
        assert_eq!(place("b.json").as_deref(), Some("after `--baseline`"));
        assert_eq!(place("model").as_deref(), Some("on the command line"));
        assert_eq!((place("other"), place("interlace")), (None, None));
    }
}

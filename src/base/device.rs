//! Compute devices.

use std::fmt;
use std::str::FromStr;

use super::error::{Error, Result};

/// A compute device, written `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Device {
    /// The CPU.
    #[default]
    Cpu,
    /// The CUDA device of this index.
    Cuda(u32),
}

impl FromStr for Device {
    type Err = Error;

    /// Errors: `Error::Invalid` for anything but `cpu`, `cuda` and `cuda:N`.
    fn from_str(text: &str) -> Result<Self> {
        match text.split_once(':') {
            None if text == "cpu" => Ok(Device::Cpu),
            None if text == "cuda" => Ok(Device::Cuda(0)),
            Some(("cuda", index)) if index.bytes().all(|byte| byte.is_ascii_digit()) => match index.parse() {
                Ok(index) => Ok(Device::Cuda(index)),
                Err(_) => Err(unknown(text)),
            },
            _ => Err(unknown(text)),
        }
    }
}

fn unknown(text: &str) -> Error {
    Error::invalid(format!("device `{text}`"), "is not known").remedy("use `cpu`, `cuda` or `cuda:N`")
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_names_are_parsed_and_printed() {
        let cases = [("cpu", Device::Cpu), ("cuda", Device::Cuda(0)), ("cuda:3", Device::Cuda(3))];
        for (text, want) in cases {
            assert_eq!(text.parse::<Device>().ok(), Some(want), "{text}");
        }
        assert_eq!(Device::Cuda(3).to_string(), "cuda:3");
    }

    #[test]
    fn invalid_device_names_are_refused() {
        for text in ["", "gpu", "CPU", "cpu:0", "cuda:", "cuda:-1", "cuda:+1", "cuda:x", "cuda:99999999999"] {
            let error = text.parse::<Device>().expect_err(text).to_string();
            assert!(error.contains("cuda:N"), "{error}");
        }
    }
}

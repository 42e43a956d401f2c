//! Errors of building or running an operator.

use tch::TchError;

/// An error of building or running an operator. It lacks the node's name, which the caller adds.
#[derive(Debug)]
pub struct OpError(pub String);

/// Result of building and running an operator.
pub type OpResult<T> = Result<T, OpError>;

impl OpError {
    /// An error with this message: lower case, no full stop.
    pub fn new(message: impl Into<String>) -> Self {
        OpError(message.into())
    }
}

impl From<TchError> for OpError {
    fn from(error: TchError) -> Self {
        let text = match error {
            TchError::Torch(text) => text,
            other => other.to_string(),
        };
        // LibTorch appends its stack after the first line.
        OpError(format!("LibTorch: {}", text.lines().next().unwrap_or("no reason given").trim()))
    }
}

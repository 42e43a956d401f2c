//! Why an operator could not be built or run.

use tch::TchError;

/// Why an operator could not be built or run, without the node's name, which the caller adds.
#[derive(Debug)]
pub struct OpError(pub String);

/// Result of building and running an operator.
pub type OpResult<T> = Result<T, OpError>;

impl OpError {
    /// With a message: lower case, no full stop.
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
        // LibTorch appends its own stack to the first line.
        OpError(format!("LibTorch: {}", text.lines().next().unwrap_or("no reason given").trim()))
    }
}

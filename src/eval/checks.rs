//! The checks of `verify` and their outcomes.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Error, Provenance, Result};
use crate::bundle::Component;
use crate::ir::Model;

use super::agreement::Rounding;
use super::quantised::CHANGE;

/// Largest allowed difference between two f32 computations of the same logits: the rounding errors of about 1,700 f32
/// operations (2^-24 each) on values near 1. Graphs with 16-bit floats are also compared in f32.
pub(super) const TOLERANCE: f64 = 1e-4;

/// Output of `verify --json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct VerifyReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Path of the model as the user gave it.
    pub model: String,
    /// True when no check failed.
    pub passed: bool,
    /// Every check, in the order in which they ran.
    pub checks: Vec<Check>,
}

impl VerifyReport {
    /// Version of the schema of the report.
    pub const SCHEMA_VERSION: u32 = 1;
}

/// One check.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct Check {
    /// Kind of the check, such as `load`.
    pub name: String,
    /// The file or figure that was checked.
    pub subject: String,
    /// Outcome.
    pub status: CheckStatus,
    /// The finding.
    pub detail: String,
    /// Largest absolute difference, for checks that compare numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub difference: Option<f64>,
    /// Largest allowed difference.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tolerance: Option<f64>,
    /// The most tokens of a prompt of which all values of the graph fit into the largest buffer, 0 where one does not fit at any
    /// length; absent where every prompt fits, and for checks of other kinds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub longest_prompt: Option<u64>,
    /// Bytes of the largest value that the vision encoder computes for one picture, in the check of values.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest_bytes: Option<u64>,
}

/// Outcome of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum CheckStatus {
    /// The requirement holds.
    Passed,
    /// The requirement does not hold; `verify` ends with exit code 1.
    Failed,
    /// It could not be made; `detail` says why. This is no failure of the model.
    Unavailable,
    /// The files fit together, but a user should know what `detail` says.
    Warning,
}

/// The largest expected rounding error of outputs up to `largest` in 16-bit floats. Each operator has a relative rounding
/// error of at most `unit`, and n independent errors sum to about sqrt(n) times one of them (Higham & Mary 2019,
/// doi:10.1137/18M1226312).
pub(super) fn half_bound(model: &Model, unit: f64, largest: f64) -> f64 {
    unit * (model.graph.body.nodes.len() as f64).sqrt() * largest
}

/// Collects the results of checks.
pub(super) struct Checks(pub Vec<Check>);

impl Checks {
    pub fn add(&mut self, name: &str, subject: &str, status: CheckStatus, detail: impl Into<String>) {
        let (name, subject, detail) = (name.to_string(), subject.to_string(), detail.into());
        self.0.push(Check {
            name,
            subject,
            status,
            detail,
            difference: None,
            tolerance: None,
            longest_prompt: None,
            largest_bytes: None,
        });
    }

    pub fn compared(&mut self, name: &str, subject: &str, difference: f64, tolerance: f64, detail: impl Into<String>) {
        // A difference of NaN means no agreement.
        let status = if difference <= tolerance { CheckStatus::Passed } else { CheckStatus::Failed };
        self.add(name, subject, status, detail);
        if let Some(check) = self.0.last_mut() {
            check.difference = Some(difference);
            check.tolerance = Some(tolerance);
        }
    }

    /// Compares the results of two engines on one graph. If `operator` rounds activations to few bits and the results
    /// differ by more than `least`, the limit of other graphs, the limit is twice the runtime's own spread, since each result may be that far
    /// from the exact one.
    pub fn engines(
        &mut self,
        (name, subject): (&str, &str),
        difference: f64,
        detail: String,
        (least, operator): (f64, Option<&str>),
        spread: impl FnOnce() -> Result<f64>,
    ) {
        let Some(operator) = operator.filter(|_| difference > least) else {
            return self.compared(name, subject, difference, least, detail);
        };
        match spread() {
            Ok(spread) => {
                let allowed = if spread.is_finite() { least.max(2.0 * spread) } else { least };
                let why = format!(
                    "`{operator}` rounds activations, so that a change of {CHANGE:.0e} changes ONNX Runtime's own outputs \
                     by up to {spread:.1e}, and twice that is allowed"
                );
                self.compared(name, subject, difference, allowed, format!("{detail}; {why}"));
            }
            Err(error) => self.error(name, subject, &error),
        }
    }

    /// Records an error: an unsupported feature makes the check unavailable, any other error is a failure.
    pub fn error(&mut self, name: &str, subject: &str, error: &Error) {
        let status = match error {
            Error::Unsupported { .. } => CheckStatus::Unavailable,
            _ => CheckStatus::Failed,
        };
        self.add(name, subject, status, error.to_string());
    }

    /// Checks the rounding errors of 16-bit floats in ONNX Runtime.
    pub fn rounded(&mut self, part: &Component, model: &Model, unit: f64, found: Result<Rounding>) {
        let name = "rounding to 16 bits";
        match found {
            Ok(Rounding { difference, largest }) => {
                let nodes = model.graph.body.nodes.len();
                let bound = half_bound(model, unit, largest);
                let detail = format!(
                    "ONNX Runtime on the file as it is against f32; {nodes} operators, values up to {largest:.2}"
                );
                self.compared(name, &part.file, difference, bound, detail);
            }
            Err(error) => self.error(name, &part.file, &error),
        }
    }

    pub fn equal<T: PartialEq + std::fmt::Display>(&mut self, subject: &str, config: Option<T>, graph: Option<T>) {
        let name = "config and graph";
        match (config, graph) {
            (Some(config), Some(graph)) if config == graph => {
                self.add(name, subject, CheckStatus::Passed, format!("both {config}"))
            }
            (Some(config), Some(graph)) => {
                self.add(name, subject, CheckStatus::Failed, format!("the config says {config}, the graph {graph}"));
            }
            (None, _) => self.add(name, subject, CheckStatus::Unavailable, "the config does not say"),
            (_, None) => self.add(name, subject, CheckStatus::Unavailable, "the graph leaves it open"),
        }
    }
}

//! What was quantised, how exactly, and what stayed.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::Provenance;
use crate::bundle::Role;

use super::forms::WeightForm;

/// Version of the schema of the report.
pub const PRECISION_SCHEMA_VERSION: u32 = 1;
/// File name of the report in the folder with the variants.
pub const PRECISION_FILE: &str = "interlace-precision.json";

/// `interlace-precision.json`: the precision variants that `export --precision` wrote.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
pub struct PrecisionReport {
    /// Tool version, schema version, input digests and settings.
    #[serde(flatten)]
    pub provenance: Provenance,
    /// Files in the order in which they were written.
    pub components: Vec<QuantisedComponent>,
    /// What each part of the model costs in 4 and in 8 bits, where that was measured.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sensitivity: Option<Sensitivity>,
}

/// What each part of a model costs in fewer bits: the KL divergence of the float model's next-token distribution from that of the
/// model in which this part alone has fewer bits, in nats, as the mean over the answer tokens of calibration data.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Sensitivity {
    /// Calibration samples.
    pub samples: usize,
    /// Answer tokens in them.
    pub answer_tokens: u64,
    /// Prefills that were run.
    pub prefills: u64,
    /// Decoder layers, vision layers, and the rest of each component.
    pub parts: Vec<PartSensitivity>,
    /// The forms that were chosen, where there was a target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<PrecisionBudget>,
}

/// One part of a model.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PartSensitivity {
    /// The component.
    pub role: Role,
    /// The part of it: `layer 3`, `rest`, or `all` where no layers are known.
    pub part: String,
    /// Bytes of its weights as floats.
    pub float_bytes: u64,
    /// Bytes in 8 bits.
    pub int8_bytes: u64,
    /// Divergence in nats when this part alone has 8 bits.
    pub int8_kl: f64,
    /// Bytes in 4 bits.
    pub int4_bytes: u64,
    /// Divergence in nats when this part alone has 4 bits.
    pub int4_kl: f64,
    /// Form in which it was written.
    pub form: WeightForm,
}

/// The result of a budget.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PrecisionBudget {
    /// Most bytes that the component files may take together.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_bytes: Option<u64>,
    /// Largest divergence in nats that was allowed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max_kl: Option<f64>,
    /// Bytes of the component files that were written.
    pub size_bytes: u64,
    /// Measured divergence in nats of the model that was written.
    pub kl: f64,
    /// Sum of the parts' own divergences in their forms.
    pub sum_of_parts: f64,
    /// Measured divergence with all parts in 4 bits.
    pub int4_kl: f64,
}

/// One component in one precision.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantisedComponent {
    /// Name of the precision, as in `int4`.
    pub precision: String,
    /// What the component computes.
    pub role: Role,
    /// Path of the float file.
    pub source: String,
    /// Path of the new file.
    pub file: String,
    /// Bytes of the float file with its external data.
    pub bytes_before: u64,
    /// Bytes of the new file with its external data.
    pub bytes_after: u64,
    /// Tensors in the new form.
    pub quantised: Vec<QuantisedTensor>,
    /// Float tensors of more than one axis and at least 1 KiB that stayed as they were.
    pub kept: Vec<KeptTensor>,
    /// Operators that still compute in float32 in a half-precision graph.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub kept_operators: Vec<KeptOperators>,
    /// Numbers beyond the range of half precision, stored as the largest one of their sign.
    #[serde(default)]
    pub clamped_numbers: u64,
}

/// A tensor in the new form.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct QuantisedTensor {
    /// Name in the float graph.
    pub name: String,
    /// Sizes of its axes there.
    pub dims: Vec<u64>,
    /// The form, as in `4 bits in blocks of 32`.
    pub form: String,
    /// Bytes of numbers, scales and zero points.
    pub bytes: u64,
    /// Root mean square of the differences to the floats, divided by that of the floats.
    pub relative_error: f64,
}

/// A float tensor that stayed as it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeptTensor {
    /// Name in both graphs.
    pub name: String,
    /// Sizes of its axes.
    pub dims: Vec<u64>,
    /// Its size in bytes.
    pub bytes: u64,
    /// Why it stayed.
    pub reason: String,
}

/// Operators that still compute in float32.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct KeptOperators {
    /// Name of the operator.
    pub operator: String,
    /// Number of nodes.
    pub nodes: usize,
    /// Why they stayed.
    pub reason: String,
}

/// The relative error of numbers in place of others: the root of `sum((a - b)^2) / sum(a^2)` over the finite numbers `a`; 0 where
/// all are 0.
pub(super) fn relative_error(exact: &[f32], found: &[f32]) -> f64 {
    let pairs = exact.iter().zip(found).filter(|(a, _)| a.is_finite());
    let squares = pairs.map(|(&a, &b)| (f64::from(a).powi(2), (f64::from(a) - f64::from(b)).powi(2)));
    let (total, error) = squares.fold((0.0, 0.0), |sums, own| (sums.0 + own.0, sums.1 + own.1));
    if total == 0.0 { error.sqrt() } else { (error / total).sqrt() }
}

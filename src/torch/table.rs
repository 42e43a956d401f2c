//! The operator table: one row per operator, from which the interpreter, the support table and the tests are made.

use std::fmt::Write;
use std::sync::OnceLock;

use crate::rewrite::INTERNAL_DOMAIN;

use super::kernel::{Build, Kernel, OpResult};
use super::ops;

/// One operator.
pub struct Row {
    /// `""` for the default domain.
    pub domain: &'static str,
    /// Name of the operator.
    pub op_type: &'static str,
    /// First version of the domain that the row implements.
    pub since: i64,
    /// Last version of the domain that the row implements.
    pub until: i64,
    /// True when gradients flow from its outputs to its floating-point inputs.
    pub differentiable: bool,
    /// Bit `i`: the content of input `i` is read on the host and decides the shape of the outputs.
    pub(super) host_inputs: u32,
    /// True when only the shape of input 0 is read.
    pub(super) shape_only: bool,
    /// True when inputs 0 and 1 are read in the autocast kind, where there is one.
    pub(super) lowers: bool,
    /// True when the output is larger in memory than the input: quantised weights as floats.
    pub(super) expands: bool,
    pub(super) build: fn(&mut Build) -> OpResult<Kernel>,
}

impl Row {
    pub(super) const fn new(
        domain: &'static str,
        op_type: &'static str,
        since: i64,
        build: fn(&mut Build) -> OpResult<Kernel>,
    ) -> Self {
        let until = if domain.is_empty() { LATEST_OPSET } else { 1 };
        let (differentiable, host_inputs, shape_only, lowers, expands) = (false, 0, false, false, false);
        Row { domain, op_type, since, until, differentiable, host_inputs, shape_only, lowers, expands, build }
    }

    pub(super) const fn until(mut self, version: i64) -> Self {
        self.until = version;
        self
    }

    pub(super) const fn grad(mut self) -> Self {
        self.differentiable = true;
        self
    }

    pub(super) const fn host(mut self, mask: u32) -> Self {
        self.host_inputs = mask;
        self
    }

    pub(super) const fn shape_only(mut self) -> Self {
        self.shape_only = true;
        self
    }

    pub(super) const fn lowers(mut self) -> Self {
        self.lowers = true;
        self
    }

    pub(super) const fn expands(mut self) -> Self {
        self.expands = true;
        self
    }

    /// True when input `index` is read on the host.
    pub(super) fn reads_on_host(&self, index: usize) -> bool {
        index < 32 && self.host_inputs >> index & 1 == 1 || index >= 32 && self.host_inputs == ALL
    }
}

/// Every input decides the shape of the outputs.
pub(super) const ALL: u32 = u32::MAX;

/// The last version of the default domain that the rows were checked against.
pub(super) const LATEST_OPSET: i64 = 26;

/// All rows, sorted by domain and name.
pub fn rows() -> &'static [&'static Row] {
    static ROWS: OnceLock<Vec<&'static Row>> = OnceLock::new();
    ROWS.get_or_init(|| {
        let mut rows: Vec<&'static Row> = ops::FAMILIES.iter().flat_map(|family| family.iter()).collect();
        rows.sort_by_key(|row| (row.domain, row.op_type, row.since));
        rows
    })
}

/// The row for an operator at a version of its domain.
///
/// Errors: the reason as text, when there is none.
pub fn find_row(domain: &str, op_type: &str, version: i64) -> Result<&'static Row, String> {
    let all = rows();
    let first = all.partition_point(|row| (row.domain, row.op_type) < (domain, op_type));
    let same = all[first..].iter().take_while(|row| (row.domain, row.op_type) == (domain, op_type));
    let (mut low, mut high) = (i64::MAX, i64::MIN);
    for row in same {
        if (row.since..=row.until).contains(&version) {
            return Ok(row);
        }
        (low, high) = (low.min(row.since), high.max(row.until));
    }
    if low > high {
        return Err("there is no such row in the operator table".into());
    }
    Err(format!("versions {low} to {high} are there"))
}

/// The table of supported operators in Markdown; nodes that only rewrites make are none of a file's.
pub fn support_table() -> String {
    let mut text = String::from("| domain | operator | opset | gradient |\n|---|---|---|---|\n");
    for row in rows().iter().filter(|row| row.domain != INTERNAL_DOMAIN) {
        let domain = if row.domain.is_empty() { "ai.onnx" } else { row.domain };
        let versions =
            if row.since == row.until { row.since.to_string() } else { format!("{}–{}", row.since, row.until) };
        let gradient = if row.differentiable { "yes" } else { "" };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {domain} | {} | {versions} | {gradient} |", row.op_type);
    }
    text
}

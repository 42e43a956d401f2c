//! The operator table, one row per operator. The interpreter, the support table and the tests use it.

use std::fmt::Write;
use std::sync::OnceLock;

use crate::rewrite::INTERNAL_DOMAIN;

use super::operator::Operator;
use super::ops;

/// All rows, sorted by domain and name.
pub fn operators() -> &'static [&'static Operator] {
    static ROWS: OnceLock<Vec<&'static Operator>> = OnceLock::new();
    ROWS.get_or_init(|| {
        let mut rows: Vec<&'static Operator> = ops::FAMILIES.iter().flat_map(|family| family.iter()).collect();
        rows.sort_by_key(|row| (row.domain, row.op_type, row.since));
        rows
    })
}

/// The row for an operator at a version of its domain.
///
/// Errors: the reason as text, when there is no row.
pub fn find_operator(domain: &str, op_type: &str, version: i64) -> Result<&'static Operator, String> {
    let all = operators();
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

/// The table of supported operators in Markdown. Nodes that only rewrites create are left out.
pub fn support_table() -> String {
    let mut text = String::from("| domain | operator | opset | gradient |\n|---|---|---|---|\n");
    for row in operators().iter().filter(|row| row.domain != INTERNAL_DOMAIN) {
        let domain = if row.domain.is_empty() { "ai.onnx" } else { row.domain };
        let versions =
            if row.since == row.until { row.since.to_string() } else { format!("{}–{}", row.since, row.until) };
        let gradient = if row.differentiable { "yes" } else { "" };
        // Writing to a string cannot fail.
        let _ = writeln!(text, "| {domain} | {} | {versions} | {gradient} |", row.op_type);
    }
    text
}

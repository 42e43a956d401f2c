//! Compares every row of the operator table with ONNX Runtime on generated inputs, shapes, types, attributes and
//! versions.
//!
//! The row and the number of a case determine it completely, so a failure message that names both can be reproduced:
//! `INTERLACE_PROPERTY_ROW=Resize INTERLACE_PROPERTY_CASES=1000 cargo test --profile quick --test suite properties`.

mod attention;
pub mod case;
mod elementwise;
mod indexing;
mod products;
mod reductions;
mod shapes;
pub mod source;
mod states;
mod windows;

use std::collections::HashSet;

use interlace::base::Device;
use interlace::runtime::Runtime;
use interlace::torch::{Operator, operators};

use case::{Case, Outcome};
use source::Source;

/// Domain, operator, and the generator of its cases.
type Generator = (&'static str, &'static str, fn(&mut Source) -> Case);

const FAMILIES: &[&[Generator]] = &[
    attention::ROWS,
    elementwise::ROWS,
    indexing::ROWS,
    products::ROWS,
    reductions::ROWS,
    shapes::ROWS,
    states::ROWS,
    windows::ROWS,
];

/// The last version of the default domain that ONNX Runtime 1.30 supports.
const LATEST: i64 = 26;
/// Default number of cases for each row.
const CASES: u64 = 6;

/// Cases that differed in an earlier version, by operator and number. They are always run.
const RECORDED: &[(&str, &[u64])] = &[
    ("DequantizeLinear", &[10, 16, 31]),
    ("GatherBlockQuantized", &[25, 34, 38, 41]),
    ("GridSample", &[70, 216, 284, 343]),
    ("MoE", &[27, 38, 39]),
    ("QMoE", &[48, 50, 51]),
    ("QuantizeLinear", &[10, 24]),
    ("Resize", &[102]),
    ("Slice", &[6, 16, 28]),
];

/// The seed of a case.
fn seed(row: &Operator, number: u64) -> u64 {
    // FNV-1a hash.
    let name = format!("{}:{}:{}", row.domain, row.op_type, row.since);
    let hash = name
        .bytes()
        .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3));
    hash.wrapping_add(number)
}

fn make(row: &'static Operator, generator: fn(&mut Source) -> Case, number: u64) -> Case {
    let seed = seed(row, number);
    let (first, last) = if row.domain.is_empty() { (row.since.max(7), row.until.min(LATEST)) } else { (7, LATEST) };
    // Most models use a version near the last one, but every version occurs.
    let version = if number.is_multiple_of(2) {
        last.min(23).max(first)
    } else {
        first + (seed % (last - first + 1) as u64) as i64
    };
    let mut source = Source::new(row.domain, row.op_type, version, seed);
    // One case in eight, but none of the recorded ones.
    source.in_bfloat16 = number % 8 == 5;
    generator(&mut source)
}

/// Outcome of the cases of one row.
#[derive(Default)]
struct Tally {
    agreed: usize,
    without: Vec<String>,
    failed: Vec<String>,
}

fn run_row(runtime: &Runtime, row: &'static Operator, generator: fn(&mut Source) -> Case, cases: u64) -> Tally {
    let mut tally = Tally::default();
    let recorded =
        RECORDED.iter().filter(|(op, _)| *op == row.op_type).flat_map(|(_, numbers)| numbers.iter().copied());
    for number in (0..cases).chain(recorded.filter(|&number| number >= cases)) {
        let case = make(row, generator, number);
        let failed = |what: &str| format!("{} case {number}: {what}\n    {}", row.op_type, case.describe());
        match case.compare(runtime) {
            Outcome::Agrees => tally.agreed += 1,
            Outcome::NoReference(reason) => tally.without.push(failed(&reason)),
            Outcome::Refused(reason) => tally.failed.push(failed(&format!("the interpreter refuses: {reason}"))),
            Outcome::Differs(what) => tally.failed.push(failed(&what)),
        }
    }
    tally
}

/// Runs the rows of a family and reports every row with a failing case.
fn check(family: &[Generator]) {
    let cases = std::env::var("INTERLACE_PROPERTY_CASES").ok().and_then(|text| text.parse().ok()).unwrap_or(CASES);
    let only = std::env::var("INTERLACE_PROPERTY_ROW").ok();
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    tch::set_num_threads(1);
    let mut problems = Vec::new();
    for &(domain, op, generator) in family {
        if only.as_ref().is_some_and(|only| only != op) {
            continue;
        }
        for row in operators().iter().filter(|row| (row.domain, row.op_type) == (domain, op)) {
            let Tally { agreed, without, failed } = run_row(&runtime, row, generator, cases);
            println!(
                "{domain}:{op}-{}: {agreed} agree, {} without reference, {} fail",
                row.since,
                without.len(),
                failed.len()
            );
            if !failed.is_empty() {
                problems.push(format!("{} of {cases}: {}", failed.len(), failed[..failed.len().min(4)].join("\n")));
            }
            if agreed + failed.len() < without.len() {
                problems.push(format!(
                    "ONNX Runtime refuses {} cases, so {}",
                    without.len(),
                    without[..without.len().min(4)].join("\n")
                ));
            }
        }
    }
    assert!(problems.is_empty(), "{} rows:\n{}", problems.len(), problems.join("\n"));
}

#[test]
fn every_row_has_a_generator() {
    let known: HashSet<(&str, &str)> =
        FAMILIES.iter().flat_map(|family| family.iter()).map(|row| (row.0, row.1)).collect();
    let all: HashSet<(&str, &str)> = operators().iter().map(|row| (row.domain, row.op_type)).collect();
    let mut lacking: Vec<_> = all.difference(&known).collect();
    lacking.sort();
    assert!(lacking.is_empty(), "no generator for {lacking:?}");
    let mut unknown: Vec<_> = known.difference(&all).collect();
    unknown.sort();
    assert!(unknown.is_empty(), "no row for {unknown:?}");
}

#[test]
fn attention_rows_agree_with_onnx_runtime() {
    check(attention::ROWS);
}

#[test]
fn elementwise_rows_agree_with_onnx_runtime() {
    check(elementwise::ROWS);
}

#[test]
fn indexing_rows_agree_with_onnx_runtime() {
    check(indexing::ROWS);
}

#[test]
fn product_rows_agree_with_onnx_runtime() {
    check(products::ROWS);
}

#[test]
fn reduction_rows_agree_with_onnx_runtime() {
    check(reductions::ROWS);
}

#[test]
fn shape_rows_agree_with_onnx_runtime() {
    check(shapes::ROWS);
}

#[test]
fn state_rows_agree_with_onnx_runtime() {
    check(states::ROWS);
}

#[test]
fn window_rows_agree_with_onnx_runtime() {
    check(windows::ROWS);
}

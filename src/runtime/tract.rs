//! Loads a graph in tract, an inference engine in Rust, as an independent check.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use tract_onnx::prelude::*;

use crate::base::{Error, Result};
use crate::ir::DataType;

/// Result of loading a graph in tract.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TractOutcome {
    /// tract builds a runnable plan.
    Loads {
        /// Nodes of the plan.
        nodes: usize,
    },
    /// tract lacks these operators.
    Missing {
        /// Their names, sorted.
        operators: Vec<String>,
    },
    /// tract has the operators, but cannot build the plan.
    Fails {
        /// tract's message.
        problem: String,
    },
}

/// The fixed type and shape of one input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InputFact {
    /// Name in the graph's signature.
    pub name: String,
    /// Type of the elements.
    pub dtype: DataType,
    /// Sizes of the axes, outermost first.
    pub shape: Vec<usize>,
}

/// Loads a graph in tract with a fixed type and shape for every input. tract cannot analyse decoders with a cache with
/// symbolic sizes.
///
/// Errors: `Error::Io` when there is no such file; `Error::Invalid` when `facts` lacks an input of the graph;
/// `Error::Unsupported` for an element type that tract lacks.
pub fn tract_check(path: &Path, facts: &[InputFact]) -> Result<TractOutcome> {
    std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    // tract expects trusted models and may panic on others. Its plan is dropped in either case.
    let outcome = catch_unwind(AssertUnwindSafe(|| load(path, facts)));
    outcome.unwrap_or_else(|_| Ok(TractOutcome::Fails { problem: "it panicked".into() }))
}

fn load(path: &Path, facts: &[InputFact]) -> Result<TractOutcome> {
    let fails = |e: TractError| Ok(TractOutcome::Fails { problem: format!("{e:#}") });
    let mut model = match tract_onnx::onnx().with_ignore_value_info(true).model_for_path(path) {
        Ok(model) => model,
        Err(e) => return fails(e),
    };
    let missing: BTreeSet<String> = model
        .nodes()
        .iter()
        .filter_map(|node| Some(node.op.name().strip_prefix("Unimplemented(")?.trim_end_matches(')').to_string()))
        .collect();
    if !missing.is_empty() {
        return Ok(TractOutcome::Missing { operators: missing.into_iter().collect() });
    }
    let names: Vec<String> = match model.input_outlets() {
        Ok(outlets) => outlets.iter().map(|outlet| model.nodes()[outlet.node].name.clone()).collect(),
        Err(e) => return fails(e),
    };
    for (number, name) in names.iter().enumerate() {
        let fact = facts.iter().find(|fact| fact.name == *name).ok_or_else(|| {
            Error::invalid(format!("`{}`", path.display()), format!("no shape was given for input `{name}`"))
        })?;
        let datum = InferenceFact::dt_shape(datum_type(fact.dtype)?, &fact.shape);
        if let Err(e) = model.set_input_fact(number, datum) {
            return fails(e);
        }
    }
    let typed = match model.into_typed().and_then(|model| model.into_decluttered()) {
        Ok(model) => model,
        Err(e) => return fails(e),
    };
    let nodes = typed.nodes().len();
    match typed.into_runnable() {
        Ok(_) => Ok(TractOutcome::Loads { nodes }),
        Err(e) => fails(e),
    }
}

fn datum_type(dtype: DataType) -> Result<DatumType> {
    Ok(match dtype {
        DataType::Float => DatumType::F32,
        DataType::Double => DatumType::F64,
        DataType::Float16 => DatumType::F16,
        DataType::Int64 => DatumType::I64,
        DataType::Int32 => DatumType::I32,
        DataType::Int8 => DatumType::I8,
        DataType::Uint8 => DatumType::U8,
        DataType::Bool => DatumType::Bool,
        other => return Err(Error::unsupported(format!("tensor of {other}"), "cannot be fed to tract")),
    })
}

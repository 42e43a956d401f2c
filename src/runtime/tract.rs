//! Loads a graph in tract, an inference engine in Rust, as an independent check.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use tract_onnx::prelude::*;

use crate::base::{Error, Result};
use crate::ir::DataType;

use super::tensor::{TensorElement, TensorValue};

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
    Ok(match plan(path, facts)? {
        Ok((_, nodes)) => TractOutcome::Loads { nodes },
        Err(outcome) => outcome,
    })
}

/// Runs a graph in tract on these inputs, with their shapes fixed. Returns its outputs in the graph's order, as f32, or why tract
/// does not run it.
///
/// Errors: as [`tract_check`].
pub fn tract_run(path: &Path, feeds: &[(String, TensorValue)]) -> Result<Result<Vec<Vec<f32>>, TractOutcome>> {
    std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    let outcome = catch_unwind(AssertUnwindSafe(|| outputs(path, feeds)));
    outcome.unwrap_or_else(|_| Ok(Err(TractOutcome::Fails { problem: "it panicked".into() })))
}

fn outputs(path: &Path, feeds: &[(String, TensorValue)]) -> Result<Result<Vec<Vec<f32>>, TractOutcome>> {
    let fact = |(name, tensor): &(String, TensorValue)| {
        Ok(InputFact { name: name.clone(), dtype: tensor.dtype()?, shape: tensor.shape() })
    };
    let facts = feeds.iter().map(fact).collect::<Result<Vec<_>>>()?;
    let (model, _) = match plan(path, &facts)? {
        Ok(planned) => planned,
        Err(outcome) => return Ok(Err(outcome)),
    };
    let mut values = TVec::new();
    for outlet in &model.model().inputs {
        // The plan keeps the names of the inputs, whose facts came from the feeds.
        let name = &model.model().nodes()[outlet.node].name;
        let fed = feeds.iter().find(|(own, _)| own == name).ok_or_else(|| {
            Error::engine("tract", format!("`{}`", path.display()), format!("its plan renamed the input `{name}`"))
        })?;
        values.push(tensor_of(&fed.1)?.into_tvalue());
    }
    let floats = |tensor: TValue| -> TractResult<Vec<f32>> {
        let tensor = tensor.cast_to::<f32>()?;
        Ok(tensor.to_plain_array_view::<f32>()?.iter().copied().collect())
    };
    let found = model.run(values).and_then(|found| found.into_iter().map(floats).collect::<TractResult<Vec<_>>>());
    Ok(found.map_err(|e| TractOutcome::Fails { problem: format!("{e:#}") }))
}

fn tensor_of(value: &TensorValue) -> Result<tract_onnx::prelude::Tensor> {
    fn of<T: TensorElement + Datum + Copy>(value: &TensorValue) -> Result<TractResult<tract_onnx::prelude::Tensor>> {
        Ok(tract_onnx::prelude::Tensor::from_shape(&value.shape(), value.data::<T>()?))
    }
    let made = match value.dtype()? {
        DataType::Float => of::<f32>(value)?,
        DataType::Int64 => of::<i64>(value)?,
        DataType::Int32 => of::<i32>(value)?,
        DataType::Bool => of::<bool>(value)?,
        other => return Err(Error::unsupported(format!("tensor of {other}"), "cannot be fed to tract")),
    };
    made.map_err(|e| Error::engine("tract", "a tensor", format!("{e:#}")))
}

type Plan = (Arc<TypedRunnableModel>, usize);

/// The runnable plan and its number of nodes, or why there is none.
fn plan(path: &Path, facts: &[InputFact]) -> Result<Result<Plan, TractOutcome>> {
    let fails = |e: TractError| Ok(Err(TractOutcome::Fails { problem: format!("{e:#}") }));
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
        return Ok(Err(TractOutcome::Missing { operators: missing.into_iter().collect() }));
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
        Ok(plan) => Ok(Ok((plan, nodes))),
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

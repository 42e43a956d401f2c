//! Runs the node tests of the ONNX package in the interpreter. `scripts/operators/backend_tests.py` writes and judges
//! them.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use interlace::ir::{self, DataType, ValueId};
use interlace::{onnx, torch};
use tch::{Kind, Tensor};

/// The variable that names the folder of the cases.
const FOLDER: &str = "INTERLACE_BACKEND_TESTS";

/// The last version of the default domain in the operator table.
const LATEST: i64 = 26;

/// Prints a line for each case: its name, a tab, and `pass`, `no row` or the failure.
#[test]
#[ignore = "needs the cases written by scripts/operators/backend_tests.py"]
fn onnx_backend_tests() {
    let folder =
        PathBuf::from(std::env::var_os(FOLDER).unwrap_or_else(|| panic!("set {FOLDER} to the folder of the cases")));
    tch::set_num_threads(1);
    let mut cases: Vec<PathBuf> =
        fs::read_dir(&folder).expect("folder").map(|entry| entry.expect("entry").path()).collect();
    cases.sort();
    assert!(!cases.is_empty(), "{} is empty", folder.display());
    for case in cases {
        let outcome = catch_unwind(AssertUnwindSafe(|| run(&case))).unwrap_or_else(|_| Err("panics".into()));
        let name = case.file_name().expect("name").to_string_lossy();
        println!("\n{name}\t{}", outcome.err().unwrap_or_else(|| "pass".into()).replace(['\n', '\t'], " "));
    }
}

/// Runs the case; the error says why it does not pass.
fn run(case: &Path) -> Result<(), String> {
    let text = |e: interlace::base::Error| e.to_string();
    let mut model = onnx::load(&case.join("model.onnx")).map_err(text)?;
    // Later versions are refused, but their cases still test the rows as the last known version.
    let imports = model.functions.iter_mut().map(|function| &mut function.opset_imports);
    for version in imports.chain([&mut model.opset_imports]).filter_map(|imports| imports.get_mut("")) {
        *version = (*version).min(LATEST);
    }
    let known = |node: &ir::Node| {
        torch::operators().iter().any(|row| (row.domain, row.op_type) == (node.domain.as_str(), node.op_type.as_str()))
    };
    if !model.graph.body.nodes.iter().all(known) {
        return Err("no row".into());
    }
    let program = torch::Program::compile(&model, &torch::Options::default()).map_err(text)?;
    let data = onnx::load(&case.join("data.onnx")).map_err(text)?;
    let arrays = |prefix: &str| -> Vec<(String, ir::Tensor)> {
        let all = data.graph.body.initializers.iter();
        all.filter_map(|(id, tensor)| Some((data.graph.name(*id).strip_prefix(prefix)?.to_string(), tensor.clone())))
            .collect()
    };
    let feeds: Vec<(ValueId, Tensor)> = arrays("in/")
        .iter()
        .map(|(name, tensor)| Ok((program.value(name)?, torch::tensor_from_ir(name, tensor)?)))
        .collect::<Result<_, _>>()
        .map_err(text)?;
    let results = tch::no_grad(|| program.run(&feeds, program.outputs())).map_err(text)?;
    let expected = arrays("out/");
    if expected.len() != results.len() {
        return Err(format!("{} outputs, expected {}", results.len(), expected.len()));
    }
    let bounds = fs::read_to_string(case.join("tolerance")).map_err(|e| e.to_string())?;
    let mut bounds = bounds.split_whitespace().map(|number| number.parse::<f64>().expect("a number"));
    let (relative, absolute) = (bounds.next().expect("rtol"), bounds.next().expect("atol"));
    for (&id, ours) in program.outputs().iter().zip(&results) {
        let name = program.name(id);
        let (_, theirs) = expected.iter().find(|(known, _)| known == name).ok_or(format!("no expected `{name}`"))?;
        compare(name, ours, theirs, relative, absolute)?;
    }
    Ok(())
}

fn compare(name: &str, ours: &Tensor, theirs: &ir::Tensor, relative: f64, absolute: f64) -> Result<(), String> {
    // 16-bit floats are computed in f32; the expected values are rounded.
    let (kind, rounding) = match theirs.dtype {
        DataType::Float16 => (Kind::Float, 5e-3),
        DataType::Bfloat16 => (Kind::Float, 2e-2),
        DataType::Uint4 => (Kind::Uint8, 0.0),
        DataType::Int4 => (Kind::Int8, 0.0),
        dtype => (torch::kind_of(dtype).ok_or(format!("no kind for {dtype}"))?, 0.0),
    };
    let want = torch::tensor_from_ir(name, theirs).map_err(|e| e.to_string())?;
    if ours.kind() != kind || ours.size() != want.size() {
        let found = format!("{:?}{:?}", ours.kind(), ours.size());
        return Err(format!("`{name}` is {found}, expected {}{:?}", theirs.dtype, theirs.dims));
    }
    let numbers = |tensor: &Tensor| -> Vec<f64> {
        Vec::try_from(tensor.to_kind(Kind::Double).contiguous().reshape([-1])).expect("numbers")
    };
    let close = |ours: f64, theirs: f64| {
        ours == theirs
            || ours.is_nan() && theirs.is_nan()
            || (ours - theirs).abs() <= absolute.max(rounding) + relative.max(rounding) * theirs.abs()
    };
    let (ours, want) = (numbers(ours), numbers(&want));
    match (0..ours.len()).find(|&at| !close(ours[at], want[at])) {
        Some(at) => Err(format!("`{name}` is {:e} at {at}, expected {:e}", ours[at], want[at])),
        None => Ok(()),
    }
}

//! Precision variants of a model, written beside its float files. A precision is a row of [`PRECISIONS`].

mod allocation;
mod calibrate;
mod divergence;
mod finite;
mod forms;
mod half;
mod int4;
mod int8;
mod kept;
mod report;
mod sensitivity;
mod weights;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::base::{Cancel, Error, Progress, Provenance, Result, ScratchDir, Sha256Digest, StagedDir, folder_of};
use crate::bundle::{Bundle, BundleWriter, Component, RecordedStep};
use crate::ir::{Body, DataType, Model, Node, ValueId};
use crate::onnx;

pub use calibrate::{RangeCalibration, Ranges};
pub use forms::WeightForm;
pub use report::{
    KeptOperators, KeptTensor, PRECISION_FILE, PRECISION_SCHEMA_VERSION, PartSensitivity, PrecisionBudget,
    PrecisionReport, QuantisedComponent, QuantisedTensor, Sensitivity,
};
pub use sensitivity::BudgetRequest;

use super::ExportTarget;
use super::components::{NOTHING, chosen};
use super::record::{Export, ExportSettings};
use forms::WeightForms;
use weights::{FloatConstants, kept_tensors, remove_dead_code};

/// The precision whose parts may have 8 bits or stay floats.
const MIXED: &str = "int4";

/// A precision in which `export` writes a model.
#[derive(Clone, Copy, Debug)]
pub struct PrecisionRow {
    /// Value of `--precision`.
    pub name: &'static str,
    /// Suffix of the files' names, by which transformers.js and [`Bundle`] know the variant.
    pub suffix: &'static str,
    /// One-line description.
    pub summary: &'static str,
    /// True when it needs the ranges of activations.
    pub calibrated: bool,
    /// True when its weights share scales in blocks, to which [`PrecisionSettings`] apply.
    pub in_blocks: bool,
    /// Rewrites one graph.
    write: fn(Work<'_>) -> Result<Done>,
}

impl PrecisionRow {
    /// True when its parts may have 8 bits or stay floats, by [`BudgetRequest`].
    pub fn is_mixed(&self) -> bool {
        self.name == MIXED
    }
}

/// All precisions.
pub const PRECISIONS: &[PrecisionRow] = &[
    PrecisionRow {
        name: "fp16",
        suffix: "fp16",
        summary: "Weights and activations in float16, inputs and outputs in float32",
        calibrated: false,
        in_blocks: false,
        write: half::half,
    },
    PrecisionRow {
        name: "int8",
        suffix: "quantized",
        summary: "Weights of 8 bits, activations rounded to 8 bits by their own range in every run",
        calibrated: false,
        in_blocks: false,
        write: int8::dynamic,
    },
    PrecisionRow {
        name: "int8-qdq",
        suffix: "int8",
        summary: "Weights and activations of 8 bits, activations by ranges measured on --data",
        calibrated: true,
        in_blocks: false,
        write: int8::calibrated,
    },
    PrecisionRow {
        name: "int4",
        suffix: "q4",
        summary: "Weights of 4 bits in blocks, activations in float32",
        calibrated: false,
        in_blocks: true,
        write: int4::single,
    },
    PrecisionRow {
        name: "q4f16",
        suffix: "q4f16",
        summary: "Weights of 4 bits in blocks, the rest as in fp16",
        calibrated: false,
        in_blocks: true,
        write: half::four_bits,
    },
];

/// The precision with this name.
///
/// Errors: a message with the known names, and the right one for the suffix of a precision's files.
pub fn precision_named(name: &str) -> Result<&'static PrecisionRow, String> {
    let names: Vec<&str> = PRECISIONS.iter().map(|row| row.name).collect();
    let found = PRECISIONS.iter().find(|row| row.name == name);
    found.ok_or_else(|| {
        let by_suffix = PRECISIONS.iter().find(|row| row.suffix == name);
        let hint = by_suffix.map(|row| format!("; the files with the suffix `_{name}` are written by `{}`", row.name));
        format!("`{name}` is none of {}{}", names.join(", "), hint.unwrap_or_default())
    })
}

/// Settings of weights in blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrecisionSettings {
    /// Numbers that share a scale: a power of two from 16 to 256.
    pub block_size: usize,
    /// Gives every block a zero point of its own.
    pub zero_points: bool,
    /// Searches the scale that leaves the least squared error; otherwise the block's range gives it.
    pub least_error: bool,
}

impl Default for PrecisionSettings {
    fn default() -> Self {
        PrecisionSettings { block_size: 32, zero_points: false, least_error: true }
    }
}

/// One graph to be rewritten.
struct Work<'a> {
    model: Model,
    settings: &'a PrecisionSettings,
    /// The form of each weight in blocks.
    forms: &'a WeightForms,
    ranges: &'a Ranges,
    /// A folder for temporary files.
    scratch: &'a Path,
    /// Path of the graph in its folder.
    file: &'a str,
    cancel: &'a Cancel,
}

impl Work<'_> {
    fn constants(&self, stem: &str) -> Result<FloatConstants> {
        let stem = format!("{}.{stem}", self.file.replace('/', "."));
        let taken = |number: &usize| self.scratch.join(format!("{stem}.{number}")).exists();
        let number = (0..).find(|number| !taken(number)).unwrap_or(0);
        FloatConstants::create(&self.scratch.join(format!("{stem}.{number}")))
    }
}

/// A rewritten graph.
struct Done {
    model: Model,
    quantised: Vec<QuantisedTensor>,
    kept_operators: Vec<KeptOperators>,
    /// Why weights stayed in floats, by their names. Others have no form with fewer bits.
    reasons: HashMap<String, String>,
    clamped_numbers: u64,
}

impl Done {
    /// The graph with its new constants, without what nothing reads any more.
    fn of(mut model: Model, constants: FloatConstants, quantised: Vec<QuantisedTensor>) -> Result<Self> {
        model.graph.body.initializers.extend(constants.finish()?);
        remove_dead_code(&mut model.graph.body);
        give_own_names(&mut model.graph.body);
        crate::rewrite::finish(&mut model)?;
        Ok(Done { model, quantised, kept_operators: Vec::new(), reasons: HashMap::new(), clamped_numbers: 0 })
    }
}

/// Name of a node that takes over a part of another node. Nodes without a name stay so: two parts must not share one.
fn part_name(node: &str, what: &str) -> String {
    if node.is_empty() { String::new() } else { format!("{node}.{what}") }
}

/// Renames nodes that were added under a name which the body has already: ONNX Runtime loads no such graph.
fn give_own_names(body: &mut Body) {
    let mut taken: HashSet<String> = HashSet::new();
    for node in &mut body.nodes {
        let own = node.name.clone();
        let numbered = (2..).map(|number| format!("{own}.{number}"));
        if !own.is_empty() {
            let free = std::iter::once(own.clone()).chain(numbered).find(|name| !taken.contains(name));
            node.name = free.unwrap_or(own);
            taken.insert(node.name.clone());
        }
        node.bodies_mut().for_each(give_own_names);
    }
}

/// The addition of a bias to a product that was part of a `Gemm`.
fn bias_node(gemm: &Node, product: ValueId, bias: ValueId, result: ValueId) -> Node {
    Node {
        name: part_name(&gemm.name, "bias"),
        op_type: "Add".into(),
        inputs: vec![Some(product), Some(bias)],
        outputs: vec![Some(result)],
        ..Node::default()
    }
}

/// Which precisions are written, and how.
pub struct PrecisionRequest<'a> {
    /// The precisions.
    pub precisions: &'a [&'static PrecisionRow],
    /// Settings of weights in blocks.
    pub settings: PrecisionSettings,
    /// Samples for precisions that need ranges of activations, and for measuring.
    pub calibration: Option<RangeCalibration<'a>>,
    /// Measures what each part costs in `int4`, and chooses forms for the parts within these limits.
    pub budget: Option<BudgetRequest>,
}

/// Writes a model in these precisions for a target, as [`super::export`] does: all of them and the floats where the target has room
/// for several, else the one precision.
///
/// Errors: as [`write_variants`] and [`super::export`]; `Error::Invalid` when the target has room for one precision and there are
/// several.
pub fn export_variants(
    bundle: &Bundle,
    request: &PrecisionRequest<'_>,
    target: &ExportTarget,
    settings: &ExportSettings,
    output: &Path,
    cancel: &Cancel,
) -> Result<Export> {
    if !target.writes_graphs() {
        return Err(Error::invalid("`--precision`", format!("is not read by the target `{}`", target.name))
            .remedy("leave it out: the target writes the weights of a checkpoint in its own types"));
    }
    // The folder is made for nothing but its errors, which would otherwise come late.
    drop(StagedDir::create(output)?);
    let mut settings = settings.clone();
    if settings.variant.is_none() && !target.writes_variants && bundle.layout().names_variants() {
        match request.precisions {
            [only] => settings.variant = Some(only.suffix.to_string()),
            several => {
                let problem = format!("writes one precision, and {} are named", several.len());
                return Err(Error::invalid(format!("target `{}`", target.name), problem)
                    .remedy("name one, or export each to a folder of its own"));
            }
        }
    }
    let scratch = ScratchDir::create_in(folder_of(output))?;
    let name = bundle.name();
    let folder = scratch.path().join(name.rsplit('/').next().unwrap_or(&name));
    let report = write_variants(bundle, request, &folder, cancel)?;
    super::export_quantised(&Bundle::open(&folder)?, target, &settings, output, report, cancel)
}

/// Writes a copy of a model folder that has the model in these precisions too, each file under its name with a suffix. In layouts
/// whose configs name the files there is one precision, in place of the floats.
///
/// Errors: `Error::Invalid` for a model that is quantised or in half precision already, a variant that is there already, and a
/// block size that no operator takes; `Error::Unsupported` for graphs with functions of their own; as [`onnx::load`] and
/// [`onnx::save`]; `Error::Interrupted` on Ctrl-C. On an error no folder remains.
pub fn write_variants(
    bundle: &Bundle,
    request: &PrecisionRequest<'_>,
    output: &Path,
    cancel: &Cancel,
) -> Result<PrecisionReport> {
    let PrecisionRequest { precisions, settings, calibration, budget } = request;
    let calibration = calibration.as_ref();
    check(bundle, request)?;
    bundle.check_output(output)?;
    let mut writer = BundleWriter::create(bundle, output)?;
    let scratch = ScratchDir::create_in(folder_of(output))?;
    let components: Vec<&Component> = chosen(bundle, None)?
        .into_iter()
        .filter(|component| !component.role.is_carried() && component.role.has_weights())
        .collect();
    let mut ranges = BTreeMap::new();
    if let Some(calibration) = calibration.filter(|_| precisions.iter().any(|row| row.calibrated)) {
        ranges = calibrate::ranges(bundle, calibration)?;
    }
    let mut allocation = None;
    if let Some((calibration, budget)) = calibration.zip(*budget) {
        allocation = Some(sensitivity::allocate(bundle, &components, (settings, calibration), budget, scratch.path())?);
    }
    let progress = Progress::new("quantise", "files", (precisions.len() * components.len()) as u64);
    let (nothing, all_alike) = (Ranges::new(), WeightForms::default());
    let mut written = Vec::new();
    for precision in *precisions {
        for component in &components {
            cancel.check(NOTHING)?;
            let model = onnx::load(&bundle.path_of(component))?;
            refuse(&model, &component.file)?;
            let names = constant_names(&model);
            let ranges = ranges.get(&component.file).unwrap_or(&nothing);
            let forms = allocation.as_ref().filter(|_| precision.is_mixed());
            let forms = forms.and_then(|it| it.forms.get(&component.file)).unwrap_or(&all_alike);
            let work = Work { model, settings, forms, ranges, scratch: scratch.path(), file: &component.file, cancel };
            let done = (precision.write)(work)?;
            let suffix = bundle.layout().names_variants().then_some(precision.suffix);
            let (file, bytes_after) = writer.save_variant(component, suffix, &done.model)?;
            written.push(QuantisedComponent {
                precision: precision.name.to_string(),
                role: component.role,
                source: component.file.clone(),
                file,
                bytes_before: bundle.size_bytes(component)?,
                bytes_after,
                kept: if done.kept_operators.is_empty() { kept_tensors(&done, &names) } else { Vec::new() },
                quantised: done.quantised,
                kept_operators: done.kept_operators,
                clamped_numbers: done.clamped_numbers,
            });
            progress.advance(1);
        }
    }
    let names: Vec<String> = precisions.iter().map(|row| row.name.to_string()).collect();
    writer.push_step(RecordedStep::Quantise { precisions: names.clone() });
    let mut inputs = BTreeMap::<String, Sha256Digest>::from([("model".to_string(), bundle.digest()?)]);
    inputs.extend(
        calibration.map(|calibration| calibration.dataset.digest()).transpose()?.map(|it| ("data".to_string(), it)),
    );
    let recorded = serde_json::json!({ "precisions": names, "blocks": settings });
    let mut sensitivity = allocation.map(|allocation| allocation.sensitivity);
    if let Some(budget) = sensitivity.as_mut().and_then(|found| found.budget.as_mut()) {
        budget.size_bytes = written.iter().filter(|part| part.precision == MIXED).map(|part| part.bytes_after).sum();
    }
    let report = PrecisionReport {
        provenance: Provenance::new(PRECISION_SCHEMA_VERSION, inputs.clone(), &recorded)?
            .with_variants("model", bundle.chosen_variants())
            .with_hub("model", bundle.hub_name()),
        components: written,
        sensitivity,
    };
    writer.add_json(PRECISION_FILE, &report)?;
    cancel.check(NOTHING)?;
    writer.commit(Provenance::new(crate::bundle::Record::SCHEMA_VERSION, inputs, &recorded)?)?;
    Ok(report)
}

/// What can be said before anything is written.
fn check(bundle: &Bundle, request: &PrecisionRequest<'_>) -> Result<()> {
    let PrecisionRequest { precisions, settings, calibration, budget } = request;
    let twice = precisions.iter().enumerate().find(|(at, row)| precisions[..*at].iter().any(|it| it.name == row.name));
    if let Some((_, row)) = twice {
        return Err(Error::invalid("`--precision`", format!("has `{}` twice", row.name)).remedy("name it once"));
    }
    if let Some(budget) = budget {
        check_budget(*budget, precisions, calibration.is_some())?;
    }
    let block = settings.block_size;
    if !block.is_power_of_two() || !(16..=256).contains(&block) {
        return Err(Error::invalid("`--block-size`", format!("is {block}, expected a power of two from 16 to 256"))
            .remedy("give 32 or 128, for which runtimes have the fastest kernels"));
    }
    if let Some(row) = precisions.iter().find(|row| row.calibrated).filter(|_| calibration.is_none()) {
        return Err(Error::invalid(format!("precision `{}`", row.name), "needs calibration data")
            .remedy("give `--data`, or take int8, which measures activations in every run"));
    }
    if !bundle.layout().names_variants() && precisions.len() > 1 {
        let problem =
            format!("names its files in a config, which has room for one precision, not {}", precisions.len());
        return Err(Error::invalid(format!("`{}`", bundle.root().display()), problem)
            .remedy("write one folder for each precision"));
    }
    for row in *precisions {
        if let Some(there) = bundle.components().iter().find(|component| component.variant == row.suffix) {
            return Err(Error::invalid(
                format!("`{}`", there.file),
                format!("is there already, in precision `{}`", row.name),
            )
            .remedy("remove it, or choose another precision"));
        }
    }
    Ok(())
}

fn check_budget(budget: BudgetRequest, precisions: &[&PrecisionRow], has_data: bool) -> Result<()> {
    if !precisions.iter().any(|row| row.is_mixed()) {
        return Err(Error::invalid("`--precision`", format!("has no `{MIXED}`, whose parts are measured and chosen"))
            .remedy("add int4, or leave `--sensitivity`, `--target-size` and `--max-kl` out"));
    }
    if !has_data {
        return Err(
            Error::invalid("the sensitivity", "needs calibration data").remedy("give conversations with `--data`")
        );
    }
    budget.check("`--max-kl`")
}

/// Operators of quantised graphs, as prefixes of their names.
const QUANTISED: &[&str] = &[
    "ConvInteger",
    "DequantizeLinear",
    "DynamicQuantize",
    "GatherBlockQuantized",
    "MatMulBnb4",
    "MatMulInteger",
    "MatMulNBits",
    "QAttention",
    "QGemm",
    "QLinear",
    "QMoE",
    "QuantizeLinear",
];

/// Errors: `Error::Invalid` for a graph that is quantised or in half precision; `Error::Unsupported` for functions of its own and
/// weights that are inputs as well.
fn refuse(model: &Model, file: &str) -> Result<()> {
    let subject = || format!("`{file}`");
    if let Some(node) =
        find_node(&model.graph.body, &|node| QUANTISED.iter().any(|start| node.op_type.starts_with(start)))
    {
        let problem = format!("is quantised already: it has {}", node.describe(&model.graph));
        return Err(Error::invalid(subject(), problem).remedy("quantise the float model"));
    }
    let body = &model.graph.body;
    let is_half = |dtype: Option<DataType>| matches!(dtype, Some(DataType::Float16 | DataType::Bfloat16));
    let input = body.inputs.iter().find(|id| is_half(model.graph.value(**id).ty.as_ref().and_then(|ty| ty.dtype())));
    let weight = body.initializers.iter().find(|(_, tensor)| is_half(Some(tensor.dtype))).map(|(id, _)| id);
    if let Some(&id) = input.or(weight) {
        let problem = format!("has `{}` in half precision", model.graph.name(id));
        return Err(Error::invalid(subject(), problem).remedy("quantise the float32 model"));
    }
    if let Some((id, _)) =
        body.initializers.iter().find(|(id, tensor)| tensor.dtype == DataType::Float && body.inputs.contains(id))
    {
        let problem = format!("has `{}` as a weight and an input, so a caller may replace it", model.graph.name(*id));
        return Err(Error::unsupported(subject(), problem).remedy("export the graph in IR version 4 or later"));
    }
    match model.functions.first() {
        Some(function) => {
            Err(Error::unsupported(subject(), format!("has the function `{}` of its own", function.name))
                .remedy("inline the functions when you export it"))
        }
        None => Ok(()),
    }
}

/// Names of all initializers.
fn constant_names(model: &Model) -> HashSet<String> {
    fn add(model: &Model, body: &Body, names: &mut HashSet<String>) {
        names.extend(body.initializers.iter().map(|(id, _)| model.graph.name(*id).to_string()));
        body.nodes.iter().flat_map(Node::bodies).for_each(|inner| add(model, inner, names));
    }
    let mut names = HashSet::new();
    add(model, &model.graph.body, &mut names);
    names
}

fn find_node<'a>(body: &'a Body, wanted: &dyn Fn(&Node) -> bool) -> Option<&'a Node> {
    body.nodes.iter().find_map(|node| match wanted(node) {
        true => Some(node),
        false => node.bodies().find_map(|inner| find_node(inner, wanted)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bundle::PRECISION_VARIANTS;

    #[test]
    fn every_precision_is_found_by_its_name_and_by_the_variant_of_its_files() {
        let rows: Vec<(&str, &str)> = PRECISIONS.iter().map(|row| (row.name, row.suffix)).collect();
        assert_eq!(rows, PRECISION_VARIANTS);
        for row in PRECISIONS {
            assert_eq!(precision_named(row.name).unwrap().suffix, row.suffix);
        }
        let error = precision_named("q4").unwrap_err();
        assert!(error.contains("none of fp16, int8") && error.ends_with("are written by `int4`"), "{error}");
        assert!(precision_named("int3").unwrap_err().ends_with("q4f16"));
    }
}

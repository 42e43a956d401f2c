//! The components under their own names, for engines that read ONNX files: OpenVINO, tract, and what takes one file alone.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::path::Path;

use crate::base::{Cancel, Error, Result, human_bytes, sha256_file};
use crate::bundle::{Bundle, Component};
use crate::ir::{Body, DataType, Model, Node, ValueId};
use crate::onnx;
use crate::rewrite::narrow_positions;

use super::components::{chosen, convert, copy, create, is_carried, size_of, storage, write as write_text};
use super::configs::{object, pretty, with_chunks};
use super::record::{ExportSettings, ExportedModel, Written};

/// The folder for OpenVINO, which takes the graphs as they are.
///
/// Errors: as [`write`].
pub(super) fn openvino(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let mut written = write(bundle, settings, (root, cancel), Weights::AsBefore, |_, _| Ok(()))?;
    for file in written.models.keys() {
        let model = onnx::load(&root.join(file))?;
        let mut operators = BTreeSet::new();
        microsoft_operators(&model.graph.body, &mut operators);
        if !operators.is_empty() {
            let operators = operators.into_iter().collect::<Vec<_>>().join(", ");
            written.notes.push(format!(
                "{file} has operators of ONNX Runtime's own domain com.microsoft ({operators}), of which OpenVINO knows only \
                 some: load it there before you ship it, or give `--standard-ops`"
            ));
        }
    }
    Ok(written)
}

/// Operators of ONNX Runtime's own domain.
fn microsoft_operators(body: &Body, found: &mut BTreeSet<String>) {
    for node in &body.nodes {
        if node.domain == "com.microsoft" {
            found.insert(node.op_type.clone());
        }
        node.bodies().for_each(|inner| microsoft_operators(inner, found));
    }
}

/// The folder with the weights of each component inside its `.onnx` file.
///
/// Errors: `Error::Unsupported` for a component that does not fit into one file; as [`write`].
pub(super) fn single_file(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    write(bundle, settings, (root, cancel), Weights::Inside, |_, model| {
        narrow_positions(model);
        Ok(())
    })
}

/// The folder for tract, which does not unify the free sizes that exporters note on inner values.
///
/// Errors: `Error::Unsupported` for weights with fewer bits than 8; as [`write`].
pub(super) fn tract(bundle: &Bundle, settings: &ExportSettings, root: &Path, cancel: &Cancel) -> Result<Written> {
    let settings = ExportSettings { standard_ops: true, ..settings.clone() };
    write(bundle, &settings, (root, cancel), Weights::AsBefore, |file, model| {
        if let Some(dtype) = below_8_bits(&model.graph.body) {
            return Err(Error::unsupported(
                format!("`{file}`"),
                format!("has weights of {dtype}, which tract does not load"),
            )
            .remedy("export it with `--precision fp16`, `int8` or `int8-qdq`, or the floats"));
        }
        without_inner_types(model);
        Ok(())
    })
}

/// The type of a weight whose numbers have fewer bits than 8.
fn below_8_bits(body: &Body) -> Option<DataType> {
    let types = body.initializers.iter().map(|(_, tensor)| tensor.dtype);
    let small = |dtype: &DataType| (1..8).contains(&dtype.bits());
    let inner = || body.nodes.iter().flat_map(Node::bodies).find_map(below_8_bits);
    types.into_iter().find(small).or_else(inner)
}

/// Place of a component's weights.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Weights {
    /// In a data file where the source has data files.
    AsBefore,
    /// Inside the `.onnx` file.
    Inside,
}

/// Most bytes of weights in one file: protobuf's limit, less room for the graph.
const ONE_FILE_BYTES: u64 = (1 << 31) - (32 << 20);

/// Writes the model's folder anew into `root`. Without a requested variant all variants are written.
///
/// Errors: as `convert` and `onnx::save`.
fn write(
    bundle: &Bundle,
    settings: &ExportSettings,
    (root, cancel): (&Path, &Cancel),
    weights: Weights,
    change: fn(&str, &mut Model) -> Result<()>,
) -> Result<Written> {
    let components: Vec<&Component> = match &settings.variant {
        Some(variant) => chosen(bundle, Some(variant))?,
        None => bundle.components().iter().collect(),
    };
    let (mut models, mut chunks, mut files) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for component in components {
        let mut model = onnx::load(&bundle.path_of(component))?;
        convert(&component.file, &mut model, settings, cancel)?;
        change(&component.file, &mut model)?;
        let bytes = model.graph.body.weight_bytes();
        if weights == Weights::Inside && bytes > ONE_FILE_BYTES {
            let problem = format!("has {} of weights, and an ONNX file holds at most 2 GB", human_bytes(bytes));
            return Err(Error::unsupported(format!("`{}`", component.file), problem)
                .remedy("export it in a smaller precision (`--precision`), or for a target with data files"));
        }
        let path = root.join(&component.file);
        let folder = path.parent().unwrap_or(root);
        create(folder)?;
        let name = component.file.rsplit('/').next().unwrap_or(&component.file);
        let inline = weights == Weights::Inside || component.external.is_empty();
        let storage = storage(&model, settings, inline, format!("{name}_data"), None)?;
        let data = onnx::save(&model, &path, &storage)?;
        if !data.is_empty() {
            chunks.insert(name.to_string(), data.len());
        }
        let size_bytes = size_of(folder, data.iter().map(String::as_str).chain([name]))?;
        models.insert(component.file.clone(), ExportedModel::new(component, &model, size_bytes));
    }
    const CONFIG: &str = "config.json";
    if let Some(mut config) = object(bundle, CONFIG)? {
        with_chunks(&mut config, &chunks);
        write_text(&root.join(CONFIG), &pretty(&config)?)?;
        files.insert(CONFIG.to_string(), sha256_file(&root.join(CONFIG))?);
    }
    for asset in bundle.assets().iter().filter(|asset| is_carried(asset) && asset.file != CONFIG) {
        copy(bundle, asset, root, asset.file.clone(), &mut files)?;
    }
    Ok(Written { settings: settings.clone(), models, files, notes: Vec::new(), inputs: BTreeMap::new(), weights: None })
}

/// Removes the noted types of all values but inputs, outputs and weights.
fn without_inner_types(model: &mut Model) {
    let mut kept: HashSet<ValueId> = HashSet::new();
    declared(&model.graph.body, &mut kept);
    for (index, value) in model.graph.values.iter_mut().enumerate() {
        if !kept.iter().any(|id| id.index() == index) {
            value.ty = None;
        }
    }
}

fn declared(body: &Body, kept: &mut HashSet<ValueId>) {
    kept.extend(body.inputs.iter().chain(&body.outputs));
    kept.extend(body.initializers.iter().map(|(id, _)| *id));
    body.nodes.iter().flat_map(Node::bodies).for_each(|inner| declared(inner, kept));
}

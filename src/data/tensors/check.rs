//! Checks the tensors of a file against the inputs that a model's graphs declare.

use std::collections::BTreeMap;

use crate::base::{Error, Result, list_preview};
use crate::bundle::{Bundle, Role};
use crate::ir::{DataType, Dim};
use crate::onnx;

use super::archive::StoredTensor;

/// Name of the labels tensor: the target token of each position, -100 at positions that are not trained on.
pub(super) const LABELS: &str = "labels";
/// Tensors that a file may contain for any graph.
const ALWAYS: &[&str] = &["input_ids", "attention_mask"];
const EMBEDS: &str = "inputs_embeds";
/// Tensors whose first two axes are rows and tokens, with their ranks.
const TOKENS: &[(&str, usize)] = &[(EMBEDS, 3), ("input_ids", 2), ("attention_mask", 2), (LABELS, 2)];

/// Declaration of a graph input.
#[derive(Clone, Debug)]
struct Declared {
    dtype: DataType,
    dims: Vec<Dim>,
}

/// Inputs of a model's graphs, by name.
#[derive(Clone, Debug)]
pub(in crate::data) struct GraphInputs {
    decoder: BTreeMap<String, Declared>,
    /// Inputs of the vision encoder and of the token embedding graph, which produce inputs of the decoder.
    others: BTreeMap<String, Declared>,
}

impl GraphInputs {
    /// Reads the inputs that the graphs declare.
    ///
    /// Errors: those of `onnx::load`; `Error::Invalid` for a folder without a decoder.
    pub fn of(bundle: &Bundle) -> Result<Self> {
        bundle.require(Role::Decoder)?;
        let declared = |role: Role| -> Result<BTreeMap<String, Declared>> {
            let Some(component) = bundle.component(role) else { return Ok(BTreeMap::new()) };
            let graph = onnx::load(&bundle.path_of(component))?.graph;
            let input = |&id: &_| {
                let ty = graph.value(id).ty.as_ref()?;
                let declared = Declared { dtype: ty.dtype()?, dims: ty.shape()?.to_vec() };
                Some((graph.name(id).to_string(), declared))
            };
            Ok(graph.body.inputs.iter().filter_map(input).collect())
        };
        let mut others = declared(Role::VisionEncoder)?;
        others.extend(declared(Role::EmbedTokens)?);
        Ok(GraphInputs { decoder: declared(Role::Decoder)?, others })
    }

    /// Checks a file's tensors. Returns the number of rows and of tokens per row.
    ///
    /// Errors: `Error::Invalid` with the tensor that no graph reads, or whose type or shape differs from its graph's
    /// declaration; `Error::Invalid` for a file without tokens.
    pub(super) fn check(&self, file: &str, entries: &BTreeMap<String, StoredTensor>) -> Result<(usize, usize)> {
        let embeds = entries.contains_key(EMBEDS);
        if !embeds && !entries.contains_key("input_ids") {
            let names: Vec<&str> = entries.keys().map(String::as_str).collect();
            return Err(Error::invalid(
                file,
                format!("holds neither `input_ids` nor `{EMBEDS}`, only {}", list_preview(&names, 8)),
            )
            .remedy("name tensors as the graph's inputs; `interlace inspect` lists these"));
        }
        if embeds && !self.decoder.contains_key(EMBEDS) {
            return Err(Error::invalid(file, format!("holds `{EMBEDS}`, but the decoder takes `input_ids`"))
                .remedy("give the token ids, and the pixels where the model reads any"));
        }
        for (name, entry) in entries {
            self.check_one(&format!("tensor `{name}` of {file}"), name, entry, embeds)?;
        }
        let (first, leading) = TOKENS
            .iter()
            .find_map(|(name, _)| Some((*name, entries.get(*name)?.shape.as_slice())))
            .ok_or_else(|| Error::invalid(file, "holds no tokens"))?;
        let (rows, time) = (leading[0], leading[1]);
        if rows == 0 || time == 0 {
            return Err(Error::invalid(
                format!("tensor `{first}` of {file}"),
                format!("has shape {leading:?}, which holds no token"),
            ));
        }
        for (name, _) in TOKENS {
            let Some(entry) = entries.get(*name).filter(|entry| entry.shape[..2] != [rows, time]) else { continue };
            let problem = format!("has shape {:?}, but `{first}` has {rows} rows of {time} tokens", entry.shape);
            return Err(Error::invalid(format!("tensor `{name}` of {file}"), problem)
                .remedy("give all tensors of a batch the same rows and tokens"));
        }
        Ok((rows, time))
    }

    fn check_one(&self, subject: &str, name: &str, entry: &StoredTensor, embeds: bool) -> Result<()> {
        let found = format!("{} {:?}", entry.dtype, entry.shape);
        if let Some((_, rank)) = TOKENS.iter().find(|(token, rank)| *token == name && entry.shape.len() != *rank) {
            return Err(Error::invalid(subject, format!("is {found}, expected {rank} axes, rows and tokens first")));
        }
        let declared = match self.decoder.get(name) {
            Some(declared) => Some(declared),
            None if embeds => None,
            None => self.others.get(name),
        };
        let Some(declared) = declared else {
            if name == LABELS || ALWAYS.contains(&name) {
                return match is_integer(entry.dtype) || (name != LABELS && entry.dtype == DataType::Bool) {
                    true => Ok(()),
                    false => Err(Error::invalid(subject, format!("is {found}, expected int64"))),
                };
            }
            return Err(self.unread(subject, name, &found, embeds));
        };
        let expected = || {
            let dims: Vec<String> = declared.dims.iter().map(Dim::to_string).collect();
            format!("{} [{}]", declared.dtype, dims.join(", "))
        };
        let wrong = |remedy: &str| {
            Err(Error::invalid(subject, format!("is {found}, the graph's input is {}", expected())).remedy(remedy))
        };
        if !fits(entry.dtype, declared.dtype) {
            return wrong(match declared.dtype.is_float() {
                true => "cast it, as in `array.astype(np.float32)`",
                false => "cast it, as in `array.astype(np.int64)`",
            });
        }
        let sizes = entry.shape.iter().zip(&declared.dims);
        let same = |(&size, dim): (&usize, &Dim)| match dim {
            // A graph with batch size 1 processes a batch row by row.
            Dim::Known(1) => true,
            Dim::Known(known) => usize::try_from(*known) == Ok(size),
            Dim::Symbol(_) | Dim::Unknown => true,
        };
        if entry.shape.len() != declared.dims.len() || !sizes.into_iter().all(same) {
            return wrong("give the tensor as the graph takes it, batch axis included");
        }
        Ok(())
    }

    fn unread(&self, subject: &str, name: &str, found: &str, embeds: bool) -> Error {
        if embeds && self.others.contains_key(name) {
            return Error::invalid(subject, format!("is {found}, but nothing reads it beside `{EMBEDS}`"))
                .remedy(format!("leave it out, or leave out `{EMBEDS}` and give `input_ids`"));
        }
        let others = self.others.keys().filter(|_| !embeds);
        let known: Vec<&str> =
            self.decoder.keys().chain(others).map(String::as_str).filter(|name| !name.starts_with("past")).collect();
        Error::invalid(subject, format!("is {found}, but no graph of the model has an input of this name"))
            .remedy(format!("known are {LABELS}, {}", list_preview(&known, 24)))
    }
}

fn is_integer(dtype: DataType) -> bool {
    !dtype.is_float() && !matches!(dtype, DataType::Bool | DataType::String)
}

/// True when a file's element type can be fed to an input. Float inputs take floats, but only f64 inputs take f64;
/// integer inputs take integers and booleans. Values are converted to the declared type; f32 is rounded when the graph
/// computes in half precision.
fn fits(found: DataType, declared: DataType) -> bool {
    match declared {
        // Values are kept as f32, which does not hold an f64.
        DataType::Float | DataType::Float16 | DataType::Bfloat16 | DataType::Double => {
            found.is_float() && found != DataType::Double
        }
        DataType::Bool => found == DataType::Bool,
        _ => is_integer(found) || found == DataType::Bool,
    }
}

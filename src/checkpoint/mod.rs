//! Hugging Face checkpoints: named tensors in safetensors files, and low-rank adapters for one.

mod adapter;
mod hub;
mod save;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

use crate::base::{
    Error, MappedFile, Result, Sha256Digest, contained_path, list_preview, sha256_json, sha256_large_file,
};
use crate::ir::{DataType, Tensor, TensorData};

pub use adapter::Adapter;
pub use hub::checkpoint_on_disk;
pub use save::{NamedTensor, save};
pub use values::{floats, from_floats};

/// Name of the one weight file of a small checkpoint.
const SINGLE: &str = "model.safetensors";
/// Name of the list of the weight files of a large one.
const INDEX: &str = "model.safetensors.index.json";
/// Name of an adapter's settings.
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// The largest list of weight files that is read.
const MAX_INDEX_BYTES: u64 = 64 << 20;

/// The named tensors of a checkpoint; their content stays in the mapped files.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    files: Vec<PathBuf>,
    tensors: BTreeMap<String, Tensor>,
}

impl Checkpoint {
    /// Opens a folder that `save_pretrained` wrote, or one `.safetensors` file.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` when there are no weights in safetensors, a file of the list is missing or
    /// outside of the folder, a tensor is in two files, or a file is malformed.
    pub fn open(path: &Path) -> Result<Self> {
        let files = weight_files(path)?;
        let mut tensors = BTreeMap::new();
        for file in &files {
            for (name, tensor) in read_file(file)? {
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(Error::invalid(format!("`{}`", path.display()), format!("has tensor `{name}` twice"))
                        .remedy("remove the weight files that are not of this checkpoint"));
                }
            }
        }
        Ok(Checkpoint { path: path.to_path_buf(), files, tensors })
    }

    /// Path that it was opened from.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// All tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, Tensor> {
        &self.tensors
    }

    /// One digest over the weight files.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        let digests: Vec<Sha256Digest> =
            self.files.iter().map(|file| sha256_large_file(file)).collect::<Result<_>>()?;
        sha256_json(&digests)
    }
}

/// The weight files of a checkpoint.
fn weight_files(path: &Path) -> Result<Vec<PathBuf>> {
    let metadata = fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
    if !metadata.is_dir() {
        return Ok(vec![path.to_path_buf()]);
    }
    let index = path.join(INDEX);
    if !index.exists() {
        let single = path.join(SINGLE);
        if single.exists() {
            return Ok(vec![single]);
        }
        return Err(Error::invalid(
            format!("`{}`", path.display()),
            format!("has neither `{SINGLE}` nor `{INDEX}`, so it is no checkpoint in safetensors"),
        )
        .remedy("give the folder that `save_pretrained` wrote; save weights of another format as safetensors first"));
    }
    files_of_index(&index)?.iter().map(|name| contained_path(path, name)).collect()
}

/// The files that a list of weight files names. They need not be there.
fn files_of_index(index: &Path) -> Result<BTreeSet<String>> {
    let size = fs::metadata(index).map_err(|e| Error::io("read", index, e))?.len();
    let wrong = |problem: String| {
        Error::invalid(format!("`{}`", index.display()), problem).remedy("download the checkpoint again")
    };
    if size > MAX_INDEX_BYTES {
        return Err(wrong(format!("has {size} bytes, more than the {MAX_INDEX_BYTES} that are read")));
    }
    let text = fs::read(index).map_err(|e| Error::io("read", index, e))?;
    let value: Value = serde_json::from_slice(&text).map_err(|e| wrong(format!("is not JSON: {e}")))?;
    let map = value.get("weight_map").and_then(Value::as_object).ok_or_else(|| wrong("has no `weight_map`".into()))?;
    let text = || wrong("names a file by something that is no text".into());
    map.values().map(|file| file.as_str().map(str::to_string).ok_or_else(text)).collect()
}

/// Element types of safetensors files with those of graphs.
pub const SAFETENSORS_TYPES: &[(Dtype, DataType)] = &[
    (Dtype::F32, DataType::Float),
    (Dtype::F64, DataType::Double),
    (Dtype::F16, DataType::Float16),
    (Dtype::BF16, DataType::Bfloat16),
    (Dtype::I64, DataType::Int64),
    (Dtype::I32, DataType::Int32),
    (Dtype::I16, DataType::Int16),
    (Dtype::I8, DataType::Int8),
    (Dtype::U64, DataType::Uint64),
    (Dtype::U32, DataType::Uint32),
    (Dtype::U16, DataType::Uint16),
    (Dtype::U8, DataType::Uint8),
    (Dtype::BOOL, DataType::Bool),
];

/// The tensors of one safetensors file.
fn read_file(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let file = Arc::new(MappedFile::open(path)?);
    let wrong = |problem: String| {
        Error::invalid(format!("`{}`", path.display()), format!("is not a readable safetensors file: {problem}"))
            .remedy("download the file again, or save the checkpoint with `save_pretrained`")
    };
    // Checks that the tensors lie in the file, one behind the other.
    SafeTensors::deserialize(&file).map_err(|e| wrong(e.to_string()))?;
    let (header, metadata) = SafeTensors::read_metadata(&file).map_err(|e| wrong(e.to_string()))?;
    let begin = header.checked_add(8).ok_or_else(|| wrong("its header is too long".into()))? as u64;
    let mut tensors = Vec::new();
    let mut unknown = Vec::new();
    for (name, info) in metadata.tensors() {
        let Some(&(_, dtype)) = SAFETENSORS_TYPES.iter().find(|(dtype, _)| *dtype == info.dtype) else {
            unknown.push(format!("{name} ({:?})", info.dtype));
            continue;
        };
        let (first, end) = (info.data_offsets.0 as u64, info.data_offsets.1 as u64);
        let dims: Vec<u64> = info.shape.iter().map(|&size| size as u64).collect();
        let mut tensor = Tensor::from_bytes(dtype, &dims, Vec::new());
        tensor.data =
            TensorData::Mapped { file: file.clone(), offset: begin + first, length: end - first, external: true };
        tensors.push((name, tensor));
    }
    if !unknown.is_empty() {
        return Err(wrong(format!("elements of {} are of an unknown type", list_preview(&unknown, 4))));
    }
    Ok(tensors)
}

/// Finetuned weights: a whole checkpoint, or an adapter for the base.
#[derive(Debug)]
pub enum Tuned {
    /// Every tensor, under the names of the base.
    Whole(Checkpoint),
    /// Low-rank differences for some tensors of the base.
    Adapter(Adapter),
}

impl Tuned {
    /// Opens a checkpoint, or a folder with `adapter_config.json` as an adapter for `base`.
    ///
    /// Errors: as [`Checkpoint::open`] and [`Adapter::open`]; `Error::Invalid` when names or shapes are not the base's.
    pub fn open(path: &Path, base: &Checkpoint) -> Result<Self> {
        if path.join(ADAPTER_CONFIG).exists() {
            return Ok(Tuned::Adapter(Adapter::open(path, base)?));
        }
        let tuned = Checkpoint::open(path)?;
        check_same_tensors(&tuned, base)?;
        Ok(Tuned::Whole(tuned))
    }

    /// The names of the base's tensors that have other values here.
    ///
    /// Errors: none that a checked checkpoint causes.
    pub fn changed(&self, base: &Checkpoint) -> Result<BTreeSet<String>> {
        match self {
            Tuned::Adapter(adapter) => Ok(adapter.names().map(str::to_string).collect()),
            Tuned::Whole(tuned) => {
                let mut changed = BTreeSet::new();
                for (name, tensor) in base.tensors() {
                    let Some(other) = tuned.tensor_like(name, base) else { continue };
                    let same = tensor.dtype == other.dtype && tensor.bytes() == other.bytes();
                    if !same && (!tensor.dtype.is_float() || floats(tensor)? != floats(other)?) {
                        changed.insert(name.clone());
                    }
                }
                Ok(changed)
            }
        }
    }

    /// The finetuned values of a tensor of the base, in row-major order, rounded to the base's element type.
    ///
    /// Errors: `Error::Invalid` when it is not of floating-point numbers.
    pub fn floats(&self, name: &str, base: &Checkpoint) -> Result<Vec<f32>> {
        let missing = || Error::invalid(format!("tensor `{name}`"), "is not in the base checkpoint");
        let tensor = base.tensors().get(name).ok_or_else(missing)?;
        match self {
            Tuned::Adapter(adapter) => adapter.merged(name, tensor),
            Tuned::Whole(tuned) => floats(tuned.tensor_like(name, base).unwrap_or(tensor)),
        }
    }

    /// One digest over the weight files.
    ///
    /// Errors: `Error::Io` when a file cannot be read.
    pub fn digest(&self) -> Result<Sha256Digest> {
        match self {
            Tuned::Whole(tuned) => tuned.digest(),
            Tuned::Adapter(adapter) => adapter.digest(),
        }
    }
}

impl Checkpoint {
    /// The tensor with the meaning of the base's `name`: of the same name, or where it was not saved because it is tied
    /// to another one, that one.
    fn tensor_like(&self, name: &str, base: &Checkpoint) -> Option<&Tensor> {
        self.tensors.get(name).or_else(|| self.tensors.get(tied(name, base, self)?))
    }
}

/// Another tensor of the base with the same content that the other checkpoint has.
fn tied<'a>(name: &str, base: &'a Checkpoint, other: &Checkpoint) -> Option<&'a str> {
    let tensor = base.tensors.get(name)?;
    let same = |candidate: &Tensor| {
        candidate.dtype == tensor.dtype && candidate.dims == tensor.dims && candidate.bytes() == tensor.bytes()
    };
    let mut found =
        base.tensors.iter().filter(|(key, value)| *key != name && other.tensors.contains_key(*key) && same(value));
    found.next().map(|(key, _)| key.as_str())
}

fn check_same_tensors(tuned: &Checkpoint, base: &Checkpoint) -> Result<()> {
    let subject = || format!("`{}`", tuned.path.display());
    let remedy = "give the checkpoint that was finetuned from this base, with the same names of tensors";
    let extra: Vec<&String> = tuned.tensors.keys().filter(|name| !base.tensors.contains_key(*name)).collect();
    if !extra.is_empty() {
        let problem = format!("has tensors that the base does not have: {}", list_preview(&extra, 4));
        return Err(Error::invalid(subject(), problem).remedy(remedy));
    }
    let lost: Vec<&String> = base.tensors.keys().filter(|name| tuned.tensor_like(name, base).is_none()).collect();
    if !lost.is_empty() {
        let problem = format!("lacks tensors of the base: {}", list_preview(&lost, 4));
        return Err(Error::invalid(subject(), problem).remedy(remedy));
    }
    for (name, tensor) in &base.tensors {
        let Some(other) = tuned.tensor_like(name, base) else { continue };
        if other.dims != tensor.dims {
            let problem = format!("tensor `{name}` has shape {:?}, the base's {:?}", other.dims, tensor.dims);
            return Err(Error::invalid(subject(), problem).remedy(remedy));
        }
    }
    Ok(())
}

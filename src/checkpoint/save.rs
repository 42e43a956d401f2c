//! Writes tensors as safetensors files, in shards with an index where they are large.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use safetensors::{Dtype, View};
use serde_json::json;

use crate::base::{Error, Result, write_json};
use crate::ir::DataType;

use super::{INDEX, SAFETENSORS_TYPES, SINGLE};

/// A tensor to write. Its bytes are made when they are written, one tensor at a time.
pub struct NamedTensor<'a> {
    /// Name in the files.
    pub name: String,
    /// Element type.
    pub dtype: DataType,
    /// Sizes of the axes.
    pub dims: Vec<u64>,
    /// Makes the elements in row-major order.
    pub bytes: Box<dyn Fn() -> Result<Vec<u8>> + 'a>,
}

impl NamedTensor<'_> {
    /// Size of its elements in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.dims.iter().product::<u64>() * self.dtype.bits() as u64 / 8
    }
}

/// Writes tensors into a folder: one file, or several of about `shard_bytes` at most with an index. A larger tensor has a
/// file of its own. Returns the names of the files.
///
/// Errors: `Error::Io`; `Error::Unsupported` for an element type that safetensors lacks; those of the tensors' functions.
pub fn save(folder: &Path, mut tensors: Vec<NamedTensor>, shard_bytes: u64) -> Result<Vec<String>> {
    tensors.sort_by(|a, b| a.name.cmp(&b.name));
    let total: u64 = tensors.iter().map(NamedTensor::size_bytes).sum();
    let mut shards: Vec<Vec<NamedTensor>> = Vec::new();
    let mut filled = 0;
    for tensor in tensors {
        let size = tensor.size_bytes();
        match shards.last_mut() {
            Some(shard) if filled + size <= shard_bytes => {
                filled += size;
                shard.push(tensor);
            }
            _ => {
                filled = size;
                shards.push(vec![tensor]);
            }
        }
    }
    let count = shards.len();
    let mut files = Vec::new();
    let mut map = BTreeMap::new();
    for (number, shard) in shards.iter().enumerate() {
        let file = match count {
            1 => SINGLE.to_string(),
            _ => format!("model-{:05}-of-{count:05}.safetensors", number + 1),
        };
        save_file(&folder.join(&file), shard)?;
        map.extend(shard.iter().map(|tensor| (tensor.name.clone(), file.clone())));
        files.push(file);
    }
    if count > 1 {
        write_json(&folder.join(INDEX), &json!({ "metadata": { "total_size": total }, "weight_map": map }))?;
        files.push(INDEX.to_string());
    }
    Ok(files)
}

fn save_file(path: &Path, tensors: &[NamedTensor]) -> Result<()> {
    let failed = RefCell::new(None);
    let mut views = Vec::new();
    for tensor in tensors {
        let Some(&(dtype, _)) = SAFETENSORS_TYPES.iter().find(|(_, dtype)| *dtype == tensor.dtype) else {
            return Err(Error::unsupported(
                format!("tensor `{}`", tensor.name),
                format!("elements of {}", tensor.dtype),
            ));
        };
        let shape = tensor.dims.iter().map(|&size| size as usize).collect();
        views.push((tensor.name.as_str(), Lazy { tensor, dtype, shape, failed: &failed }));
    }
    // transformers reads no file that does not name its framework.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let written = safetensors::serialize_to_file(views, &Some(metadata), path);
    if let Some(error) = failed.into_inner() {
        return Err(error);
    }
    written.map_err(|e| Error::io("write", path, std::io::Error::other(e.to_string())))
}

/// A tensor whose bytes are made when the file is written; the writer's interface has no place for an error.
struct Lazy<'a, 'b> {
    tensor: &'a NamedTensor<'b>,
    dtype: Dtype,
    shape: Vec<usize>,
    failed: &'a RefCell<Option<Error>>,
}

impl View for Lazy<'_, '_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        match (self.tensor.bytes)() {
            Ok(bytes) => bytes.into(),
            Err(error) => {
                self.failed.borrow_mut().get_or_insert(error);
                vec![0; self.data_len()].into()
            }
        }
    }

    fn data_len(&self) -> usize {
        self.tensor.size_bytes() as usize
    }
}

#[cfg(test)]
mod tests {
    use super::super::Checkpoint;
    use super::*;

    fn numbers(name: &str, count: u64) -> NamedTensor<'static> {
        let bytes = move || Ok((0..count).flat_map(|number| (number as f32).to_le_bytes()).collect());
        NamedTensor { name: name.into(), dtype: DataType::Float, dims: vec![count], bytes: Box::new(bytes) }
    }

    #[test]
    fn small_checkpoints_are_one_file_and_large_ones_have_an_index() {
        let folder = tempfile::tempdir().unwrap();
        let one = folder.path().join("one");
        let many = folder.path().join("many");
        std::fs::create_dir_all(&one).unwrap();
        std::fs::create_dir_all(&many).unwrap();
        let all = || vec![numbers("c", 30), numbers("a", 4), numbers("b", 6)];
        assert_eq!(save(&one, all(), 1000).unwrap(), [SINGLE]);
        // 16 and 24 bytes fit into 40; 120 do not, and have a file of their own.
        let files = save(&many, all(), 40).unwrap();
        assert_eq!(files, ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", INDEX]);
        let index: serde_json::Value = serde_json::from_slice(&std::fs::read(many.join(INDEX)).unwrap()).unwrap();
        assert_eq!(index["metadata"]["total_size"], 160);
        assert_eq!(index["weight_map"]["b"], files[0]);
        for path in [one, many] {
            let read = Checkpoint::open(&path).unwrap();
            assert_eq!(read.tensors().keys().collect::<Vec<_>>(), ["a", "b", "c"]);
            assert_eq!(read.tensors()["b"].bytes(), (numbers("b", 6).bytes)().unwrap());
        }
    }

    #[test]
    fn an_error_while_bytes_are_made_ends_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let broken = NamedTensor { bytes: Box::new(|| Err(Error::invalid("b", "is broken"))), ..numbers("b", 2) };
        let error = save(folder.path(), vec![numbers("a", 1), broken], 1000).unwrap_err();
        assert!(error.to_string().contains("is broken"), "{error}");
    }
}

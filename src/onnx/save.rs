//! Writes a model: a small message, with payloads streamed from their files.

use std::collections::HashMap;
use std::path::Path;

use protobuf::Message;

use crate::base::{AtomicFile, Error, Result, copy_range, folder_of};
use crate::ir::{Model, Tensor, TensorData};

use super::encode::{self, Placed};
use super::wire::put_varint;

/// Initializers below this many bytes stay inside the `.onnx` file: ONNX Runtime reads shapes and axes at load time.
pub const INLINE_LIMIT: u64 = 1024;
/// Tensors of at least this size start at a page boundary, so that runtimes can map them.
const PAGE_ALIGN_MIN: u64 = 1 << 20;
/// Protobuf's own limit for one message.
const MESSAGE_LIMIT: u64 = (1 << 31) - 1;

/// Place of the weights.
#[derive(Clone, Debug, PartialEq)]
pub enum Storage {
    /// Inside the `.onnx` file; at most 2 GiB.
    Inline,
    /// In files next to it. The first has this name; with `chunk_bytes`, further ones have `_1`, `_2`, ... appended.
    External {
        /// Name of the first file, in the model's folder.
        file_name: String,
        /// Size in bytes above which a new file begins. A tensor larger than this gets a file of its own.
        chunk_bytes: Option<u64>,
    },
}

/// Metadata of a model: keys and values.
pub type Metadata = Vec<(String, String)>;

/// Writes a model under its final name. On an error no file remains there. Returns the names of the data files.
///
/// Errors: `Error::Io` when writing fails; `Error::Invalid` when an inline model would
/// exceed 2 GiB or the graph is broken.
pub fn save(model: &Model, path: &Path, storage: &Storage) -> Result<Vec<String>> {
    save_with(model, path, storage, || Ok(Metadata::new()))
}

/// As [`save`], with additional metadata. `metadata` is called after the external data is written, so a caller can
/// compute it on another thread meanwhile.
///
/// Errors: as [`save`] and those of `metadata`.
pub fn save_with(
    model: &Model,
    path: &Path,
    storage: &Storage,
    metadata: impl FnOnce() -> Result<Metadata>,
) -> Result<Vec<String>> {
    crate::ir::check(model)?;
    let folder = folder_of(path);
    let mut data = match storage {
        Storage::Inline => None,
        Storage::External { file_name, chunk_bytes } => Some(DataFiles::new(folder, file_name, *chunk_bytes)),
    };
    let mut file = AtomicFile::create(path)?;
    let place = |name: &str, tensor: &Tensor| match &mut data {
        Some(files) if tensor.byte_len() >= INLINE_LIMIT && encode::is_numeric(tensor) => files.place(name, tensor),
        _ => Ok(Placed::Inline),
    };
    save_into(model, &mut file, place, metadata)?;
    let names = match data {
        Some(files) => files.commit()?,
        None => Vec::new(),
    };
    file.commit()?;
    Ok(names)
}

/// Writes several models into `folder` under these file names, over one file of weights, `data_file`: content that two
/// models share is written once. On an error no file remains. Returns the names of the data files.
///
/// Errors: as [`save`].
pub fn save_sharing(folder: &Path, models: &[(&str, &Model)], data_file: &str) -> Result<Vec<String>> {
    let mut data = DataFiles::new(folder, data_file, None);
    let mut known: HashMap<(usize, u64), (String, u64)> = HashMap::new();
    let mut files = Vec::with_capacity(models.len());
    for (name, model) in models {
        crate::ir::check(model)?;
        let mut file = AtomicFile::create(&folder.join(name))?;
        let place = |name: &str, tensor: &Tensor| {
            if tensor.byte_len() < INLINE_LIMIT || !encode::is_numeric(tensor) {
                return Ok(Placed::Inline);
            }
            // Clones of a tensor have the same bytes in memory.
            let (key, length) = ((tensor.bytes().as_ptr().addr(), tensor.byte_len()), tensor.byte_len());
            if let Some((location, offset)) = known.get(&key) {
                return Ok(Placed::External { location: location.clone(), offset: *offset, length });
            }
            let placed = data.place(name, tensor)?;
            if let Placed::External { location, offset, .. } = &placed {
                known.insert(key, (location.clone(), *offset));
            }
            Ok(placed)
        };
        save_into(model, &mut file, place, || Ok(Metadata::new()))?;
        files.push(file);
    }
    let names = data.commit()?;
    files.into_iter().try_for_each(AtomicFile::commit)?;
    Ok(names)
}

/// Writes the message. `place` decides where each initializer's content is written; `metadata` is called last and adds
/// to the model's own metadata.
///
/// Errors: as [`save`].
pub fn save_into(
    model: &Model,
    file: &mut AtomicFile,
    mut place: impl FnMut(&str, &Tensor) -> Result<Placed>,
    metadata: impl FnOnce() -> Result<Metadata>,
) -> Result<()> {
    let too_large = || {
        Error::invalid("the model", "passes 2 GiB in one file, the limit of protobuf")
            .remedy("store the weights as external data")
    };
    let mut proto = encode::model_without_initializers(model, &mut place)?;
    let graph = proto.graph.take().unwrap_or_default();
    let broken = |e: protobuf::Error| {
        Error::invalid("the graph", format!("cannot be written: {e}"))
            .remedy("check the free space and the permissions of the target's folder")
    };
    let graph_bytes = graph.write_to_bytes().map_err(broken)?;

    // Each initializer is its fields without content and then, for inline numbers only, field 9 with the content.
    let mut heads = Vec::with_capacity(model.graph.body.initializers.len());
    let mut graph_length = graph_bytes.len() as u64;
    for (id, tensor) in &model.graph.body.initializers {
        let name = model.graph.name(*id);
        let placed = place(name, tensor)?;
        let mut head = encode::initializer(name, tensor, &placed, false).write_to_bytes().map_err(broken)?;
        let content = match placed {
            Placed::Inline if encode::is_numeric(tensor) => {
                put_varint(&mut head, 9 << 3 | 2);
                put_varint(&mut head, tensor.byte_len());
                tensor.byte_len()
            }
            _ => 0,
        };
        let mut framed = Vec::with_capacity(head.len() + 12);
        put_varint(&mut framed, 5 << 3 | 2);
        put_varint(&mut framed, head.len() as u64 + content);
        framed.extend_from_slice(&head);
        graph_length = graph_length.checked_add(framed.len() as u64 + content).ok_or_else(too_large)?;
        heads.push((framed, content > 0));
    }
    if graph_length > MESSAGE_LIMIT {
        return Err(too_large());
    }
    encode::set_metadata(&mut proto, &metadata()?);
    let mut start = proto.write_to_bytes().map_err(broken)?;
    put_varint(&mut start, 7 << 3 | 2);
    put_varint(&mut start, graph_length);
    start.extend_from_slice(&graph_bytes);
    file.write_all(&start)?;
    let mut pending = Vec::new();
    for ((_, tensor), (head, has_content)) in model.graph.body.initializers.iter().zip(&heads) {
        pending.extend_from_slice(head);
        if *has_content {
            if tensor.byte_len() < INLINE_LIMIT {
                pending.extend_from_slice(tensor.bytes());
            } else {
                file.write_all(&std::mem::take(&mut pending))?;
                write_content(tensor, file)?;
            }
        }
    }
    file.write_all(&pending)
}

fn write_content(tensor: &Tensor, file: &mut AtomicFile) -> Result<()> {
    match &tensor.data {
        TensorData::Mapped { file: source, offset, length, .. } => copy_range(source, *offset, *length, file),
        _ => file.write_all(tensor.bytes()),
    }
}

/// Data files, filled one after the other.
struct DataFiles<'a> {
    folder: &'a Path,
    stem: &'a str,
    chunk_bytes: Option<u64>,
    done: Vec<AtomicFile>,
    names: Vec<String>,
    length: u64,
    /// True when some content was computed and is not a copy of a file's range.
    computed: bool,
}

impl<'a> DataFiles<'a> {
    fn new(folder: &'a Path, stem: &'a str, chunk_bytes: Option<u64>) -> Self {
        DataFiles { folder, stem, chunk_bytes, done: Vec::new(), names: Vec::new(), length: 0, computed: false }
    }

    fn place(&mut self, _name: &str, tensor: &Tensor) -> Result<Placed> {
        let length = tensor.byte_len();
        let align = if length >= PAGE_ALIGN_MIN { 4096 } else { 64 };
        let mut offset = self.length.next_multiple_of(align);
        let full = self.chunk_bytes.is_some_and(|limit| self.length > 0 && offset.saturating_add(length) > limit);
        if self.done.is_empty() || full {
            let name = match self.done.len() {
                0 => self.stem.to_string(),
                count => format!("{}_{count}", self.stem),
            };
            self.done.push(AtomicFile::create(&self.folder.join(&name))?);
            self.names.push(name);
            self.length = 0;
            offset = 0;
        }
        let (Some(file), Some(location)) = (self.done.last_mut(), self.names.last()) else {
            return Ok(Placed::Inline);
        };
        file.write_all(&vec![0; (offset - self.length) as usize])?;
        write_content(tensor, file)?;
        self.computed |= !matches!(tensor.data, TensorData::Mapped { .. });
        self.length = offset + length;
        Ok(Placed::External { location: location.clone(), offset, length })
    }

    /// Flushes computed data to the disk before the rename. Data copied from the input is not flushed: the system
    /// writes it later, and the same command can recreate it after a power failure.
    fn commit(self) -> Result<Vec<String>> {
        for file in self.done {
            if self.computed { file.commit()? } else { file.commit_unflushed()? }
        }
        Ok(self.names)
    }
}

//! Reader of named tensors in a safetensors or NumPy `.npz` file.

use std::collections::BTreeMap;
use std::io::{Cursor, Read};
use std::ops::Range;
use std::path::Path;

use half::{bf16, f16};
use ndarray::{ArrayD, IxDyn};
use safetensors::SafeTensors;
use zip::{CompressionMethod, ZipArchive};

use crate::base::{Error, MappedFile, Result};
use crate::checkpoint::SAFETENSORS_TYPES;
use crate::data::guard::guarded;
use crate::ir::DataType;
use crate::prompt::Array;

use super::npy::npy_header;

/// Maximum compression ratio: deflate expands one byte to at most 1032 bytes.
const MOST_COMPRESSED: u64 = 1032;
/// Maximum size of an array's header, in bytes.
const HEADER_BYTES: u64 = 64 << 10;

/// A tensor in a file: element type, shape and position of its bytes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct StoredTensor {
    pub dtype: DataType,
    pub shape: Vec<usize>,
    place: StoredBytes,
}

#[derive(Clone, Debug, PartialEq)]
enum StoredBytes {
    /// Byte range in the file.
    Plain(Range<usize>),
    /// Index of a compressed zip entry, and offset of the elements in its decompressed bytes.
    Compressed { index: usize, begin: u64 },
}

/// A file of named tensors, mapped into memory.
#[derive(Debug)]
pub(super) struct Archive {
    map: MappedFile,
    entries: BTreeMap<String, StoredTensor>,
}

impl Archive {
    /// Opens a file and reads its index, without the elements.
    ///
    /// Errors: `Error::Io`; `Error::Invalid` for a file of another format, or with the name of a malformed tensor.
    pub fn open(path: &Path) -> Result<Self> {
        let map = MappedFile::open(path)?;
        let zipped = path.extension().is_some_and(|extension| extension == "npz");
        let read = || if zipped { npz_entries(&map) } else { safetensors_entries(&map) };
        let entries = guarded(read).and_then(|entries| entries).map_err(|problem| {
            let format = if zipped { ".npz" } else { ".safetensors" };
            Error::invalid(format!("`{}`", path.display()), format!("is not a readable {format} file: {problem}"))
                .remedy("write it with `np.savez` or `safetensors.numpy.save_file`")
        })?;
        Ok(Archive { map, entries })
    }

    /// Tensors by name.
    pub fn entries(&self) -> &BTreeMap<String, StoredTensor> {
        &self.entries
    }

    /// Reads a tensor: floats as f32, integers as i64, booleans as booleans.
    ///
    /// Errors: `Error::Invalid` with the tensor's name when its bytes are damaged, do not fit its shape, or have an
    /// unsupported type.
    pub fn read(&self, name: &str) -> Result<Array> {
        let subject = || format!("tensor `{name}` of `{}`", self.map.path().display());
        let entry = self.entries.get(name).ok_or_else(|| Error::invalid(subject(), "does not exist"))?;
        let array = match &entry.place {
            StoredBytes::Plain(range) => {
                self.map.get(range.clone()).ok_or_else(|| "ends early".to_string()).and_then(|bytes| entry.array(bytes))
            }
            StoredBytes::Compressed { index, begin } => guarded(|| {
                let mut zip = ZipArchive::new(Cursor::new(&self.map[..])).map_err(|e| e.to_string())?;
                let mut file = zip.by_index(*index).map_err(|e| e.to_string())?;
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).map_err(|e| e.to_string())?;
                let begin = usize::try_from(*begin).unwrap_or(usize::MAX);
                entry.array(bytes.get(begin..).ok_or("ends early")?)
            })
            .and_then(|array| array),
        };
        array.map_err(|problem| Error::invalid(subject(), problem).remedy("write the file again"))
    }
}

impl StoredTensor {
    fn bytes(&self) -> Option<usize> {
        let count = self.shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size))?;
        count.checked_mul(self.dtype.bits() / 8)
    }

    fn array(&self, bytes: &[u8]) -> Result<Array, String> {
        if self.bytes() != Some(bytes.len()) {
            return Err(format!("has {} bytes for {} {:?}", bytes.len(), self.dtype, self.shape));
        }
        macro_rules! elements {
            ($ty:ty) => {
                bytes.as_chunks().0.iter().map(|chunk| <$ty>::from_le_bytes(*chunk))
            };
        }
        let floats = |data: Vec<f32>| ArrayD::from_shape_vec(IxDyn(&self.shape), data).map(Array::Float);
        let ints = |data: Vec<i64>| ArrayD::from_shape_vec(IxDyn(&self.shape), data).map(Array::Int);
        let array = match self.dtype {
            DataType::Float => floats(elements!(f32).collect()),
            DataType::Float16 => floats(elements!(f16).map(f16::to_f32).collect()),
            DataType::Bfloat16 => floats(elements!(bf16).map(bf16::to_f32).collect()),
            DataType::Int64 => ints(elements!(i64).collect()),
            DataType::Int32 => ints(elements!(i32).map(i64::from).collect()),
            DataType::Int16 => ints(elements!(i16).map(i64::from).collect()),
            DataType::Int8 => ints(elements!(i8).map(i64::from).collect()),
            DataType::Uint32 => ints(elements!(u32).map(i64::from).collect()),
            DataType::Uint16 => ints(elements!(u16).map(i64::from).collect()),
            DataType::Uint8 => ints(bytes.iter().map(|&x| i64::from(x)).collect()),
            DataType::Uint64 => {
                let data: Option<Vec<i64>> = elements!(u64).map(|x| i64::try_from(x).ok()).collect();
                ints(data.ok_or("holds a number above 9223372036854775807")?)
            }
            DataType::Bool => {
                let data = bytes.iter().map(|&byte| byte != 0).collect();
                ArrayD::from_shape_vec(IxDyn(&self.shape), data).map(Array::Bool)
            }
            dtype => return Err(format!("has elements of {dtype}, which no input takes")),
        };
        array.map_err(|e| e.to_string())
    }
}

fn safetensors_entries(bytes: &[u8]) -> Result<BTreeMap<String, StoredTensor>, String> {
    // Checks that the tensors are inside the file, without gaps or overlaps.
    SafeTensors::deserialize(bytes).map_err(|e| e.to_string())?;
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| e.to_string())?;
    let mut entries = BTreeMap::new();
    for (name, info) in metadata.tensors() {
        let row = SAFETENSORS_TYPES.iter().find(|(dtype, _)| *dtype == info.dtype);
        let Some(&(_, dtype)) = row else {
            return Err(format!("tensor `{name}` has elements of {:?}, which no input takes", info.dtype));
        };
        let before = header.checked_add(8).ok_or("its header is too long")?;
        let place = StoredBytes::Plain(before + info.data_offsets.0..before + info.data_offsets.1);
        entries.insert(name.clone(), StoredTensor { dtype, shape: info.shape.clone(), place });
    }
    Ok(entries)
}

fn npz_entries(bytes: &[u8]) -> Result<BTreeMap<String, StoredTensor>, String> {
    let mut zip = ZipArchive::new(Cursor::new(bytes)).map_err(|e| e.to_string())?;
    let mut entries = BTreeMap::new();
    for index in 0..zip.len() {
        let mut file = zip.by_index(index).map_err(|e| e.to_string())?;
        let name = file.name().to_string();
        let wrong = |problem: &str| format!("array `{name}` {problem}");
        let key = name.strip_suffix(".npy").ok_or_else(|| wrong("is no .npy file"))?.to_string();
        let (size, stored) = (file.size(), file.compressed_size());
        if size > stored.saturating_mul(MOST_COMPRESSED) {
            return Err(wrong(&format!("claims {size} bytes in {stored} compressed ones")));
        }
        let plain = file.compression() == CompressionMethod::Stored;
        let start = file.data_start();
        let mut head = Vec::new();
        file.by_ref().take(HEADER_BYTES).read_to_end(&mut head).map_err(|e| wrong(&e.to_string()))?;
        let header = npy_header(&head).map_err(|problem| wrong(&problem))?;
        let place = match (plain, usize::try_from(start).ok()) {
            (true, Some(start)) => {
                let end = usize::try_from(size).ok().and_then(|size| start.checked_add(size));
                StoredBytes::Plain(start + header.begin..end.ok_or_else(|| wrong("is too long"))?)
            }
            _ => StoredBytes::Compressed { index, begin: header.begin as u64 },
        };
        let entry = StoredTensor { dtype: header.dtype, shape: header.shape, place };
        let wanted = entry.bytes().and_then(|bytes| (bytes as u64).checked_add(header.begin as u64));
        if wanted != Some(size) {
            return Err(wrong(&format!("has {size} bytes, which is not what {:?} takes", entry.shape)));
        }
        if entries.insert(key, entry).is_some() {
            return Err(wrong("is there twice"));
        }
    }
    Ok(entries)
}

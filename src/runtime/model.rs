//! Sessions of graphs in memory: the graph is written to a temporary file without its weights, which stay mapped.

use std::collections::HashSet;

use ort::memory::{Allocator, MemoryInfo};
use ort::session::builder::SessionBuilder;
use ort::value::{DynValue, DynValueTypeMarker, Value};
use ort::{AsPointer, sys};

use crate::base::{AtomicFile, Error, Result, ScratchDir};
use crate::ir::{Model, Tensor};
use crate::onnx::{INLINE_LIMIT, Metadata, Placed, save_into};

use super::ENGINE;
use super::backing::Backing;
use super::session::{Runtime, Session, SessionOptions};
use super::tensor::element_type;

/// The external-data location in the written graph; the weights are passed to the session separately.
const ELSEWHERE: &str = "weights";

impl Runtime {
    /// Loads a graph in memory. Weights of 1 KB and more are read through their memory maps, not copied.
    ///
    /// Errors: `Error::Invalid` when the graph is broken; `Error::Io` when no temporary file can be written;
    /// `Error::Engine` when ONNX Runtime rejects it.
    pub fn session_of(&self, model: &Model, options: &SessionOptions) -> Result<Session> {
        crate::ir::check(model)?;
        let folder = ScratchDir::create_in(&std::env::temp_dir())?;
        let path = folder.path().join("model.onnx");
        let own: HashSet<*const Tensor> =
            model.graph.body.initializers.iter().map(|(_, tensor)| std::ptr::from_ref(tensor)).collect();
        let mut weights: Vec<(String, &Tensor)> = Vec::new();
        for (id, tensor) in &model.graph.body.initializers {
            if tensor.byte_len() >= INLINE_LIMIT && element_type(tensor.dtype).is_ok() {
                weights.push((model.graph.name(*id).to_string(), tensor));
            }
        }
        let mut file = AtomicFile::create(&path)?;
        let place = |_: &str, tensor: &Tensor| {
            let given = tensor.byte_len() >= INLINE_LIMIT && element_type(tensor.dtype).is_ok();
            if given && own.contains(&std::ptr::from_ref(tensor)) {
                return Ok(Placed::External { location: ELSEWHERE.into(), offset: 0, length: tensor.byte_len() });
            }
            Ok(Placed::Inline)
        };
        save_into(model, &mut file, place, || Ok(Metadata::new()))?;
        file.commit()?;

        let subject = format!("graph `{}`", model.graph.body.name);
        let mut builder = self.builder(options)?;
        let mut backing = Vec::with_capacity(weights.len());
        for (name, tensor) in &weights {
            builder = give_weight(builder, name, tensor, &mut backing)?;
        }
        let inner = builder.commit_from_file(&path).map_err(|e| Error::engine(ENGINE, subject.clone(), e))?;
        Session::new(inner, self.device(), subject, backing)
    }
}

fn give_weight(
    builder: SessionBuilder,
    name: &str,
    tensor: &Tensor,
    backing: &mut Vec<Backing>,
) -> Result<SessionBuilder> {
    let element = element_type(tensor.dtype)?;
    let bytes = tensor.bytes();
    let width = (tensor.dtype.bits() / 8).max(1);
    let data = if bytes.as_ptr().addr().is_multiple_of(width) {
        backing.push(Backing::Shared(tensor.data.clone()));
        bytes.as_ptr()
    } else {
        let words = bytes.chunks(8).map(|chunk| {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            u64::from_ne_bytes(word)
        });
        let words: Vec<u64> = words.collect();
        let data = words.as_ptr().cast();
        backing.push(Backing::Aligned(words));
        data
    };
    let dims: Vec<i64> = tensor.dims.iter().map(|&dim| i64::try_from(dim).unwrap_or(i64::MAX)).collect();
    let failed = |e: ort::Error| Error::engine(ENGINE, format!("weight `{name}`"), e);
    let info = MemoryInfo::default();
    let mut value = std::ptr::null_mut();
    // SAFETY: `data` is readable for `bytes.len()` bytes while `backing` is held, and the session holds it longer than
    // its graph. ONNX Runtime does not write to weights.
    let status = unsafe {
        (ort::api().CreateTensorWithDataAsOrtValue)(
            info.ptr(),
            data.cast_mut().cast(),
            bytes.len(),
            dims.as_ptr(),
            dims.len(),
            sys::ONNXTensorElementDataType::from(element),
            &mut value,
        )
    };
    // SAFETY: the status comes from the call above and is read once.
    unsafe { ort::Error::result_from_status(status) }.map_err(failed)?;
    let Some(value) = std::ptr::NonNull::new(value) else {
        return Err(Error::engine(ENGINE, format!("weight `{name}`"), "no tensor came back"));
    };
    // SAFETY: a new CPU tensor. Dropping it releases the handle, but not the memory, which it does not own.
    let value: DynValue = unsafe { Value::<DynValueTypeMarker>::from_ptr(value, Some(&Allocator::default())) };
    builder.with_external_initializer(name, value).map_err(|e| failed(e.into()))
}

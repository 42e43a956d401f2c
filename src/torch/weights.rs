//! Weights as tensors: frozen ones share memory with the mapped file unless they are widened;
//! trainable ones are copies.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

use tch::{Device, Kind, Tensor};

use crate::base::{Error, MappedFile, Result};
use crate::ir::{self, TensorData};

use super::convert::{computed, count_of, dims_of, kind_of, tensor_from_ir};
use super::op_error::OpResult;
use super::wiring::Slot;

/// Storage of frozen weights that are quantised or have 16 bits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Hold {
    /// In f32, widened and dequantised once: fast, but two to eight times as large as the file.
    #[default]
    Widened,
    /// In the file's type, on a CPU without a copy. Each operator that reads one converts it in every run.
    Stored,
}

/// Integer constants of at most this many elements stay on the host, because they feed shapes.
pub(super) const HOST_INTEGERS: u64 = 4096;
/// Float constants of at most this many elements stay on the host: scales and thresholds.
const HOST_FLOATS: u64 = 16;

/// Values that are equal in every run: frozen weights and constants. `lowers` contains those that a schedule reads in
/// the autocast kind only.
#[derive(Default)]
pub(super) struct FixedTensors {
    exact: HashMap<Slot, Tensor>,
    lowered: HashMap<Slot, Tensor>,
}

impl FixedTensors {
    pub fn get(&self, slot: Slot, lowers: &HashSet<Slot>) -> Option<&Tensor> {
        if lowers.contains(&slot) { self.lowered.get(&slot) } else { self.exact.get(&slot) }
    }

    pub fn insert(&mut self, slot: Slot, tensor: Tensor, lowers: &HashSet<Slot>) {
        let place = if lowers.contains(&slot) { &mut self.lowered } else { &mut self.exact };
        place.insert(slot, tensor);
    }
}

/// Frozen weights and constants of several programs of one graph. Keys: the slot, and true for the autocast kind.
#[derive(Default)]
pub(super) struct Shared(Mutex<HashMap<(Slot, bool), Tensor>>);

impl Shared {
    /// The tensor of a weight, created by `make` if no program has it yet.
    ///
    /// Errors: those of `make`.
    pub fn weight(&self, key: (Slot, bool), make: impl FnOnce() -> Result<Tensor>) -> Result<Tensor> {
        let mut known = self.lock();
        if let Some(tensor) = known.get(&key) {
            return Ok(tensor.shallow_clone());
        }
        let tensor = make()?;
        known.insert(key, tensor.shallow_clone());
        Ok(tensor)
    }

    /// The tensors of all constants of a schedule, created together by `make` if one is missing.
    ///
    /// Errors: those of `make`.
    pub fn constants(
        &self,
        slots: &HashSet<Slot>,
        lowers: &HashSet<Slot>,
        make: impl FnOnce() -> Result<Vec<(Slot, Tensor)>>,
    ) -> Result<Vec<(Slot, Tensor)>> {
        let mut known = self.lock();
        let key = |slot: Slot| (slot, lowers.contains(&slot));
        let found = slots.iter().map(|&slot| Some((slot, known.get(&key(slot))?.shallow_clone())));
        if let Some(all) = found.collect() {
            return Ok(all);
        }
        let made = make()?;
        known.extend(made.iter().map(|(slot, tensor)| (key(*slot), tensor.shallow_clone())));
        Ok(made)
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<(Slot, bool), Tensor>> {
        self.0.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

/// A constant in 16 bits if that is lossless, as for a transposed or sliced 16-bit weight.
pub(super) fn narrowed(tensor: Tensor) -> OpResult<Tensor> {
    if tensor.f_kind()? != Kind::Float || tensor.numel() as u64 <= HOST_INTEGERS {
        return Ok(tensor);
    }
    for kind in [Kind::Half, Kind::BFloat16] {
        let narrow = tensor.f_to_kind(kind)?;
        if narrow.f_to_kind(Kind::Float)?.f_equal(&tensor)? {
            return Ok(narrow);
        }
    }
    Ok(tensor)
}

/// Files into which LibTorch tensors point. LibTorch has no hook for the end of the last such tensor (it may be a view,
/// or saved for a backward pass), so a shared file stays mapped until the process ends.
static SHARED: Mutex<Vec<Arc<MappedFile>>> = Mutex::new(Vec::new());

/// True for constants that a program on a GPU keeps on the host.
pub(super) fn stays_on_host(tensor: &ir::Tensor) -> bool {
    tensor.element_count() <= if tensor.dtype.is_float() { HOST_FLOATS } else { HOST_INTEGERS }
}

/// A frozen weight on its device.
///
/// Errors: `Error::Unsupported` for element types without a LibTorch kind, `Error::Invalid` for a wrong byte count.
pub(super) fn frozen(name: &str, tensor: &ir::Tensor, device: Device, hold: Hold) -> Result<Tensor> {
    let host = match share(name, tensor)? {
        Some(shared) => shared,
        None => tensor_from_ir(name, tensor)?,
    };
    let host = match hold {
        Hold::Stored => host,
        Hold::Widened => {
            let wide = computed(name, host.shallow_clone())?;
            if wide.data_ptr() != host.data_ptr() {
                // The copy takes the place of what is in the file.
                tensor.release();
            }
            wide
        }
    };
    if device == Device::Cpu || stays_on_host(tensor) {
        return Ok(host);
    }
    host.f_to_device(device).map_err(|e| Error::engine("LibTorch", format!("tensor `{name}`"), e))
}

/// A tensor over the mapped bytes, if they are mapped, aligned and of a kind that LibTorch supports.
fn share(name: &str, tensor: &ir::Tensor) -> Result<Option<Tensor>> {
    let (TensorData::Mapped { file, .. }, Some(kind)) = (&tensor.data, kind_of(tensor.dtype)) else {
        return Ok(None);
    };
    let dims = dims_of(name, tensor)?;
    let bytes = tensor.bytes();
    let width = kind.elt_size_in_bytes();
    let wanted = count_of(&dims).and_then(|count| count.checked_mul(width));
    if bytes.is_empty() || wanted != Some(bytes.len()) || !bytes.as_ptr().addr().is_multiple_of(width) {
        return Ok(None);
    }
    let mut shared = SHARED.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    if !shared.iter().any(|known| Arc::ptr_eq(known, file)) {
        shared.push(file.clone());
    }
    // SAFETY: the bytes fill the shape, are aligned for the kind, and stay mapped because `SHARED` holds the file. The
    // interpreter never writes to a frozen weight.
    unsafe { Tensor::f_from_blob(bytes.as_ptr(), &dims, &[], kind, Device::Cpu) }
        .map(Some)
        .map_err(|e| Error::engine("LibTorch", format!("tensor `{name}`"), e))
}

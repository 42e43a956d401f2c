//! Memory of the GPU: what is free, what LibTorch holds, and pinned host memory.

use std::ffi::{c_char, c_int, c_void};

use tch::Tensor;

use super::ranks::text_of;
use crate::base::{Error, Result};

/// A copy of a host tensor in pinned memory, from which copies to the GPU are asynchronous.
///
/// Errors: `Error::Engine` when LibTorch has no GPU.
pub fn pinned(tensor: &Tensor) -> Result<Tensor> {
    let mut copy = tensor.shallow_clone();
    // SAFETY: the handle is a tensor of LibTorch that lives until the call returns; the call puts another one in its place.
    call("pinned memory", |error| unsafe { interlace_pin(copy.as_mut_ptr().cast(), error) })?;
    Ok(copy)
}

/// Gives the GPU memory that LibTorch holds for later tensors back, so that ONNX Runtime can take it.
///
/// Errors: `Error::Engine` when LibTorch has no GPU.
pub fn release_cached() -> Result<()> {
    // SAFETY: the pointer lives until the call returns.
    call("the GPU's memory", |error| unsafe { interlace_release_cached(error) })
}

/// Bytes of a GPU that no process uses.
///
/// Errors: as [`super::cuda_device`]; `Error::Engine` when LibTorch cannot read it.
pub fn free_gpu_memory(gpu: usize) -> Result<u64> {
    bytes_of(gpu, interlace_free_memory)
}

/// The most bytes of a GPU that tensors have taken so far.
///
/// Errors: as [`free_gpu_memory`].
pub fn peak_gpu_memory(gpu: usize) -> Result<u64> {
    bytes_of(gpu, interlace_peak_memory)
}

type Read = unsafe extern "C" fn(c_int, *mut u64, *mut *mut c_char) -> bool;

fn bytes_of(gpu: usize, read: Read) -> Result<u64> {
    super::cuda_device(gpu)?;
    let mut bytes = 0;
    // SAFETY: the pointers live until the call returns.
    call(&format!("the memory of cuda:{gpu}"), |error| unsafe { read(gpu as c_int, &mut bytes, error) })?;
    Ok(bytes)
}

fn call(subject: &str, work: impl FnOnce(*mut *mut c_char) -> bool) -> Result<()> {
    let mut error = std::ptr::null_mut();
    match work(&mut error) {
        true => Ok(()),
        false => Err(Error::engine("LibTorch", subject, text_of(error))),
    }
}

unsafe extern "C" {
    fn interlace_pin(tensor: *mut c_void, error: *mut *mut c_char) -> bool;
    fn interlace_release_cached(error: *mut *mut c_char) -> bool;
    fn interlace_free_memory(gpu: c_int, bytes: *mut u64, error: *mut *mut c_char) -> bool;
    fn interlace_peak_memory(gpu: c_int, bytes: *mut u64, error: *mut *mut c_char) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::torch::cuda_device;

    /// Holds with and without a GPU: a call works, or its error is LibTorch's own; nothing ends the process.
    #[test]
    fn gpu_memory_is_read_or_the_error_is_libtorchs_own() {
        let tensor = Tensor::from_slice(&[1f32, 2.0]);
        let subject = |error: Error| {
            let Error::Engine { .. } = &error else { panic!("{error}") };
            error.to_string()
        };
        if cuda_device(0).is_ok() {
            let copy = pinned(&tensor).unwrap();
            assert!(copy.is_pinned(tch::Device::Cuda(0)) && copy.equal(&tensor));
            release_cached().unwrap();
            assert!(free_gpu_memory(0).unwrap() > 0);
            let held = Tensor::zeros([1 << 20], (tch::Kind::Float, tch::Device::Cuda(0)));
            assert!(peak_gpu_memory(0).unwrap() >= 4 << 20);
            drop(held);
        } else {
            assert!(subject(pinned(&tensor).unwrap_err()).contains("pinned memory"));
            assert!(subject(release_cached().unwrap_err()).contains("the GPU's memory"));
            assert!(free_gpu_memory(0).unwrap_err().to_string().contains("--device cpu"));
        }
    }
}

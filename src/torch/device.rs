//! CUDA, loaded only when a user asks for it.

use std::ffi::{CStr, CString};
use std::sync::OnceLock;

use tch::{Cuda, Device};

use crate::base::{Error, Result};

static CUDA: OnceLock<Result<(), String>> = OnceLock::new();

/// The CUDA device `index`, after loading LibTorch's CUDA library.
///
/// Errors: `Error::Unsupported` when the library does not load or there is no such GPU; never falls back to the CPU.
pub fn cuda_device(index: usize) -> Result<Device> {
    let subject = format!("device cuda:{index}");
    let count = cuda_device_count()?;
    if index >= count {
        let problem =
            if count == 0 { "no GPU was found".into() } else { format!("{count} GPUs were found, counted from 0") };
        return Err(Error::unsupported(subject, problem).remedy("use --device cpu, or run on a machine with the GPU"));
    }
    Ok(Device::Cuda(index))
}

/// Number of GPUs that LibTorch sees.
///
/// Errors: `Error::Unsupported` when LibTorch's CUDA library cannot be loaded.
pub fn cuda_device_count() -> Result<usize> {
    CUDA.get_or_init(load).as_ref().map_err(|message| {
        Error::unsupported("CUDA", format!("LibTorch's CUDA library does not load: {message}")).remedy(
            "put libtorch_cuda.so of LibTorch 2.11.0 and the CUDA libraries on LD_LIBRARY_PATH, or use --device cpu",
        )
    })?;
    Ok(usize::try_from(Cuda::device_count()).unwrap_or(0))
}

/// True on x86-64 processors without instructions for bf16, where a training step in bf16 took 3.3 times as long as one in
/// f32 and as much memory.
pub fn cpu_lacks_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    let lacks = !is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let lacks = false;
    lacks
}

fn load() -> Result<(), String> {
    // LibTorch finds its CUDA back end through global symbols, hence RTLD_GLOBAL.
    let name = CString::new("libtorch_cuda.so").map_err(|e| e.to_string())?;
    // SAFETY: the name is a terminated string; the library's initialisers are LibTorch's own.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        return Ok(());
    }
    // SAFETY: dlerror gives null or a terminated string that lives until the next call on this thread.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return Err("no reason given".into());
    }
    // SAFETY: checked not null above.
    Err(unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned())
}

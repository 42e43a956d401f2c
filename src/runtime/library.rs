//! The ONNX Runtime library: located, loaded and checked once per process.

use std::path::PathBuf;
use std::sync::Mutex;

use ort::environment::{Environment, GlobalThreadPoolOptions};
use ort::logging::LogLevel;

use crate::base::{Error, Result};

use super::{ENGINE, cuda_libraries};

/// Environment variable with the path of the library.
const VARIABLE: &str = "ORT_DYLIB_PATH";

static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// Environment variable that turns telemetry off before the library loads. The library's own function for this comes
/// too late: by then it has created a device id, a database and a log in the user's cache and in the folder for
/// temporary files.
const NO_TELEMETRY: &str = "ORT_DISABLE_TELEMETRY";

/// Prevents ONNX Runtime from storing or sending usage data.
///
/// # Safety
///
/// The process must have no other threads, because one of them could read the environment at the same time.
pub unsafe fn keep_telemetry_off() {
    // SAFETY: guaranteed by the caller.
    unsafe { std::env::set_var(NO_TELEMETRY, "1") };
}

/// The process's ONNX Runtime environment: one thread pool that all sessions share, log level error.
///
/// Errors: `Error::Invalid` when the library does not load or is older than this program needs.
pub(super) fn environment() -> Result<Environment> {
    let mut slot = ENVIRONMENT.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    if let Some(environment) = slot.as_ref() {
        return Ok(environment.clone());
    }
    let (path, origin) = library_path();
    let remedy = format!(
        "set {VARIABLE} to the full path of libonnxruntime.so of version 1.{} or newer (tested with 1.30.0), or run \
         scripts/setup",
        ort::MINOR_VERSION
    );
    let builder = ort::init_from(&path)
        .map_err(|e| Error::invalid(format!("ONNX Runtime library ({origin})"), e.to_string()).remedy(remedy))?;
    let environment = builder
        .with_name("interlace")
        .with_telemetry(false)
        .with_global_thread_pool(GlobalThreadPoolOptions::default())
        .build()
        .map_err(|e| Error::engine(ENGINE, "its environment", e))?;
    environment.set_log_level(LogLevel::Error);
    *slot = Some(environment.clone());
    Ok(environment)
}

/// Loads the CUDA libraries next to ONNX Runtime's library.
pub(super) fn load_cuda() {
    cuda_libraries::load_beside(&library_path().0);
}

/// The library's path and its origin: the variable, `../lib` relative to the program as in a package, its location at
/// build time, or the system.
fn library_path() -> (PathBuf, String) {
    if let Some(path) = std::env::var_os(VARIABLE).filter(|path| !path.is_empty()) {
        return (path.into(), format!("from {VARIABLE}"));
    }
    let name = format!("{}onnxruntime{}", std::env::consts::DLL_PREFIX, std::env::consts::DLL_SUFFIX);
    let packed = std::env::current_exe().ok().and_then(|own| Some(own.parent()?.parent()?.join("lib").join(&name)));
    if let Some(path) = packed.filter(|path| path.is_file()) {
        return (path, "beside this program".to_string());
    }
    match option_env!("INTERLACE_ORT_DYLIB_PATH") {
        Some(path) if std::path::Path::new(path).exists() => (path.into(), "from the build".to_string()),
        _ => (name.clone().into(), format!("`{name}` from the system")),
    }
}

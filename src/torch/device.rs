//! CUDA, loaded on demand.

use std::env;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use tch::{Cuda, Device};

use super::library::Library;
use crate::base::{Error, Result};

const CPU_LIBRARY: &str = "libtorch_cpu.so";
const CUDA_LIBRARY: &str = "libtorch_cuda.so";

static CUDA: OnceLock<Result<(), String>> = OnceLock::new();

/// The CUDA device `index`, after loading LibTorch's CUDA library.
///
/// Errors: `Error::Unsupported` when the library does not load or there is no such GPU. There
/// is no fall-back to the CPU.
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
/// Errors: `Error::Unsupported` when LibTorch's CUDA library is missing, belongs to another build, or does not load.
pub fn cuda_device_count() -> Result<usize> {
    CUDA.get_or_init(load).as_ref().map_err(|problem| {
        Error::unsupported("LibTorch with CUDA", problem).remedy(
            "run `scripts/setup --cuda`; or put the folder `lib` of a whole LibTorch 2.11.0 for CUDA 13, libtorch_cpu.so among \
             it, on LD_LIBRARY_PATH; or use --device cpu",
        )
    })?;
    Ok(usize::try_from(Cuda::device_count()).unwrap_or(0))
}

/// True on x86-64 processors without bf16 instructions. There, a training step in bf16 took 3.3 times as long as one in
/// f32 and used as much memory.
pub fn cpu_lacks_bf16() -> bool {
    #[cfg(target_arch = "x86_64")]
    let lacks = !is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let lacks = false;
    lacks
}

/// Loads the CUDA library of the build whose CPU library is already loaded.
fn load() -> Result<(), String> {
    let maps = fs::read_to_string("/proc/self/maps").map_err(|e| format!("/proc/self/maps cannot be read: {e}"))?;
    let loaded = mapped(&maps, CPU_LIBRARY).ok_or_else(|| format!("{CPU_LIBRARY} is not loaded"))?;
    let search = env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let path = cuda_library_of(&loaded, &search)?;
    Library::open(&path).map(|_| ())
}

/// The file from which a library is mapped, with links resolved.
fn mapped(maps: &str, library: &str) -> Option<PathBuf> {
    let paths = maps.lines().filter_map(|line| line.find('/').map(|at| Path::new(&line[at..])));
    paths.into_iter().find(|path| path.file_name() == Some(library.as_ref())).map(Path::to_path_buf)
}

/// The CUDA library next to the loaded CPU library. Libraries of two builds do not work together.
fn cuda_library_of(loaded: &Path, search: &OsStr) -> Result<PathBuf, String> {
    let own = loaded.with_file_name(CUDA_LIBRARY);
    if own.is_file() {
        return Ok(own);
    }
    let other = env::split_paths(search).map(|folder| folder.join(CUDA_LIBRARY)).find(|path| path.is_file());
    Err(match other {
        Some(other) => format!(
            "`{}` and the loaded `{}` are of two builds, which do not work together",
            other.display(),
            loaded.display()
        ),
        None => {
            format!("there is no {CUDA_LIBRARY} next to `{}`: this LibTorch is for processors only", loaded.display())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libtorch_libraries_of_two_builds_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let (cpu, gpu) = (folder.path().join("cpu"), folder.path().join("gpu"));
        for path in [&cpu, &gpu] {
            fs::create_dir(path).unwrap();
        }
        let loaded = cpu.join(CPU_LIBRARY);
        let maps = format!("7f00-7f01 r-xp 00000000 fe:00 12   {}\n", loaded.display());
        assert_eq!(mapped(&maps, CPU_LIBRARY), Some(loaded.clone()));
        assert_eq!(mapped(&maps, CUDA_LIBRARY), None);
        let error = cuda_library_of(&loaded, OsStr::new("")).unwrap_err();
        assert!(error.contains("for processors only"), "{error}");
        fs::write(gpu.join(CUDA_LIBRARY), "").unwrap();
        let error = cuda_library_of(&loaded, gpu.as_os_str()).unwrap_err();
        assert!(error.contains("two builds"), "{error}");
        let own = cpu.join(CUDA_LIBRARY);
        fs::write(&own, "").unwrap();
        assert_eq!(cuda_library_of(&loaded, gpu.as_os_str()), Ok(own));
    }

    /// Holds with and without a GPU: no machine has a device of the largest index, and device 0 works or is refused.
    #[test]
    fn the_error_for_a_missing_gpu_or_library_names_a_remedy() {
        let check = |error: Error| {
            assert!(matches!(error, Error::Unsupported { .. }), "{error}");
            assert!(error.to_string().contains("--device cpu"), "{error}");
        };
        check(cuda_device(usize::MAX).unwrap_err());
        match cuda_device(0) {
            Ok(device) => {
                let sum = tch::Tensor::from_slice(&[1f32, 2.0]).to_device(device).sum(tch::Kind::Float);
                assert_eq!(sum.device(), device);
                assert_eq!(sum.double_value(&[]), 3.0);
            }
            Err(error) => check(error),
        }
    }
}

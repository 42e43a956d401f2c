//! The CUDA libraries for ONNX Runtime's CUDA provider, loaded from the folders next to it.

use std::ffi::CString;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Once;

/// In order of their dependencies. Source: the provider of ONNX Runtime 1.30 for CUDA 13.
const LIBRARIES: &[&str] = &[
    "libcudart.so.13",
    "libnvrtc.so.13",
    "libcublasLt.so.13",
    "libcublas.so.13",
    "libcufft.so.12",
    "libcurand.so.10",
    "libcudnn.so.9",
];

/// Loads the libraries from the folders next to ONNX Runtime's library, once per process. For a missing library the
/// system's own search applies; its error names the library.
pub(super) fn load_beside(library: &Path) {
    static LOADED: Once = Once::new();
    LOADED.call_once(|| {
        let folders = folders(library);
        for name in LIBRARIES {
            let Some(path) = folders.iter().map(|folder| folder.join(name)).find(|path| path.is_file()) else {
                continue;
            };
            let Ok(path) = CString::new(path.as_os_str().as_bytes()) else { continue };
            // SAFETY: the path is a terminated string, and the initialisers are those of CUDA's own libraries. The
            // handle is never closed, as the provider uses the library until the process ends.
            unsafe { libc::dlopen(path.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        }
    });
}

/// The library's own folder, and the folders of NVIDIA's packages in the layout of Python wheels.
fn folders(library: &Path) -> Vec<PathBuf> {
    let real = fs::canonicalize(library).unwrap_or_else(|_| library.to_path_buf());
    let mut folders: Vec<PathBuf> = real.parent().map(Path::to_path_buf).into_iter().collect();
    if let Some(site) = real.ancestors().nth(3)
        && let Ok(packages) = fs::read_dir(site.join("nvidia"))
    {
        let mut found: Vec<PathBuf> = packages.flatten().map(|package| package.path().join("lib")).collect();
        found.sort();
        folders.extend(found);
    }
    folders
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cuda_libraries_are_found_in_packages_beside_onnx_runtime() {
        let site = tempfile::tempdir().unwrap();
        let capi = site.path().join("onnxruntime/capi");
        fs::create_dir_all(&capi).unwrap();
        fs::create_dir_all(site.path().join("nvidia/cudnn/lib")).unwrap();
        fs::create_dir_all(site.path().join("nvidia/cu13/lib")).unwrap();
        let library = capi.join("libonnxruntime.so");
        fs::write(&library, "").unwrap();
        let site = fs::canonicalize(site.path()).unwrap();
        let want = [site.join("onnxruntime/capi"), site.join("nvidia/cu13/lib"), site.join("nvidia/cudnn/lib")];
        assert_eq!(folders(&library), want);
    }
}

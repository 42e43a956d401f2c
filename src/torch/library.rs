//! Shared libraries that are opened while the program runs.

use std::ffi::{CStr, CString, c_void};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

/// An open library. It stays loaded until the process ends.
#[derive(Clone, Copy, Debug)]
pub(super) struct Library(NonNull<c_void>);

impl Library {
    /// Opens a library by its path, or by its file name on the loader's search path. Its symbols become visible to libraries
    /// that are opened later: LibTorch finds its CUDA back end through them.
    ///
    /// Errors: the loader's own text.
    pub fn open(name: &Path) -> Result<Self, String> {
        let text = CString::new(name.as_os_str().as_bytes()).map_err(|e| e.to_string())?;
        // SAFETY: the name is a terminated string; the library's initialisers are its authors'.
        let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        NonNull::new(handle).map(Library).ok_or_else(|| format!("`{}` does not load: {}", name.display(), reason()))
    }

    /// Address of a function.
    ///
    /// Errors: the loader's own text, where the library has no symbol of this name.
    pub fn function(self, name: &CStr) -> Result<NonNull<c_void>, String> {
        // SAFETY: the library is never closed, and the name is a terminated string.
        let address = unsafe { libc::dlsym(self.0.as_ptr(), name.as_ptr()) };
        NonNull::new(address).ok_or_else(|| format!("has no function `{}`: {}", name.to_string_lossy(), reason()))
    }
}

/// What the loader says about the last failure on this thread.
fn reason() -> String {
    // SAFETY: dlerror gives null or a terminated string that lives until the next call on this thread.
    let message = unsafe { libc::dlerror() };
    if message.is_null() {
        return "no reason is given".to_string();
    }
    // SAFETY: checked not null above.
    unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned()
}

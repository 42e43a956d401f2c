//! `interlace` with LibTorch linked. `interlace` executes it, with the same arguments, for the verbs
//! that compute in LibTorch.

use std::ffi::CStr;

use tikv_jemallocator::Jemalloc;

/// Every step allocates tensors of different sizes, which fragments glibc malloc: the process grows by half. jemalloc
/// does not. LibTorch uses this allocator too.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// A background thread returns freed pages to the system after about a second. A shorter delay makes the next steps
/// allocate them again; a longer one lets them accumulate.
// SAFETY: jemalloc reads its settings from a variable of this name and type.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static malloc_conf: Option<&'static std::ffi::c_char> = {
    const SETTINGS: &CStr = c"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0";
    // SAFETY: the first byte of a string with static lifetime.
    Some(unsafe { &*SETTINGS.as_ptr() })
};

fn main() {
    interlace::cli::main(interlace::cli::here)
}

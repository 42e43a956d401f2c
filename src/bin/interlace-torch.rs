//! `interlace` with LibTorch in it. `interlace` starts it for the verbs that compute there; it takes the
//! same arguments.

use std::ffi::CStr;

use tikv_jemallocator::Jemalloc;

/// Tensors of ever other sizes come and go at each step. The C library's allocator leaves gaps between them that fit no
/// later one, and the process grows by half of what it needs; this one is LibTorch's too.
#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// Freed pages go back to the system within about a second, from a thread that does nothing else: sooner, the next steps
/// pay for them again; later, they add up.
// SAFETY: the name and the type are those that the allocator reads its settings from.
#[unsafe(no_mangle)]
#[allow(non_upper_case_globals)]
pub static malloc_conf: Option<&'static std::ffi::c_char> = {
    const SETTINGS: &CStr = c"background_thread:true,dirty_decay_ms:1000,muzzy_decay_ms:0";
    // SAFETY: the first byte of a string that lives forever.
    Some(unsafe { &*SETTINGS.as_ptr() })
};

fn main() {
    interlace::cli::main(interlace::cli::here)
}

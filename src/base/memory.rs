//! The process's own memory: figures, and how the allocator keeps it.

/// The largest resident set of this process so far, in bytes (`VmHWM`); 0 where the system does not tell.
pub fn peak_memory_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// Makes the allocator keep large freed blocks for the next tensors instead of giving them back to the system, and all
/// threads share one pool of them.
///
/// Training allocates and frees the same large blocks at every step. Given back, each of them costs a page fault per 4 KiB
/// to have again: attention over 512 tokens ran three times slower so. Does nothing where the C library is not GNU's.
pub fn keep_freed_blocks() {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` sets process-wide numbers of the allocator and touches no memory of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, libc::c_int::MAX);
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

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

/// Makes the allocator keep freed blocks for the next tensors, within bounds, for as long as this lives.
///
/// Training allocates and frees the same large blocks at every step. Given back to the system, each of them costs a page
/// fault per 4 KiB to have again: attention over 512 tokens ran three times slower so. But blocks of many sizes also leave
/// gaps that fit no later block, so the process grows; when it has grown by a quarter more than what a step takes,
/// everything free is given back. Does nothing where the C library is not GNU's.
#[derive(Debug)]
pub struct KeptBlocks {
    /// Bytes in use when free blocks were last given back.
    base: u64,
    /// The most that one step has taken above that.
    step: u64,
    /// True until a step has run after the last giving back.
    fresh: bool,
}

/// Growth that is not worth giving back.
const SMALL_GROWTH: u64 = 32 << 20;

impl KeptBlocks {
    /// From now on freed blocks are kept, and all threads share one pool of them.
    #[expect(clippy::new_without_default, reason = "it changes the process")]
    pub fn new() -> Self {
        give_back();
        configure(1 << 30, libc::c_int::MAX);
        KeptBlocks { base: resident_bytes(), step: 0, fresh: true }
    }

    /// Call it after every step: gives free blocks back when too much is kept.
    pub fn after_step(&mut self) {
        let grown = resident_bytes().saturating_sub(self.base);
        if std::mem::take(&mut self.fresh) {
            self.step = self.step.max(grown);
        }
        if grown > self.step + self.step / 4 + SMALL_GROWTH {
            give_back();
            self.base = resident_bytes();
            self.fresh = true;
        }
    }
}

impl Drop for KeptBlocks {
    fn drop(&mut self) {
        configure(4 << 20, 4 << 20);
        give_back();
    }
}

/// From which size blocks are mapped by themselves, and how much may lie free at the end of the heap.
fn configure(own_map_from: libc::c_int, kept_at_end: libc::c_int) {
    #[cfg(target_env = "gnu")]
    // SAFETY: `mallopt` sets process-wide numbers of the allocator and touches no memory of ours.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, own_map_from);
        libc::mallopt(libc::M_TRIM_THRESHOLD, kept_at_end);
        libc::mallopt(libc::M_ARENA_MAX, 1);
        // Aligned blocks, which all tensors are, are cut out of larger ones. What is left over must grow together with its
        // neighbours again, or no freed block is ever large enough for one of its own size.
        libc::mallopt(libc::M_MXFAST, 0);
    }
    #[cfg(not(target_env = "gnu"))]
    let _ = (own_map_from, kept_at_end);
}

fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it only tells the system of pages that no block lies in.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Memory of the process's own, without files that it maps, in bytes; 0 where the system does not tell.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: Vec<u64> = statm.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // SAFETY: `sysconf` reads a number of the system's.
    let page = u64::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(0);
    match pages.as_slice() {
        [_, resident, shared, ..] => resident.saturating_sub(*shared).saturating_mul(page),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_resident_is_seen() {
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(resident_bytes() >= 64 << 20);
        assert!(peak_memory_bytes() >= 64 << 20);
        drop(block);
    }
}

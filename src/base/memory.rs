//! The process's own memory, and what the machine has free.

/// The largest resident set of this process so far, in bytes (`VmHWM`); 0 where the system does not report it.
pub fn peak_memory_bytes() -> u64 {
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
            line.split_whitespace().nth(1)?.parse::<u64>().ok()
        })
        .map_or(0, |kib| kib.saturating_mul(1024))
}

/// Memory, in bytes, that new allocations can take without swapping (`MemAvailable`); `None` where the system does not
/// report it.
pub fn free_memory_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemAvailable:"))?;
    Some(line.split_whitespace().nth(1)?.parse::<u64>().ok()?.saturating_mul(1024))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peak_memory_includes_a_resident_allocation() {
        let block = std::hint::black_box(vec![1u8; 64 << 20]);
        assert!(peak_memory_bytes() >= 64 << 20);
        drop(block);
    }

    #[test]
    fn the_free_memory_is_read_where_the_system_reports_it() {
        assert_eq!(free_memory_bytes().is_some(), std::path::Path::new("/proc/meminfo").exists());
        assert!(free_memory_bytes().is_none_or(|bytes| bytes > 1 << 20));
    }
}

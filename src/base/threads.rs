//! The number of threads to compute with.

/// The number of processors that this process may use, or `OMP_NUM_THREADS`, which LibTorch reads too; at least 1.
pub fn thread_count() -> usize {
    let asked = std::env::var("OMP_NUM_THREADS").ok();
    let asked = asked.and_then(|text| text.split(',').next()?.trim().parse().ok()).filter(|&count| count > 0);
    asked.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from))
}

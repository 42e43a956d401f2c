//! The threads of a process that compute in LibTorch, each on operations of its own.

use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::base::{Error, Result, thread_count};

/// Runs the tasks on the pool's threads, each with `threads` of LibTorch's own, and collects what they give in their order;
/// a panic goes on here.
///
/// The threads stay: a new one would begin every step with cold caches, in the allocator and in LibTorch.
///
/// Errors: `Error::Engine` when the system gives no threads; the first that a task gave.
pub fn on_pool<R: Send>(
    threads: usize,
    tasks: impl Iterator<Item = impl FnOnce() -> Result<R> + Send>,
) -> Result<Vec<R>> {
    static POOL: OnceLock<Result<ThreadPool, String>> = OnceLock::new();
    let pool = POOL.get_or_init(|| {
        let built = ThreadPoolBuilder::new().num_threads(thread_count()).build();
        built.map_err(|error| error.to_string())
    });
    let pool = pool.as_ref().map_err(|problem| Error::engine("rayon", "the threads of a step", problem))?;
    let tasks: Vec<_> = tasks.collect();
    let mut results: Vec<Option<Result<R>>> = tasks.iter().map(|_| None).collect();
    let threads = i32::try_from(threads.max(1)).unwrap_or(i32::MAX);
    pool.in_place_scope(|scope| {
        for (task, result) in tasks.into_iter().zip(&mut results) {
            scope.spawn(move |_| {
                tch::set_num_threads(threads);
                *result = Some(task());
            });
        }
    });
    results.into_iter().flatten().collect()
}

//! Thread pool of the process for LibTorch computations.

use std::sync::OnceLock;

use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::base::{Error, Result, thread_count};

/// Runs the tasks on the pool's threads and returns their results in the order of the tasks. Each task may use
/// `threads` threads of LibTorch's own. A panic of a task is propagated.
///
/// The pool lives as long as the process: new threads would start every step with cold caches in the allocator and in
/// LibTorch.
///
/// Errors: `Error::Engine` when the threads cannot be created; the first error of a task.
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

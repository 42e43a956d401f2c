//! A stopwatch that sums durations over many calls, on any thread.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A sum of durations.
#[derive(Debug, Default)]
pub struct Stopwatch {
    nanos: AtomicU64,
}

impl Stopwatch {
    /// Runs `work` and adds its duration.
    pub fn time<T>(&self, work: impl FnOnce() -> T) -> T {
        let began = Instant::now();
        let result = work();
        self.nanos.fetch_add(u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        result
    }

    /// Wraps an iterator and adds the duration of each `next`.
    pub fn over<I: Iterator>(&self, items: I) -> impl Iterator<Item = I::Item> {
        let mut items = items;
        std::iter::from_fn(move || self.time(|| items.next()))
    }

    /// The sum so far.
    pub fn elapsed(&self) -> Duration {
        Duration::from_nanos(self.nanos.load(Ordering::Relaxed))
    }

    /// The sum so far in seconds.
    pub fn seconds(&self) -> f64 {
        self.elapsed().as_secs_f64()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_times_of_all_iterator_items_add_up() {
        let watch = Stopwatch::default();
        let slow = (0..5).inspect(|_| std::thread::sleep(Duration::from_millis(4)));
        assert_eq!(watch.over(slow).sum::<i32>(), 10);
        assert_eq!(watch.time(|| 7), 7);
        assert!(watch.elapsed() >= Duration::from_millis(20), "{:?}", watch.elapsed());
        assert!(watch.seconds() < 5.0);
    }
}

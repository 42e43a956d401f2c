//! Prepares items on other threads while one consumes the earlier ones.

use std::sync::mpsc::{IntoIter, Receiver, SyncSender, sync_channel};
use std::sync::{Mutex, PoisonError};

use super::{Error, Result};

/// Produces `items` on a second thread and passes them, in order, to `take`; returns the result of `take`. The second
/// thread starts before `take` does and is at most `window` items ahead of it.
///
/// Errors: those of `take`, which receives the errors of `items`. The first error ends the production, and so does the
/// return of `take`.
pub fn ahead<T: Send, I: Iterator<Item = Result<T>>, R>(
    window: usize,
    items: impl FnOnce() -> Result<I> + Send,
    take: impl FnOnce(IntoIter<Result<T>>) -> Result<R>,
) -> Result<R> {
    std::thread::scope(|scope| {
        let (sender, receiver) = sync_channel(window);
        scope.spawn(move || match items() {
            Ok(items) => {
                for item in items {
                    let failed = item.is_err();
                    // Sending fails when `take` has returned.
                    if sender.send(item).is_err() || failed {
                        break;
                    }
                }
            }
            Err(error) => drop(sender.send(Err(error))),
        });
        take(receiver.into_iter())
    })
}

/// Produces `items` on one thread, applies `prepare` to them on `threads` others, and passes the results to `take` in the
/// order of the items; returns the result of `take`. At most `window` results, and one item per thread, are ahead of
/// `take`, which receives every error of `prepare`. The return of `take` ends the production.
///
/// Errors: those of `items`, and those of `take`.
pub fn prepared_ahead<I: Send, T: Send, S: Iterator<Item = I>, R>(
    (threads, window): (usize, usize),
    items: impl FnOnce() -> Result<S> + Send,
    prepare: impl Fn(I) -> Result<T> + Sync,
    take: impl FnOnce(&mut dyn Iterator<Item = Result<T>>) -> Result<R>,
) -> Result<R> {
    let threads = threads.max(1);
    std::thread::scope(|scope| {
        // Each item has a channel of its own for its result; the channels are queued in the order of the items.
        let (queue, results) = sync_channel::<Receiver<Result<T>>>(window);
        let (jobs, work) = sync_channel::<(I, SyncSender<Result<T>>)>(threads);
        let (work, prepare) = (Mutex::new(work), &prepare);
        let work = std::sync::Arc::new(work);
        for _ in 0..threads {
            let work = work.clone();
            scope.spawn(move || {
                loop {
                    let job = work.lock().unwrap_or_else(PoisonError::into_inner).recv();
                    let Ok((item, result)) = job else { break };
                    // Sending fails when `take` has returned.
                    drop(result.send(prepare(item)));
                }
            });
        }
        drop(work);
        scope.spawn(move || {
            let enqueue = || {
                let (sender, receiver) = sync_channel(1);
                queue.send(receiver).ok().map(|()| sender)
            };
            match items() {
                Ok(items) => {
                    for item in items {
                        // `take` has returned when the queue is closed.
                        let Some(result) = enqueue() else { break };
                        if jobs.send((item, result)).is_err() {
                            break;
                        }
                    }
                }
                Err(error) => drop(enqueue().map(|result| result.send(Err(error)))),
            }
        });
        let lost = || Err(Error::engine("thread", "prepare an item", "a thread has ended early"));
        take(&mut results.into_iter().map(|result| result.recv().unwrap_or_else(|_| lost())))
    })
}

#[cfg(test)]
mod tests {
    use super::super::Error;
    use super::*;

    #[test]
    fn items_keep_their_order_and_the_first_error_ends_the_iterator() {
        let wrong = |number: usize| Err(Error::invalid("item", format!("{number}")));
        let numbers = |end: usize| move || Ok((0..100).map(move |n| if n == end { wrong(n) } else { Ok(n) }));
        let mut seen = Vec::new();
        let mut push = |mut items: IntoIter<Result<usize>>| {
            items.try_for_each(|number| {
                seen.push(number?);
                Ok(())
            })
        };
        ahead(2, numbers(100), &mut push).unwrap();
        assert!(ahead(2, numbers(3), &mut push).unwrap_err().to_string().contains('3'));
        assert_eq!(seen, (0..100).chain(0..3).collect::<Vec<_>>());
        let refuse = |mut items: IntoIter<Result<usize>>| {
            items.try_for_each(|number| if number? == 5 { wrong(5).map(drop) } else { Ok(()) })
        };
        assert!(ahead(2, numbers(100), refuse).unwrap_err().to_string().contains('5'));
        assert!(ahead(2, numbers(100), |_| wrong(6)).unwrap_err().to_string().contains('6'));
        let nothing = || -> Result<std::iter::Empty<Result<usize>>> { wrong(0).map(|_: usize| std::iter::empty()) };
        let none = ahead(2, nothing, |items| items.collect::<Result<Vec<_>>>().map(drop));
        assert_eq!(none.unwrap_err().to_string(), "item: 0");
    }

    #[test]
    fn items_that_are_prepared_on_several_threads_keep_their_order() {
        let wrong = |number: usize| Error::invalid("item", format!("{number}"));
        let slow = |number: usize| {
            // Earlier items take longer than later ones.
            std::thread::sleep(std::time::Duration::from_millis(if number.is_multiple_of(4) { 8 } else { 0 }));
            if number % 10 == 7 { Err(wrong(number)) } else { Ok(number) }
        };
        let all = prepared_ahead((4, 3), || Ok(0..20), slow, |items| Ok(items.collect::<Vec<_>>())).unwrap();
        let found: Vec<String> =
            all.into_iter().map(|item| item.map_or_else(|e| e.to_string(), |n| n.to_string())).collect();
        let expected: Vec<String> =
            (0..20).map(|n| slow(n).map_or_else(|e| e.to_string(), |n| n.to_string())).collect();
        assert_eq!(found, expected);
        let first = prepared_ahead((2, 2), || Ok(0usize..), slow, |items| items.collect::<Result<Vec<_>>>().map(drop));
        assert!(first.unwrap_err().to_string().contains('7'));
        let nothing = || -> Result<std::iter::Empty<usize>> { Err(wrong(0)) };
        let none = prepared_ahead((2, 2), nothing, slow, |items| items.collect::<Result<Vec<_>>>().map(drop));
        assert_eq!(none.unwrap_err().to_string(), "item: 0");
    }

    #[test]
    fn no_more_items_are_produced_than_the_window_and_the_threads_hold() {
        let produced = std::sync::atomic::AtomicUsize::new(0);
        let count = |_: &usize| _ = produced.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        prepared_ahead(
            (3, 2),
            || Ok((0..1000).inspect(count)),
            Ok,
            |items| {
                items.next().transpose()?;
                std::thread::sleep(std::time::Duration::from_millis(50));
                Ok(())
            },
        )
        .unwrap();
        // One is taken, two wait in the queue, and one more is made before the queue refuses it.
        assert!(produced.load(std::sync::atomic::Ordering::SeqCst) <= 4 + 3, "{produced:?}");
    }
}

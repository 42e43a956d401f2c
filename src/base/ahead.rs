//! Prepares items on one thread while another consumes the earlier ones.

use std::sync::mpsc::{IntoIter, sync_channel};

use super::Result;

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
        assert!(ahead(2, nothing, |mut items| items.try_for_each(|item| item.map(drop))).is_err());
    }
}

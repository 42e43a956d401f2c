//! Processes that share the samples of one run.

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::{Error, Result};

/// One of several processes that do the same work on other samples. Calls that exchange something come in the same order in
/// all of them.
pub trait Peers: Sync {
    /// This process's number, from 0.
    fn rank(&self) -> usize;

    /// How many processes there are.
    fn size(&self) -> usize;

    /// The bytes of every process, in their order.
    ///
    /// Errors: `Error::Engine` when one has ended or does not come.
    fn of_all(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>>;
}

/// True where item `number` is this process's: items are dealt out one by one.
pub fn is_own(peers: Option<&dyn Peers>, number: usize) -> bool {
    peers.is_none_or(|peers| number % peers.size() == peers.rank())
}

/// This process's part of items in an order: a stretch of them, so that the parts of all processes, one behind the other, are
/// the items in their order.
pub fn own_part<'a, T>(peers: Option<&dyn Peers>, items: &'a [T]) -> &'a [T] {
    let Some(peers) = peers else { return items };
    let each = items.len().div_ceil(peers.size().max(1));
    let start = (each * peers.rank()).min(items.len());
    &items[start..(start + each).min(items.len())]
}

/// True in the process that prints and writes.
pub fn is_first(peers: Option<&dyn Peers>) -> bool {
    peers.is_none_or(|peers| peers.rank() == 0)
}

/// What every process has found, in their order; alone, what this one has.
///
/// Errors: as [`Peers::of_all`].
pub fn gathered<T: Serialize + DeserializeOwned>(peers: Option<&dyn Peers>, own: T) -> Result<Vec<T>> {
    let Some(peers) = peers else { return Ok(vec![own]) };
    let damaged = |e: serde_json::Error| Error::invalid("what another process sent", e.to_string());
    let all = peers.of_all(&serde_json::to_vec(&own).map_err(damaged)?)?;
    all.iter().map(|bytes| serde_json::from_slice(bytes).map_err(damaged)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One of several ranks that all receive the same values.
    struct Echo(usize, usize);

    impl Peers for Echo {
        fn rank(&self) -> usize {
            self.0
        }

        fn size(&self) -> usize {
            self.1
        }

        fn of_all(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
            Ok(vec![bytes.to_vec(); self.1])
        }
    }

    #[test]
    fn the_parts_of_all_ranks_join_to_the_whole_in_order() {
        let items: Vec<usize> = (0..10).collect();
        for size in 1..=12 {
            let parts = (0..size).flat_map(|rank| own_part(Some(&Echo(rank, size)), &items).to_vec());
            assert_eq!(parts.collect::<Vec<_>>(), items, "{size}");
            for number in 0..10 {
                assert_eq!((0..size).filter(|&rank| is_own(Some(&Echo(rank, size)), number)).count(), 1);
            }
        }
        assert_eq!((own_part(None, &items), is_own(None, 3), is_first(None)), (&items[..], true, true));
        assert!(own_part(Some(&Echo(1, 2)), &items[..0]).is_empty());
    }

    #[test]
    fn gathered_numbers_are_bit_identical() {
        let value = (0.1f64 + 0.2, f64::MIN_POSITIVE);
        assert_eq!(gathered(Some(&Echo(1, 3)), value).unwrap(), [value; 3]);
        assert_eq!(gathered(None, value).unwrap(), [value]);
    }
}

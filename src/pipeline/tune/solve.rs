//! The search over all combinations of one choice on each axis.

/// A choice on each axis of `axes::AXES`, by its index there; 0 changes nothing.
pub type TunePoint = [usize; 3];

/// Every combination, the unchanged model first.
pub fn points(sizes: TunePoint) -> impl Iterator<Item = TunePoint> {
    let [a, b, c] = sizes;
    (0..a).flat_map(move |x| (0..b).flat_map(move |y| (0..c).map(move |z| [x, y, z])))
}

/// Combinations that `fits`, those with the least loss first; of equal losses the one with the smaller cost.
pub fn ranked(
    sizes: TunePoint,
    fits: impl Fn(TunePoint) -> bool,
    loss: impl Fn(TunePoint) -> f64,
    cost: impl Fn(TunePoint) -> f64,
) -> Vec<TunePoint> {
    let mut found: Vec<TunePoint> = points(sizes).filter(|&point| fits(point)).collect();
    found.sort_by(|&a, &b| loss(a).total_cmp(&loss(b)).then(cost(a).total_cmp(&cost(b))).then(a.cmp(&b)));
    found
}

/// The front: combinations to which no other one is better in loss or cost and as good in the other. By rising cost.
pub fn front(sizes: TunePoint, loss: impl Fn(TunePoint) -> f64, cost: impl Fn(TunePoint) -> f64) -> Vec<TunePoint> {
    let mut all: Vec<TunePoint> = points(sizes).collect();
    all.sort_by(|&a, &b| cost(a).total_cmp(&cost(b)).then(loss(a).total_cmp(&loss(b))).then(a.cmp(&b)));
    let mut least = f64::INFINITY;
    all.retain(|&point| {
        let own = loss(point);
        let better = own < least;
        least = least.min(own);
        better
    });
    all
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Tables of losses and costs by axis, of few distinct values so that ties occur.
    fn tables() -> impl Strategy<Value = ([Vec<f64>; 3], [Vec<f64>; 3])> {
        let table = |size: std::ops::Range<usize>| prop::collection::vec((0..7u8, 0..7u8), size);
        (table(1..6), table(1..4), table(1..4)).prop_map(|(a, b, c)| {
            let of = |table: &[(u8, u8)], loss: bool| {
                table.iter().map(|&(x, y)| f64::from(if loss { x } else { y })).collect::<Vec<f64>>()
            };
            let all = [&a[..], &b, &c];
            (all.map(|table| of(table, true)), all.map(|table| of(table, false)))
        })
    }

    fn sum(tables: &[Vec<f64>; 3], point: TunePoint) -> f64 {
        tables.iter().zip(point).map(|(table, index)| table[index]).sum()
    }

    /// All combinations, by a counter with digits.
    fn counted(sizes: TunePoint) -> Vec<TunePoint> {
        let total: usize = sizes.iter().product();
        let digits = |mut number: usize| {
            [2, 1, 0].into_iter().fold([0; 3], |mut point, axis| {
                point[axis] = number % sizes[axis];
                number /= sizes[axis];
                point
            })
        };
        (0..total).map(digits).collect()
    }

    proptest! {
        #[test]
        fn the_best_combination_within_a_limit_is_that_of_brute_force((losses, costs) in tables(), limit in 0..20u8) {
            let sizes = [losses[0].len(), losses[1].len(), losses[2].len()];
            let limit = f64::from(limit);
            let found = ranked(sizes, |p| sum(&costs, p) <= limit, |p| sum(&losses, p), |p| sum(&costs, p));
            let within: Vec<TunePoint> = counted(sizes).into_iter().filter(|&p| sum(&costs, p) <= limit).collect();
            prop_assert_eq!(found.len(), within.len());
            let least = within.iter().map(|&p| sum(&losses, p)).fold(f64::INFINITY, f64::min);
            if let Some(&best) = found.first() {
                prop_assert!(within.contains(&best));
                prop_assert_eq!(sum(&losses, best), least);
                let cheapest = within.iter().filter(|&&p| sum(&losses, p) == least).map(|&p| sum(&costs, p));
                prop_assert_eq!(sum(&costs, best), cheapest.fold(f64::INFINITY, f64::min));
            }
            prop_assert!(found.windows(2).all(|pair| sum(&losses, pair[0]) <= sum(&losses, pair[1])));
        }

        #[test]
        fn the_front_is_what_nothing_dominates((losses, costs) in tables()) {
            let sizes = [losses[0].len(), losses[1].len(), losses[2].len()];
            let all = counted(sizes);
            let key = |p: TunePoint| (sum(&costs, p), sum(&losses, p));
            let dominated = |p: TunePoint| all.iter().any(|&q| {
                let ((cost, loss), (other_cost, other_loss)) = (key(p), key(q));
                other_cost <= cost && other_loss <= loss && (other_cost < cost || other_loss < loss)
            });
            let mut want: Vec<(f64, f64)> = all.iter().copied().filter(|&p| !dominated(p)).map(key).collect();
            want.sort_by(|a, b| a.0.total_cmp(&b.0).then(a.1.total_cmp(&b.1)));
            want.dedup();
            let found: Vec<(f64, f64)> = front(sizes, |p| sum(&losses, p), |p| sum(&costs, p)).into_iter().map(key).collect();
            prop_assert_eq!(found, want);
        }
    }
}

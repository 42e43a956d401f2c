//! The points of the residual stream that are compared with the dense model's.

use crate::finetune::loss::{Compared, Compute, LOSSES};
use crate::finetune::settings::Settings;

/// A point of the residual stream: before the student's layer of this number, and the dense layer before which the
/// teacher's stream is to be matched; the number of layers stands for the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub student: usize,
    pub dense: usize,
}

/// The points that the anchor term compares, ascending: behind every trained layer, which is before the anchor where it
/// has one, and behind every anchor where the network is trained at once. So every trained layer has a target of its own.
/// A layer that is healed by itself is not run through its anchor: that takes as long again and heals no better.
pub fn anchor_points(anchors: &[usize], trained: &[usize], settings: &Settings) -> Vec<usize> {
    let first = trained.iter().copied().min().unwrap_or(0);
    let anchors = if settings.layer_by_layer() { &[] } else { anchors };
    let behind = trained.iter().chain(anchors.iter().filter(|&&anchor| anchor > first));
    let mut points: Vec<usize> = behind.map(|&layer| layer + 1).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// The points that the stream terms compare, ascending, from layer `first` on, where training begins.
///
/// A finetuned layer answers for what was dropped behind it, so the stream after it is matched with the dense stream
/// before the next layer that was kept; the stream after a frozen layer with the dense stream after that same layer.
pub fn points(
    kept: &[usize],
    anchors: &[usize],
    trained: &[usize],
    first: usize,
    dense_layers: usize,
    settings: &Settings,
) -> Vec<Point> {
    let layers = kept.len();
    let dense_of = |student: usize| match student {
        0 => 0,
        _ if trained.contains(&(student - 1)) => kept.get(student).copied().unwrap_or(dense_layers),
        _ => kept[student - 1] + 1,
    };
    let mut students: Vec<usize> = Vec::new();
    for row in LOSSES.iter().filter(|row| settings.weight(row.kind) > 0.0) {
        match row.compute {
            Compute::Stream(Compared::All, _) => students.extend(first + 1..=layers),
            Compute::Stream(Compared::TrainedAndAnchors, _) => {
                students.extend(anchor_points(anchors, trained, settings));
            }
            Compute::Answers(_) => {}
        }
    }
    if settings.fit.enabled {
        students.extend(trained.iter().map(|&layer| layer + 1));
    }
    students.sort_unstable();
    students.dedup();
    students.into_iter().map(|student| Point { student, dense: dense_of(student) }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::finetune::loss::LossKind;
    use crate::finetune::settings::Stage;

    /// Eight dense layers; 2 dropped and 3 trained with anchor 4, 6 dropped and 5 trained with anchor 7.
    #[test]
    fn points_of_the_pruned_and_the_dense_stream_correspond() {
        let kept = [0, 1, 3, 4, 5, 7];
        let pairs = |kinds: &[LossKind], anchors: &[usize]| -> Vec<(usize, usize)> {
            let points = points(
                &kept,
                anchors,
                &[2, 4],
                2,
                8,
                &Settings::default().with(|s| s.stages = Stage::only(kinds.iter().map(|&kind| (kind, 1.0)))),
            );
            points.iter().map(|point| (point.student, point.dense)).collect()
        };
        let all = [(3, 4), (4, 5), (5, 7), (6, 8)];
        assert_eq!(pairs(&[LossKind::Ce, LossKind::Anchor], &[3, 5]), all);
        assert_eq!(pairs(&[LossKind::Hidden], &[3, 5]), all);
        assert_eq!(pairs(&[LossKind::Ce, LossKind::Anchor], &[]), [(3, 4), (5, 7)]);
        // One layer after the other: nothing is looked at behind an anchor.
        assert_eq!(pairs(&[LossKind::Anchor], &[3, 5]), [(3, 4), (5, 7)]);
    }
}

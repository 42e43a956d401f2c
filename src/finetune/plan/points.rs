//! Points of the residual stream that are compared with the dense model's stream.

use crate::finetune::loss::{ComparedPoints, Compute, LOSSES};
use crate::finetune::settings::Settings;

/// A point of the residual stream: before the student's layer `student`, compared with the dense model's stream before
/// its layer `dense`. The number of layers denotes the end of the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Point {
    pub student: usize,
    pub dense: usize,
}

/// Student's points that the anchor term compares, ascending. They are the points behind every trained layer (which is
/// before its anchor, if it has one) and, when all layers are trained together, behind every anchor. So every trained
/// layer has a target of its own. Layer-by-layer training does not run a layer's anchor: it doubles the time and does
/// not improve the result.
pub fn anchor_points(anchors: &[usize], trained: &[usize], settings: &Settings) -> Vec<usize> {
    let first = trained.iter().copied().min().unwrap_or(0);
    let anchors = if settings.layer_by_layer() { &[] } else { anchors };
    let behind = trained.iter().chain(anchors.iter().filter(|&&anchor| anchor > first));
    let mut points: Vec<usize> = behind.map(|&layer| layer + 1).collect();
    points.sort_unstable();
    points.dedup();
    points
}

/// Points that the stream terms and the fit compare, ascending. `first` is the first layer that the student runs.
///
/// A trained layer compensates for the layers dropped behind it, so the stream after it is compared with the dense
/// stream before the next kept layer. The stream after a frozen layer is compared with the dense stream after the same
/// layer.
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
            Compute::Stream(ComparedPoints::All, _) => students.extend(first + 1..=layers),
            Compute::Stream(ComparedPoints::TrainedAndAnchors, _) => {
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
        // Layer by layer: no point behind an anchor is compared.
        assert_eq!(pairs(&[LossKind::Anchor], &[3, 5]), [(3, 4), (5, 7)]);
    }
}

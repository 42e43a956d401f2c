//! The dense model's streams for a fit, computed when it asks for them.

use std::collections::BTreeMap;

use crate::base::{Cancel, Result};
use crate::finetune::data::{TeacherTargets, TrainingSet};
use crate::finetune::train::DenseStream;

/// Streams of the dense model for fits, indexed by position in the training set.
pub struct Live<'a> {
    targets: &'a TeacherTargets<'a>,
    /// Number of each sample in its source.
    numbers: Vec<u64>,
    cancel: &'a Cancel,
}

impl<'a> Live<'a> {
    /// Streams for fits on samples of `dataset`.
    pub fn new(targets: &'a TeacherTargets<'a>, dataset: &TrainingSet, cancel: &'a Cancel) -> Self {
        let numbers = dataset.examples.iter().map(|example| example.number).collect();
        Live { targets, numbers, cancel }
    }
}

impl DenseStream for Live<'_> {
    fn computes(&self, layer: usize) -> bool {
        !self.targets.student_points().contains(&(layer + 1))
    }

    fn rows_behind(&self, layers: &[usize], samples: &[usize]) -> Result<Vec<BTreeMap<usize, Vec<u8>>>> {
        let numbers: Vec<u64> = samples.iter().map(|&sample| self.numbers[sample]).collect();
        let mut found = self.targets.rows_behind(layers, &numbers, self.cancel)?;
        let by_place = found.iter_mut().map(|rows| {
            let own = samples.iter().zip(&numbers);
            own.filter_map(|(&sample, number)| Some((sample, rows.remove(number)?))).collect()
        });
        Ok(by_place.collect())
    }
}

//! Learning-rate schedules, one row each, as factors of the peak rate.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// How the learning rate moves over the optimiser steps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Schedule {
    /// Linear warm-up, then half a cosine down to 0.
    #[default]
    Cosine,
    /// Linear warm-up, then a straight line down to 0.
    Linear,
    /// Linear warm-up from the first step on, then the peak rate to the end.
    ConstantWithWarmup,
    /// The peak rate from the first step.
    Constant,
}

/// One schedule: its name in settings and its factor of the peak rate.
pub struct ScheduleRow {
    /// The schedule.
    pub schedule: Schedule,
    /// Name in settings.
    pub name: &'static str,
    /// Factor during warm-up, from the step (counted from 0) and the number of warm-up steps.
    warm_up: fn(f64, f64) -> f64,
    /// Factor after warm-up, from the progress: 0 at the end of the warm-up, 1 at the end of the run.
    decay: fn(f64) -> f64,
}

/// All schedules.
pub const SCHEDULES: &[ScheduleRow] = &[
    ScheduleRow {
        schedule: Schedule::Cosine,
        name: "cosine",
        warm_up: from_zero,
        decay: |progress| (0.5 * (1.0 + (std::f64::consts::PI * progress).cos())).max(0.0),
    },
    ScheduleRow {
        schedule: Schedule::Linear,
        name: "linear",
        warm_up: from_zero,
        decay: |progress| (1.0 - progress).max(0.0),
    },
    ScheduleRow {
        schedule: Schedule::ConstantWithWarmup,
        name: "constant_with_warmup",
        warm_up: from_first,
        decay: |_| 1.0,
    },
    ScheduleRow { schedule: Schedule::Constant, name: "constant", warm_up: |_, _| 1.0, decay: |_| 1.0 },
];

/// 0 at the first step, 1 at the first step after the warm-up. Source: `transformers/optimization.py`.
fn from_zero(step: f64, warmup: f64) -> f64 {
    step / warmup.max(1.0)
}

/// A rise without a step of rate 0: when a layer has ten steps, such a step wastes a tenth of them.
fn from_first(step: f64, warmup: f64) -> f64 {
    (step + 1.0) / (warmup + 1.0)
}

impl Schedule {
    /// Factor of the peak rate at optimiser step `step` (counted from 0) of `total`. The first `warmup` steps are the
    /// warm-up.
    ///
    /// Source: `transformers/optimization.py`, `get_cosine_schedule_with_warmup` (half a cycle) and its siblings.
    pub fn factor(self, step: u64, warmup: u64, total: u64) -> f64 {
        let row = SCHEDULES.iter().find(|row| row.schedule == self).unwrap_or(&SCHEDULES[0]);
        if step < warmup {
            return (row.warm_up)(step as f64, warmup as f64);
        }
        let progress = step.saturating_sub(warmup) as f64 / total.saturating_sub(warmup).max(1) as f64;
        (row.decay)(progress)
    }
}

/// Number of warm-up steps: `ratio * total`, rounded up.
pub fn warmup_steps(ratio: f64, total: u64) -> u64 {
    (ratio * total as f64).ceil() as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Reference: learning rates of `transformers.get_scheduler` at base rate 1.
    #[test]
    fn learning_rate_factors_equal_transformers() {
        // (schedule, warm-up, total, [(step, factor)])
        type Case = (Schedule, u64, u64, &'static [(u64, f64)]);
        let cases: &[Case] = &[
            (
                Schedule::Cosine,
                5,
                141,
                &[
                    (0, 0.0),
                    (1, 0.2),
                    (4, 0.8),
                    (5, 1.0),
                    (6, 0.9998666040558186),
                    (70, 0.5346221914470959),
                    (140, 0.00013339594418138034),
                    (141, 0.0),
                ],
            ),
            (
                Schedule::Cosine,
                0,
                10,
                &[(0, 1.0), (1, 0.9755282581475768), (5, 0.5), (9, 0.024471741852423234), (10, 0.0)],
            ),
            (
                Schedule::Linear,
                5,
                141,
                &[
                    (0, 0.0),
                    (1, 0.2),
                    (4, 0.8),
                    (5, 1.0),
                    (6, 0.9926470588235294),
                    (70, 0.5220588235294118),
                    (140, 0.007352941176470588),
                    (141, 0.0),
                ],
            ),
            (Schedule::Linear, 0, 10, &[(0, 1.0), (1, 0.9), (5, 0.5), (9, 0.1), (10, 0.0)]),
            (Schedule::ConstantWithWarmup, 0, 10, &[(0, 1.0), (1, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]),
            (
                Schedule::Constant,
                5,
                141,
                &[(0, 1.0), (1, 1.0), (4, 1.0), (5, 1.0), (6, 1.0), (70, 1.0), (140, 1.0), (141, 1.0)],
            ),
            (Schedule::Constant, 0, 10, &[(0, 1.0), (1, 1.0), (5, 1.0), (9, 1.0), (10, 1.0)]),
        ];
        for (schedule, warmup, total, points) in cases {
            for &(step, want) in *points {
                let found = schedule.factor(step, *warmup, *total);
                assert!((found - want).abs() < 1e-15, "{schedule:?} step {step} of {total}: {found}, expected {want}");
            }
        }
    }

    #[test]
    fn every_schedule_has_one_row_under_its_serialised_name() {
        for row in SCHEDULES {
            assert_eq!(serde_json::to_value(row.schedule).unwrap(), row.name);
        }
    }

    #[test]
    fn the_first_step_of_a_constant_rate_with_warm_up_is_not_zero() {
        let factors = |warmup| [0, 1, 2, 5].map(|step| Schedule::ConstantWithWarmup.factor(step, warmup, 11));
        assert_eq!(factors(1), [0.5, 1.0, 1.0, 1.0]);
        assert_eq!(factors(3), [0.25, 0.5, 0.75, 1.0]);
    }

    #[test]
    fn the_number_of_warm_up_steps_is_rounded_up() {
        assert_eq!(warmup_steps(0.03, 141), 5);
        assert_eq!(warmup_steps(0.03, 100), 3);
        assert_eq!(warmup_steps(0.0, 100), 0);
    }
}

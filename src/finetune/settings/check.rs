//! Ranges of the settings of a finetuning run.

use super::values::{LoraLayers, Settings, Stage};
use crate::base::{Error, Result};

/// Largest `batch.size`, `batch.accumulation_steps` and `schedule.epochs`, and largest `schedule.max_steps`.
const MOST: u64 = 1 << 20;
const MOST_STEPS: u64 = 1 << 40;

impl Settings {
    /// Checks the range of every value.
    ///
    /// Errors: `Error::Invalid` with the setting, its value and the allowed range.
    pub fn check(&self) -> Result<()> {
        let Settings { data, batch, optimizer, schedule, fit, lora, kd, .. } = self;
        let share = |value: f64| (0.0..=1.0).contains(&value);
        let below_one = |value: f64| (0.0..1.0).contains(&value);
        let numbers = [
            ("data.share", data.share, data.share > 0.0 && data.share <= 1.0, "above 0 and at most 1"),
            ("optimizer.weight_decay", optimizer.weight_decay, optimizer.weight_decay >= 0.0, "0 or more"),
            ("optimizer.beta1", optimizer.beta1, below_one(optimizer.beta1), "at least 0 and below 1"),
            ("optimizer.beta2", optimizer.beta2, below_one(optimizer.beta2), "at least 0 and below 1"),
            ("optimizer.epsilon", optimizer.epsilon, optimizer.epsilon > 0.0, "above 0"),
            ("optimizer.max_grad_norm", optimizer.max_grad_norm, optimizer.max_grad_norm >= 0.0, "0 or more"),
            ("optimizer.average_last", optimizer.average_last, share(optimizer.average_last), "between 0 and 1"),
            ("schedule.warmup_ratio", schedule.warmup_ratio, share(schedule.warmup_ratio), "between 0 and 1"),
            ("kd.temperature", kd.temperature, kd.temperature > 0.0, "above 0"),
            ("lora.alpha", lora.alpha, lora.alpha > 0.0, "above 0"),
        ];
        let wrong = |name: &str, problem: String| Err(Error::invalid(format!("finetune setting `{name}`"), problem));
        // Steps compute in f32.
        let in_f32 = |value: f64| (value as f32).is_finite() && (value == 0.0 || value as f32 != 0.0);
        for (name, value, fits, want) in numbers {
            if !(fits && in_f32(value)) {
                let want = if fits && value.is_finite() { "in the range of f32" } else { want };
                return wrong(name, format!("is {value:?}, must be {want}"));
            }
        }
        optimizer.learning_rate.check()?;
        let counts = [
            ("data.max_tokens", u64::from(data.max_tokens), u64::MAX),
            ("batch.size", u64::from(batch.size), MOST),
            ("batch.accumulation_steps", u64::from(batch.accumulation_steps), MOST),
            ("schedule.epochs", u64::from(schedule.epochs), MOST),
            ("schedule.max_steps", schedule.max_steps.unwrap_or(1), MOST_STEPS),
            ("kd.top_k", u64::from(kd.top_k), u64::MAX),
            ("fit.tokens_per_feature", u64::from(fit.tokens_per_feature), u64::MAX),
            ("fit.tokens", fit.tokens.unwrap_or(1), u64::MAX),
            ("data.step_tokens", data.step_tokens.unwrap_or(1), u64::MAX),
        ];
        for (name, value, most) in counts {
            let problem = match value {
                0 => "is 0, must be at least 1".to_string(),
                value if value > most => format!("is {value}, must be at most {most}"),
                _ => continue,
            };
            return wrong(name, problem);
        }
        self.check_stages()?;
        if self.train_head && !self.losses().keys().any(|kind| kind.looks_at_answers()) {
            let problem = "is set, and no loss term looks at answers, which alone move the head";
            return Err(Error::invalid("finetune setting `train_head`", problem)
                .remedy("take a recipe with `ce`, such as `paper`, or leave it out"));
        }
        if lora.layers == LoraLayers::All && (lora.rank == 0 || self.layer_by_layer() || !self.trains()) {
            let problem = "is `all`, which wants a `lora.rank` and a loss term that looks at answers";
            return Err(Error::invalid("finetune setting `lora.layers`", problem)
                .remedy("for instance `--recipe best --lora-rank 16 --lora-layers all`"));
        }
        Ok(())
    }

    fn check_stages(&self) -> Result<()> {
        let wrong = |name: &str, problem: String| Err(Error::invalid(format!("finetune setting `{name}`"), problem));
        for Stage { share, losses } in &self.stages {
            if !(*share > 0.0 && *share <= 1.0) {
                return wrong("stage.share", format!("is {share}, must be above 0 and at most 1"));
            }
            for (loss, weight) in losses {
                if !(weight.is_finite() && *weight >= 0.0) {
                    return wrong(&format!("stage.losses.{}", loss.name()), format!("is {weight}, must be 0 or more"));
                }
            }
            if !losses.values().any(|&weight| weight > 0.0) {
                return Err(Error::invalid("finetune setting `stage.losses`", "no term has a weight above 0")
                    .remedy("for instance `[[stage]]` with `losses = { ce = 1.0 }`"));
            }
        }
        let sum: f64 = self.stages.iter().map(|stage| stage.share).sum();
        match (self.stages.is_empty(), self.fit.enabled) {
            (true, true) => Ok(()),
            (true, false) => Err(Error::invalid("finetune setting `stage`", "there is none, and no fit")
                .remedy("add `[[stage]]` with `losses = { ce = 1.0 }`, or set `fit.enabled`")),
            (false, _) if (sum - 1.0).abs() > 1e-6 => {
                wrong("stage.share", format!("the shares make {sum}, must make 1"))
            }
            (false, _) => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::LearningRate;
    use super::*;
    use crate::finetune::loss::LossKind;

    #[test]
    fn a_setting_out_of_range_is_named() {
        type Case = (fn(&mut Settings), &'static str);
        let cases: [Case; 11] = [
            (|s| s.optimizer.learning_rate = LearningRate::One(0.0), "optimizer.learning_rate"),
            (|s| s.optimizer.learning_rate = LearningRate::One(f64::NAN), "optimizer.learning_rate"),
            (|s| s.optimizer.learning_rate = LearningRate::Several(Vec::new()), "optimizer.learning_rate"),
            (|s| s.optimizer.beta2 = 1.0, "optimizer.beta2"),
            (|s| s.schedule.warmup_ratio = 1.5, "schedule.warmup_ratio"),
            (|s| s.batch.size = 0, "batch.size"),
            (|s| s.stages = Stage::only([(LossKind::Ce, -1.0)]), "stage.losses.ce"),
            (|s| s.stages[0].losses.clear(), "stage.losses"),
            (|s| s.stages.clear(), "stage"),
            (|s| s.data.share = 0.0, "data.share"),
            (|s| s.optimizer.average_last = 1.5, "optimizer.average_last"),
        ];
        for (change, name) in cases {
            let message = Settings::default().with(change).check().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
        }
    }
}

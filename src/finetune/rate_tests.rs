//! The search for the learning rate.

use super::*;

#[test]
fn the_learning_rate_with_the_lowest_final_loss_is_chosen() {
    let work = tempfile::tempdir().unwrap();
    // Eight steps per pass.
    let settings = settings().with(|s| {
        s.batch.size = 1;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = None;
        s.schedule.epochs = 2;
        s.fit.enabled = true;
    });
    let choosing = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::Several(vec![1e-9, 1e-3, 1e-6]));
    let chosen = run(&choosing, &[2, 4], work.path(), false, None).outcome.unwrap();
    let report = &chosen.report;
    assert_eq!(report.learning_rate, 1e-3, "{:?}", report.trials);
    assert_eq!(report.trials.iter().map(|trial| trial.learning_rate).collect::<Vec<_>>(), [1e-9, 1e-3, 1e-6]);
    // Trials do not change the weights.
    let plain = settings.with(|s| s.optimizer.learning_rate = LearningRate::One(1e-3));
    let plain = run(&plain, &[2, 4], work.path(), false, None).outcome.unwrap();
    assert!(weights(&plain.decoder) == weights(&chosen.decoder));
    // A run that stops after its trials resumes with their results.
    let folder = tempfile::tempdir().unwrap();
    interrupt(&choosing, &[2, 4], folder.path(), 3);
    let resumed = run(&choosing, &[2, 4], folder.path(), true, None).outcome.unwrap();
    assert_eq!((resumed.report.resumed_from_step, &resumed.report.trials), (3, &report.trials));
    assert!(weights(&resumed.decoder) == weights(&chosen.decoder));
}

#[test]
fn a_diverging_rate_is_skipped_unless_every_rate_diverges() {
    let settings = settings().with(|s| {
        s.batch.size = 1;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = None;
        s.fit.enabled = false;
    });
    let rates = |learning_rates: Vec<f64>| {
        let work = tempfile::tempdir().unwrap();
        let settings = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::Several(learning_rates));
        run(&settings, &[2, 4], work.path(), false, None).outcome
    };
    let chosen = rates(vec![1e38, 1e-3, 1e37]).unwrap();
    let trials = &chosen.report.trials;
    assert_eq!(chosen.report.learning_rate, 1e-3, "{trials:?}");
    let diverged: Vec<bool> = trials.iter().map(|trial| trial.diverged.is_some() && trial.loss.is_none()).collect();
    assert_eq!(diverged, [true, false, true], "{trials:?}");
    assert!(trials[0].diverged.as_ref().is_some_and(|problem| problem.contains("finetune step")), "{trials:?}");
    // Diverged trials do not change the weights.
    let alone = rates(vec![1e-3]).unwrap();
    assert!(weights(&alone.decoder) == weights(&chosen.decoder));
    let Err(error) = rates(vec![1e38, 1e37]) else { panic!("no rate is left") };
    let message = error.to_string();
    assert!(message.starts_with("learning rates 1e38, 1e37: all diverge: finetune step"), "{message}");
    assert!(message.contains("take a lower learning rate"), "{message}");
}

#[test]
fn learning_rate_trials_are_judged_on_held_back_samples() {
    let settings = settings().with(|s| {
        (s.batch.size, s.batch.accumulation_steps, s.schedule.max_steps) = (1, 1, None);
        s.optimizer.learning_rate = LearningRate::AUTO;
    });
    let work = tempfile::tempdir().unwrap();
    let found = run(&settings, &[2, 4], work.path(), false, None).outcome.unwrap();
    let trials = &found.report.trials;
    // With eight samples and one per step, two are held out and a trial has six steps.
    assert!(trials.len() >= 2 && trials.len() <= 6, "{trials:?}");
    assert!(trials.iter().all(|trial| (trial.steps, trial.held_out_samples) == (6, 2)), "{trials:?}");
    let least = trials.iter().min_by(|a, b| a.loss.unwrap().total_cmp(&b.loss.unwrap())).unwrap();
    assert_eq!(found.report.learning_rate, least.learning_rate, "{trials:?}");
    let mut held_out = Vec::new();
    for (place, trial) in trials.iter().enumerate() {
        let rates = OPTIMIZERS[0].rates;
        let number = rates.iter().position(|&rate| rate == trial.learning_rate).unwrap();
        let text = std::fs::read_to_string(work.path().join(format!("search-{number}/metrics.jsonl"))).unwrap();
        let steps: Vec<StepMetrics> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let mut seen: Vec<String> = steps.into_iter().flat_map(|step| step.samples).collect();
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 6);
        if place == 0 {
            held_out = found.report.sample_ids.iter().filter(|id| !seen.contains(id)).cloned().collect();
        }
        assert!(held_out.iter().all(|id| !seen.contains(id)), "{held_out:?}, {seen:?}");
    }
    // Trials do not change the weights.
    let plain = settings.with(|s| s.optimizer.learning_rate = LearningRate::One(least.learning_rate));
    let alone = run(&plain, &[2, 4], work.path(), false, None).outcome.unwrap();
    assert!(weights(&alone.decoder) == weights(&found.decoder));
}

//! Runs with the dense model as teacher.

use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

#[test]
fn losses_that_need_the_dense_model_are_refused_without_it() {
    let _alone = alone();
    let bundle = Bundle::open(&model()).unwrap();
    let work = tempfile::tempdir().unwrap();
    let settings = settings().with(|s| s.stages = Stage::only([(LossKind::Kd, 1.0)]));
    let request = Request {
        bundle: &bundle,
        layers: &[3],
        data: &Texts { vocabulary: 100 },
        settings: &settings,
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features: &FeatureCache::new(1 << 20),
    };
    let message = finetune(&request, &Cancel::default(), &mut |_| {}).err().unwrap().to_string();
    assert!(message.contains("`kd`") && message.contains("teacher"), "{message}");
}

#[test]
fn losses_are_zero_if_a_model_is_its_own_teacher() {
    let _alone = alone();
    let bundle = Bundle::open(&model()).unwrap();
    let kept: Vec<usize> = (0..16).collect();
    let losses = [(LossKind::Kd, 1.0), (LossKind::Hidden, 1.0), (LossKind::Anchor, 1.0)];
    let work = tempfile::tempdir().unwrap();
    let settings = settings().with(|s| {
        s.stages = Stage::only(losses);
        s.schedule.max_steps = Some(1);
    });
    let request = Request {
        bundle: &bundle,
        layers: &[3, 7],
        data: &Texts { vocabulary: 800 },
        settings: &settings,
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features: &FeatureCache::new(1 << 20),
    };
    let teacher = Teacher { bundle: &bundle, kept: &kept, anchors: &[5, 9] };
    let mut losses = BTreeMap::new();
    finetune_with_teacher(&request, Some(&teacher), &Cancel::default(), &mut |metrics| losses = metrics.losses.clone())
        .unwrap();
    assert!(losses["kd"].abs() < 1e-4, "{losses:?}");
    // Targets are stored in bf16, whose relative error is at most 2^-9.
    let rounding = 2f64.powi(-18);
    assert!(losses["hidden"] < rounding && losses["anchor"] < rounding, "{losses:?}");
}

/// Texts with a counter of the passes over them.
struct Counted(Texts, AtomicU32);

impl Source for Counted {
    fn digest(&self) -> Result<Sha256Digest> {
        self.0.digest()
    }

    fn count(&self) -> u64 {
        self.0.count()
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.samples()
    }
}

/// When the dense model contains the pruned model's frozen part, one pass over the samples computes both outputs, with
/// the same losses as two passes.
#[test]
fn a_frozen_part_shared_with_the_dense_model_is_computed_once() {
    let _alone = alone();
    let dense = Bundle::open(&model()).unwrap();
    let settings = settings().with(|s| s.stages = Stage::only([(LossKind::Kd, 1.0), (LossKind::Anchor, 1.0)]));
    let losses = |dropped: &[usize], parent: Sha256Digest, layers: &[usize], readings: u32| {
        let folder = tempfile::tempdir().unwrap();
        let bundle = Bundle::open(&pruned_from(&dense, folder.path(), dropped, parent)).unwrap();
        let data = Counted(Texts { vocabulary: 800 }, 0.into());
        let request = Request {
            bundle: &bundle,
            layers,
            data: &data,
            settings: &settings,
            device: Device::Cpu,
            work: &folder.path().join("work"),
            resume: false,
            limits: Limits::default(),
            ranks: None,
            features: &FeatureCache::new(1 << 20),
        };
        let kept: Vec<usize> = (0..16).filter(|layer| !dropped.contains(layer)).collect();
        let teacher = Teacher { bundle: &dense, kept: &kept, anchors: &[] };
        let mut losses = Vec::new();
        finetune_with_teacher(&request, Some(&teacher), &Cancel::default(), &mut |step| losses.push(step.loss))
            .unwrap();
        // One more reading, of the first samples, is for the plan of the run.
        assert_eq!(data.1.into_inner(), readings + 1, "dropped {dropped:?}, trained {layers:?}");
        losses
    };
    let own = || dense.digest().unwrap();
    for layers in [[2, 4], [0, 4]] {
        let (one, two) = (losses(&DROPPED, own(), &layers, 1), losses(&DROPPED, sha256_bytes(b"other"), &layers, 2));
        assert!(!one.is_empty() && one.len() == two.len(), "trained {layers:?}: {one:?}, {two:?}");
        for (a, b) in one.iter().zip(&two) {
            assert!((a - b).abs() < 1e-5 * b, "trained {layers:?}: {a}, expected {b}");
        }
    }
    // The frozen part lacks a layer of the dense model.
    losses(&DROPPED, own(), &[4, 6], 2);
}

#[test]
fn distillation_lowers_the_loss_with_and_without_checkpointing() {
    let losses = [(LossKind::Ce, 1.0), (LossKind::Kd, 0.5), (LossKind::Hidden, 2.0), (LossKind::Anchor, 1.0)];
    let settings = settings().with(|s| s.stages = Stage::only(losses));
    let work = tempfile::tempdir().unwrap();
    let plain = run(&settings, &[2, 4], work.path(), false, None);
    let report = plain.outcome.unwrap().report;
    assert!(
        report.last_loss.unwrap() < report.first_loss.unwrap(),
        "{:?} to {:?}",
        report.first_loss,
        report.last_loss
    );
    assert!(report.provenance.inputs.contains_key("teacher"));
    let checkpointed = settings.with(|s| s.batch.gradient_checkpointing = Some(true));
    let checkpointed = run(&checkpointed, &[2, 4], work.path(), false, None);
    checkpointed.outcome.unwrap();
    assert!(!plain.steps.is_empty() && plain.steps.len() == checkpointed.steps.len());
    for (a, b) in plain.steps.iter().zip(&checkpointed.steps) {
        assert!((a.loss - b.loss).abs() < 1e-4 * a.loss, "step {}: {} and {}", a.step, a.loss, b.loss);
        assert!(
            (a.grad_norm - b.grad_norm).abs() < 1e-3 * a.grad_norm,
            "step {}: {} and {}",
            a.step,
            a.grad_norm,
            b.grad_norm
        );
        assert!(a.losses.len() == 4 && b.losses.len() == 4);
    }
}

fn by_layer() -> Settings {
    let losses = [(LossKind::Anchor, 1.0)];
    settings().with(|s| {
        s.stages = Stage::only(losses);
        s.fit.enabled = true;
        s.batch.size = 2;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = Some(6);
    })
}

/// The first layer's weights are the same, bit for bit, with and without a second layer; the second layer is healed
/// too.
#[test]
fn a_layer_is_healed_independently_of_the_layers_after_it() {
    let settings = by_layer().with(|s| s.schedule.max_steps = Some(16));
    let work = tempfile::tempdir().unwrap();
    let both = run(&settings, &[2, 4], work.path(), false, None);
    let outcome = both.outcome.unwrap();
    let report = &outcome.report;
    let order: Vec<(usize, usize)> = report.fitted.iter().map(|fit| (fit.layer, fit.weights.len())).collect();
    assert_eq!(order, [(2, 1), (4, 1)]);
    assert!(report.fitted.iter().all(|fit| fit.distance_after < fit.distance_before), "{:?}", report.fitted);
    let steps: Vec<u64> = both.steps.iter().map(|step| step.step).collect();
    assert_eq!(steps, (1..=16).collect::<Vec<_>>());
    // Four steps of two samples are one pass over the eight samples: two passes per layer.
    assert_eq!((report.steps, report.tokens), (16, 2 * (6..14).sum::<u64>()));

    let work = tempfile::tempdir().unwrap();
    let alone = settings.with(|s| s.schedule.max_steps = Some(8));
    let alone = run(&alone, &[2], work.path(), false, None).outcome.unwrap();
    assert_eq!(alone.report.fitted, report.fitted[..1]);
    assert!(alone.report.trained_parameters < report.trained_parameters);
    let pruned_folder = tempfile::tempdir().unwrap();
    let dense = Bundle::open(&model()).unwrap();
    let bundle = Bundle::open(&pruned(&dense, pruned_folder.path())).unwrap();
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let first = changed(&decoder, &alone.decoder);
    assert!(!first.is_empty());
    let differing = changed(&alone.decoder, &outcome.decoder);
    assert!(differing.iter().all(|name| !first.contains(name)), "{differing:?}");
    assert_eq!(first.len() + differing.len(), changed(&decoder, &outcome.decoder).len());
}

/// Without a fit, steps bring both layers nearer to the dense stream, with either optimiser.
#[test]
fn gradient_steps_alone_heal_each_layer() {
    // Muon's steps have an RMS of a fifth of the learning rate.
    for (optimizer, factor) in [(OptimizerKind::AdamW, 1.0), (OptimizerKind::Muon, 5.0)] {
        let learning_rate = factor * by_layer().peak_rate();
        let settings = by_layer().with(|s| {
            s.fit.enabled = false;
            s.batch.size = 8;
            s.schedule.max_steps = Some(24);
            s.optimizer.kind = optimizer;
            s.optimizer.learning_rate = LearningRate::One(learning_rate);
        });
        let work = tempfile::tempdir().unwrap();
        let steps = run(&settings, &[2, 4], work.path(), false, None).steps;
        for layer in steps.chunks_exact(12) {
            let (first, last) = (layer[0].loss, layer[11].loss);
            assert!(last < 0.8 * first, "{optimizer:?}: {first} to {last}");
        }
    }
}

/// Stops after every step: within a layer, and before the stream and the fit of the next one.
#[test]
fn a_layer_by_layer_run_resumes_to_the_same_bits() {
    let adapted = by_layer().with(|s| {
        s.lora.rank = 4;
        s.optimizer.average_last = 0.5;
        s.schedule.checkpoint_every = 2;
    });
    let muon = by_layer().with(|s| s.optimizer.kind = OptimizerKind::Muon);
    for settings in [by_layer(), adapted, muon] {
        let folder = tempfile::tempdir().unwrap();
        let whole = run(&settings, &[2, 4], folder.path(), false, None).outcome.unwrap();
        for stop in 1..6 {
            let folder = tempfile::tempdir().unwrap();
            let stopped = run(&settings, &[2, 4], folder.path(), false, Some(stop)).outcome.err().unwrap();
            assert!(stopped.to_string().contains(&format!("{stop} of 6 steps")), "{stopped}");
            let resumed = run(&settings, &[2, 4], folder.path(), true, None).outcome.unwrap();
            assert_eq!(resumed.report.resumed_from_step, stop);
            assert_eq!(resumed.report.fitted, whole.report.fitted);
            assert_eq!(resumed.report.trained_parameters, whole.report.trained_parameters);
            assert!(weights(&resumed.decoder) == weights(&whole.decoder), "stopped after step {stop}");
        }
    }
}

/// Trials compare the cross-entropy of the answers. With a negligible rate it equals the loss of the first step of a
/// run with `ce`.
#[test]
fn learning_rates_are_judged_by_answers_even_without_a_ce_loss() {
    let work = tempfile::tempdir().unwrap();
    let still = by_layer().with(|s| {
        s.optimizer.learning_rate = LearningRate::Several(vec![1e-12, 1e-3]);
        s.fit.enabled = false;
    });
    let report = run(&still, &[2, 4], work.path(), false, None).outcome.unwrap().report;
    let work = tempfile::tempdir().unwrap();
    let answers = settings().with(|s| {
        s.batch.size = 8;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = Some(1);
    });
    let first = run(&answers, &[2, 4], work.path(), false, None).outcome.unwrap().report.first_loss.unwrap();
    let [unmoved, moved] = report.trials.as_slice() else { panic!("{:?}", report.trials) };
    assert!((unmoved.loss.unwrap() - first).abs() < 1e-5 * first, "{unmoved:?}, {first}");
    assert!(moved.loss != unmoved.loss);
    let best = if moved.loss.unwrap() < unmoved.loss.unwrap() { moved } else { unmoved };
    assert_eq!(report.learning_rate, best.learning_rate);
}

/// A rate that diverges in one layer does not affect the trials of the next rate.
#[test]
fn a_diverging_rate_is_skipped_in_a_layer_by_layer_run() {
    let settings = by_layer().with(|s| {
        s.batch.size = 1;
        s.schedule.max_steps = None;
    });
    let rates = |learning_rates: Vec<f64>| {
        let work = tempfile::tempdir().unwrap();
        let settings = settings.clone().with(|s| s.optimizer.learning_rate = LearningRate::Several(learning_rates));
        run(&settings, &[2, 4], work.path(), false, None).outcome
    };
    let chosen = rates(vec![1e38, 1e-3]).unwrap();
    let [first, second] = chosen.report.trials.as_slice() else { panic!("{:?}", chosen.report.trials) };
    assert!(first.loss.is_none() && first.diverged.is_some(), "{first:?}");
    assert!(second.loss.is_some_and(f64::is_finite) && second.diverged.is_none(), "{second:?}");
    let alone = rates(vec![1e-3]).unwrap();
    assert!(weights(&chosen.decoder) == weights(&alone.decoder));
}

/// The distance after the fit equals the term `anchor` that the network itself then measures.
#[test]
fn the_distance_reported_by_the_fit_equals_the_anchor_loss() {
    let work = tempfile::tempdir().unwrap();
    // One step over all samples per layer.
    let measured = by_layer().with(|s| {
        s.batch.size = 8;
        s.schedule.max_steps = Some(2);
        s.optimizer.learning_rate = LearningRate::One(1e-12);
        s.fit.enabled = false;
    });
    let before = run(&measured, &[4, 5], work.path(), false, None);
    assert!(before.outcome.unwrap().report.fitted.is_empty());
    let fitting = measured.with(|s| s.fit.enabled = true);
    let after = run(&fitting, &[4, 5], work.path(), false, None);
    let report = after.outcome.unwrap().report;
    let [first, second] = report.fitted.as_slice() else { panic!("{:?}", report.fitted) };
    assert!(after.steps.len() >= 2, "{} steps", after.steps.len());
    for (fit, step) in [first, second].into_iter().zip(&after.steps) {
        let (found, left) = (step.loss, fit.distance_after.unwrap());
        assert!((found - left).abs() < 1e-3 * left, "measured {found}, fitted {left}");
    }
    let (found, start) = (after.steps[0].loss, before.steps[0].loss);
    assert!((start - first.distance_before.unwrap()).abs() < 1e-3 * start && found < 0.7 * start, "{start} to {found}");

    // The fit alone changes two weights of each layer and nothing else, and reduces each layer's distance.
    let alone = fitting.with(|s| s.stages = Vec::new());
    let outcome = run(&alone, &[4, 5], work.path(), false, None).outcome.unwrap();
    assert_eq!((outcome.report.steps, outcome.report.first_loss), (0, None));
    let fitted = &outcome.report.fitted;
    assert_eq!(fitted.iter().map(|fit| fit.layer).collect::<Vec<_>>(), [4, 5]);
    for both in fitted {
        assert!(both.distance_after < both.distance_before, "{both:?}");
    }
    let dense = Bundle::open(&model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&dense, folder.path())).unwrap();
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let names: Vec<String> = fitted.iter().flat_map(|fit| fit.weights.clone()).collect();
    assert_eq!(names.len(), 4, "{names:?}");
    assert_eq!(changed(&decoder, &outcome.decoder), names);
}

#[test]
fn stages_switch_the_losses_and_a_run_resumes_in_any_stage() {
    let stage = |share, losses: &[(LossKind, f64)]| Stage { share, losses: losses.iter().copied().collect() };
    let stages = vec![stage(0.5, &[(LossKind::Anchor, 1.0)]), stage(0.5, &[(LossKind::Ce, 1.0), (LossKind::Kd, 0.5)])];
    let settings = settings().with(|s| {
        s.fit.enabled = true;
        s.stages = stages;
        s.batch.size = 2;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = Some(6);
    });
    let folder = tempfile::tempdir().unwrap();
    let whole = run(&settings, &[2, 4], folder.path(), false, None);
    let terms: Vec<Vec<&str>> =
        whole.steps.iter().map(|step| step.losses.keys().map(String::as_str).collect()).collect();
    assert_eq!(
        terms,
        [vec!["anchor"], vec!["anchor"], vec!["anchor"], vec!["ce", "kd"], vec!["ce", "kd"], vec!["ce", "kd"]]
    );
    let want = weights(&whole.outcome.unwrap().decoder);
    for stop in [2, 3, 4] {
        let folder = tempfile::tempdir().unwrap();
        interrupt(&settings, &[2, 4], folder.path(), stop);
        let resumed = run(&settings, &[2, 4], folder.path(), true, None).outcome.unwrap();
        assert_eq!(resumed.report.resumed_from_step, stop);
        assert!(weights(&resumed.decoder) == want, "stopped after step {stop}");
    }
}

/// Ridges, weights and distances are the same for one worker and for several, and no stream of the dense model is on
/// disk.
#[test]
fn the_fit_does_not_depend_on_worker_count_and_writes_no_targets() {
    let settings = settings().with(|s| {
        s.stages = Vec::new();
        s.fit.enabled = true;
        s.fit.tokens_per_feature = 1000;
    });
    let runs = [1, 2, 3].map(|workers| {
        let work = tempfile::tempdir().unwrap();
        let outcome = run_with(&settings, &[4, 5], work.path(), Limits { workers: Some(workers), ..Limits::default() });
        let names = std::fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let streams: Vec<_> = names.filter(|name| name.to_string_lossy().starts_with("streams-")).collect();
        assert!(streams.is_empty(), "{streams:?}");
        outcome
    });
    let (first, rest) = runs.split_first().unwrap();
    let fitted = &first.report.fitted;
    // The eight samples have 76 tokens.
    assert!(fitted.iter().all(|fit| fit.tokens == 76 && (14..=24).contains(&fit.held_out_tokens)), "{fitted:?}");
    for other in rest {
        assert_eq!(&other.report.fitted, fitted);
        assert_eq!(changed(&first.decoder, &other.decoder), Vec::<String>::new());
    }
}

/// Adapters in all layers leave the initial network unchanged, change every layer's matrices, and resume to the same
/// bits.
#[test]
fn adapters_on_all_layers_train_after_a_fit() {
    let losses = BTreeMap::from([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0)]);
    let plain = settings().with(|s| {
        s.stages = Stage::only(losses);
        s.fit.enabled = true;
        s.schedule.max_steps = Some(3);
    });
    let wide = plain.clone().with(|s| {
        s.lora.rank = 2;
        s.lora.layers = LoraLayers::All;
    });
    let [narrow_work, whole_work, work] = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let narrow = run(&plain, &[4, 5], narrow_work.path(), false, None);
    let whole = run(&wide, &[4, 5], whole_work.path(), false, None);
    let (first, same) = (whole.steps[0].loss, narrow.steps[0].loss);
    assert!((first - same).abs() < 1e-4 * same, "{first}, without adapters {same}");
    let whole = whole.outcome.unwrap();
    assert_eq!(whole.report.fitted.iter().map(|fit| fit.layer).collect::<Vec<_>>(), [4, 5]);
    let dense = Bundle::open(&model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&dense, folder.path())).unwrap();
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    assert_eq!(changed(&decoder, &whole.decoder).len(), 14 * 7);
    interrupt(&wide, &[4, 5], work.path(), 2);
    let resumed = run(&wide, &[4, 5], work.path(), true, None).outcome.unwrap();
    assert_eq!(resumed.report.resumed_from_step, 2);
    assert!(weights(&resumed.decoder) == weights(&whole.decoder));
}

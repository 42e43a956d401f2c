//! Complete runs on the shipped model.

#[path = "connector_tests.rs"]
mod connector;
#[path = "quantised_tests.rs"]
mod quantised;
#[path = "rate_tests.rs"]
mod rates;
#[path = "teacher_tests.rs"]
mod teacher;
#[path = "whole_tests.rs"]
mod whole;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use half::f16;

use super::*;
use crate::base::{Cancel, Device, Error, Provenance, Result, Sha256Digest, sha256_bytes};
use crate::bundle::{Bundle, BundleWriter, LayerEdit, Record, Role, Tower};
use crate::ir::{AttributeKind, DataType, Model, Tensor, ValueType};
use crate::prompt::Prompt;
use crate::runtime::FeatureCache;

/// Eight texts without pictures, the same as in the reference script.
struct Texts {
    vocabulary: i64,
}

impl Source for Texts {
    fn digest(&self) -> Result<Sha256Digest> {
        Ok(sha256_bytes(b"eight texts"))
    }

    fn count(&self) -> u64 {
        8
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        Ok(Box::new((0..8i64).map(|i| {
            let length = 6 + i;
            let input_ids = (0..length).map(|t| (7 * i * i + 31 * t * t + 11 * t + 5 * i) % self.vocabulary).collect();
            let answer_mask = (0..length).map(|t| t >= length / 2).collect();
            Ok(TrainingSample {
                id: format!("text {i}"),
                number: i as u64,
                prompt: Prompt { input_ids, ..Prompt::default() },
                answer_mask,
            })
        })))
    }
}

fn model() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model")
}

const DROPPED: [usize; 2] = [2, 5];

/// Dense layers that remain of 16 without 2 and 5.
const KEPT: [usize; 14] = [0, 1, 3, 4, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The model without decoder layers 2 and 5, as a folder with a record of the dense model.
fn pruned(dense: &Bundle, folder: &Path) -> PathBuf {
    pruned_from(dense, folder, &DROPPED, dense.digest().unwrap())
}

fn pruned_from(dense: &Bundle, folder: &Path, dropped: &[usize], parent: Sha256Digest) -> PathBuf {
    let target = folder.join("pruned");
    let component = dense.require(Role::Decoder).unwrap();
    let decoder = crate::onnx::load(&dense.path_of(component)).unwrap();
    let analysis = crate::analysis::analyse(&decoder).unwrap();
    let mut writer = BundleWriter::create(dense, &target).unwrap();
    writer.drop_layers(&LayerEdit::new(Tower::Text, 16, dropped).unwrap(), None, Vec::new()).unwrap();
    writer.save(component, &crate::rewrite::drop_layers(&analysis, dropped).unwrap()).unwrap();
    let inputs = BTreeMap::from([("model".to_string(), parent)]);
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, inputs, &()).unwrap()).unwrap();
    target
}

fn settings() -> Settings {
    Settings::default().with(|s| {
        s.optimizer.learning_rate = LearningRate::One(1e-3);
        s.batch.size = 4;
        s.batch.accumulation_steps = 2;
        s.schedule.max_steps = Some(6);
        s.schedule.checkpoint_every = 0;
    })
}

/// A lock to hold during a run. A run sets LibTorch's number of threads, which is global to the process and affects the
/// last bits of results.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Run {
    outcome: Result<FinetunedModel>,
    steps: Vec<StepMetrics>,
}

fn run(settings: &Settings, layers: &[usize], work: &Path, resume: bool, stop_after: Option<u64>) -> Run {
    run_within(settings, layers, work, resume, stop_after, Limits::default())
}

fn run_with(settings: &Settings, layers: &[usize], work: &Path, limits: Limits) -> FinetunedModel {
    run_within(settings, layers, work, false, None, limits).outcome.unwrap()
}

fn run_within(
    settings: &Settings,
    layers: &[usize],
    work: &Path,
    resume: bool,
    stop_after: Option<u64>,
    limits: Limits,
) -> Run {
    let dense = Bundle::open(&model()).unwrap();
    let pruned_folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&dense, pruned_folder.path())).unwrap();
    let needs_teacher = settings.fit.enabled || settings.losses().keys().any(|kind| kind.needs_teacher());
    let teacher = needs_teacher.then_some(dense);
    let features = FeatureCache::new(1 << 20);
    let vocabulary = bundle.require_config().unwrap().vocab_size.unwrap() as i64;
    let request = Request {
        bundle: &bundle,
        layers,
        data: &Texts { vocabulary },
        settings,
        device: Device::Cpu,
        work,
        resume,
        limits,
        ranks: None,
        features: &features,
    };
    let cancel = Cancel::default();
    let mut steps = Vec::new();
    let _alone = alone();
    let teacher = teacher.as_ref().map(|dense| Teacher { bundle: dense, kept: &KEPT, anchors: &[3, 5] });
    let outcome = finetune_with_teacher(&request, teacher.as_ref(), &cancel, &mut |metrics| {
        steps.push(metrics.clone());
        if Some(metrics.step) == stop_after {
            cancel.request();
        }
    });
    Run { outcome, steps }
}

/// Asserts that a run which is stopped behind a step ends as interrupted.
fn interrupt(settings: &Settings, layers: &[usize], work: &Path, step: u64) {
    let error = run(settings, layers, work, false, Some(step)).outcome.err().unwrap();
    assert!(matches!(error, Error::Interrupted { .. }), "{error}");
}

/// Bytes of every initializer by name.
fn weights(model: &Model) -> Vec<(String, Vec<u8>)> {
    let graph = &model.graph;
    graph.body.initializers.iter().map(|(id, tensor)| (graph.name(*id).to_string(), tensor.bytes().to_vec())).collect()
}

fn changed(before: &Model, after: &Model) -> Vec<String> {
    let (before, after) = (weights(before), weights(after));
    assert_eq!(before.len(), after.len(), "initializers");
    before.into_iter().zip(after).filter(|(a, b)| a != b).map(|((name, _), _)| name).collect()
}

/// A run of `scripts/reference/finetune.py`.
#[derive(serde::Deserialize)]
struct Reference {
    dropped: Vec<usize>,
    trained: Vec<usize>,
    steps: Vec<ReferenceStep>,
}

#[derive(serde::Deserialize)]
struct ReferenceStep {
    loss: f64,
    grad_norm: f64,
    learning_rate: f64,
}

/// Reference: the same network in transformers, trained with `torch.optim.AdamW` on the same texts.
#[test]
fn losses_and_gradient_norms_equal_transformers() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/expected/finetune.json");
    let reference: Reference = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    assert_eq!((reference.dropped, reference.trained), (DROPPED.to_vec(), vec![2, 4]));
    let work = tempfile::tempdir().unwrap();
    for gradient_checkpointing in [None, Some(true)] {
        let settings = settings().with(|s| s.batch.gradient_checkpointing = gradient_checkpointing);
        let run = run(&settings, &[2, 4], work.path(), false, None);
        run.outcome.unwrap();
        assert_eq!(run.steps.len(), reference.steps.len());
        for (step, want) in run.steps.iter().zip(&reference.steps) {
            let (loss, norm) = (step.loss, step.grad_norm);
            assert!(
                (loss - want.loss).abs() < 1e-4 * want.loss,
                "step {}: loss {loss}, expected {}",
                step.step,
                want.loss
            );
            let norm_of = want.grad_norm;
            assert!((norm - norm_of).abs() < 1e-3 * norm_of, "step {}: norm {norm}, expected {norm_of}", step.step);
            assert!((step.learning_rate - want.learning_rate).abs() < 1e-12);
        }
    }
}

#[test]
fn only_the_trained_layers_change() {
    let work = tempfile::tempdir().unwrap();
    let outcome = run(&settings(), &[2, 4], work.path(), false, None).outcome.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&Bundle::open(&model()).unwrap(), folder.path())).unwrap();
    let before = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let map = crate::analysis::layers(&before.graph).unwrap();
    let mut want: Vec<String> = Vec::new();
    for &(id, _) in &before.graph.body.initializers {
        let of_layer = |layer: usize| map.layers[layer].weights.contains(&id);
        let big = before
            .graph
            .body
            .initializer(id)
            .is_some_and(|tensor| tensor.element_count() > 1 && tensor.dtype.is_float());
        if (of_layer(2) || of_layer(4)) && big {
            want.push(before.graph.name(id).to_string());
        }
    }
    assert_eq!(changed(&before, &outcome.decoder), want);
    assert_eq!(
        outcome.report.trained_parameters,
        want.iter()
            .map(|name| before
                .graph
                .body
                .initializers
                .iter()
                .find(|(id, _)| before.graph.name(*id) == name)
                .unwrap()
                .1
                .element_count())
            .sum::<u64>()
    );

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("decoder.onnx");
    crate::onnx::save(&outcome.decoder, &path, &crate::onnx::Storage::Inline).unwrap();
    assert_eq!(weights(&crate::onnx::load(&path).unwrap()), weights(&outcome.decoder));
}

#[test]
fn a_stopped_run_resumes_to_the_same_bits() {
    let settings = settings().with(|s| {
        s.batch.size = 2;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = Some(7);
    });
    let whole = tempfile::tempdir().unwrap();
    let whole = run(&settings, &[3], whole.path(), false, None);
    let work = tempfile::tempdir().unwrap();
    let stopped = run(&settings, &[3], work.path(), false, Some(3));
    assert!(matches!(stopped.outcome, Err(Error::Interrupted { .. })));
    assert_eq!(stopped.steps.len(), 3);
    let resumed = run(&settings, &[3], work.path(), true, None);
    assert_eq!(resumed.steps.first().map(|step| step.step), Some(4));
    let (whole_outcome, resumed_outcome) = (whole.outcome.unwrap(), resumed.outcome.unwrap());
    assert_eq!(weights(&whole_outcome.decoder), weights(&resumed_outcome.decoder));
    assert_eq!(resumed_outcome.report.resumed_from_step, 3);
    assert_eq!(whole_outcome.report.last_loss, resumed_outcome.report.last_loss);
    let lines = std::fs::read_to_string(work.path().join("metrics.jsonl")).unwrap();
    assert_eq!(lines.lines().count(), 7);
    clear_work(work.path()).unwrap();
    let left: Vec<_> = std::fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(!left.iter().any(|name| name.to_string_lossy().starts_with("hidden-")), "{left:?}");
    assert_eq!(std::fs::read_dir(work.path().join("checkpoints")).unwrap().count(), 0);

    let other = settings.with(|s| s.seed = 7);
    run(&other, &[3], work.path(), false, Some(1)).outcome.err();
    let message = run(&other.with(|s| s.seed = 8), &[3], work.path(), true, None).outcome.err().unwrap().to_string();
    assert!(message.contains("`settings` differ"), "{message}");
}

fn floats(model: &Model) -> Vec<(String, Vec<f32>)> {
    let words = |bytes: Vec<u8>| bytes.as_chunks::<4>().0.iter().map(|word| f32::from_le_bytes(*word)).collect();
    weights(model).into_iter().map(|(name, bytes)| (name, words(bytes))).collect()
}

/// At a constant rate, runs of 4 and 5 steps end with the weights of the longer run after these steps. The mean of the
/// runs' weights is therefore the longer run's mean.
#[test]
fn averaged_weights_are_the_mean_over_the_last_steps() {
    let settings = settings().with(|s| {
        s.schedule.kind = Schedule::Constant;
        s.batch.size = 2;
        s.batch.accumulation_steps = 1;
    });
    let ends: Vec<Model> = [4, 5, 6]
        .map(|steps| {
            let work = tempfile::tempdir().unwrap();
            let settings = settings.clone().with(|s| s.schedule.max_steps = Some(steps));
            run(&settings, &[3], work.path(), false, None).outcome.unwrap().decoder
        })
        .into();
    let settings = settings.with(|s| {
        s.optimizer.average_last = 0.5;
        s.schedule.max_steps = Some(6);
    });
    let work = tempfile::tempdir().unwrap();
    let averaged = run(&settings, &[3], work.path(), false, None).outcome.unwrap().decoder;
    let moved = changed(&ends[2], &averaged);
    assert_eq!(moved.len(), 9, "{moved:?}");
    let ends: Vec<_> = ends.iter().map(floats).collect();
    for (number, (name, found)) in floats(&averaged).into_iter().enumerate().filter(|(_, (n, _))| moved.contains(n)) {
        for (at, &found) in found.iter().enumerate() {
            let want = ends.iter().map(|weights| f64::from(weights[number].1[at])).sum::<f64>() / 3.0;
            assert!((f64::from(found) - want).abs() <= 1e-6 * want.abs().max(0.1), "{name}: {found}, expected {want}");
        }
    }
    for (stop, lora_rank) in [(3, 0), (5, 0), (5, 2)] {
        let settings = settings.clone().with(|s| s.lora.rank = lora_rank);
        let straight = tempfile::tempdir().unwrap();
        let straight = run(&settings, &[3], straight.path(), false, None).outcome.unwrap();
        let work = tempfile::tempdir().unwrap();
        interrupt(&settings, &[3], work.path(), stop);
        let resumed = run(&settings, &[3], work.path(), true, None).outcome.unwrap();
        assert_eq!(resumed.report.resumed_from_step, stop);
        assert!(weights(&resumed.decoder) == weights(&straight.decoder), "stopped after step {stop}");
    }
}

/// The changes have the rank of the adapters, only matrices change, and a run that stops after a fit and some steps
/// resumes to the same bits.
#[test]
fn adapters_change_matrices_by_a_difference_of_their_rank() {
    let settings = settings().with(|s| {
        s.batch.size = 2;
        s.batch.accumulation_steps = 1;
        s.schedule.max_steps = Some(5);
        s.lora.rank = 3;
    });
    let whole = tempfile::tempdir().unwrap();
    let whole = run(&settings, &[3], whole.path(), false, None).outcome.unwrap();
    let dense = Bundle::open(&model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&dense, folder.path())).unwrap();
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let moved = changed(&decoder, &whole.decoder);
    assert_eq!(moved.len(), 7, "{moved:?}");
    let mut elements = 0;
    let graphs = [&decoder.graph, &whole.decoder.graph];
    for name in &moved {
        let [before, after] = graphs.map(|graph| {
            let (_, tensor) = graph.body.initializers.iter().find(|(id, _)| graph.name(*id) == name).unwrap();
            let numbers: Vec<f32> =
                tensor.bytes().chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
            let [rows, columns] = tensor.dims[..] else { panic!("`{name}` is no matrix") };
            tch::Tensor::from_slice(&numbers).view([rows as i64, columns as i64])
        });
        let sizes = before.size();
        elements += 3 * (sizes[0] + sizes[1]);
        let (_, values, _) = (after - before).to_kind(tch::Kind::Double).svd(true, false);
        let values = Vec::<f64>::try_from(values).unwrap();
        assert!(values[0] > 0.0 && values[3] < 1e-3 * values[0], "{name}: {:?}", &values[..5]);
    }
    assert_eq!(whole.report.trained_parameters, elements as u64);

    let settings = settings.with(|s| s.fit.enabled = true);
    let straight = tempfile::tempdir().unwrap();
    let straight = run(&settings, &[3], straight.path(), false, None).outcome.unwrap();
    let work = tempfile::tempdir().unwrap();
    interrupt(&settings, &[3], work.path(), 2);
    let resumed = run(&settings, &[3], work.path(), true, None).outcome.unwrap();
    assert_eq!(resumed.report.resumed_from_step, 2);
    assert!(weights(&straight.decoder) == weights(&resumed.decoder));
}

#[test]
fn a_non_finite_loss_stops_the_run_and_names_step_and_sample() {
    let work = tempfile::tempdir().unwrap();
    let settings = settings().with(|s| {
        s.optimizer.learning_rate = LearningRate::One(1e30);
        s.schedule.kind = Schedule::Constant;
        s.optimizer.max_grad_norm = 0.0;
    });
    let message = run(&settings, &[3], work.path(), false, None).outcome.err().unwrap().to_string();
    assert!(message.contains("finetune step") && message.contains("`text 0`"), "{message}");
}

#[test]
fn an_empty_or_unknown_set_of_layers_is_refused() {
    let work = tempfile::tempdir().unwrap();
    for (layers, want) in [
        (&[][..], "finetune: no layer is named"),
        (&[99][..], "layer 99: does not exist, the model has layers 0 to 13"),
    ] {
        let error = run(&settings(), layers, work.path(), false, None).outcome.err().unwrap();
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().starts_with(want), "{error}");
    }
}

/// Rows that do not fit on disk are computed on demand, with the same weights to the bit.
#[test]
fn recomputed_rows_give_the_same_weights_as_stored_rows() {
    let plain = settings().with(|s| {
        (s.batch.size, s.batch.accumulation_steps, s.schedule.epochs, s.schedule.max_steps) = (2, 1, 2, None);
    });
    let losses = [(LossKind::Ce, 1.0), (LossKind::Kd, 1.0), (LossKind::Anchor, 0.5)];
    let taught = plain.clone().with(|s| {
        s.fit.enabled = true;
        s.stages = Stage::only(losses);
    });
    let searched = taught.clone().with(|s| s.optimizer.learning_rate = LearningRate::Several(vec![1e-3, 2e-3]));
    let adapted = plain.clone().with(|s| (s.lora.rank, s.lora.layers) = (2, LoraLayers::All));
    let half = taught.clone().with(|s| s.precision = Some(Precision::Bf16));
    let all = [(plain, [3, 4]), (taught, [2, 4]), (searched, [2, 4]), (adapted, [2, 4]), (half, [2, 4])];
    for (settings, layers) in all {
        let of = |cache| {
            let work = tempfile::tempdir().unwrap();
            let outcome = run_with(&settings, &layers, work.path(), Limits { cache, ..Limits::default() });
            let files = std::fs::read_dir(work.path()).unwrap().map(|entry| entry.unwrap().file_name());
            let files: Vec<String> = files.map(|name| name.to_string_lossy().into_owned()).collect();
            let rows = files.iter().filter(|name| [".f32", ".bf16"].iter().any(|end| name.ends_with(end)));
            assert!(!files.contains(&"window".to_string()), "{files:?}");
            let sizes = rows.map(|name| (name.clone(), std::fs::metadata(work.path().join(name)).unwrap().len()));
            (outcome, sizes.collect::<BTreeMap<String, u64>>())
        };
        let ((kept, files), (streamed, none)) = (of(None), of(Some(0)));
        assert!(!files.is_empty() && none.is_empty(), "{files:?}, {none:?} without room");
        // What the dense model gives has room alone.
        let mut of_dense = files.clone();
        of_dense.retain(|name, _| !name.starts_with("hidden-"));
        let (some, left) = of(Some(of_dense.values().sum()));
        assert_eq!(left, of_dense);
        assert_eq!(of_dense.is_empty(), settings.weight(LossKind::Kd) == 0.0);
        let hidden: Vec<&String> = files.keys().filter(|name| name.starts_with("hidden-")).collect();
        let half = settings.precision == Some(Precision::Bf16);
        assert!(hidden.len() == 1 && hidden[0].ends_with(if half { ".bf16" } else { ".f32" }), "{hidden:?}");
        for other in [streamed, some] {
            let [kept_samples, others] = [&kept, &other].map(|own| (&own.report.samples, &own.report.sample_ids));
            assert_eq!(kept_samples, others);
            assert_eq!(kept.report.trials, other.report.trials);
            assert!(weights(&kept.decoder) == weights(&other.decoder), "{settings:?}");
        }
    }
    let layered = settings().with(|s| s.stages = Stage::only([(LossKind::Anchor, 1.0)]));
    let work = tempfile::tempdir().unwrap();
    let limits = Limits { cache: Some(0), ..Limits::default() };
    let refused = run_within(&layered, &[2, 4], work.path(), false, None, limits).outcome.err().unwrap().to_string();
    assert!(refused.contains("on disk, and the limit is 0") && refused.contains("--cache-bytes"), "{refused}");
}

/// A run that computes rows when it needs them keeps those of the fit's samples until the first step, as its plan says.
#[test]
fn a_streamed_fit_keeps_the_rows_of_its_plan() {
    let settings = settings().with(|s| {
        s.fit.enabled = true;
        s.stages = Stage::only([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0), (LossKind::Anchor, 0.5)]);
    });
    let work = tempfile::tempdir().unwrap();
    let dense = Bundle::open(&model()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&dense, folder.path())).unwrap();
    let vocabulary = bundle.require_config().unwrap().vocab_size.unwrap() as i64;
    let request = Request {
        bundle: &bundle,
        layers: &[2, 4],
        data: &Texts { vocabulary },
        settings: &settings,
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits { cache: Some(0), ..Limits::default() },
        ranks: None,
        features: &FeatureCache::new(1 << 20),
    };
    let teacher = Teacher { bundle: &dense, kept: &KEPT, anchors: &[3, 5] };
    let plan = plan_run(&request, Some(&teacher)).unwrap();
    let planned = plan.bytes.iter().find(|item| item.what == "rows of the fit").unwrap().bytes;
    // The fit takes all samples, so the first step's rows are among them.
    assert_eq!(plan.fit.as_ref().unwrap().tokens, plan.data.tokens);
    let _alone = alone();
    let mut held = None;
    let outcome = finetune_with_teacher(&request, Some(&teacher), &Cancel::default(), &mut |_| {
        let files = std::fs::read_dir(work.path().join("window")).unwrap();
        let rows = files.map(|file| file.unwrap()).filter(|file| {
            let name = file.file_name().to_string_lossy().into_owned();
            name.ends_with(".f32") || name.ends_with(".bf16")
        });
        held.get_or_insert(rows.map(|file| file.metadata().unwrap().len()).sum::<u64>());
    });
    outcome.unwrap();
    assert_eq!(held, Some(planned));
}

/// A run in bf16 reads the stream in bf16 wherever passes begin, so rows in bf16 give the numbers of rows in f32.
#[test]
fn rows_in_bf16_give_the_logits_of_rows_in_f32() {
    let _alone = alone();
    let dense = Bundle::open(&model()).unwrap();
    let decoder = crate::onnx::load(&dense.path_of(dense.require(Role::Decoder).unwrap())).unwrap();
    let mut cut = cut::Cut::new(&decoder, &(0..16).collect::<Vec<_>>()).unwrap();
    cut.adapt(settings::Lora { rank: 2, alpha: 4.0, seed: 1 }, &[]).unwrap();
    let suffix = cut.suffix().unwrap();
    let side = cut::side_inputs(&cut.analysis.model.graph, &suffix).unwrap();
    let hold = crate::torch::Hold::Widened;
    let student = student::Student::compile(&cut, suffix, Precision::Bf16, hold, tch::Device::Cpu).unwrap();
    let open = || {
        let runtime = crate::runtime::Runtime::new(Device::Cpu)?;
        let options = crate::runtime::SessionOptions::default();
        crate::runtime::VlmSession::open(&runtime, &dense, &options, &FeatureCache::new(0))
    };
    let folder = tempfile::tempdir().unwrap();
    let logits = [data::RowDtype::F32, data::RowDtype::Bf16].map(|element| {
        let store = data::RowStore::new(folder.path(), &sha256_bytes(b"rows"), side.clone(), element);
        let source = Texts { vocabulary: 800 };
        let mut frozen = data::LazySession::new(open);
        store.fill(&source, "", &mut frozen, true, 64, &Cancel::default()).unwrap();
        let (set, _) = store.open().unwrap().unwrap();
        let batch = set.batch(&[7, 2, 4], student.feeds()).unwrap();
        assert_eq!(batch.hidden.kind(), element.kind());
        let path = folder.path().join(format!("hidden-{}.{}", &sha256_bytes(b"rows")[..16], element.extension()));
        let tokens: usize = set.lengths().iter().sum();
        assert_eq!(std::fs::metadata(path).unwrap().len(), (tokens * set.hidden_size() * element.size()) as u64);
        let side = student.side(&batch).unwrap();
        let mut stream = student.entering(&batch.hidden).unwrap();
        for layer in 0..student.layers() {
            stream = student.layer(layer, &stream, &side).unwrap();
        }
        student.head(&stream, &batch, &side).unwrap()
    });
    assert!(logits[0].isfinite().all().int64_value(&[]) == 1 && logits[0].equal(&logits[1]));
}

/// Rows that a run in bf16 left are not read by a run in f32 in the same folder, nor the other way round.
#[test]
fn rows_of_another_precision_are_not_read() {
    let of = |half: bool, work: &Path| {
        let settings = settings().with(|s| s.precision = half.then_some(Precision::Bf16));
        weights(&run(&settings, &[2, 4], work, false, None).outcome.unwrap().decoder)
    };
    let [shared, first, second] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let (half, full) = (of(true, first.path()), of(false, second.path()));
    assert!(half != full);
    assert!(of(true, shared.path()) == half && of(false, shared.path()) == full && of(true, shared.path()) == half);
}

#[test]
fn bf16_training_follows_f32_and_keeps_its_weights_in_f32() {
    let work = tempfile::tempdir().unwrap();
    let plain = run(&settings(), &[2, 4], work.path(), false, None);
    let half = run(&settings().with(|s| s.precision = Some(Precision::Bf16)), &[2, 4], work.path(), false, None);
    let [plain_model, half_model] = [plain.outcome.unwrap(), half.outcome.unwrap()];
    // The report names the format, which the settings of the first run leave open.
    let named = |model: &FinetunedModel| model.report.provenance.settings["precision"].clone();
    assert_eq!([named(&plain_model), named(&half_model)], ["f32", "bf16"]);
    let decoder = half_model.decoder;
    // bf16 has eight significant bits.
    assert!(!plain.steps.is_empty() && plain.steps.len() == half.steps.len());
    for (a, b) in plain.steps.iter().zip(&half.steps) {
        assert!((a.loss - b.loss).abs() < a.loss / 256.0 * 4.0, "step {}: {} and {}", a.step, a.loss, b.loss);
        assert_ne!(a.loss, b.loss);
    }
    let trained = decoder.graph.body.initializers.iter().filter(|(_, tensor)| !tensor.is_external());
    let fine = trained.filter(|(_, tensor)| tensor.dtype == DataType::Float && tensor.element_count() > 1000);
    assert!(fine.clone().count() > 0);
    for (_, tensor) in fine {
        let (words, _) = tensor.bytes().as_chunks::<4>();
        assert!(words.iter().any(|word| word[0] != 0 || word[1] != 0), "only bf16 values");
    }
}

/// The model with f16 in place of f32.
fn in_half_precision(model: &Model) -> Model {
    let narrow = |tensor: &mut Tensor| {
        if tensor.dtype == DataType::Float {
            let numbers = tensor.to_f64s().unwrap();
            let bytes: Vec<u8> =
                numbers.iter().flat_map(|&x| f16::from_f64(x.clamp(-65504.0, 65504.0)).to_le_bytes()).collect();
            *tensor = Tensor::from_bytes(DataType::Float16, &tensor.dims, bytes);
        }
    };
    let mut model = model.clone();
    for value in &mut model.graph.values {
        if let Some(ValueType::Tensor { dtype: dtype @ DataType::Float, .. }) = &mut value.ty {
            *dtype = DataType::Float16;
        }
    }
    model.graph.body.initializers.iter_mut().for_each(|(_, tensor)| narrow(tensor));
    for (name, attribute) in model.graph.body.nodes.iter_mut().flat_map(|node| &mut node.attributes) {
        match &mut attribute.kind {
            AttributeKind::Tensor(tensor) => narrow(tensor),
            AttributeKind::Int(to) if name == "to" && *to == DataType::Float as i64 => *to = DataType::Float16 as i64,
            _ => {}
        }
    }
    model
}

/// A run computes in f32, so its losses are those of the f32 model, and writes the weights as f16.
#[test]
fn a_half_precision_model_is_healed_and_stays_in_half_precision() {
    let _alone = alone();
    let dense = Bundle::open(&model()).unwrap();
    let folders: [_; 2] = std::array::from_fn(|_| tempfile::tempdir().unwrap());
    let outcomes = [false, true].map(|half| {
        let folder = folders[usize::from(half)].path();
        let path = pruned(&dense, folder).join("onnx/decoder_model_merged.onnx");
        let before = crate::onnx::load(&path).unwrap();
        let before = if half { in_half_precision(&before) } else { before };
        crate::onnx::save(&before, &path, &crate::onnx::Storage::Inline).unwrap();
        let bundle = Bundle::open(&folder.join("pruned")).unwrap();
        let request = Request {
            bundle: &bundle,
            layers: &[2, 4],
            data: &Texts { vocabulary: 800 },
            settings: &settings(),
            device: Device::Cpu,
            work: folder,
            resume: false,
            limits: Limits::default(),
            ranks: None,
            features: &FeatureCache::new(1 << 20),
        };
        (before, finetune(&request, &Cancel::default(), &mut |_| {}).unwrap())
    });
    let [(_, full), (before, half)] = &outcomes;
    let types = |model: &Model| model.graph.body.initializers.iter().map(|(_, t)| t.dtype).collect::<Vec<_>>();
    assert_eq!(types(&half.decoder), types(before));
    assert!(types(before).contains(&DataType::Float16) && !types(before).contains(&DataType::Float));
    assert_eq!(changed(before, &half.decoder).len(), 18);
    for loss in [|report: &Report| report.first_loss, |report: &Report| report.last_loss] {
        let (full, half) = (loss(&full.report).unwrap(), loss(&half.report).unwrap());
        assert!((full - half).abs() < 5e-3 * full, "{full} in f32, {half} in f16");
    }
    assert!(half.report.last_loss < half.report.first_loss);
}

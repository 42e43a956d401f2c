//! Adapters on a connector that is a graph of its own: that of the shipped model, split off its vision encoder.

use std::sync::Arc;

use tch::{Kind, Tensor as Torch};

use super::*;
use crate::data::{DataOptions, Dataset, Encoder, Intake};
use crate::finetune::cut::{Cut, SideInputs, side_inputs};
use crate::finetune::data::{LazySession, RowDtype, RowStore, TrainingBatch, TrainingSet};
use crate::finetune::plan::PlannedBytes;
use crate::finetune::settings::Lora;
use crate::finetune::student::Student;
use crate::ir::{DataType, Dim, Node, Value, ValueId, ValueType};
use crate::onnx::Storage;
use crate::runtime::{Decoder, Runtime, SessionOptions, Step, VlmSession};
use crate::torch::Hold;

const CONNECTOR: &str = "onnx/multi_modal_projector.onnx";
const LORA: Lora = Lora { rank: 4, alpha: 8.0, seed: 3 };

fn value(model: &Model, name: &str) -> ValueId {
    let made = model.graph.body.nodes.iter().flat_map(Node::present_outputs);
    made.chain(model.graph.body.inputs.iter().copied()).find(|id| model.graph.name(*id) == name).unwrap()
}

/// The shipped model with its connector, a pixel shuffle and a product, in a file of its own.
fn split(folder: &Path) -> Bundle {
    let target = folder.join("split");
    std::fs::create_dir_all(target.join("onnx")).unwrap();
    for part in ["", "onnx"] {
        for entry in std::fs::read_dir(model().join(part)).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_file() {
                std::fs::copy(entry.path(), target.join(part).join(entry.file_name())).unwrap();
            }
        }
    }
    let vision = crate::onnx::load(&model().join("onnx/vision_encoder.onnx")).unwrap();
    let before = value(&vision, "layer_norm_10");
    let encoder = crate::rewrite::extract(&vision, &[], &[before]).unwrap();
    let connector = crate::rewrite::extract(&vision, &[before], &vision.graph.body.outputs).unwrap();
    crate::onnx::save(&encoder, &target.join("onnx/vision_encoder.onnx"), &Storage::Inline).unwrap();
    crate::onnx::save(&connector, &target.join(CONNECTOR), &Storage::Inline).unwrap();
    Bundle::open(&target).unwrap()
}

/// The first samples of the fixture's data, each with a picture, and texts between them.
fn with_data<T>(bundle: &Bundle, work: impl FnOnce(&dyn Source) -> T) -> T {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/data/finetune-small.parquet");
    let dataset = Dataset::open(&path, &DataOptions::default()).unwrap();
    let encoder = Encoder::open(bundle, &dataset).unwrap();
    let intake = Intake::new(&dataset, bundle, usize::MAX);
    let indices: Vec<usize> = (0..4).collect();
    let pictures = Conversations { encoder: &encoder, dataset: &dataset, indices: &indices, intake };
    let vocabulary = bundle.require_config().unwrap().vocab_size.unwrap() as i64;
    work(&Mixed { pictures: &pictures, texts: Texts { vocabulary } })
}

/// Samples with pictures, then four texts.
struct Mixed<'a> {
    pictures: &'a Conversations<'a>,
    texts: Texts,
}

impl Source for Mixed<'_> {
    fn digest(&self) -> Result<Sha256Digest> {
        self.pictures.digest()
    }

    fn count(&self) -> u64 {
        self.pictures.count() + 4
    }

    fn samples(&self) -> Result<Box<dyn Iterator<Item = Result<TrainingSample>> + '_>> {
        let texts = self.texts.samples()?.take(4).map(|text| {
            // Token 4 is that of a picture.
            let mut text = text?;
            text.number += 100;
            text.prompt.input_ids.iter_mut().filter(|id| **id == 4).for_each(|id| *id = 5);
            Ok(text)
        });
        Ok(Box::new(self.pictures.samples()?.chain(texts)))
    }
}

fn adapted(s: &mut Settings) {
    (s.lora.rank, s.lora.layers) = (4, LoraLayers::All);
    s.optimizer.learning_rate = LearningRate::One(3e-3);
    (s.batch.size, s.batch.accumulation_steps) = (4, 1);
    (s.schedule.epochs, s.schedule.max_steps) = (3, None);
}

struct Trained {
    outcome: Result<FinetunedModel>,
    steps: Vec<StepMetrics>,
}

impl Trained {
    fn losses(&self) -> Vec<f64> {
        self.steps.iter().map(|step| step.loss).collect()
    }

    fn weights(&self) -> Vec<(String, Vec<u8>)> {
        let outcome = self.outcome.as_ref().unwrap();
        [weights(&outcome.decoder), weights(outcome.connector.as_ref().unwrap())].concat()
    }
}

fn request<'a>(
    bundle: &'a Bundle,
    data: &'a dyn Source,
    settings: &'a Settings,
    (work, features): (&'a Path, &'a Arc<FeatureCache>),
) -> Request<'a> {
    Request {
        bundle,
        layers: &[3, 7],
        data,
        settings,
        device: Device::Cpu,
        work,
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features,
    }
}

fn train(
    bundle: &Bundle,
    settings: &Settings,
    work: &Path,
    (resume, stop): (bool, Option<u64>),
    limits: Limits,
) -> Trained {
    let features = FeatureCache::new(1 << 20);
    let cancel = Cancel::default();
    let mut steps = Vec::new();
    let dense = Bundle::open(bundle.root()).unwrap();
    let kept: Vec<usize> = (0..16).collect();
    let teacher = Teacher { bundle: &dense, kept: &kept, anchors: &[] };
    let teacher = settings.losses().keys().any(|kind| kind.needs_teacher()).then_some(&teacher);
    let outcome = with_data(bundle, |data| {
        let request = Request { resume, limits, ..request(bundle, data, settings, (work, &features)) };
        let _alone = alone();
        finetune_with_teacher(&request, teacher, &cancel, &mut |metrics| {
            steps.push(metrics.clone());
            if Some(metrics.step) == stop {
                cancel.request();
            }
        })
    });
    Trained { outcome, steps }
}

fn train_anew(bundle: &Bundle, settings: &Settings, limits: Limits) -> Trained {
    let work = tempfile::tempdir().unwrap();
    train(bundle, settings, work.path(), (false, None), limits)
}

/// The network with adapters, and the rows of all samples.
struct Network {
    cut: Cut,
    student: Student,
    set: TrainingSet,
    _folder: tempfile::TempDir,
}

impl Network {
    fn new(bundle: &Bundle) -> Self {
        let load = |role| crate::onnx::load(&bundle.path_of(bundle.require(role).unwrap())).unwrap();
        let mut cut = Cut::new(&load(Role::Decoder), &(0..16).collect::<Vec<_>>()).unwrap();
        assert_eq!(cut.add_connector(&load(Role::Projector), LORA.rank).unwrap(), None);
        cut.adapt(LORA, &[]).unwrap();
        let suffix = cut.suffix().unwrap();
        let mut side = side_inputs(&cut.analysis.model.graph, &suffix).unwrap();
        side.connector = cut.connector.as_ref().map(|connector| connector.input);
        let student = Student::compile(&cut, suffix, Precision::F32, Hold::Widened, tch::Device::Cpu).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let set = rows(bundle, folder.path(), side);
        Network { cut, student, set, _folder: folder }
    }

    /// Gives every adapter's `B` numbers other than 0.
    fn fill(&self) {
        for adapted in &self.cut.adapted {
            let (_, mut b) = self.student.weight_of(adapted.b).unwrap();
            let places = Torch::arange(b.numel() as i64, (Kind::Float, tch::Device::Cpu));
            tch::no_grad(|| b.copy_(&((places * 0.37).sin().reshape(b.size()) * 0.05)));
        }
    }

    fn logits(&self, batch: &TrainingBatch) -> Torch {
        let side = self.student.side(batch).unwrap();
        let mut stream = self.student.entering(&batch.hidden).unwrap();
        for layer in 0..self.student.layers() {
            stream = self.student.layer(layer, &stream, &side).unwrap();
        }
        self.student.head(&stream, batch, &side).unwrap()
    }

    /// Cross-entropy of other answers than the samples': the model knows those by heart.
    fn loss(&self, batch: &TrainingBatch) -> Torch {
        let others: Torch = (&batch.targets * 7 + 11).remainder(800);
        self.logits(batch).to_kind(Kind::Double).cross_entropy_for_logits(&others)
    }
}

fn rows(bundle: &Bundle, folder: &Path, side: SideInputs) -> TrainingSet {
    let store = RowStore::new(folder, &sha256_bytes(b"rows"), side, RowDtype::F32);
    let open = || {
        let runtime = Runtime::new(Device::Cpu)?;
        let mut session = VlmSession::open(&runtime, bundle, &SessionOptions::default(), &FeatureCache::new(0))?;
        session.keep_unprojected();
        Ok(session)
    };
    let cancel = Cancel::default();
    with_data(bundle, |data| store.fill(data, "", &mut LazySession::new(open), true, 4096, &cancel).unwrap().0)
}

fn double(tensor: &Torch) -> f64 {
    tensor.double_value(&[])
}

/// Gradients of the connector's adapters against central differences, for samples with and without pictures in one batch.
#[test]
fn gradients_of_the_connector_equal_differences() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let network = Network::new(&bundle);
    network.fill();
    let batch = network.set.batch(&[0, 5, 1], network.student.feeds()).unwrap();
    assert!(batch.connector.is_some());
    let connector = network.cut.connector.as_ref().unwrap();
    let own: Vec<_> = network.cut.adapted.iter().filter(|adapted| connector.own(adapted.weight).is_some()).collect();
    assert_eq!(own.len(), 1);
    for id in [own[0].a, own[0].b] {
        let (name, mut weight) = network.student.weight_of(id).unwrap();
        let gradient = Torch::run_backward(&[network.loss(&batch)], &[&weight], false, false).remove(0);
        let places = Torch::arange(weight.numel() as i64, (Kind::Float, tch::Device::Cpu)).reshape(weight.size());
        for direction in [gradient.shallow_clone(), gradient.sign() * ((places * 0.7).cos() + 1.5)] {
            let direction = &direction / direction.norm();
            let step = 0.02;
            let mut moved = |by: f64| {
                tch::no_grad(|| {
                    let _ = weight.g_add_(&(&direction * by));
                    double(&network.loss(&batch))
                })
            };
            let ahead = moved(step);
            let behind = moved(-2.0 * step);
            moved(step);
            let (found, want) = (double(&(&gradient * &direction).sum(Kind::Float)), (ahead - behind) / (2.0 * step));
            println!("{name}: gradient {found:.6}, differences {want:.6}");
            assert!(
                want.abs() > 1e-3 && (found - want).abs() < 0.01 * want.abs(),
                "{name}: {found}, differences {want}"
            );
        }
    }
    // Without pictures nothing reads them.
    let texts = network.set.batch(&[4, 5], network.student.feeds()).unwrap();
    assert!(texts.connector.is_none());
    let (_, weight) = network.student.weight_of(own[0].b).unwrap();
    let none = Torch::run_backward(&[network.loss(&texts)], &[&weight], false, false).remove(0);
    assert!(!none.defined());
}

/// ONNX Runtime with the merged weights computes what the network in training computes.
#[test]
fn the_merged_connector_computes_the_same_in_onnx_runtime() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let network = Network::new(&bundle);
    let merged = |changed: Vec<(ValueId, Tensor)>| {
        let (of_connector, rest): (Vec<_>, Vec<_>) =
            changed.into_iter().partition(|(id, _)| network.cut.of_connector(*id));
        let load = |role| crate::onnx::load(&bundle.path_of(bundle.require(role).unwrap())).unwrap();
        let write = WriteTrained::Float;
        let decoder = crate::finetune::cut::written_back(&load(Role::Decoder), rest, &[], write).unwrap();
        let connector = network.cut.connector.as_ref().unwrap();
        (decoder, connector.written_back(of_connector, write).unwrap())
    };
    let plain = tch::no_grad(|| network.logits(&network.set.batch(&[0], network.student.feeds()).unwrap()));
    network.fill();
    let (decoder, connector) = merged(network.student.changed(&network.cut, LORA.scale()).unwrap());
    let other = tempfile::tempdir().unwrap();
    let healed = split(other.path());
    crate::onnx::save(&connector, &healed.root().join(CONNECTOR), &Storage::Inline).unwrap();
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let options = SessionOptions::default();
    let decoder = Decoder::new(runtime.session_of(&decoder, &options).unwrap(), Some(40)).unwrap();
    let mut session = VlmSession::with_decoder(&runtime, &healed, decoder, &options, &FeatureCache::new(0)).unwrap();
    with_data(&healed, |data| {
        for (number, sample) in data.samples().unwrap().enumerate() {
            let sample = sample.unwrap();
            let batch = network.set.batch(&[number], network.student.feeds()).unwrap();
            let found = tch::no_grad(|| network.logits(&batch));
            let embedded = session.embed(&sample.prompt).unwrap();
            let step = Step::prefill(&[&embedded], false).unwrap();
            let outputs = session.decoder_mut().prefill_outputs(&step).unwrap();
            let logits = outputs.get("logits").unwrap();
            let shape: Vec<i64> = logits.shape().iter().map(|&size| size as i64).collect();
            let logits = Torch::from_slice(&logits.to_f32().unwrap()).reshape(&shape).squeeze_dim(0);
            let want = logits.index_select(0, &batch.answer_rows);
            let far = double(&(&found - &want).abs().max());
            println!("{}: largest logit {:.3}, difference {far:e}", sample.id, double(&want.abs().max()));
            assert!(far < 1e-4 * double(&want.abs().max()).max(1.0), "{}: {far:e}", sample.id);
            if number == 0 {
                assert!(double(&(found - &plain).abs().max()) > 0.01);
            }
        }
    });
}

#[test]
fn training_moves_the_connector_and_lowers_the_loss() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let settings = settings().with(adapted);
    let run = train_anew(&bundle, &settings, Limits::default());
    let losses = run.losses();
    assert_eq!(losses.len(), 6);
    let half = |losses: &[f64]| losses.iter().sum::<f64>();
    assert!(half(&losses[4..]) < 0.95 * half(&losses[..2]), "{losses:?}");
    let outcome = run.outcome.as_ref().unwrap();
    assert_eq!(outcome.report.connector.as_deref(), Some(CONNECTOR));
    let before = crate::onnx::load(&bundle.root().join(CONNECTOR)).unwrap();
    let after = outcome.connector.as_ref().unwrap();
    assert_eq!(changed(&before, after), ["val_572"]);
    // Rank 4 of a matrix of 512 x 160.
    let all = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let layers = crate::analysis::layers(&all.graph).unwrap();
    let thin = |id: &ValueId| match all.graph.body.initializer(*id).unwrap().dims[..] {
        [rows, columns] => 4 * (rows + columns),
        _ => 0,
    };
    let of_decoder: u64 = layers.layers.iter().flat_map(|layer| &layer.weights).map(thin).sum();
    assert_eq!(outcome.report.trained_parameters, of_decoder + 4 * (512 + 160));
    // The network computes the same with every layer computed again, and about the same in bf16.
    let again = settings.clone().with(|s| s.batch.gradient_checkpointing = Some(true));
    let again = train_anew(&bundle, &again, Limits::default()).losses();
    assert!(losses.iter().zip(&again).all(|(a, b)| (a - b).abs() < 1e-4 * a), "{losses:?}, {again:?}");
    let coarse =
        train_anew(&bundle, &settings.with(|s| s.precision = Some(Precision::Bf16)), Limits::default()).losses();
    assert!(losses.iter().zip(&coarse).all(|(a, b)| (a - b).abs() < 0.02 * a && a != b), "{losses:?}, {coarse:?}");
}

#[test]
fn a_stopped_run_with_a_connector_resumes_to_the_same_bits() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let settings = settings().with(adapted).with(|s| {
        s.stages = Stage::only([(LossKind::Ce, 1.0), (LossKind::Kd, 1.0), (LossKind::Anchor, 0.5)]);
        s.optimizer.average_last = 0.5;
    });
    let whole = train_anew(&bundle, &settings, Limits::default());
    let work = tempfile::tempdir().unwrap();
    let stopped = train(&bundle, &settings, work.path(), (false, Some(3)), Limits::default());
    assert!(matches!(stopped.outcome.err(), Some(Error::Interrupted { .. })));
    let resumed = train(&bundle, &settings, work.path(), (true, None), Limits::default());
    assert_eq!(resumed.outcome.as_ref().unwrap().report.resumed_from_step, 3);
    assert!(resumed.weights() == whole.weights());
    // The dense model is the same one, connector included, so the first step compares equal networks.
    assert!(
        whole.steps[0].losses["kd"].abs() < 1e-4 && whole.steps[5].losses["kd"] > 1e-4,
        "{:?}",
        whole.steps[0].losses
    );
    // Rows that are computed between steps give the same bits.
    let streamed = train_anew(&bundle, &settings, Limits { cache: Some(0), ..Limits::default() });
    assert!(streamed.weights() == whole.weights());
}

#[test]
fn a_plan_lists_the_connector() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let features = FeatureCache::new(1 << 20);
    let plan = |bundle: &Bundle, settings: &Settings| {
        with_data(bundle, |data| {
            let work = &folder.path().join("work");
            std::fs::create_dir_all(work).unwrap();
            plan_run(&request(bundle, data, settings, (work, &features)), None).unwrap()
        })
    };
    let all = settings().with(adapted);
    let with = plan(&bundle, &all);
    let named = |what: &str| -> Vec<&PlannedBytes> { with.bytes.iter().filter(|item| item.what == what).collect() };
    let connector = with.connector.as_ref().unwrap();
    assert_eq!((connector.file.as_str(), connector.matrices, connector.parameters), (CONNECTOR, 1, 4 * (512 + 160)));
    assert_eq!(connector.line(), format!("the connector `{CONNECTOR}` gets adapters on 1 matrix"));
    // One matrix in f32, and the constants of the pixel shuffle.
    let weights = named("connector's weights")[0].bytes;
    assert!((4 * 512 * 160..4 * 512 * 160 + 4096).contains(&weights), "{weights}");
    assert_eq!(named("connector's adapters")[0].bytes, 4 * 4 * (512 + 160));
    // Four rows of 128 for each image token.
    let (share, most) = (with.data.image_share, named("connector's activations")[0].bytes as f64);
    let least = share * (with.workers * 512 * 4 * 4 * 128) as f64;
    assert!(share > 0.1 && share < 1.0 && most >= least && most < 8.0 * least, "{share}, {most}, {least}");
    let rows = named("features of pictures that the connector reads")[0];
    assert_eq!((rows.bytes, with.data.image_tokens > 0), (4 * with.data.image_tokens * 4 * 128, true));
    // Without adapters on all layers, or without a connector of its own, nothing changes.
    let own = plan(&bundle, &all.clone().with(|s| s.lora.layers = LoraLayers::Trained));
    let whole = plan(&Bundle::open(&model()).unwrap(), &all);
    for plan in [&own, &whole] {
        assert!(plan.connector.is_none() && plan.bytes.iter().all(|item| !item.what.contains("connector")));
    }
    // The layers hold what they hold without it.
    let layers = |plan: &RunPlan| plan.bytes.iter().find(|item| item.what == "activations").unwrap().bytes;
    assert_eq!(layers(&with), layers(&whole));
    assert_eq!(with.trained_parameters, whole.trained_parameters + connector.parameters);
}

/// The connector with its matrix in int8, and a node that expands it.
fn quantised(connector: &Model) -> Model {
    let mut model = connector.clone();
    let body = &mut model.graph.body;
    let place = body.initializers.iter().position(|(_, tensor)| tensor.dims == [512, 160]).unwrap();
    let (weight, floats) = body.initializers.remove(place);
    let floats = floats.to_f64s().unwrap();
    let scale = floats.iter().fold(0f64, |largest, number| largest.max(number.abs())) / 127.0;
    let bytes: Vec<u8> = floats.iter().map(|number| (number / scale).round() as i8 as u8).collect();
    let mut add = |name: &str, tensor: Tensor| {
        let id = model.graph.add_value(Value { name: name.into(), ..Value::default() });
        model.graph.body.initializers.push((id, tensor));
        Some(id)
    };
    let numbers = add("numbers", Tensor::from_bytes(DataType::Int8, &[512, 160], bytes));
    let scale = add("scale", Tensor::from_f32(&[], &[scale as f32]));
    let (inputs, outputs) = (vec![numbers, scale], vec![Some(weight)]);
    let expand = Node { op_type: "DequantizeLinear".into(), inputs, outputs, ..Node::default() };
    model.graph.body.nodes.insert(0, expand);
    crate::ir::check(&model).unwrap();
    model
}

/// A quantised connector is trained as quantised layers are: written as floats, or in its own form.
#[test]
fn a_quantised_connector_is_written_as_asked() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let path = bundle.root().join(CONNECTOR);
    let before = quantised(&crate::onnx::load(&path).unwrap());
    crate::onnx::save(&before, &path, &Storage::Inline).unwrap();
    let matrix = |model: &Model, dtype: DataType| {
        let of_type = model.graph.body.initializers.iter().filter(|(_, tensor)| tensor.dtype == dtype);
        of_type.filter(|(_, tensor)| tensor.dims == [512, 160]).map(|(_, tensor)| tensor.bytes().to_vec()).next()
    };
    for (write, dtype, other) in [
        (WriteTrained::Float, DataType::Float, DataType::Int8),
        (WriteTrained::Quantised, DataType::Int8, DataType::Float),
    ] {
        let settings = settings().with(adapted).with(|s| {
            s.optimizer.learning_rate = LearningRate::One(3e-2);
            s.write_trained = write;
        });
        let after = train_anew(&bundle, &settings, Limits::default()).outcome.unwrap().connector.unwrap();
        let (found, stored) = (matrix(&after, dtype).unwrap(), matrix(&before, dtype));
        assert!(matrix(&after, other).is_none() && Some(&found) != stored.as_ref(), "{write:?}");
    }
    // Two matrices of integers have no float product.
    let mut integers = before.clone();
    let node = integers.graph.body.nodes.iter_mut().find(|node| node.op_type == "MatMul").unwrap();
    node.op_type = "QLinearMatMul".into();
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let refused = Cut::new(&decoder, &[0, 1]).unwrap().add_connector(&integers, 4).unwrap_err().to_string();
    assert!(refused.contains("QLinearMatMul") && refused.contains("--lora-layers trained"), "{refused}");
}

/// A connector of another form is left as it is, and the plan says why.
#[test]
fn a_connector_of_another_form_is_left_out_with_the_reason() {
    let folder = tempfile::tempdir().unwrap();
    let bundle = split(folder.path());
    let decoder = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let connector = crate::onnx::load(&bundle.root().join(CONNECTOR)).unwrap();
    let left_out = |change: &dyn Fn(&mut Model), rank: u32| {
        let mut connector = connector.clone();
        change(&mut connector);
        let mut cut = Cut::new(&decoder, &[0, 1]).unwrap();
        let reason = cut.add_connector(&connector, rank).unwrap();
        assert_eq!(cut.connector.is_none(), reason.is_some());
        reason.unwrap_or_default()
    };
    assert_eq!(left_out(&|_| {}, 4), "");
    assert_eq!(left_out(&|_| {}, 160), "it has no matrix with both sides above the rank 160");
    let sizes = |model: &mut Model| {
        let ty = Some(ValueType::Tensor { dtype: DataType::Int64, shape: Some(vec![Dim::Unknown, Dim::Known(2)]) });
        let id = model.graph.add_value(Value { name: "image_sizes".into(), ty, ..Value::default() });
        model.graph.body.inputs.push(id);
    };
    assert_eq!(left_out(&sizes, 4), "it has 2 inputs and 1 outputs, not one of features each");
    let one = |model: &mut Model| {
        let input = model.graph.body.inputs[0];
        let shape = [1, 64, 128].map(Dim::Known).to_vec();
        model.graph.values[input.index()].ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(shape) });
    };
    assert!(left_out(&one, 4).contains("(float32 [1, 64, 128]) is not of the form"), "{}", left_out(&one, 4));
    let opset = |model: &mut Model| {
        model.opset_imports.insert(String::new(), 19);
    };
    assert!(left_out(&opset, 4).contains("opset"), "{}", left_out(&opset, 4));
}

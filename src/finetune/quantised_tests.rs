//! Healing of quantised models. `scripts/reference/quantised.py` quantises the fixture's first three layers with ONNX
//! Runtime's own tools, and gives PyTorch's gradients.

use std::sync::OnceLock;

use tch::{Kind, Tensor as Torch};

use super::*;
use crate::finetune::cut::Cut;
use crate::finetune::plan::Sizes;
use crate::finetune::settings::Lora;
use crate::ir::{AttributeKind, DataType, ValueId};

use crate::quantised::{Activations, QuantisedWeight, float_products, requantised, with_floats};
use crate::runtime::{Decoder, Embedded, Runtime, SessionOptions, Step};
use crate::torch::{Hold, Options, Program, tensor_from_ir, tensor_to_ir};

const FORMS: [&str; 4] = ["int4", "int4-zeros", "int8", "qdq"];
const LAYER: usize = 1;
const VOCABULARY: i64 = 839;

fn quantised(form: &str) -> Model {
    static UNPACKED: OnceLock<tempfile::TempDir> = OnceLock::new();
    let unpack = || {
        let folder = tempfile::tempdir().unwrap();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantised/models.tar.zst");
        let archive = zstd::Decoder::new(std::fs::File::open(path).unwrap()).unwrap();
        tar::Archive::new(archive).unpack(folder.path()).unwrap();
        folder
    };
    crate::onnx::load(&UNPACKED.get_or_init(unpack).path().join(format!("{form}.onnx"))).unwrap()
}

fn samples() -> Vec<TrainingSample> {
    Texts { vocabulary: VOCABULARY }.samples().unwrap().map(Result::unwrap).collect()
}

/// Embeddings of all tokens, `[V, D]`.
fn table() -> Torch {
    let dense = Bundle::open(&model()).unwrap();
    let embed = crate::onnx::load(&dense.path_of(dense.require(Role::EmbedTokens).unwrap())).unwrap();
    let weights = &embed.graph.body.initializers;
    let (_, table) = weights.iter().find(|(_, tensor)| tensor.dims.len() == 2).unwrap();
    tensor_from_ir("table", table).unwrap()
}

/// Targets of a sample's answers: the positions that predict them, and their ids.
fn answers(sample: &TrainingSample) -> (Vec<i64>, Vec<i64>) {
    let ids = &sample.prompt.input_ids;
    (1..ids.len()).filter(|&at| sample.answer_mask[at]).map(|at| (at as i64 - 1, ids[at])).unzip()
}

fn answer_count(samples: &[TrainingSample]) -> f64 {
    samples.iter().map(|sample| answers(sample).0.len()).sum::<usize>() as f64
}

/// The adapters' numbers in the script.
fn filled(rows: i64, columns: i64) -> Torch {
    let places = Torch::arange(rows * columns, (Kind::Double, tch::Device::Cpu));
    (places * 0.37).sin().reshape([rows, columns]).to_kind(Kind::Float) * 0.05
}

/// Mean cross-entropy of the script's three texts in the interpreter.
fn interpreted_loss(program: &Program, table: &Torch) -> Torch {
    let samples: Vec<TrainingSample> =
        samples().into_iter().filter(|sample| [0, 6, 7].contains(&sample.number)).collect();
    let total = samples.iter().map(|sample| {
        let ids = &sample.prompt.input_ids;
        let time = ids.len() as i64;
        let places = Torch::arange(time, (Kind::Int64, tch::Device::Cpu)).reshape([1, time]);
        let given: Vec<(ValueId, Torch)> = program
            .inputs()
            .iter()
            .map(|&id| {
                let tensor = match program.name(id) {
                    "inputs_embeds" => table.index_select(0, &Torch::from_slice(ids)).unsqueeze(0),
                    "attention_mask" => Torch::ones([1, time], (Kind::Int64, tch::Device::Cpu)),
                    "position_ids" => places.shallow_clone(),
                    _ => Torch::zeros([1, 2, 0, 40], (Kind::Float, tch::Device::Cpu)),
                };
                (id, tensor)
            })
            .collect();
        let logits = program.run(&given, &[program.value("logits").unwrap()]).unwrap().pop().unwrap();
        let (rows, targets) = answers(sample);
        let rows = logits.reshape([time, -1]).index_select(0, &Torch::from_slice(&rows));
        let none = None::<Torch>;
        rows.cross_entropy_loss(&Torch::from_slice(&targets), none, tch::Reduction::Sum, -100, 0.0)
    });
    total.reduce(|sum, term| sum + term).unwrap() / answer_count(&samples)
}

/// Mean cross-entropy of the answers in ONNX Runtime.
fn onnx_runtime_loss(model: &Model) -> f64 {
    let runtime = Runtime::new(Device::Cpu).unwrap();
    let session = runtime.session_of(model, &SessionOptions::default()).unwrap();
    let mut decoder = Decoder::new(session, Some(40)).unwrap();
    let table = table();
    let loss = |sample: &TrainingSample| {
        let ids = &sample.prompt.input_ids;
        let rows = table.index_select(0, &Torch::from_slice(ids));
        let data = Vec::<f32>::try_from(rows.flatten(0, -1)).unwrap();
        let embedded = Embedded::text(ids, 160, data, 0, decoder.position_rows());
        let (logits, _) = decoder.step(&Step::prefill(&[&embedded], false).unwrap(), None).unwrap();
        let logits = Torch::from_slice(&logits.to_f32().unwrap()).reshape([ids.len() as i64, -1]);
        let (rows, targets) = answers(sample);
        let rows = logits.index_select(0, &Torch::from_slice(&rows));
        let none = None::<Torch>;
        let sum = rows.cross_entropy_loss(&Torch::from_slice(&targets), none, tch::Reduction::Sum, -100, 0.0);
        sum.double_value(&[])
    };
    samples().iter().map(loss).sum::<f64>() / answer_count(&samples())
}

/// What a packed weight holds, as the graph with float products has it.
fn held(stored: &Model, weight: &QuantisedWeight) -> Tensor {
    Tensor::from_f32(&weight.dims, &weight.form.values(&stored.graph.body).unwrap())
}

/// The model with all its packed weights as floats.
fn dequantised(packed: &Model) -> Model {
    let found = float_products(&mut packed.clone(), Activations::Exact, &|_| true);
    let floats: Vec<_> = found.iter().map(|weight| (weight, held(packed, weight))).collect();
    with_floats(packed, &floats).unwrap()
}

fn heal(decoder: &Model, settings: &Settings) -> Run {
    let dense = Bundle::open(&model()).unwrap();
    let (folder, work) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let dropped: Vec<usize> = (3..16).collect();
    let target = pruned_from(&dense, folder.path(), &dropped, dense.digest().unwrap());
    let three = Bundle::open(&target).unwrap();
    let folder = folder.path().join("quantised");
    let mut writer = BundleWriter::create(&three, &folder).unwrap();
    writer.save(three.require(Role::Decoder).unwrap(), decoder).unwrap();
    writer.commit(Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), &()).unwrap()).unwrap();
    let bundle = Bundle::open(&folder).unwrap();
    let request = Request {
        bundle: &bundle,
        layers: &[LAYER],
        data: &Texts { vocabulary: VOCABULARY },
        settings,
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features: &FeatureCache::new(1 << 20),
    };
    let mut steps = Vec::new();
    let _alone = alone();
    let outcome = finetune(&request, &Cancel::default(), &mut |metrics| steps.push(metrics.clone()));
    Run { outcome, steps }
}

/// All eight texts in every step.
fn steps(count: u64, rank: u32) -> Settings {
    settings().with(|s| {
        (s.lora.rank, s.schedule.kind) = (rank, Schedule::Constant);
        s.optimizer.learning_rate = LearningRate::One(if rank > 0 { 1e-2 } else { 1e-3 });
        (s.batch.size, s.batch.accumulation_steps, s.schedule.max_steps) = (8, 1, Some(count));
    })
}

#[test]
fn gradients_of_adapters_are_those_of_pytorch() {
    let _alone = alone();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/quantised/gradients.npz");
    let golden: BTreeMap<String, Torch> = Torch::read_npz(path).unwrap().into_iter().collect();
    let table = table();
    for form in FORMS {
        let mut cut = Cut::new(&quantised(form), &[LAYER]).unwrap();
        cut.adapt(Lora { rank: 2, alpha: 8.0, seed: 0 }, &[]).unwrap();
        // One adapter for each of the seven products, and none beside scales or zero points.
        assert_eq!(cut.adapted.len(), 7, "{form}");
        let graph = &mut cut.analysis.model.graph;
        for id in &cut.trained {
            let (_, tensor) = graph.body.initializers.iter_mut().find(|(other, _)| other == id).unwrap();
            let numbers = filled(tensor.dims[0] as i64, tensor.dims[1] as i64);
            *tensor = tensor_to_ir("adapter", &numbers, DataType::Float).unwrap();
        }
        for hold in [Hold::Widened, Hold::Stored] {
            let options = Options { trainable: cut.trained.clone(), hold, ..Options::default() };
            let program = Program::compile(&cut.analysis.model, &options).unwrap();
            let loss = interpreted_loss(&program, &table);
            let want = golden[&format!("{form}/loss")].double_value(&[]);
            assert!((loss.double_value(&[]) - want).abs() < 1e-5 * want, "{form}: {}, expected {want}", loss);
            let leaves: Vec<&Torch> = program.parameters().iter().map(|parameter| &parameter.tensor).collect();
            let found = Torch::run_backward(&[&loss], &leaves, false, false);
            for (adapted, found) in cut.adapted.iter().zip(found.chunks(2)) {
                let packed = cut.quantised_weight(adapted.weight).unwrap().form.parts()[0];
                let name = cut.stored.graph.name(packed);
                for (end, found) in ["A", "B"].into_iter().zip(found) {
                    let want = &golden[&format!("{form}/{name}.{end}")];
                    let off = ((found - want).norm() / want.norm()).double_value(&[]);
                    assert!(off < 1e-5, "{form} {hold:?}: gradient of {end} of {name} is off by {off:e}");
                }
            }
        }
    }
}

/// A run beside packed weights is the run beside the floats that they hold.
#[test]
fn packed_weights_are_trained_as_the_floats_that_they_hold() {
    for form in ["int4", "int4-zeros"] {
        let packed = quantised(form);
        let float = dequantised(&packed);
        for rank in [4, 0] {
            let (found, want) = (heal(&packed, &steps(3, rank)), heal(&float, &steps(3, rank)));
            let (outcome, reference) = (found.outcome.unwrap(), want.outcome.unwrap());
            assert_eq!(outcome.report.trained_parameters, reference.report.trained_parameters);
            for (found, want) in found.steps.iter().zip(&want.steps) {
                let off = |a: f64, b: f64| (a - b).abs() / b;
                let (step, losses, norms) = (want.step, (found.loss, want.loss), (found.grad_norm, want.grad_norm));
                assert!(off(losses.0, losses.1) < 1e-5, "{form}, rank {rank}, step {step}: losses {losses:?}");
                assert!(off(norms.0, norms.1) < 1e-5, "{form}, rank {rank}, step {step}: norms {norms:?}");
            }
        }
    }
}

/// Losses fall, and what is written is what was trained: the loss in ONNX Runtime after 20 steps is the loss of step 21, and
/// weights that are quantised again differ from the trained floats by at most half a step.
#[test]
fn quantised_models_are_healed_and_written_in_either_form() {
    for form in FORMS {
        let packed = quantised(form);
        for rank in [4, 0] {
            let more = heal(&packed, &steps(21, rank));
            let after = more.steps[20].loss;
            assert!(after < 0.9 * more.steps[0].loss, "{form}, rank {rank}: {} to {after}", more.steps[0].loss);
            let float = heal(&packed, &steps(20, rank)).outcome.unwrap().decoder;
            // Integer products lose the rounding of their first factor when they become float products.
            let tolerance = if form == "int8" { 1e-2 } else { 1e-4 };
            let written = onnx_runtime_loss(&float);
            assert!((written - after).abs() < tolerance * after, "{form}, rank {rank}: {written}, trained {after}");
            let again = steps(20, rank).with(|s| s.write_trained = WriteTrained::Quantised);
            let again = heal(&packed, &again).outcome.unwrap().decoder;
            let rounded = onnx_runtime_loss(&again);
            println!("{form}, rank {rank}: trained {after:.4}, written as floats {written:.4}, quantised {rounded:.4}");
            within_half_a_step(form, [&packed, &float, &again]);
        }
    }
}

/// Checks the trained layer's weights in both forms, and that nothing else changed.
fn within_half_a_step(form: &str, [packed, float, again]: [&Model; 3]) {
    let cut = Cut::new(packed, &[LAYER]).unwrap();
    let trained: Vec<&QuantisedWeight> = cut.trained.iter().filter_map(|&id| cut.quantised_weight(id)).collect();
    assert_eq!(trained.len(), 7);
    let parts: Vec<ValueId> = trained.iter().flat_map(|weight| weight.form.parts()).collect();
    for (id, before) in &packed.graph.body.initializers {
        let after = again.graph.body.initializer(*id).unwrap();
        assert_eq!((after.dtype, &after.dims), (before.dtype, &before.dims));
        let may = parts.contains(id) || cut.trained.contains(id);
        assert!(may || after.bytes() == before.bytes(), "{form}: {} changed", packed.graph.name(*id));
    }
    for weight in trained {
        let name = packed.graph.name(weight.form.parts()[0]);
        let values = |tensor: &Tensor| tensor_from_ir(name, tensor).unwrap();
        let product = float.graph.body.nodes.iter().find(|node| node.outputs.contains(&Some(weight.products[0])));
        let product = product.unwrap();
        assert_eq!(product.op_type, "MatMul");
        let own = values(float.graph.body.initializer(product.inputs[1].unwrap()).unwrap());
        let (before, after) = (values(&held(packed, weight)), values(&held(again, weight)));
        assert!(!own.allclose(&before, 1e-6, 1e-6, false), "{form}: {name} was not trained");
        let scales = again.graph.body.initializer(weight.form.parts()[1]).unwrap();
        let step = values(scales).abs().max().double_value(&[]);
        let off = (&own - &after).abs().max().double_value(&[]);
        // Of 4 bits, the end of the range on the other side of the zero point may be a step nearer than the number there.
        let most = if form.starts_with("int4") { 1.0 } else { 0.501 };
        assert!(off <= most * step, "{form}: {name} is off by {off}, a step is {step}");
    }
}

/// The form of the file's own numbers is recognised: floats that were not trained are packed as before.
#[test]
fn untrained_floats_are_packed_as_before() {
    // Zero points that were rounded move a range, so that form has no such law.
    for form in ["int4", "int8", "qdq"] {
        let packed = quantised(form);
        let found = float_products(&mut packed.clone(), Activations::Exact, &|_| true);
        assert_eq!(found.len(), 7 * 3 + 1, "{form}");
        for weight in &found {
            for (id, after) in requantised(&packed, weight, &held(&packed, weight)).unwrap() {
                assert_eq!(id, weight.form.parts()[1], "{form}: {} changed", packed.graph.name(id));
                let values = |tensor: &Tensor| tensor_from_ir("scales", tensor).unwrap();
                let before = values(packed.graph.body.initializer(id).unwrap());
                assert!(values(&after).allclose(&before, 1e-6, 0.0, false), "{form}");
            }
        }
    }
}

/// A plan counts packed bytes for what stays packed, and floats for what is trained.
#[test]
fn plans_count_packed_bytes() {
    for form in FORMS {
        let packed = quantised(form);
        let mut cut = Cut::new(&packed, &[LAYER]).unwrap();
        cut.adapt(Lora { rank: 4, alpha: 4.0, seed: 0 }, &[]).unwrap();
        let sizes = Sizes::of(&cut, &cut.suffix().unwrap(), 4, Precision::F32);
        // Two layers and the head; tables and constants are the rest.
        let numbers = 2 * (2 * 160 * 160 + 2 * 160 * 80 + 3 * 160 * 256) + 160 * VOCABULARY as u64;
        let (bytes, widened) = (numbers / if form.starts_with("int4") { 2 } else { 1 }, 4 * numbers);
        // At most a scale in f32 and a zero point of 4 bits for every 16 numbers.
        let scales = if form.starts_with("int4") { numbers / 4 + numbers / 32 } else { 20_000 };
        assert!((bytes..bytes + scales + 8_000).contains(&sizes.frozen_bytes), "{form}: {}", sizes.frozen_bytes);
        assert!((widened..widened + scales + 8_000).contains(&sizes.widened_bytes), "{form}: {}", sizes.widened_bytes);
        let one = 2 * 160 * 160 + 2 * 160 * 80 + 3 * 160 * 256;
        assert!((4 * one..4 * one + 40_000).contains(&sizes.layer_widened_bytes), "{}", sizes.layer_widened_bytes);
        assert_eq!(sizes.head_widened_bytes / 4 / 160, VOCABULARY as u64, "{form}");
        assert_eq!(sizes.hidden_size, 160);
        let mut cut = Cut::new(&packed, &[LAYER]).unwrap();
        cut.expand_trained().unwrap();
        let sizes = Sizes::of(&cut, &cut.suffix().unwrap(), 4, Precision::F32);
        assert_eq!(sizes.trained_elements(), one + 2 * 160, "{form}");
    }
}

#[test]
fn a_weight_in_another_form_is_refused() {
    let mut packed = quantised("int4");
    for node in packed.graph.body.nodes.iter_mut().filter(|node| node.op_type == "MatMulNBits") {
        let bits = node.attributes.iter_mut().find(|(name, _)| name == "bits").unwrap();
        bits.1 = AttributeKind::Int(2).into();
    }
    let message = Cut::new(&packed, &[LAYER]).err().unwrap().to_string();
    assert!(message.contains("layer 1") && message.contains("MatMulNBits"), "{message}");
}

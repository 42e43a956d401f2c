//! Runs in bf16, and models in 16 bits.

use half::f16;

use super::*;
use crate::ir::{AttributeKind, DataType, ValueType};

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

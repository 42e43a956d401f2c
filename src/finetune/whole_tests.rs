//! Runs on the shipped model without dropped layers, and with a trained head.

use super::*;

/// Reference: all layers of the dense model, trained in transformers with `torch.optim.AdamW` on the same texts.
#[test]
fn an_unpruned_model_trains_as_in_transformers() {
    let reference = reference("whole");
    assert_eq!((reference.dropped.len(), reference.trained.len()), (0, 16));
    let bundle = Bundle::open(&model()).unwrap();
    let work = tempfile::tempdir().unwrap();
    let features = FeatureCache::new(1 << 20);
    let vocabulary = bundle.require_config().unwrap().vocab_size.unwrap() as i64;
    let request = Request {
        bundle: &bundle,
        layers: &reference.trained,
        data: &Texts { vocabulary },
        settings: &settings(),
        device: Device::Cpu,
        work: work.path(),
        resume: false,
        limits: Limits::default(),
        ranks: None,
        features: &features,
    };
    let mut steps = Vec::new();
    let _alone = alone();
    finetune(&request, &Cancel::default(), &mut |metrics| steps.push(metrics.clone())).unwrap();
    check(&steps, &reference);
}

#[test]
fn the_head_trains_as_in_transformers_and_is_saved() {
    let reference = reference("with_head");
    let work = tempfile::tempdir().unwrap();
    let settings = Settings { train_head: true, ..settings() };
    let run = run(&settings, &[2, 4], work.path(), false, None);
    check(&run.steps, &reference);
    let after = run.outcome.unwrap().decoder;
    let folder = tempfile::tempdir().unwrap();
    let bundle = Bundle::open(&pruned(&Bundle::open(&model()).unwrap(), folder.path())).unwrap();
    let before = crate::onnx::load(&bundle.path_of(bundle.require(Role::Decoder).unwrap())).unwrap();
    let map = crate::analysis::layers(&before.graph).unwrap();
    let head = crate::analysis::head_weight(&before.graph, map.result).unwrap();
    let in_layers = |name: &String| {
        map.layers.iter().any(|layer| layer.weights.iter().any(|&id| before.graph.name(id) == name.as_str()))
    };
    let outside: Vec<String> = changed(&before, &after).into_iter().filter(|name| !in_layers(name)).collect();
    assert_eq!(outside, [before.graph.name(head).to_string()]);
}

#[test]
fn training_the_head_without_answers_is_refused() {
    let stages = Stage::only([(LossKind::Anchor, 1.0)]);
    let error = Settings { train_head: true, stages, ..settings() }.check().unwrap_err().to_string();
    assert!(error.contains("`train_head`") && error.contains("`ce`"), "{error}");
}

/// The run `name` of `scripts/reference/finetune.py`.
fn reference(name: &str) -> Reference {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/expected/finetune.json");
    let all: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    serde_json::from_value(all[name].clone()).unwrap()
}

fn check(steps: &[StepMetrics], reference: &Reference) {
    assert_eq!(steps.len(), reference.steps.len());
    for (step, want) in steps.iter().zip(&reference.steps) {
        let near = |found: f64, want: f64, off: f64| (found - want).abs() < off * want;
        assert!(near(step.loss, want.loss, 1e-4), "step {}: loss {}, expected {}", step.step, step.loss, want.loss);
        let (norm, norm_of) = (step.grad_norm, want.grad_norm);
        assert!(near(norm, norm_of, 1e-3), "step {}: norm {norm}, expected {norm_of}", step.step);
    }
}

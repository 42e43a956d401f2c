//! Graphs written as a Hugging Face checkpoint, and taken back in.
//!
//! `fixtures/checkpoints/NAME.tar.zst` are the checkpoints from which the graphs in `fixtures/families` were exported
//! (`scripts/families/checkpoints.py` makes them). That transformers computes the graphs' logits from what is written is
//! shown by `scripts/consumers/transformers_checkpoint.py`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::path::Path;

use interlace::checkpoint::Checkpoint;
use interlace::ir::{DataType, Tensor};
use interlace::onnx;
use serde_json::Value;

use super::cli::{interlace, stderr};
use super::families::Family;

/// A family with its checkpoint in the folder `base`.
fn family(name: &str) -> Family {
    let family = Family::open(name, name);
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/checkpoints/{name}.tar.zst"));
    let archive = zstd::Decoder::new(File::open(file).expect("archive")).expect("zstd");
    let folder = family.here().join("unpacked");
    tar::Archive::new(archive).unpack(&folder).expect("unpacks");
    fs::rename(folder.join(name), family.here().join("base")).expect("moved");
    family
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).expect("a file")).expect("JSON")
}

/// Exports a folder with this base; the record that is printed.
fn exported(family: &Family, model: &str, out: &str, more: &[&str]) -> Value {
    let arguments = ["--json", "export", model, "--to", "safetensors", "--base", "base", "-o", out, "-q"];
    serde_json::from_str(&family.run(&[&arguments[..], more].concat())).expect("JSON")
}

/// Runs a verb that refuses, and returns its message.
fn refused(family: &Family, arguments: &[&str]) -> String {
    let output = interlace(family.here(), arguments);
    assert_eq!(output.status.code(), Some(2), "{arguments:?}: {}", stderr(&output));
    stderr(&output)
}

/// Every tensor is the base's, those of `prefix` without the dropped layers and numbered anew.
fn check_renumbered(family: &Family, out: &str, prefix: &str, layers: usize, dropped: &[usize]) {
    let base = Checkpoint::open(&family.here().join("base")).expect("base");
    let found = Checkpoint::open(&family.here().join(out)).expect("checkpoint");
    let kept: Vec<usize> = (0..layers).filter(|layer| !dropped.contains(layer)).collect();
    let mut wanted: BTreeMap<String, &Tensor> = BTreeMap::new();
    for (name, tensor) in base.tensors() {
        let Some(rest) = name.strip_prefix(prefix) else {
            wanted.insert(name.clone(), tensor);
            continue;
        };
        let (number, rest) = rest.split_once('.').expect("a layer");
        let number: usize = number.parse().expect("a number");
        if let Some(now) = kept.iter().position(|layer| *layer == number) {
            wanted.insert(format!("{prefix}{now}.{rest}"), tensor);
        }
    }
    assert!(wanted.len() < base.tensors().len(), "{prefix} begins no name");
    assert_eq!(found.tensors().keys().collect::<Vec<_>>(), wanted.keys().collect::<Vec<_>>());
    for (name, tensor) in wanted {
        let other = &found.tensors()[&name];
        assert!(tensor.dims == other.dims && tensor.bytes() == other.bytes(), "{name}");
    }
}

#[test]
fn a_pruned_model_becomes_a_checkpoint_with_fewer_layers() {
    for (name, more) in
        [("idefics3", &[][..]), ("qwen3_vl", &["--deepstack", "shift"]), ("qwen3_vl_moe", &["--deepstack", "shift"])]
    {
        let family = family(name);
        family.run(&[&["prune", name, "--drop", "1,4", "-o", "pruned", "-q"], more].concat());
        let written = exported(&family, "pruned", "out", &[]);
        let prefix = if name == "idefics3" { "model.text_model.layers." } else { "model.language_model.layers." };
        check_renumbered(&family, "out", prefix, 6, &[1, 4]);
        assert_eq!(written["weights"]["changed"], 0, "{name}");
        assert_eq!(written["weights"]["from_base"], serde_json::json!([]), "{name}");
        let config = json(&family.here().join("out/config.json"));
        assert_eq!(config["text_config"]["num_hidden_layers"], 4, "{name}");
        assert_eq!(config["architectures"], json(&family.here().join("base/config.json"))["architectures"]);
        for file in ["tokenizer.json", "chat_template.jinja", "processor_config.json", "generation_config.json"] {
            let (base, out) = (family.here().join("base").join(file), family.here().join("out").join(file));
            assert_eq!(fs::read(base).expect(file), fs::read(out).expect(file), "{name}");
        }
    }
}

#[test]
fn layers_of_the_vision_encoder_are_numbered_anew_too() {
    let family = family("idefics3");
    family.run(&["prune", "idefics3", "--component", "vision_encoder", "--drop", "0", "-o", "pruned", "-q"]);
    // One layer alone is not recognised as a list; the model before it was pruned has two.
    let arguments = ["export", "pruned", "--to", "safetensors", "--base", "base", "-o", "out"];
    assert!(refused(&family, &arguments).contains("--dense"));
    exported(&family, "pruned", "out", &["--dense", "idefics3"]);
    check_renumbered(&family, "out", "model.vision_model.encoder.layers.", 2, &[0]);
    assert_eq!(json(&family.here().join("out/config.json"))["vision_config"]["num_hidden_layers"], 1);
}

/// The initializers of a folder's graphs by file and name.
fn weights(folder: &Path) -> BTreeMap<(String, String), Tensor> {
    let mut all = BTreeMap::new();
    for file in ["decoder_model_merged", "embed_tokens", "vision_encoder"] {
        let model = onnx::load(&folder.join(format!("onnx/{file}.onnx"))).expect("graph");
        for (id, tensor) in &model.graph.body.initializers {
            all.insert((file.to_string(), model.graph.name(*id).to_string()), tensor.clone());
        }
    }
    all
}

/// Trained weights go out to a checkpoint and come back in through `graft` with the same bytes, in f32 and, where the base is
/// in bfloat16, in f32 too.
#[test]
fn healed_weights_go_out_and_come_back_in() {
    let family = family("idefics3");
    let turns = &family.expected["learned"]["turns"][0].clone();
    let data = family.dataset("heal.json", &[turns]);
    family.run(&["plan", "idefics3", "--drop", "1,4", "-o", "plan.json", "-q"]);
    family.run(&["prune", "idefics3", "--plan", "plan.json", "-o", "pruned", "-q"]);
    let heal =
        ["finetune", "pruned", "--plan", "plan.json", "--data", data.to_str().expect("path"), "--recipe", "paper"];
    let settings = ["--learning-rate", "1e-3", "--batch-size", "1", "--accumulation-steps", "1", "--epochs", "3"];
    family.run(&[&heal[..], &settings, &["-o", "healed", "-q"]].concat());

    let trained = refused(&family, &["export", "healed", "--to", "safetensors", "--base", "base", "-o", "out"]);
    assert!(trained.contains("was trained") && trained.contains("--dense"), "{trained}");
    let written = exported(&family, "healed", "out", &["--dense", "pruned"]);
    let changed = written["weights"]["changed"].as_u64().expect("a number");
    assert!(changed > 10, "{written}");
    exported(&family, "healed", "again", &["--dense", "idefics3"]);
    let bytes = |folder: &str| fs::read(family.here().join(folder).join("model.safetensors")).expect("weights");
    assert!(bytes("out") == bytes("again"), "the dense model before pruning gives the same");

    exported(&family, "pruned", "pruned-base", &["--shard-size", "100kB"]);
    assert!(family.here().join("pruned-base/model.safetensors.index.json").is_file());
    family.run(&["graft", "pruned", "--base", "pruned-base", "--tuned", "out", "-o", "grafted", "-q"]);
    let (healed, grafted, pruned) =
        ["healed", "grafted", "pruned"].map(|folder| weights(&family.here().join(folder))).into();
    assert_eq!(healed.keys().collect::<Vec<_>>(), grafted.keys().collect::<Vec<_>>());
    let mut moved = 0;
    for (name, tensor) in &healed {
        assert!(tensor.bytes() == grafted[name].bytes(), "{name:?}");
        moved += u64::from(tensor.bytes() != pruned[name].bytes());
    }
    assert_eq!(moved, changed);
    // An adapter of a pruned model is trained on its checkpoint, so layers are those of the pruned one.
    let wrong = refused(&family, &["graft", "pruned", "--base", "base", "--tuned", "out", "-o", "other", "-q"]);
    assert!(wrong.contains("lacks tensors of the base"), "{wrong}");
}

#[test]
fn trained_tensors_of_a_base_in_16_bits_are_written_in_f32() {
    let family = family("idefics3");
    let here = family.here();
    // The family's weights are few distinct values, all of which bfloat16 holds.
    let base = Checkpoint::open(&here.join("base")).expect("base");
    let halved: Vec<_> = base
        .tensors()
        .iter()
        .map(|(name, tensor)| {
            let numbers = tensor.to_f64s().expect("floats");
            let bytes: Vec<u8> = numbers.iter().flat_map(|&n| half::bf16::from_f64(n).to_le_bytes()).collect();
            let exact = numbers.iter().all(|&n| half::bf16::from_f64(n).to_f64() == n);
            assert!(exact, "{name}");
            interlace::checkpoint::NamedTensor {
                name: name.clone(),
                dtype: DataType::Bfloat16,
                dims: tensor.dims.clone(),
                bytes: Box::new(move || Ok(bytes.clone())),
            }
        })
        .collect();
    fs::create_dir(here.join("half")).expect("folder");
    interlace::checkpoint::save(&here.join("half"), halved, u64::MAX).expect("saved");
    let mut config = json(&here.join("base/config.json"));
    config["dtype"] = "bfloat16".into();
    fs::write(here.join("half/config.json"), config.to_string()).expect("config");
    // One number of the graph moves by a little.
    family.run(&["prune", "idefics3", "--drop", "1", "-o", "pruned", "-q"]);
    family.run(&["prune", "idefics3", "--drop", "1", "-o", "trained", "-q"]);
    let norm = |name: &str, _: &Tensor| name == "lm.norm.weight";
    let moved = |numbers: &[f32]| numbers.iter().map(|number| number + 1e-6).collect();
    change(&here.join("trained/onnx/decoder_model_merged.onnx"), norm, moved);
    let arguments =
        ["export", "trained", "--to", "safetensors", "--base", "half", "--dense", "pruned", "-o", "out", "-q"];
    family.run(&arguments);
    let out = Checkpoint::open(&here.join("out")).expect("checkpoint");
    for (name, tensor) in out.tensors() {
        let trained = name == "model.text_model.norm.weight";
        assert_eq!(tensor.dtype, if trained { DataType::Float } else { DataType::Bfloat16 }, "{name}");
        if trained {
            let found: Vec<f32> = tensor.to_f64s().expect("floats").into_iter().map(|n| n as f32).collect();
            let before = base.tensors()[name].to_f64s().expect("floats");
            assert_eq!(found, moved(&before.into_iter().map(|n| n as f32).collect::<Vec<_>>()));
        }
    }
    assert_eq!(json(&here.join("out/config.json"))["dtype"], "float32");
}

/// Changes the one initializer of a graph that `is_it` finds.
fn change(path: &Path, is_it: impl Fn(&str, &Tensor) -> bool, make: impl Fn(&[f32]) -> Vec<f32>) {
    let mut model = onnx::load(path).expect("graph");
    let graph = &model.graph;
    let place =
        graph.body.initializers.iter().position(|(id, tensor)| is_it(graph.name(*id), tensor)).expect("a weight");
    let tensor = &mut model.graph.body.initializers[place].1;
    let numbers: Vec<f32> = tensor.to_f64s().expect("floats").into_iter().map(|n| n as f32).collect();
    *tensor = Tensor::from_f32(&tensor.dims.clone(), &make(&numbers));
    onnx::save(&model, path, &onnx::Storage::Inline).expect("saved");
}

/// The head is the embeddings in the checkpoint; a graph in which only the head was trained does not fit into it.
#[test]
fn a_head_that_is_tied_to_the_embeddings_is_not_written_alone() {
    let family = family("idefics3");
    let here = family.here();
    let base = Checkpoint::open(&here.join("base")).expect("base");
    let table = &base.tensors()["model.text_model.embed_tokens.weight"];
    let (rows, columns) = (table.dims[0] as usize, table.dims[1] as usize);
    let numbers: Vec<f32> = table.to_f64s().expect("floats").into_iter().map(|n| n as f32).collect();
    let turned: Vec<f32> = (0..rows * columns).map(|at| numbers[at % rows * columns + at / rows]).collect();
    let head = |_: &str, tensor: &Tensor| tensor.dims == [columns as u64, rows as u64];
    family.run(&["prune", "idefics3", "--drop", "1", "-o", "tied", "-q"]);
    change(&here.join("tied/onnx/decoder_model_merged.onnx"), head, |_| turned.clone());
    let tensors = base.tensors().iter().filter(|(name, _)| *name != "lm_head.weight").map(|(name, tensor)| {
        let (name, dims, bytes) = (name.clone(), tensor.dims.clone(), tensor.bytes().to_vec());
        interlace::checkpoint::NamedTensor {
            name,
            dtype: tensor.dtype,
            dims,
            bytes: Box::new(move || Ok(bytes.clone())),
        }
    });
    fs::create_dir(here.join("tied-base")).expect("folder");
    interlace::checkpoint::save(&here.join("tied-base"), tensors.collect(), u64::MAX).expect("saved");
    fs::copy(here.join("base/config.json"), here.join("tied-base/config.json")).expect("config");
    family.run(&["prune", "tied", "--drop", "0", "-o", "trained", "-q"]);
    let arguments = ["export", "trained", "--to", "safetensors", "--base", "tied-base", "--dense", "tied", "-o"];
    family.run(&[&arguments[..], &["out", "-q"]].concat());
    assert!(!Checkpoint::open(&here.join("out")).expect("checkpoint").tensors().contains_key("lm_head.weight"));

    let moved = |numbers: &[f32]| numbers.iter().map(|number| number + 0.5).collect();
    change(&here.join("trained/onnx/decoder_model_merged.onnx"), head, moved);
    let message = refused(&family, &[&arguments[..], &["alone"]].concat());
    assert!(message.contains("both are `model.text_model.embed_tokens.weight` in the checkpoint"), "{message}");
    // With the embeddings changed in the same way it is one tensor again.
    change(&here.join("trained/onnx/embed_tokens.onnx"), |_, _| true, moved);
    family.run(&[&arguments[..], &["both", "-q"]].concat());
    change(&here.join("trained/onnx/embed_tokens.onnx"), |_, _| true, moved);
    let message = refused(&family, &[&arguments[..], &["apart"]].concat());
    assert!(message.contains("with different values"), "{message}");
}

/// Adds a step to the record of a folder.
fn with_step(folder: &Path, step: Value) {
    let file = folder.join("interlace.json");
    let mut record = json(&file);
    record["history"].as_array_mut().expect("a history").push(step);
    fs::write(file, record.to_string()).expect("record");
}

#[test]
fn only_steps_that_train_ask_for_the_model_before() {
    let family = family("idefics3");
    let here = family.here();
    family.run(&["prune", "idefics3", "--drop", "1", "-o", "pruned", "-q"]);
    let plain = exported(&family, "pruned", "plain", &[]);
    family.run(&["export", "pruned", "--precision", "int8", "-o", "quantised", "-q"]);
    for step in [
        serde_json::json!({ "step": "pictures", "keys": { "do_image_splitting": false } }),
        serde_json::json!({ "step": "image_tokens", "keep": 1.0 }),
    ] {
        with_step(&here.join("quantised"), step);
    }
    let found = exported(&family, "quantised", "floats", &[]);
    assert_eq!(found["weights"], plain["weights"]);
    let bytes = |folder: &str| fs::read(here.join(folder).join("model.safetensors")).expect("weights");
    assert!(bytes("floats") == bytes("plain"));

    let step = serde_json::json!({ "step": "graft", "tensors": 1 });
    with_step(&here.join("quantised"), step);
    let export = |more: &[&str]| {
        let arguments = ["export", "quantised", "--to", "safetensors", "--base", "base", "-o", "out"];
        refused(&family, &[&arguments[..], more].concat())
    };
    let floats = export(&[]);
    assert!(floats.contains("was trained") && !floats.contains("heal the floats"), "{floats}");
    let rounded = export(&["--variant", "quantized"]);
    assert!(rounded.contains("was trained") && rounded.contains("heal the floats, then quantise"), "{rounded}");

    let step = serde_json::json!({ "step": "vocabulary", "kept": 90, "of": 100 });
    with_step(&here.join("quantised"), step);
    for more in [&[][..], &["--dense", "pruned"]] {
        let cut = export(more);
        assert!(cut.contains("head was cut to 90 of 100 rows") && cut.contains("--vocabulary"), "{cut}");
    }
    assert!(!here.join("out").exists());
}

#[test]
fn a_tensor_larger_than_a_shard_is_named() {
    let family = family("idefics3");
    family.run(&["prune", "idefics3", "--drop", "1", "-o", "pruned", "-q"]);
    let arguments = ["export", "pruned", "--to", "safetensors", "--base", "base", "--shard-size", "1kB", "-o", "out"];
    let message = refused(&family, &arguments);
    assert!(message.contains("weight `") && message.contains("a data file may hold 1"), "{message}");
    assert!(message.contains("a larger `--shard-size`"), "{message}");
    assert!(!family.here().join("out").exists());
}

#[test]
fn what_transformers_or_the_base_cannot_say_is_refused() {
    let family = family("qwen3_vl");
    let export = |model: &str, base: &str| {
        refused(&family, &["export", model, "--to", "safetensors", "--base", base, "-o", "out"])
    };
    // Features that keep the place of a dropped layer.
    family.run(&["prune", "qwen3_vl", "--drop", "1,4", "-o", "kept", "-q"]);
    let message = export("kept", "base");
    assert!(message.contains("layer 1") && message.contains("--deepstack shift"), "{message}");
    // A file without a config, no base.
    family.run(&["prune", "qwen3_vl", "--drop", "4", "-o", "pruned", "-q"]);
    assert!(export("pruned", "base/model.safetensors").contains("config.json"));
    let missing = refused(&family, &["export", "pruned", "--to", "safetensors", "-o", "out"]);
    assert!(missing.contains("--base"), "{missing}");
    let unread = refused(&family, &["export", "pruned", "--to", "triton", "--base", "base", "-o", "out"]);
    assert!(unread.contains("not read by the target `triton`"), "{unread}");
    // A base of which one matrix of the graphs is not.
    let base = Checkpoint::open(&family.here().join("base")).expect("base");
    let changed = "model.language_model.layers.2.mlp.up_proj.weight";
    let tensors = base.tensors().iter().map(|(name, tensor)| {
        let mut bytes = tensor.bytes().to_vec();
        if name == changed {
            bytes[3] ^= 0x40;
        }
        let (name, dims) = (name.clone(), tensor.dims.clone());
        interlace::checkpoint::NamedTensor {
            name,
            dtype: tensor.dtype,
            dims,
            bytes: Box::new(move || Ok(bytes.clone())),
        }
    });
    let folder = family.here().join("changed");
    fs::create_dir(&folder).expect("folder");
    fs::copy(family.here().join("base/config.json"), folder.join("config.json")).expect("config");
    interlace::checkpoint::save(&folder, tensors.collect(), u64::MAX).expect("saved");
    let message = export("pruned", "changed");
    assert!(message.contains(changed) && message.contains("differ from tensors of the base"), "{message}");
    // The dense model itself has no record, so a tensor that is in no graph could have changed.
    let message = export("qwen3_vl/onnx/decoder_model_merged.onnx", "base");
    assert!(message.contains("in none of the graphs") && message.contains("--dense"), "{message}");
    assert!(!family.here().join("out").exists());
}

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use super::*;
use crate::base::Provenance;
use crate::ir::{DataType, Dim, Graph, Model, Node, Tensor, Value, ValueType};
use crate::onnx;

const CONFIG: &str = r#"{
  "model_type": "idefics3",
  "image_token_id": 7,
  "text_config": {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "rms_norm_eps": 1e-05,
    "vocab_size": 640
  },
  "transformers.js_config": {"use_external_data_format": {"decoder_model_merged.onnx": 3, "embed_tokens": 0}},
  "vision_config": {"num_hidden_layers": 2}
}
"#;

fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (file, text) in files {
        let path = folder.path().join(file);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }
    folder
}

fn transformers_js(extra: &[(&str, &str)]) -> tempfile::TempDir {
    let mut files = vec![
        ("config.json", CONFIG),
        ("generation_config.json", r#"{"eos_token_id": [1, 2]}"#),
        ("tokenizer.json", "{}"),
        ("README.md", "words"),
        (".gitattributes", "*.onnx filter=lfs"),
        ("onnx/vision_encoder.onnx", "v"),
        ("onnx/embed_tokens.onnx", "e"),
        ("onnx/decoder_model_merged.onnx", "d"),
        ("onnx/decoder_model_merged.onnx_data", "w"),
        ("onnx/decoder_model_merged.onnx_data_1", "w1"),
        ("onnx/decoder_model_merged_q4.onnx", "q"),
    ];
    files.extend_from_slice(extra);
    folder(&files)
}

fn provenance() -> Provenance {
    Provenance::new(Record::SCHEMA_VERSION, BTreeMap::new(), &serde_json::json!({})).unwrap()
}

/// A graph that adds a weight of this many floats to its input.
fn model(size: usize) -> Model {
    let mut graph = Graph::default();
    let ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(vec![Dim::Known(size as i64)]) });
    let mut value = |name: &str| graph.add_value(Value { name: name.into(), ty: ty.clone(), ..Value::default() });
    let (x, w, y) = (value("x"), value("w"), value("y"));
    let node =
        Node { op_type: "Add".into(), inputs: vec![Some(x), Some(w)], outputs: vec![Some(y)], ..Node::default() };
    let weight = Tensor::from_f32(&[size as u64], &vec![1.0; size]);
    graph.body = Body {
        name: "g".into(),
        inputs: vec![x],
        outputs: vec![y],
        initializers: vec![(w, weight)],
        nodes: vec![node],
        ..Body::default()
    };
    Model { ir_version: 8, opset_imports: BTreeMap::from([(String::new(), 17)]), graph, ..Model::default() }
}

fn save(folder: &Path, name: &str, data: Option<&str>) {
    let storage = match data {
        Some(data) => onnx::Storage::External { file_name: data.into(), chunk_bytes: None },
        None => onnx::Storage::Inline,
    };
    onnx::save(&model(600), &folder.join(name), &storage).unwrap();
}

#[test]
fn a_history_that_contradicts_the_graph_is_refused_without_allocation() {
    let step = |layers_before, dropped: &[usize]| {
        let (dropped, dropped_original) = (dropped.to_vec(), dropped.to_vec());
        RecordedStep::Prune {
            tower: Tower::Text,
            layers_before,
            dropped,
            dropped_original,
            deepstack: None,
            compensated: Vec::new(),
            bridged: Vec::new(),
            mlps: Vec::new(),
            taps: Vec::new(),
        }
    };
    let originals = |history: &[RecordedStep], count| Record::original_layers(history, Tower::Text, count);
    assert_eq!(originals(&[step(6, &[1, 4]), step(4, &[0])], 3).unwrap(), [2, 3, 5]);
    assert_eq!(originals(&[step(6, &[1, 4])], 0).unwrap_err().to_string().matches("6 layers").count(), 1);
    for layers in [0, 5, 1 << 32, usize::MAX] {
        let error = originals(&[step(layers, &[1, 4])], 4).unwrap_err().to_string();
        assert!(error.contains(&format!("its history drops 2 of {layers} layers")), "{error}");
    }
    for dropped in [&[1, 1][..], &[1, 6], &[1, usize::MAX]] {
        let error = originals(&[step(6, dropped)], 4).unwrap_err().to_string();
        assert!(error.contains("its history drops 2 of 6 layers"), "{dropped:?}: {error}");
    }
}

#[test]
fn components_variants_and_config_values_are_read() {
    let folder = transformers_js(&[]);
    let bundle = Bundle::open(folder.path()).unwrap();
    assert_eq!(bundle.layout().name, "transformers.js");
    let decoders: Vec<&str> = bundle.variants(Role::Decoder).map(|c| c.variant.as_str()).collect();
    assert_eq!(decoders, ["", "q4"]);
    let decoder = bundle.require(Role::Decoder).unwrap();
    assert_eq!(decoder.external, ["onnx/decoder_model_merged.onnx_data", "onnx/decoder_model_merged.onnx_data_1"]);
    assert_eq!(bundle.size_bytes(decoder).unwrap(), 4);
    let config = bundle.require_config().unwrap();
    assert_eq!((config.num_hidden_layers, config.head_size(), config.vision_num_layers), (Some(4), Some(16), Some(2)));
    assert_eq!((config.image_token_id, config.eos_token_ids.as_slice()), (Some(7), &[1, 2][..]));
}

#[test]
fn external_data_under_any_name_belongs_to_the_graph_that_reads_it() {
    let folder = folder(&[("config.json", r#"{"num_hidden_layers": 2}"#)]);
    save(folder.path(), "model.onnx", Some("weights.bin"));
    let bundle = Bundle::open(folder.path()).unwrap();
    assert_eq!(bundle.components()[0].external, ["weights.bin"]);
    fs::write(folder.path().join("other.bin"), "").unwrap();
    let error = Bundle::open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("`other.bin`"), "{error}");
}

#[test]
fn a_hub_cache_snapshot_of_symlinks_opens_like_any_folder() {
    let repository = folder(&[("blobs/0", r#"{"num_hidden_layers": 2}"#), ("snapshots/main/README.md", "")]);
    save(&repository.path().join("blobs"), "model.onnx", Some("data"));
    let snapshot = repository.path().join("snapshots/main");
    let links = [("0", "config.json"), ("model.onnx", "model.onnx"), ("data", "data")];
    for (blob, name) in links {
        std::os::unix::fs::symlink(format!("../../blobs/{blob}"), snapshot.join(name)).unwrap();
    }
    for path in [snapshot.clone(), snapshot.join("model.onnx")] {
        let bundle = Bundle::open(&path).unwrap();
        assert_eq!(bundle.components()[0].external, ["data"]);
        let out = repository.path().join("out");
        BundleWriter::create(&bundle, &out).unwrap().commit(provenance()).unwrap();
        assert!(fs::symlink_metadata(out.join("data")).unwrap().is_file());
        onnx::load(&out.join("model.onnx")).unwrap();
        fs::remove_dir_all(out).unwrap();
    }
}

#[test]
fn an_unclaimed_file_is_refused_by_name() {
    let cases = [
        ("model.safetensors", "weights in another format"),
        ("model.safetensors.index.bin", "no graph in the folder reads it"),
        ("onnx/decoder_model_merged_q7.onnx", "STEM_VARIANT.onnx"),
        ("onnx/mystery.ONNX", "STEM_VARIANT.onnx"),
        ("README.onnx", "STEM_VARIANT.onnx"),
        ("onnx/embed_tokens.onnx_data_x", "it is no text"),
        ("onnx/other.onnx_data_1", "no graph in the folder reads it"),
        ("deep/er/x.dat", "move the file out of the folder"),
        ("blob", "it is no text and no graph reads it"),
        ("onnx/encoder_model.onnx", "encoder-decoder"),
        ("onnx/encoder_model_quantized.onnx", "Florence-2, Donut"),
    ];
    for (file, want) in cases {
        let folder = transformers_js(&[(file, "x\0")]);
        for name in ["vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_model_merged_q4"] {
            save(folder.path(), &format!("onnx/{name}.onnx"), None);
        }
        let error = Bundle::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("`{file}`")) && error.contains(want), "{error}");
    }
}

/// Files that download and version-control tools leave in a model folder.
#[test]
fn files_that_do_not_affect_the_computation_are_copied_and_listed() {
    let carried = [
        ".DS_Store",
        ".mdl",
        ".msc",
        ".mv",
        "Makefile",
        "configuration.json",
        "handler.py",
        "model.safetensors.index.json",
        "modeling_my.py",
        "onnx/.DS_Store",
        "params.json",
        "requirements.txt",
        "scripts/run.sh",
        "trainer_state.json",
    ];
    let known = [
        "additional_chat_templates/tool_use.jinja",
        "tekken.json",
        "tokenizer.model.v3",
        "demo.html",
        "LICENSE",
        "assets/figure.png",
        "qwen.tiktoken",
    ];
    let hidden = [".cache/huggingface/download/x.metadata", ".git/config", "__pycache__/handler.pyc"];
    let files: Vec<(&str, &str)> = carried.iter().chain(&known).chain(&hidden).map(|file| (*file, "{}\n")).collect();
    let folder = transformers_js(&files);
    // Marker files of a download are not text.
    fs::write(folder.path().join(".msc"), [0x80, 4, 0, 0xff]).unwrap();
    for name in ["vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_model_merged_q4"] {
        save(folder.path(), &format!("onnx/{name}.onnx"), None);
    }
    let bundle = Bundle::open(folder.path()).unwrap();
    assert_eq!(bundle.carried().collect::<Vec<_>>(), carried);
    let plain = transformers_js(&[]);
    for name in ["vision_encoder", "embed_tokens", "decoder_model_merged", "decoder_model_merged_q4"] {
        save(plain.path(), &format!("onnx/{name}.onnx"), None);
    }
    let out = plain.path().join("out");
    let mut writer = BundleWriter::create(&bundle, &out).unwrap();
    writer.drop_layers(&LayerEdit::new(Tower::Text, 4, &[1]).unwrap(), None, Vec::new()).unwrap();
    writer.commit(provenance()).unwrap();
    for file in carried.iter().chain(&known) {
        assert_eq!(fs::read(out.join(file)).unwrap(), fs::read(folder.path().join(file)).unwrap(), "{file}");
    }
    let record = Bundle::open(&out).unwrap().record().unwrap().unwrap();
    assert_eq!(record.carried, carried);
    assert_eq!(record.left_out, [".cache/", ".git/", "__pycache__/"]);
    assert!(!out.join(".cache").exists());
    // These files do not affect the computation.
    for file in carried {
        fs::remove_file(folder.path().join(file)).unwrap();
    }
    assert_eq!(Bundle::open(folder.path()).unwrap().digest().unwrap(), bundle.digest().unwrap());
}

#[test]
fn layer_counts_in_configs_of_other_tools_follow_or_are_refused() {
    let drop = |file: &str, text: &str| {
        let folder = transformers_js(&[(file, text)]);
        let bundle = Bundle::open(folder.path()).unwrap();
        let out = folder.path().join("out");
        let mut writer = BundleWriter::create(&bundle, &out)?;
        writer.drop_layers(&LayerEdit::new(Tower::Text, 4, &[1])?, None, Vec::new())?;
        writer.commit(provenance())?;
        Ok::<_, Error>(fs::read_to_string(out.join(file)).unwrap())
    };
    let params = r#"{"dim": 64, "n_layers": 4, "vision_encoder": {"num_hidden_layers": 4}}"#;
    let want = r#"{"dim": 64, "n_layers": 3, "vision_encoder": {"num_hidden_layers": 4}}"#;
    assert_eq!(drop("params.json", params).unwrap(), want);
    // A count for another network stays unchanged.
    let other = r#"{"n_layers": 9, "list": [1, 2, 3, 4]}"#;
    assert_eq!(drop("draft.json", other).unwrap(), other);
    let error = drop("mlc-chat-config.json", r#"{"model_config": {"num_hidden_layers": 4}}"#).unwrap_err().to_string();
    assert!(error.contains("`model_config.num_hidden_layers` is 4") && error.contains("move it out"), "{error}");
}

#[test]
fn the_written_model_card_describes_the_pruning() {
    let card = "---\nlicense: mit\n---\n# Dense\n\naccuracy 97.3\n";
    let folder = transformers_js(&[("README.md", card), ("README_zh.md", "x"), ("LICENSE.md", "free")]);
    let bundle = Bundle::open(folder.path()).unwrap();
    let out = folder.path().join("out");
    let mut writer = BundleWriter::create(&bundle, &out).unwrap();
    writer.drop_layers(&LayerEdit::new(Tower::Text, 4, &[1, 2]).unwrap(), None, Vec::new()).unwrap();
    writer.commit(provenance()).unwrap();
    let written = fs::read_to_string(out.join("README.md")).unwrap();
    assert!(written.starts_with("---\nlicense: mit\n---\n"), "{written}");
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    let said = written.find("2 of 4 layers of the language model removed: layers 1, 2").unwrap();
    assert!(said < written.find("# Dense").unwrap() && written.contains(&format!("made from `{name}`")), "{written}");
    assert!(fs::read_to_string(out.join("README_zh.md")).unwrap().contains("2 of 4 layers"));
    assert_eq!(fs::read_to_string(out.join("LICENSE.md")).unwrap(), "free");
    // If the model is unchanged, its card is unchanged.
    let copy = folder.path().join("copy");
    BundleWriter::create(&bundle, &copy).unwrap().commit(provenance()).unwrap();
    assert_eq!(fs::read_to_string(copy.join("README.md")).unwrap(), card);
}

#[test]
fn graphs_that_no_verb_runs_are_components_and_are_copied() {
    let janus = ["prepare_inputs_embeds", "language_model", "lm_head", "gen_head", "gen_img_embeds", "image_decode"];
    let files: Vec<String> = janus.iter().map(|stem| format!("onnx/{stem}_q4f16.onnx")).collect();
    let mut files: Vec<(&str, &str)> = files.iter().map(|file| (file.as_str(), "x")).collect();
    files.extend([("onnx/audio_encoder.onnx", "a"), ("onnx/audio_encoder.onnx_data", "w")]);
    let folder = folder(&files);
    let bundle = Bundle::open(folder.path()).unwrap();
    for (role, file) in [
        (Role::EmbedTokens, "onnx/prepare_inputs_embeds_q4f16.onnx"),
        (Role::Decoder, "onnx/language_model_q4f16.onnx"),
        (Role::LmHead, "onnx/lm_head_q4f16.onnx"),
        (Role::AudioEncoder, "onnx/audio_encoder.onnx"),
    ] {
        assert_eq!(bundle.require(role).unwrap().file, file);
    }
    let carried: Vec<&str> = bundle.carried().collect();
    let image = ["gen_head", "gen_img_embeds", "image_decode"].map(|stem| format!("onnx/{stem}_q4f16.onnx"));
    assert_eq!(carried, ["onnx/audio_encoder.onnx", image[0].as_str(), image[1].as_str(), image[2].as_str()]);
    let out = folder.path().join("out");
    BundleWriter::create(&bundle, &out).unwrap().commit(provenance()).unwrap();
    assert_eq!(fs::read_to_string(out.join("onnx/audio_encoder.onnx_data")).unwrap(), "w");
}

#[test]
fn the_layout_of_a_model_folder_is_recognised() {
    let genai = r#"{"model": {"type": "llama", "eos_token_id": 2, "decoder": {"filename": "text.onnx", "num_hidden_layers": 4}}}"#;
    let export = r#"{"components": {"prefill": {"file": "prefill.onnx"}, "decode": {"file": "decode.onnx"}}}"#;
    type Files<'a> = &'a [(&'a str, &'a str)];
    let cases: &[(&str, Files, Role)] = &[
        ("genai", &[("genai_config.json", genai), ("text.onnx", ""), ("text.onnx.data", "")], Role::Decoder),
        (
            "transformers-exporter",
            &[("export.json", export), ("prefill.onnx", ""), ("decode.onnx", "")],
            Role::DecoderWithPast,
        ),
        (
            "mobius",
            &[("decoder/model.onnx", ""), ("embedding/model.onnx", ""), ("embedding/model.onnx.data", "")],
            Role::EmbedTokens,
        ),
        ("optimum", &[("model.onnx", ""), ("ort_config.json", "{}")], Role::Decoder),
    ];
    for (name, files, role) in cases {
        let folder = folder(files);
        let bundle = Bundle::open(folder.path()).unwrap();
        assert_eq!(bundle.layout().name, *name);
        bundle.require(*role).unwrap();
    }
}

#[test]
fn invalid_model_folders_are_refused() {
    let escape = r#"{"model": {"decoder": {"filename": "../text.onnx"}}}"#;
    let cases: &[(&[(&str, &str)], &str)] = &[
        (&[("a.txt", "")], "is not a model folder"),
        (&[("genai_config.json", escape)], "without `..`"),
        (&[("genai_config.json", "{")], "not JSON"),
        (&[("genai_config.json", r#"{"model": {"decoder": {"filename": "x.onnx"}}}"#)], "cannot open"),
        (&[("config.json", r#"{"num_hidden_layers": -1}"#), ("model.onnx", "")], "expected a whole number"),
        (
            &[("config.json", r#"{"num_hidden_layers": 9223372036854775807}"#), ("model.onnx", "")],
            "expected a whole number from 0 to 100000",
        ),
        (&[("config.json", r#"{"head_dim": 9223372036854775807}"#), ("model.onnx", "")], "to 16777216"),
        (
            &[("config.json", r#"{"max_position_embeddings": 4611686018427387904}"#), ("model.onnx", "")],
            "to 2147483647",
        ),
        (
            &[
                ("config.json", r#"{"max_position_embeddings": 4096, "rope_scaling": {"factor": 1e300}}"#),
                ("model.onnx", ""),
            ],
            "its rotary scaling makes a context",
        ),
        (&[("config.json", r#"{"eos_token_id": 9223372036854775807}"#), ("model.onnx", "")], "the id of a token"),
        (&[("config.json", r#"{"image_token_id": 9223372036854775807}"#), ("model.onnx", "")], "the id of a token"),
        (&[("config.json", r#"{"vision_config": {"spatial_merge_size": 0}}"#), ("model.onnx", "")], "from 1 to 256"),
        (
            &[
                (
                    "genai_config.json",
                    r#"{"model": {"context_length": 9223372036854775807, "decoder": {"filename": "model.onnx"}}}"#,
                ),
                ("model.onnx", ""),
            ],
            "`context_length` is 9223372036854775807, expected a whole number from 0 to 2147483647",
        ),
        (
            &[
                (
                    "genai_config.json",
                    r#"{"model": {"decoder": {"filename": "model.onnx", "head_size": 9223372036854775807}}}"#,
                ),
                ("model.onnx", ""),
            ],
            "`head_size` is 9223372036854775807",
        ),
    ];
    for (files, want) in cases {
        let folder = folder(files);
        let error = Bundle::open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let error = Bundle::open(Path::new("no/such/folder")).unwrap_err().to_string();
    assert!(error.contains("cannot open"), "{error}");
}

#[test]
fn a_single_onnx_file_opens_with_only_its_external_data() {
    let folder = folder(&[("y.onnx", ""), ("z.bin", "")]);
    save(folder.path(), "x.onnx", Some("weights.bin"));
    let bundle = Bundle::open(&folder.path().join("x.onnx")).unwrap();
    assert_eq!(bundle.components().len(), 1);
    assert_eq!(bundle.components()[0].external, ["weights.bin"]);
    assert!(bundle.assets().is_empty());
}

#[test]
fn a_written_folder_differs_from_its_source_only_by_the_changes() {
    let folder = transformers_js(&[]);
    let out = folder.path().join("../").join(format!("{}-out", folder.path().file_name().unwrap().to_string_lossy()));
    let bundle = Bundle::open(folder.path()).unwrap();
    let mut writer = BundleWriter::create(&bundle, &out).unwrap();
    for component in bundle.components().iter().filter(|c| c.role.is_decoder()) {
        writer.save(component, &model(600)).unwrap();
    }
    writer.drop_layers(&LayerEdit::new(Tower::Text, 4, &[1]).unwrap(), None, Vec::new()).unwrap();
    writer.commit(provenance()).unwrap();

    let written = Bundle::open(&out).unwrap();
    let config = fs::read_to_string(out.join("config.json")).unwrap();
    let want = CONFIG
        .replace("\"num_hidden_layers\": 4", "\"num_hidden_layers\": 3")
        .replace("\"decoder_model_merged.onnx\": 3", "\"decoder_model_merged.onnx\": 1");
    assert_eq!(config, want);
    assert_eq!(written.require(Role::Decoder).unwrap().external, ["onnx/decoder_model_merged.onnx_data"]);
    assert_eq!(fs::read_to_string(out.join("onnx/vision_encoder.onnx")).unwrap(), "v");
    assert_eq!(fs::read_to_string(out.join(".gitattributes")).unwrap(), "*.onnx filter=lfs");
    let history = written.record().unwrap().unwrap().history;
    assert_eq!(Record::original_layers(&history, Tower::Text, 3).unwrap(), [0, 2, 3]);
    assert_ne!(written.digest().unwrap(), bundle.digest().unwrap());

    // A second step still refers to the first model.
    let again =
        folder.path().join("../").join(format!("{}-again", folder.path().file_name().unwrap().to_string_lossy()));
    let mut writer = BundleWriter::create(&written, &again).unwrap();
    writer.drop_layers(&LayerEdit::new(Tower::Text, 3, &[1]).unwrap(), None, Vec::new()).unwrap();
    let record = writer.record(provenance()).unwrap();
    let Some(RecordedStep::Prune { dropped_original, .. }) = record.history.last() else {
        panic!("the last step is not a pruning")
    };
    assert_eq!(dropped_original, &[2]);
    let props = record.metadata_props(Tower::Text, 2).unwrap();
    assert!(props.contains(&("interlace.original_layers".into(), "0,3".into())), "{props:?}");
    drop(writer);
    assert!(!again.exists());
    fs::remove_dir_all(out).unwrap();
}

#[test]
fn an_existing_output_folder_is_refused() {
    let folder = transformers_js(&[]);
    let bundle = Bundle::open(folder.path()).unwrap();
    let error = BundleWriter::create(&bundle, folder.path()).unwrap_err().to_string();
    assert!(error.contains("exists already"), "{error}");
}

#[test]
fn exported_parts_of_a_vision_language_model_get_their_roles() {
    let parts = ["image_encoder", "multi_modal_projector", "language_model", "lm_head", "decode"];
    let components: serde_json::Map<String, serde_json::Value> = parts
        .iter()
        .map(|part| (part.to_string(), serde_json::json!({"file": format!("{part}.onnx"), "metadata": {}})))
        .collect();
    let export = serde_json::json!({"components": components}).to_string();
    let mut files = vec![("config.json".to_string(), CONFIG.to_string()), ("export.json".to_string(), export)];
    files.extend(parts.iter().map(|part| (format!("{part}.onnx"), part.to_string())));
    let files: Vec<(&str, &str)> = files.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    let folder = folder(&files);
    let bundle = Bundle::open(folder.path()).unwrap();
    for (role, file) in [
        (Role::VisionEncoder, "image_encoder.onnx"),
        (Role::Projector, "multi_modal_projector.onnx"),
        (Role::DecoderPrefill, "language_model.onnx"),
        (Role::LmHead, "lm_head.onnx"),
        (Role::DecoderWithPast, "decode.onnx"),
    ] {
        assert_eq!(bundle.require(role).unwrap().file, file);
    }
}

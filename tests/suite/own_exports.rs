//! Finetuning what `export --precision` writes, through the command line.

use std::fs;
use std::path::Path;

use interlace::onnx;

use super::cli::{fixture, interlace, stderr};

fn done(folder: &Path, arguments: &[&str]) {
    let output = interlace(folder, arguments);
    assert_eq!(output.status.code(), Some(0), "{arguments:?}: {}", stderr(&output));
}

/// The names of a graph's operators, and the bytes of its constants by name.
fn read(path: &Path) -> (Vec<String>, Vec<(String, Vec<u8>)>) {
    let model = onnx::load(path).expect("graph");
    let constants = model.graph.body.initializers.iter();
    let constants = constants.map(|(id, tensor)| (model.graph.name(*id).to_string(), tensor.bytes().to_vec()));
    (model.graph.body.nodes.iter().map(|node| node.op_type.clone()).collect(), constants.collect())
}

#[test]
fn exports_of_every_form_are_finetuned_as_floats_and_in_their_own_form() {
    let folder = tempfile::tempdir().expect("folder");
    let here = folder.path();
    let (model, data) = (fixture("model"), fixture("data/finetune-small.parquet"));
    for (precision, suffix, product) in
        [("int4", "q4", "MatMulNBits"), ("int8", "quantized", "MatMulInteger"), ("int8-qdq", "int8", "QuantizeLinear")]
    {
        let mut arguments = vec!["export", &model, "--precision", precision, "-q", "-o", precision];
        if precision == "int4" {
            arguments.extend(["--rounding", "nearest"]);
        }
        if precision == "int8-qdq" {
            arguments.extend(["--data", &data, "--samples", "2"]);
        }
        done(here, &arguments);
        let finetune = |named: &[&str], out: &str, how: &str| {
            let arguments = ["finetune", precision, "--recipe", "paper", "--layers", "15", "-q"];
            let more =
                ["--data", &data, "--turns", "separate", "--samples", "8", "--batch-size", "4", "--max-steps", "2"];
            let last = ["--accumulation-steps", "1", "--learning-rate", "1e-2", "--write-trained", how, "-o", out];
            interlace(here, &[&arguments[..], named, &more, &last].concat())
        };
        // The other files of the decoder would keep their old weights.
        let refused = finetune(&[], "refused", "float");
        assert_eq!(refused.status.code(), Some(2));
        assert!(stderr(&refused).contains("would keep their old weights"), "{}", stderr(&refused));
        let graph = format!("onnx/decoder_model_merged_{suffix}.onnx");
        let (before, weights) = read(&here.join(precision).join(&graph));
        let count = |operators: &[String], name: &str| operators.iter().filter(|own| *own == name).count();
        for how in ["float", "quantised"] {
            let out = format!("{precision}-{how}");
            let output = finetune(&["--variant", suffix], &out, how);
            assert_eq!(output.status.code(), Some(0), "{out}: {}", stderr(&output));
            // The new folder has none of them.
            for file in fs::read_dir(here.join(&out).join("onnx")).expect("folder").flatten() {
                let name = file.file_name().to_string_lossy().into_owned();
                assert!(name.contains(&format!("_{suffix}.onnx")), "{out}: {name}");
            }
            let (after, trained) = read(&here.join(&out).join(&graph));
            let changed = weights.iter().filter(|own| !trained.contains(own)).count();
            match how {
                // Seven products with integer weights become float ones; with ranges of activations those stay.
                "float" if precision != "int8-qdq" => {
                    assert_eq!(count(&after, product) + 7, count(&before, product), "{out}");
                    assert_eq!(count(&after, "MatMul"), count(&before, "MatMul") + 7, "{out}");
                }
                "float" => {
                    assert_eq!(count(&after, "DequantizeLinear") + 7, count(&before, "DequantizeLinear"), "{out}")
                }
                _ => assert_eq!(after, before, "{out}"),
            }
            // The seven matrices, each in two or three parts, and two norms.
            assert!((7..=23).contains(&changed), "{out}: {changed}");
        }
    }
}

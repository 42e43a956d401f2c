//! Models made to cause harm: each ends in a result or one error, in bounded time and memory, without a panic, and
//! nothing outside the output is written.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::cli::fixture;

/// Longest time for one verb, with a slow build on a busy machine.
const TIME_LIMIT: Duration = Duration::from_secs(60);
/// Largest resident memory of one verb, in bytes.
const MEMORY_LIMIT: u64 = 2 << 30;
/// Text outside the model's folder that must never be printed or changed.
const SECRET: &str = "what stands outside of the folder";

/// One attack: its name, and the change to a copy of the shipped model.
type Harm = (&'static str, fn(&Path));

const GRAPH: &str = "onnx/embed_tokens.onnx";
const DECODER: &str = "onnx/decoder_model_merged.onnx";

const HARMS: &[Harm] = &[
    ("empty graph", |model| put(model, GRAPH, b"")),
    ("graph of noise", |model| put(model, GRAPH, &[0xa7; 5000])),
    ("half a graph", |model| {
        let bytes = fs::read(model.join(DECODER)).expect("graph");
        put(model, DECODER, &bytes[..bytes.len() / 2]);
    }),
    ("a graph that is a folder", |model| {
        fs::remove_file(model.join(GRAPH)).expect("remove");
        fs::create_dir(model.join(GRAPH)).expect("folder");
    }),
    ("a graph without end", |model| link(model, GRAPH, "/dev/zero")),
    ("weights without end", |model| link(model, "onnx/decoder_model_merged.onnx_data", "/dev/zero")),
    ("weights from above the folder", |model| append(model, GRAPH, &external("../../secret.txt", None, Some("8")))),
    ("weights from an absolute path", |model| append(model, GRAPH, &external("/etc/passwd", None, Some("8")))),
    ("weights through a link", |model| {
        symlink("../../secret.txt", model.join("onnx/weights.bin")).expect("link");
        append(model, GRAPH, &external("weights.bin", None, Some("8")));
    }),
    ("weights behind the end of the file", |model| {
        append(model, GRAPH, &external("decoder_model_merged.onnx_data", Some("18446744073709551615"), Some("8")))
    }),
    ("weights longer than the file", |model| {
        append(model, GRAPH, &external("decoder_model_merged.onnx_data", Some("0"), Some("9223372036854775807")))
    }),
    ("weights of a negative length", |model| {
        append(model, GRAPH, &external("decoder_model_merged.onnx_data", Some("-8"), Some("-8")))
    }),
    ("a shape whose size overflows", |model| append(model, GRAPH, &initializer(&[1 << 40, 1 << 40], b"12345678"))),
    ("a negative dimension", |model| append(model, GRAPH, &initializer(&[u64::MAX], b"12345678"))),
    ("fewer bytes than the shape asks", |model| append(model, GRAPH, &initializer(&[1 << 33], b"12345678"))),
    ("a field longer than the file", |model| append(model, GRAPH, &[0x3a, 0xff, 0xff, 0xff, 0xff, 0x7f])),
    ("groups inside groups", |model| append(model, GRAPH, &[0x0b; 300_000])),
    ("graphs inside graphs", |model| append(model, GRAPH, &nested(20_000))),
    ("a node that reads itself", |model| append(model, GRAPH, &node("Relu", "loop", "loop"))),
    ("two nodes that read each other", |model| {
        append(model, GRAPH, &[node("Relu", "one", "two"), node("Relu", "two", "one")].concat())
    }),
    ("a function that calls itself", |model| append(model, GRAPH, &recursive_function())),
    ("config of brackets", |model| put(model, "config.json", "[".repeat(1_000_000).as_bytes())),
    ("config that is a pipe", |model| pipe(model, "config.json")),
    ("config without end", |model| link(model, "config.json", "/dev/zero")),
    ("more layers than atoms", |model| {
        edit(model, "config.json", |config| config["text_config"]["num_hidden_layers"] = 1e18.into())
    }),
    ("layers that are below zero", |model| {
        edit(model, "config.json", |config| config["text_config"]["num_hidden_layers"] = (-3).into())
    }),
    ("vocabulary of a billion billions", |model| {
        edit(model, "config.json", |config| config["text_config"]["vocab_size"] = 1_000_000_000_000_000_000_u64.into())
    }),
    ("a list of layer types without end", |model| {
        edit(model, "config.json", |config| {
            config["text_config"]["layer_types"] = vec!["full_attention"; 200_000].into()
        })
    }),
    ("tokenizer of brackets", |model| put(model, "tokenizer.json", "{\"a\":".repeat(300_000).as_bytes())),
    ("tokenizer with a pattern that never ends", |model| {
        edit(model, "tokenizer.json", |tokenizer| {
            tokenizer["pre_tokenizer"] = serde_json::json!({"type": "Split", "pattern": {"Regex": "(a*)*(a*)*b"},
                "behavior": "Isolated", "invert": false})
        })
    }),
    ("a template that counts without end", |model| {
        put(model, "chat_template.jinja", b"{% for i in range(1000000000000) %}x{% endfor %}")
    }),
    ("a template that doubles a text", |model| {
        put(model, "chat_template.jinja", b"{% set ns = namespace(a='xxxxxxxx') %}{% for i in range(9000) %}{% set ns.a = ns.a ~ ns.a %}{% endfor %}{{ ns.a }}")
    }),
    ("a template that calls itself", |model| {
        put(model, "chat_template.jinja", b"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}")
    }),
    ("a template that reads a file", |model| put(model, "chat_template.jinja", b"{% include '../secret.txt' %}")),
    ("a template of brackets", |model| {
        put(model, "chat_template.jinja", format!("{{{{ {}1 }}}}", "(".repeat(200_000)).as_bytes())
    }),
    ("pictures of a million pixels a side", |model| {
        for file in ["preprocessor_config.json", "processor_config.json"] {
            edit(model, file, |config| {
                let settings =
                    if config["image_processor"].is_object() { &mut config["image_processor"] } else { config };
                settings["size"] = serde_json::json!({"longest_edge": 1_000_000});
                settings["max_image_size"] = serde_json::json!({"longest_edge": 1_000_000});
            });
        }
    }),
    ("a billion tokens for a picture", |model| {
        edit(model, "processor_config.json", |config| config["image_seq_len"] = 1_000_000_000.into())
    }),
    ("an answer without end", |model| {
        edit(model, "generation_config.json", |config| config["max_new_tokens"] = u64::MAX.into())
    }),
    ("a note that the model was pruned above its folder", |model| {
        put(model, "interlace.json", br#"{"schema_version": 1, "files": [{"path": "../secret.txt"}]}"#)
    }),
];

/// What is run on each model: the verb, the arguments after the model, and the paths that it may write.
const VERBS: &[&[&str]] = &[
    &["inspect"],
    &["prune", "--drop", "1", "-o", "out"],
    &["score", "--data", "DATA", "--samples", "2", "-o", "out"],
    &["eval", "--data", "BENCH", "--limit", "2", "-o", "out"],
];

fn put(model: &Path, file: &str, bytes: &[u8]) {
    fs::write(model.join(file), bytes).expect("write");
}

fn append(model: &Path, file: &str, bytes: &[u8]) {
    let mut all = fs::read(model.join(file)).expect("graph");
    all.extend(bytes);
    put(model, file, &all);
}

fn link(model: &Path, file: &str, target: &str) {
    fs::remove_file(model.join(file)).expect("remove");
    symlink(target, model.join(file)).expect("link");
}

fn pipe(model: &Path, file: &str) {
    fs::remove_file(model.join(file)).expect("remove");
    let made = Command::new("mkfifo").arg(model.join(file)).status().expect("mkfifo");
    assert!(made.success());
}

fn edit(model: &Path, file: &str, change: impl FnOnce(&mut Value)) {
    let path = model.join(file);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).expect("file")).expect("JSON");
    change(&mut value);
    fs::write(path, value.to_string()).expect("write");
}

fn varint(mut number: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while number >= 0x80 {
        bytes.push(number as u8 | 0x80);
        number >>= 7;
    }
    bytes.push(number as u8);
    bytes
}

/// A length-delimited field of the wire format.
fn field(number: u64, bytes: &[u8]) -> Vec<u8> {
    [varint(number << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// A varint field of the wire format.
fn number(field: u64, value: u64) -> Vec<u8> {
    [varint(field << 3), varint(value)].concat()
}

/// An initializer that a graph gets if these bytes are appended to its own, because protobuf merges repeated messages.
fn tensor_in_graph(tensor: &[u8]) -> Vec<u8> {
    field(7, &field(5, tensor))
}

fn initializer(dims: &[u64], bytes: &[u8]) -> Vec<u8> {
    let dims: Vec<u8> = dims.iter().flat_map(|&dim| number(1, dim)).collect();
    tensor_in_graph(&[dims, number(2, 1), field(8, b"harm"), field(9, bytes)].concat())
}

fn external(location: &str, offset: Option<&str>, length: Option<&str>) -> Vec<u8> {
    let entry = |key: &str, value: &str| field(13, &[field(1, key.as_bytes()), field(2, value.as_bytes())].concat());
    let mut tensor = [number(1, 2), number(2, 1), field(8, b"harm"), entry("location", location)].concat();
    tensor.extend(offset.map(|offset| entry("offset", offset)).unwrap_or_default());
    tensor.extend(length.map(|length| entry("length", length)).unwrap_or_default());
    tensor.extend(number(14, 1));
    tensor_in_graph(&tensor)
}

fn node(op_type: &str, input: &str, output: &str) -> Vec<u8> {
    let node = [field(1, input.as_bytes()), field(2, output.as_bytes()), field(4, op_type.as_bytes())].concat();
    field(7, &field(1, &node))
}

/// An `If` whose branch holds an `If`, nested `depth` times.
fn nested(depth: usize) -> Vec<u8> {
    let mut graph = Vec::new();
    for _ in 0..depth {
        let attribute = [field(1, b"then_branch"), field(6, &graph), number(20, 5)].concat();
        let node = [field(1, b"x"), field(2, b"y"), field(4, b"If"), field(5, &attribute)].concat();
        graph = field(1, &node);
    }
    field(7, &graph)
}

fn recursive_function() -> Vec<u8> {
    let call = [field(1, b"x"), field(2, b"y"), field(4, b"Again"), field(7, b"harm")].concat();
    let function = [
        field(1, b"Again"),
        field(4, b"x"),
        field(5, b"y"),
        field(7, &call),
        field(9, &[field(1, b"harm"), number(2, 1)].concat()),
        field(10, b"harm"),
    ]
    .concat();
    [field(25, &function), field(8, &[field(1, b"harm"), number(2, 1)].concat()), field(7, &field(1, &call))].concat()
}

fn copy_of_the_model(folder: &Path) -> PathBuf {
    let model = folder.join("model");
    fs::create_dir_all(model.join("onnx")).expect("folder");
    for place in ["", "onnx"] {
        for entry in fs::read_dir(Path::new(&fixture("model")).join(place)).expect("folder") {
            let path = entry.expect("entry").path();
            if path.is_file() {
                fs::copy(&path, model.join(place).join(path.file_name().expect("name"))).expect("copy");
            }
        }
    }
    model
}

/// Exit status, largest resident memory in bytes, and the printed text.
///
/// Panics if the run takes too long.
fn run(folder: &Path, arguments: &[String], name: &str) -> (Option<i32>, u64, String) {
    let log = fs::File::create(folder.join("log.txt")).expect("log");
    let mut child = Command::new(env!("CARGO_BIN_EXE_interlace"))
        .args(arguments)
        .current_dir(folder)
        .stdin(Stdio::null())
        .stdout(log.try_clone().expect("log"))
        .stderr(log)
        .spawn()
        .expect("the binary starts");
    let started = Instant::now();
    let mut memory = 0;
    let status = loop {
        let status = fs::read_to_string(format!("/proc/{}/status", child.id())).unwrap_or_default();
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
        let kilobytes = peak.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
        memory = memory.max(kilobytes.unwrap_or(0) * 1024);
        if let Some(status) = child.try_wait().expect("wait") {
            break status;
        }
        if started.elapsed() > TIME_LIMIT || memory > MEMORY_LIMIT {
            child.kill().expect("kill");
            panic!("{name}: {arguments:?}: {memory} bytes after {:?}", started.elapsed());
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let text = fs::read(folder.join("log.txt")).expect("log");
    (status.code(), memory, String::from_utf8_lossy(&text).into_owned())
}

/// Every file below a folder with its size, except those of the model and those that a verb may write.
fn files_around(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder)
        .expect("folder")
        .map(|entry| entry.expect("entry").file_name().to_string_lossy().into_owned())
        .filter(|name| !["out", "log.txt"].contains(&name.as_str()))
        .collect();
    names.sort();
    names
}

#[test]
fn hostile_models_end_in_a_result_or_one_error() {
    let (mut refused, mut answered) = (0, 0);
    for (name, harm) in HARMS {
        let folder = tempfile::tempdir().expect("folder");
        fs::write(folder.path().join("secret.txt"), SECRET).expect("write");
        harm(&copy_of_the_model(folder.path()));
        for verb in VERBS {
            let data = |argument: &&str| match *argument {
                "DATA" => fixture("data/finetune-small.parquet"),
                "BENCH" => fixture("data/bench-small.tsv"),
                other => other.to_string(),
            };
            let mut arguments = vec![verb[0].to_string(), "model".into(), "--quiet".into()];
            arguments.extend(verb[1..].iter().map(data));
            let (code, _, text) = run(folder.path(), &arguments, name);
            match code {
                Some(0 | 1) => answered += 1,
                Some(2) => {
                    refused += 1;
                    let errors = text.lines().filter(|line| line.starts_with("error:")).count();
                    assert_eq!(errors, 1, "{name}: {verb:?}: {text}");
                    assert!(!folder.path().join("out").exists(), "{name}: {verb:?} left its output");
                }
                other => panic!("{name}: {verb:?} ended with {other:?}: {text}"),
            }
            assert!(!text.contains("panicked") && !text.contains(SECRET), "{name}: {verb:?}: {text}");
            assert_eq!(files_around(folder.path()), ["model", "secret.txt"], "{name}: {verb:?}");
            assert_eq!(fs::read_to_string(folder.path().join("secret.txt")).expect("secret"), SECRET, "{name}");
            let out = folder.path().join("out");
            if out.is_dir() {
                fs::remove_dir_all(out).expect("remove");
            } else if out.exists() {
                fs::remove_file(out).expect("remove");
            }
        }
    }
    println!("{refused} runs refused, {answered} answered");
    assert_eq!(refused + answered, HARMS.len() * VERBS.len());
    assert!(refused > answered, "{refused} refused, {answered} answered");
}

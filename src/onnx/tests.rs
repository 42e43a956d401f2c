use std::collections::HashMap;
use std::path::{Path, PathBuf};

use onnx_protobuf as pb;
use protobuf::Message;

use super::*;
use crate::ir::{Model, TensorData};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name)
}

fn weights(model: &Model) -> HashMap<String, (crate::ir::DataType, Vec<u64>, Vec<u8>)> {
    let graph = &model.graph;
    let entry = |(id, tensor): &(crate::ir::ValueId, crate::ir::Tensor)| {
        (graph.name(*id).to_string(), (tensor.dtype, tensor.dims.clone(), tensor.bytes().to_vec()))
    };
    graph.body.initializers.iter().map(entry).collect()
}

const FILES: &[&str] = &["smolvlm/ts17.onnx", "genai/qwen3_vl-int4-embeds/model.onnx", "qwen3_vl/mobius.onnx"];

#[test]
fn a_saved_model_loads_with_equal_content() {
    for name in FILES {
        let model = load(&fixture(name)).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let external = Storage::External { file_name: "x.onnx.data".into(), chunk_bytes: Some(200_000) };
        for (file, storage) in [("inline.onnx", Storage::Inline), ("x.onnx", external)] {
            let path = folder.path().join(file);
            save(&model, &path, &storage).unwrap();
            let again = load(&path).unwrap();
            assert_eq!(weights(&model), weights(&again), "{name}");
            assert_eq!(format!("{:?}", model.graph.body.nodes), format!("{:?}", again.graph.body.nodes), "{name}");
            assert_eq!(format!("{:?}", model.functions), format!("{:?}", again.functions), "{name}");
            assert_eq!(model.opset_imports, again.opset_imports);
            assert_eq!(model.metadata, again.metadata);
        }
    }
}

#[test]
fn small_tensors_are_stored_inline_and_large_ones_externally() {
    let model = load(&fixture(FILES[0])).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("x.onnx");
    save(&model, &path, &Storage::External { file_name: "x.onnx.data".into(), chunk_bytes: None }).unwrap();
    for (_, tensor) in &load(&path).unwrap().graph.body.initializers {
        assert_eq!(tensor.is_external(), tensor.byte_len() >= INLINE_LIMIT);
        if tensor.byte_len() >= INLINE_LIMIT {
            assert!(matches!(tensor.data, TensorData::Mapped { .. }));
        }
    }
}

fn refusal(bytes: &[u8]) -> String {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.onnx");
    std::fs::write(&path, bytes).unwrap();
    load(&path).unwrap_err().to_string()
}

#[test]
fn a_truncated_file_is_refused_at_any_length() {
    let bytes = std::fs::read(fixture(FILES[1])).unwrap();
    assert!(refusal(&[]).contains("empty"));
    for length in [1, 10, 1000, bytes.len() / 2, bytes.len() - 1] {
        let message = refusal(&bytes[..length]);
        assert!(message.contains("bad.onnx"), "{message}");
    }
}

#[test]
fn a_protobuf_group_is_refused_before_parsing() {
    assert!(refusal(&[0x0b, 0x0b, 0x0b]).contains("group"));
    // The same inside a graph inside the model.
    assert!(refusal(&[0x3a, 0x02, 0x0b, 0x0b]).contains("group"));
}

#[test]
fn deep_nesting_is_refused_before_parsing() {
    // graph > node > attribute > graph > node ...
    let mut message = Vec::new();
    for depth in 0..402 {
        let field = [6u64, 5, 1][depth % 3];
        let mut outer = Vec::new();
        wire::put_field(&mut outer, field, &message);
        message = outer;
    }
    let mut model = Vec::new();
    wire::put_field(&mut model, 7, &message);
    let text = refusal(&model);
    assert!(text.contains("nested deeper"), "{text}");
}

#[test]
fn external_data_outside_the_folder_is_refused() {
    let source = fixture(FILES[1]);
    for (location, want) in
        [("../x.data", "without `..`"), ("/etc/passwd", "relative path"), ("link.data", "leads out")]
    {
        let folder = tempfile::tempdir().unwrap();
        let inner = folder.path().join("m");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(folder.path().join("x.data"), vec![0; 1 << 20]).unwrap();
        std::os::unix::fs::symlink("../x.data", inner.join("link.data")).unwrap();
        let mut bytes = std::fs::read(&source).unwrap();
        let old = b"model.onnx.data";
        let new = format!("{location:/<15}");
        let new = if location == "../x.data" {
            "./../../../x.da".to_string()
        } else if location == "link.data" {
            "./././link.data".to_string()
        } else {
            new
        };
        assert_eq!(new.len(), old.len());
        let mut position = 0;
        while let Some(found) = bytes[position..].windows(old.len()).position(|window| window == old) {
            bytes[position + found..position + found + old.len()].copy_from_slice(new.as_bytes());
            position += found + old.len();
        }
        let path = inner.join("model.onnx");
        std::fs::write(&path, bytes).unwrap();
        let message = load(&path).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
}

/// Name, operator, inputs and outputs of a node.
type Row<'a> = (&'a str, &'a str, &'a [&'a str], &'a [&'a str]);

fn graph(inputs: &[&str], rows: &[Row], outputs: &[&str]) -> pb::GraphProto {
    let strings = |names: &[&str]| names.iter().map(ToString::to_string).collect();
    let info = |name: &&str| pb::ValueInfoProto { name: name.to_string(), ..Default::default() };
    let node = |&(name, op, inputs, outputs): &Row| pb::NodeProto {
        name: name.into(),
        op_type: op.into(),
        input: strings(inputs),
        output: strings(outputs),
        ..Default::default()
    };
    pb::GraphProto {
        name: "g".into(),
        input: inputs.iter().map(info).collect(),
        node: rows.iter().map(node).collect(),
        output: outputs.iter().map(info).collect(),
        ..Default::default()
    }
}

fn opset(domain: &str, version: i64) -> pb::OperatorSetIdProto {
    pb::OperatorSetIdProto { domain: domain.into(), version, ..Default::default() }
}

fn proto(rows: &[Row]) -> pb::ModelProto {
    pb::ModelProto {
        ir_version: 8,
        opset_import: vec![opset("", 17)],
        graph: Some(graph(&["x"], rows, &["y"])).into(),
        ..Default::default()
    }
}

fn read(proto: &pb::ModelProto) -> Result<Model> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, proto.write_to_bytes().unwrap()).unwrap();
    load(&path)
}

/// Asserts that reading the changed model fails with an error that contains these words.
fn refused(rows: &[Row], change: impl Fn(&mut pb::ModelProto), words: &[&str]) {
    let mut proto = proto(rows);
    read(&proto).unwrap();
    change(&mut proto);
    let message = read(&proto).unwrap_err().to_string();
    assert!(words.iter().all(|word| message.contains(word)), "{message}: expected {words:?}");
}

const PLAIN: &[Row] = &[("a", "Relu", &["x"], &["y"])];

#[test]
fn missing_invalid_or_contradicting_versions_are_refused() {
    refused(PLAIN, |proto| proto.opset_import.clear(), &["m.onnx", "has no `opset_import`", "export"]);
    refused(PLAIN, |proto| proto.ir_version = 0, &["m.onnx", "has no `ir_version`", "export"]);
    refused(PLAIN, |proto| proto.ir_version = -4, &["`ir_version` -4"]);
    refused(PLAIN, |proto| proto.opset_import[0].version = 0, &["version 0", "`ai.onnx`"]);
    refused(PLAIN, |proto| proto.opset_import[0].version = -3, &["version -3", "`ai.onnx`", "1 or more"]);
    let other = |proto: &mut pb::ModelProto| proto.opset_import = vec![opset("com.microsoft", 1)];
    refused(PLAIN, other, &["node `a` (Relu)", "`ai.onnx`", "found com.microsoft", "opset_import"]);
    refused(PLAIN, |proto| proto.graph.as_mut().unwrap().node[0].domain = "z".into(), &["node `a` (z.Relu)", "`z`"]);
    for domain in ["", "ai.onnx"] {
        let add = |proto: &mut pb::ModelProto| proto.opset_import.push(opset(domain, 18));
        refused(PLAIN, add, &["versions 17 and 18", "`ai.onnx`"]);
        let mut proto = proto(PLAIN);
        proto.opset_import.push(opset(domain, 17));
        assert_eq!(read(&proto).unwrap().opset_imports.len(), 1);
    }
}

#[test]
fn unknown_versions_are_refused() {
    refused(PLAIN, |proto| proto.ir_version = 50, &["m.onnx", "`ir_version` 50", "up to 14", "export"]);
    for (domain, version) in [("", 99), ("ai.onnx", 99), ("ai.onnx.ml", 40), ("com.microsoft", 2)] {
        let name = if domain.is_empty() { "ai.onnx" } else { domain };
        let add = |proto: &mut pb::ModelProto| {
            proto.opset_import.retain(|import| domain != "ai.onnx" && import.domain != domain);
            proto.opset_import.push(opset(domain, version));
        };
        let version = format!("version {version} of the operators of `{name}`");
        refused(PLAIN, add, &["m.onnx", &version, "versions up to", "are known", "export"]);
    }
    // Domains that this version does not know may have any version.
    let mut proto = proto(PLAIN);
    proto.opset_import.push(opset("somebody.else", 99));
    read(&proto).unwrap();
}

#[test]
fn versions_are_checked_in_functions_and_branches() {
    let call = |proto: &mut pb::ModelProto| {
        proto.opset_import.push(opset("f", 1));
        proto.functions.push(pb::FunctionProto {
            name: "F".into(),
            domain: "f".into(),
            input: vec!["i".into()],
            output: vec!["o".into()],
            node: graph(&[], &[("inner", "Relu", &["i"], &["o"])], &[]).node,
            opset_import: vec![opset("", 17)],
            ..Default::default()
        });
    };
    let mut sound = proto(PLAIN);
    call(&mut sound);
    read(&sound).unwrap();
    let without = |proto: &mut pb::ModelProto| {
        call(proto);
        proto.functions[0].opset_import.clear();
    };
    refused(PLAIN, without, &["node `inner` (Relu)", "`ai.onnx`", "found none"]);
    for (imports, words) in [
        (vec![opset("", 0)], ["function `F`", "version 0"]),
        (vec![opset("", 99)], ["function `F`", "version 99"]),
        (vec![opset("", 17), opset("ai.onnx", 18)], ["function `F`", "versions 17 and 18"]),
    ] {
        let contradicts = |proto: &mut pb::ModelProto| {
            call(proto);
            proto.functions[0].opset_import.clone_from(&imports);
        };
        refused(PLAIN, contradicts, &words);
    }
    let twice = |proto: &mut pb::ModelProto| {
        call(proto);
        call(proto);
    };
    refused(PLAIN, twice, &["function `F`", "twice"]);
    let mut branches = proto(BRANCHES);
    add_branches(&mut branches, "x");
    read(&branches).unwrap();
    let inner = |proto: &mut pb::ModelProto| {
        add_branches(proto, "x");
        proto.graph.as_mut().unwrap().node[0].attribute[1].g.as_mut().unwrap().node[0].domain = "q".into();
    };
    refused(BRANCHES, inner, &["(q.Relu)", "`q`"]);
}

const BRANCHES: &[Row] = &[("if", "If", &["x"], &["y"])];

/// Gives the first node two branches that read this value and whose nodes are out of order.
fn add_branches(proto: &mut pb::ModelProto, reads: &str) {
    for name in ["then_branch", "else_branch"] {
        let rows: &[Row] = &[("", "Relu", &["t"], &["u"]), ("", "Neg", &[reads], &["t"])];
        proto.graph.as_mut().unwrap().node[0].attribute.push(pb::AttributeProto {
            name: name.into(),
            type_: pb::attribute_proto::AttributeType::GRAPH.into(),
            g: Some(graph(&[], rows, &["u"])).into(),
            ..Default::default()
        });
    }
}

#[test]
fn missing_names_and_malformed_tensors_are_refused() {
    let node = |proto: &mut pb::ModelProto| std::mem::take(&mut proto.graph.as_mut().unwrap().node[0]);
    let attribute = |name: &str, i| pb::AttributeProto {
        name: name.into(),
        type_: pb::attribute_proto::AttributeType::INT.into(),
        i,
        ..Default::default()
    };
    let with = |attributes: Vec<pb::AttributeProto>| {
        move |proto: &mut pb::ModelProto| {
            let changed = pb::NodeProto { attribute: attributes.clone(), ..node(proto) };
            proto.graph.as_mut().unwrap().node[0] = changed;
        }
    };
    refused(PLAIN, with(vec![attribute("axis", 1), attribute("axis", 2)]), &["node `a`", "`axis` twice"]);
    refused(PLAIN, with(vec![attribute("", 1)]), &["node `a`", "without a name"]);
    refused(PLAIN, |proto| proto.graph.as_mut().unwrap().node[0].op_type.clear(), &["node `a`", "no operator"]);
    refused(PLAIN, |proto| proto.graph.as_mut().unwrap().output[0].name.clear(), &["output of graph `g`", "no name"]);
    refused(PLAIN, |proto| proto.graph.as_mut().unwrap().input[0].name.clear(), &["no name"]);
    let with = |tensor: pb::TensorProto| {
        move |proto: &mut pb::ModelProto| proto.graph.as_mut().unwrap().initializer.push(tensor.clone())
    };
    let tensor = |data_type| pb::TensorProto { name: "w".into(), dims: vec![1], data_type, ..Default::default() };
    let twice = pb::TensorProto { raw_data: vec![0; 4], float_data: vec![1.0], ..tensor(1) };
    refused(PLAIN, with(twice), &["tensor `w`", "content twice"]);
    let words = pb::TensorProto { string_data: vec![b"a".to_vec(), b"b".to_vec()], ..tensor(8) };
    refused(PLAIN, with(words), &["tensor `w`", "2 strings", "takes 1"]);
    refused(PLAIN, with(pb::TensorProto { raw_data: vec![0; 4], ..tensor(8) }), &["tensor `w`", "`string_data`"]);
    let elsewhere = pb::TensorProto { data_location: protobuf::EnumOrUnknown::from_i32(7), ..tensor(1) };
    refused(PLAIN, with(elsewhere), &["tensor `w`", "data location 7"]);
}

fn names(nodes: &[crate::ir::Node]) -> Vec<&str> {
    nodes.iter().map(|node| node.name.as_str()).collect()
}

#[test]
fn nodes_out_of_order_are_sorted_and_others_keep_their_order() {
    let rows: &[Row] = &[
        ("b", "Add", &["a.out", "cast.out"], &["b.out"]),
        ("free", "Relu", &["x"], &["free.out"]),
        ("c", "Add", &["b.out", "free.out"], &["y"]),
        ("a", "Neg", &["x"], &["a.out"]),
        ("cast", "Neg", &["x"], &["cast.out"]),
    ];
    let model = read(&proto(rows)).unwrap();
    assert_eq!(names(&model.graph.body.nodes), ["a", "cast", "b", "free", "c"]);
    let folder = tempfile::tempdir().unwrap();
    save(&model, &folder.path().join("sorted.onnx"), &Storage::Inline).unwrap();
    let model = load(&fixture(FILES[0])).unwrap();
    let before = std::fs::read(fixture(FILES[0])).unwrap();
    let before = pb::ModelProto::parse_from_bytes(&before).unwrap();
    let before: Vec<&str> = before.graph.node.iter().map(|node| node.name.as_str()).collect();
    assert_eq!(names(&model.graph.body.nodes), before);
}

#[test]
fn branches_and_functions_are_sorted_and_may_read_later_values() {
    let rows: &[Row] = &[("if", "If", &["x"], &["y"]), ("late", "Neg", &["x"], &["late.out"])];
    let mut branches = proto(rows);
    add_branches(&mut branches, "late.out");
    branches.functions.push(pb::FunctionProto {
        name: "F".into(),
        input: vec!["i".into()],
        output: vec!["o".into()],
        node: graph(&[], &[("2", "Relu", &["m"], &["o"]), ("1", "Neg", &["i"], &["m"])], &[]).node,
        opset_import: vec![opset("", 17)],
        ..Default::default()
    });
    let model = read(&branches).unwrap();
    let nodes = &model.graph.body.nodes;
    assert_eq!(names(nodes), ["late", "if"]);
    assert_eq!(names(&model.functions[0].graph.body.nodes), ["1", "2"]);
    let late = nodes[0].outputs[0];
    for body in nodes[1].bodies() {
        assert_eq!(body.nodes.iter().map(|node| node.op_type.as_str()).collect::<Vec<_>>(), ["Neg", "Relu"]);
        assert_eq!(body.nodes[0].inputs, [late]);
    }
}

#[test]
fn nodes_in_a_cycle_are_named() {
    let rows: &[Row] = &[
        ("start", "Relu", &["x"], &["s"]),
        ("a", "Add", &["s", "c"], &["y"]),
        ("b", "Neg", &["y"], &["b"]),
        ("", "Neg", &["b"], &["c"]),
    ];
    let message = read(&proto(rows)).unwrap_err().to_string();
    let circle = "nodes `a` (Add) <- node of `c` (Neg) <- `b` (Neg) <- `a` (Add)";
    assert!(message.contains(circle) && message.contains("in a circle") && !message.contains("start"), "{message}");
    let message = read(&proto(&[("self", "Add", &["x", "y"], &["y"])])).unwrap_err().to_string();
    assert!(message.contains("`self` (Add) <- `self` (Add)"), "{message}");
}

/// The order that a conversion to half precision produces, in a real graph.
#[test]
fn an_exported_graph_with_reordered_nodes_loads_as_before() {
    let bytes = std::fs::read(fixture(FILES[0])).unwrap();
    let mut proto = pb::ModelProto::parse_from_bytes(&bytes).unwrap();
    let nodes = &mut proto.graph.as_mut().unwrap().node;
    nodes.rotate_left(40);
    nodes.reverse();
    let folder = tempfile::tempdir().unwrap();
    std::fs::copy(fixture("smolvlm/weights.data"), folder.path().join("weights.data")).unwrap();
    let path = folder.path().join("m.onnx");
    std::fs::write(&path, proto.write_to_bytes().unwrap()).unwrap();
    let (sorted, sound) = (load(&path).unwrap(), load(&fixture(FILES[0])).unwrap());
    let sorted_names = |model: &Model| {
        let mut found: Vec<String> = model.graph.body.nodes.iter().map(|node| node.name.clone()).collect();
        found.sort();
        found
    };
    assert_eq!(sorted_names(&sorted), sorted_names(&sound));
}

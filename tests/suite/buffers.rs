//! Graphs whose large constants are split compute what the whole ones compute, or are refused by name.

use std::time::Instant;

use interlace::base::Device;
use interlace::ir::{self, AttributeKind, DataType, Model, Tensor, large_constants};
use interlace::rewrite::split_buffers;
use interlace::runtime::{Runtime, SessionOptions, TensorValue};

use super::properties::case::Builder;

const FLOAT: DataType = DataType::Float;

fn floats(dims: &[u64]) -> Tensor {
    let count = dims.iter().product::<u64>();
    let numbers: Vec<f32> = (0..count).map(|at| (at as f32 * 12.9898).sin()).collect();
    Tensor::from_f32(dims, &numbers)
}

/// The outputs as bytes, or the message of ONNX Runtime.
fn run(model: &Model, feeds: &[(&str, Tensor)]) -> Result<Vec<Tensor>, String> {
    let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
    let options = SessionOptions { exact_products: true, ..SessionOptions::default() };
    let mut session = runtime.session_of(model, &options).expect("a session");
    let tensors: Vec<_> = feeds.iter().map(|(name, x)| (*name, TensorValue::from_ir(x).expect("tensor"))).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
    let outputs = session.run(&tensors, None).map_err(|error| error.to_string())?;
    Ok(outputs.iter().map(|(_, tensor)| tensor.to_ir().expect("output")).collect())
}

fn agree(name: &str, wanted: &Tensor, found: &Tensor) {
    assert_eq!((wanted.dtype, &wanted.dims), (found.dtype, &found.dims), "{name}");
    match (wanted.to_f64s(), found.to_f64s()) {
        (Some(wanted), Some(found)) => {
            let apart = wanted.iter().zip(&found).map(|(a, b)| (a - b).abs()).fold(0f64, f64::max);
            assert!(apart <= 1e-5, "{name}: {apart}");
        }
        _ => assert_eq!(wanted.bytes(), found.bytes(), "{name}"),
    }
}

/// A lookup in a table of 100 rows.
fn lookup(table: Tensor, ids: DataType) -> Model {
    let mut build = Builder::new(17);
    build.input("ids", ids, None);
    // Results of these types cannot be read here.
    let unreadable = [DataType::Uint16, DataType::Uint32].contains(&table.dtype);
    build.output("rows", if unreadable { DataType::Int64 } else { table.dtype });
    build.constant("table", table);
    let node = build.node("Gather", &["table", "ids"], &[if unreadable { "found" } else { "rows" }], vec![]);
    build.push(node);
    if unreadable {
        let to = vec![("to", AttributeKind::Int(DataType::Int64 as i64))];
        let node = build.node("Cast", &["found"], &["rows"], to);
        build.push(node);
    }
    build.model
}

#[test]
fn a_split_lookup_takes_negative_ids_and_fails_outside_the_table() {
    let whole = lookup(floats(&[100, 32]), DataType::Int64);
    let (split, names) = split_buffers(&whole, 4000).expect("split");
    assert_eq!((names, large_constants(&split, 4000).len()), (vec!["table".to_string()], 0));
    let ids = |ids: &[i64]| [("ids", Tensor::from_i64(&[ids.len() as u64], ids))];
    for inside in [&[0, 5, 30, 31, 62, 93, 99][..], &[-1, -7, -8, -69, -70, -99, -100], &[-100, 99, 0, -1], &[]] {
        let (wanted, found) = (run(&whole, &ids(inside)).expect("whole"), run(&split, &ids(inside)).expect("split"));
        agree(&format!("{inside:?}"), &wanted[0], &found[0]);
        assert_eq!(wanted[0].bytes(), found[0].bytes(), "{inside:?}");
    }
    for outside in [100, 1000, i64::MAX, -101, -131, -1000, i64::MIN] {
        let (wanted, found) = (run(&whole, &ids(&[3, outside])), run(&split, &ids(&[3, outside])));
        for error in [wanted.unwrap_err(), found.unwrap_err()] {
            assert!(error.contains("out of data bounds"), "{outside}: {error}");
        }
    }
    let one = lookup(floats(&[100, 32]), DataType::Int32);
    let scalar = [("ids", Tensor::from_bytes(DataType::Int32, &[], (-3i32).to_le_bytes().to_vec()))];
    let split = split_buffers(&one, 4000).expect("split").0;
    agree("one id", &run(&one, &scalar).expect("whole")[0], &run(&split, &scalar).expect("split")[0]);
}

#[test]
fn tables_of_all_types_with_a_lookup_are_split_or_refused() {
    let ids = [("ids", Tensor::from_i64(&[2, 3], &[0, 99, -2, 40, -100, 77]))];
    let bytes = |dtype: DataType| {
        let length = 100 * 32 * dtype.bits() / 8;
        let bool = dtype == DataType::Bool;
        let bytes: Vec<u8> = (0..length).map(|at| (at * 37 % 251) as u8 % if bool { 2 } else { 60 }).collect();
        Tensor::from_bytes(dtype, &[100, 32], bytes)
    };
    use DataType::*;
    for dtype in [Float, Float16, Bfloat16, Double, Int8, Uint8, Int16, Uint16, Int32, Uint32, Int64, Bool] {
        let whole = lookup(bytes(dtype), Int64);
        let limit = whole.graph.body.initializers[0].1.byte_len() / 3;
        let split = split_buffers(&whole, limit).expect("split").0;
        let (wanted, found) = (run(&whole, &ids).expect("whole"), run(&split, &ids).expect("split"));
        agree(&dtype.to_string(), &wanted[0], &found[0]);
    }
    let mut words = bytes(Bool);
    words.dtype = String;
    words.data = ir::TensorData::Strings((0..3200).map(|at| format!("word {at}").into_bytes()).collect());
    for table in [bytes(Uint64), words] {
        let dtype = table.dtype.to_string();
        let error = split_buffers(&lookup(table, Int64), 1000).unwrap_err().to_string();
        assert!(error.contains("`table`") && error.contains(&dtype) && error.contains("--max-buffer"), "{error}");
    }
}

#[test]
fn weights_that_are_no_matrix_are_refused_by_name() {
    let product = |op: &str, weight: &[u64]| {
        let mut build = Builder::new(17);
        build.input("x", FLOAT, None);
        build.output("y", FLOAT);
        build.constant("w", floats(weight));
        let turned = build.node("Transpose", &["w"], &["t"], vec![]);
        let (second, reader) = if op == "Transpose" { ("t", Some(turned)) } else { ("w", None) };
        reader.into_iter().for_each(|node| build.push(node));
        let inputs = if op == "Gather" { ["w", "x"] } else { ["x", second] };
        let node = build.node(if op == "Gather" { op } else { "MatMul" }, &inputs, &["y"], vec![]);
        build.push(node);
        build.model
    };
    for (op, dims) in [
        ("MatMul", &[2048][..]),
        ("MatMul", &[2, 64, 64]),
        ("Gather", &[2048]),
        ("Gather", &[100, 4, 32]),
        ("Transpose", &[2, 64, 64]),
    ] {
        let error = split_buffers(&product(op, dims), 4000).unwrap_err().to_string();
        let axes = format!("{} axes instead of 2", dims.len());
        assert!(error.contains("`w`") && error.contains(op) && error.contains(&axes), "{op} {dims:?}: {error}");
        assert!(error.contains("--max-buffer"), "{error}");
    }
}

/// A body inside a node reads the transposed weight, or one product reads it as both factors.
#[test]
fn a_transposed_weight_with_another_reader_is_refused() {
    let mut build = Builder::new(17);
    build.output("y", FLOAT);
    build.constant("w", floats(&[64, 64]));
    let turned = build.node("Transpose", &["w"], &["t"], vec![]);
    build.push(turned);
    let square = build.node("MatMul", &["t", "t"], &["y"], vec![]);
    build.push(square.clone());
    assert!(split_buffers(&build.model, 4000).unwrap_err().to_string().contains("transposes it"));
    build.model.graph.body.nodes.pop();
    build.input("x", FLOAT, None);
    build.input("c", DataType::Bool, Some(&[]));
    let product = build.node("MatMul", &["x", "t"], &["z"], vec![]);
    build.push(product);
    let branch = |build: &mut Builder, name: &str| {
        let node = build.node("Add", &["z", "t"], &[name], vec![]);
        AttributeKind::Graph(build.body(&[], &[name], vec![node]))
    };
    let branches = vec![("then_branch", branch(&mut build, "a")), ("else_branch", branch(&mut build, "b"))];
    let node = build.node("If", &["c"], &["y"], branches);
    build.push(node);
    assert!(split_buffers(&build.model, 4000).unwrap_err().to_string().contains("transposes it"));
}

#[test]
fn constants_of_nodes_are_split_and_constants_of_bodies_are_refused_by_name() {
    let mut build = Builder::new(17);
    build.input("x", FLOAT, Some(&[-1, 32]));
    build.output("y", FLOAT);
    let weight = build.node("Constant", &[], &["w"], vec![("value", AttributeKind::Tensor(floats(&[32, 64])))]);
    build.push(weight);
    let product = build.node("MatMul", &["x", "w"], &["y"], vec![]);
    build.push(product);
    assert_eq!(large_constants(&build.model, 2000).len(), 1);
    let (split, names) = split_buffers(&build.model, 2000).expect("split");
    assert_eq!((names, large_constants(&split, 2000).len()), (vec!["w".to_string()], 0));
    let x = [("x", floats(&[3, 32]))];
    agree("constant", &run(&build.model, &x).expect("whole")[0], &run(&split, &x).expect("split")[0]);

    let mut build = Builder::new(17);
    build.input("x", FLOAT, Some(&[-1, 32]));
    build.input("c", DataType::Bool, Some(&[]));
    build.output("y", FLOAT);
    let branch = |build: &mut Builder, weight: &str, out: &str, inside: bool| {
        let product = build.node("MatMul", &["x", weight], &[out], vec![]);
        let constant = vec![("value", AttributeKind::Tensor(floats(&[32, 64])))];
        let constant = build.node("Constant", &[], &[weight], constant);
        let id = build.value(weight);
        let mut body = build.body(&[], &[out], if inside { vec![product] } else { vec![constant, product] });
        body.initializers.extend(inside.then(|| (id, floats(&[32, 64]))));
        AttributeKind::Graph(body)
    };
    let branches = vec![
        ("then_branch", branch(&mut build, "w1", "a", true)),
        ("else_branch", branch(&mut build, "w2", "b", false)),
    ];
    let mut node = build.node("If", &["c"], &["y"], branches);
    node.name = "choice".into();
    build.push(node);
    let large = large_constants(&build.model, 2000);
    assert!(large[0].0.contains("`w1` in node `choice` (If)"), "{large:?}");
    assert!(large[1].0.contains("`w2` (Constant) in node `choice` (If)"), "{large:?}");
    let error = split_buffers(&build.model, 2000).unwrap_err().to_string();
    assert!(error.contains("`w1`") && error.contains("choice") && error.contains("--max-buffer"), "{error}");
}

/// Scales that are listed before the packed weight, or are larger than it, are cut with it.
#[test]
fn scales_above_the_limit_are_cut_with_their_packed_weight() {
    let (k, n, block) = (640u64, 65u64, 16u64);
    let mut build = Builder::new(17);
    build.input("x", FLOAT, Some(&[-1, k as i64]));
    build.output("y", FLOAT);
    let packed: Vec<u8> = (0..n * k / 2).map(|at| (at * 37 % 256) as u8).collect();
    build.constant("scales", floats(&[n * k / block]));
    build.constant("packed", Tensor::from_bytes(DataType::Uint8, &[n, k / block, block / 2], packed));
    let numbers = [("K", k), ("N", n), ("bits", 4), ("block_size", block)];
    let numbers = numbers.map(|(name, number)| (name, AttributeKind::Int(number as i64)));
    let node = build.node("com.microsoft:MatMulNBits", &["x", "packed", "scales"], &["y"], numbers.into());
    build.push(node);
    let x = [("x", floats(&[3, k]))];
    for limit in [1000, 9000, 12_000] {
        let split = split_buffers(&build.model, limit).expect("split").0;
        assert!(large_constants(&split, limit).is_empty(), "{limit}");
        agree("packed", &run(&build.model, &x).expect("whole")[0], &run(&split, &x).expect("split")[0]);
    }
    let node = &mut build.model.graph.body.nodes[0];
    node.attributes[1].1 = AttributeKind::Int(64).into();
    let error = split_buffers(&build.model, 1000).unwrap_err().to_string();
    assert!(error.contains("`packed`") && error.contains("N 64"), "{error}");
}

#[test]
fn many_parts_are_quick_and_too_many_are_refused() {
    let whole = lookup(floats(&[20_000, 16]), DataType::Int64);
    let begun = Instant::now();
    let split = split_buffers(&whole, 64 * 20).expect("split").0;
    assert!(begun.elapsed().as_secs_f64() < 10.0, "{:?}", begun.elapsed());
    assert_eq!(split.graph.body.nodes.iter().filter(|node| node.op_type == "Gather").count(), 1000);
    let error = split_buffers(&whole, 64).unwrap_err().to_string();
    assert!(error.contains("20000 parts") && error.contains("1280 bytes"), "{error}");
    assert!(split_buffers(&whole, 1280).is_ok());
    // A model that is split already has names of parts.
    let whole = lookup(floats(&[100, 32]), DataType::Int64);
    let split = split_buffers(&whole, 4000).expect("split").0;
    let again = split_buffers(&split, 2000).expect("split again").0;
    let ids = [("ids", Tensor::from_i64(&[4], &[0, 99, -100, 77]))];
    assert_eq!(run(&whole, &ids).expect("whole")[0].bytes(), run(&again, &ids).expect("split")[0].bytes());
}

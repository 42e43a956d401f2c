//! Compiles and runs hand-made graphs.

#[path = "control_tests.rs"]
mod control;
#[path = "precision_tests.rs"]
mod precision;

use tch::{Kind, Tensor};

use crate::ir::{self, Attribute, AttributeKind, Body, DataType, Function, Model, Node, Value, ValueId, ValueType};

use super::*;

/// Builds graphs by name; an unknown name creates a value.
#[derive(Default)]
struct Builder {
    model: Model,
}

impl Builder {
    fn new() -> Self {
        let mut model = Model { ir_version: 10, ..Default::default() };
        model.opset_imports.insert(String::new(), 21);
        Builder { model }
    }

    fn value(&mut self, name: &str) -> ValueId {
        value_of(&mut self.model.graph, name)
    }

    fn input(mut self, name: &str, dtype: DataType) -> Self {
        let id = self.value(name);
        self.model.graph.values[id.index()].ty = Some(ValueType::Tensor { dtype, shape: None });
        self.model.graph.body.inputs.push(id);
        self
    }

    fn weight(mut self, name: &str, dims: &[u64], values: &[f32]) -> Self {
        let id = self.value(name);
        self.model.graph.body.initializers.push((id, ir::Tensor::from_f32(dims, values)));
        self
    }

    fn ints(mut self, name: &str, values: &[i64]) -> Self {
        let id = self.value(name);
        self.model.graph.body.initializers.push((id, ir::Tensor::from_i64(&[values.len() as u64], values)));
        self
    }

    fn node(mut self, op: &str, inputs: &[&str], outputs: &[&str]) -> Self {
        let node = node_of(&mut self.model.graph, op, inputs, outputs);
        self.model.graph.body.nodes.push(node);
        self
    }

    fn attribute(mut self, name: &str, kind: AttributeKind) -> Self {
        let node = self.model.graph.body.nodes.last_mut().expect("a node");
        node.attributes.push((name.into(), kind.into()));
        self
    }

    fn output(mut self, name: &str) -> Self {
        let id = self.value(name);
        self.model.graph.body.outputs.push(id);
        self
    }
}

fn value_of(graph: &mut ir::Graph, name: &str) -> ValueId {
    let known = graph.values.iter().position(|value| value.name == name);
    let ids: Vec<ValueId> =
        graph.body.inputs.iter().chain(graph.body.initializers.iter().map(|(id, _)| id)).copied().collect();
    let nodes = graph.body.nodes.iter().flat_map(|node| node.present_inputs().chain(node.present_outputs()));
    let known = known.and_then(|index| ids.into_iter().chain(nodes).find(|id| id.index() == index));
    known.unwrap_or_else(|| graph.add_value(Value { name: name.into(), ..Default::default() }))
}

fn node_of(graph: &mut ir::Graph, op: &str, inputs: &[&str], outputs: &[&str]) -> Node {
    let (domain, op_type) = op.split_once(':').unwrap_or(("", op));
    let mut ids = |names: &[&str]| names.iter().map(|name| (!name.is_empty()).then(|| value_of(graph, name))).collect();
    let (inputs, outputs) = (ids(inputs), ids(outputs));
    let name = format!("/{op_type}");
    Node { name, op_type: op_type.into(), domain: domain.into(), inputs, outputs, ..Default::default() }
}

fn vector(values: &[f32]) -> Tensor {
    Tensor::from_slice(values)
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().contiguous().reshape([-1])).expect("floats")
}

fn run(model: &Model, feeds: &[(&str, Tensor)]) -> crate::base::Result<Vec<Tensor>> {
    let program = Program::compile(model, &Options::default())?;
    let feeds: Vec<(ValueId, Tensor)> =
        feeds.iter().map(|(name, tensor)| (program.value(name).expect(name), tensor.shallow_clone())).collect();
    program.run(&feeds, program.outputs())
}

/// x * w + x in two nodes, with w trainable.
fn line() -> Builder {
    Builder::new()
        .input("x", DataType::Float)
        .weight("w", &[2], &[2.0, 3.0])
        .node("Mul", &["x", "w"], &["m"])
        .node("Add", &["m", "x"], &["y"])
        .output("y")
}

#[test]
fn every_missing_operator_is_listed_with_version_and_reason() {
    let model = line().node("Wonder", &["y"], &["a"]).node("Wonder", &["a"], &["b"]).node("GRU", &["b"], &["c"]).model;
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    for part in ["Wonder-21", "2 nodes, first node `/Wonder` (Wonder)", "GRU-21"] {
        assert!(error.contains(part), "`{part}` is not in: {error}");
    }
}

#[test]
fn a_domain_that_is_not_imported_is_refused() {
    let model = line().node("com.microsoft:QuickGelu", &["y"], &["z"]).model;
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    assert!(error.contains("imports no version of domain `com.microsoft`"), "{error}");
}

#[test]
fn an_opset_that_is_too_new_is_refused() {
    let mut model = line().model;
    model.opset_imports.insert(String::new(), 99);
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    assert!(error.contains("Mul-99: versions 7 to"), "{error}");
}

#[test]
fn an_unread_attribute_is_refused_by_name() {
    let model = line().attribute("axes_of_evil", AttributeKind::Int(1)).model;
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    assert!(error.contains("node `/Add` (Add)") && error.contains("`axes_of_evil`"), "{error}");
}

#[test]
fn only_nodes_of_the_requested_outputs_must_be_supported() {
    let builder = line().node("Wonder", &["y"], &["z"]).output("z");
    let mut builder = builder;
    let wanted = builder.value("y");
    let options = Options { outputs: Some(vec![wanted]), ..Default::default() };
    let program = Program::compile(&builder.model, &options).expect("the part up to y");
    let x = program.value("x").expect("x");
    let out = program.run(&[(x, vector(&[1.0, 1.0]))], &[wanted]).expect("run");
    assert_eq!(floats(&out[0]), [3.0, 4.0]);
}

#[test]
fn missing_and_wrong_inputs_are_named() {
    let model = line().model;
    let error = run(&model, &[]).expect_err("no input").to_string();
    assert!(error.contains("no value for `x`"), "{error}");
    let error = run(&model, &[("x", Tensor::from_slice(&[1i64, 2]))]).expect_err("integers").to_string();
    assert!(error.contains("input `x`") && error.contains("float32"), "{error}");
    let error = run(&model, &[("x", vector(&[1.0, 2.0, 3.0]))]).expect_err("length 3").to_string();
    assert!(error.contains("node `/Mul` (Mul)") && error.contains("[3]"), "{error}");
}

#[test]
fn gradients_reach_trainable_weights_only() {
    let mut builder = line().weight("frozen", &[1], &[5.0]).node("Mul", &["y", "frozen"], &["z"]);
    let weight = builder.value("w");
    builder.model.graph.body.outputs.clear();
    let model = builder.output("z").model;
    let options = Options { trainable: vec![weight], ..Default::default() };
    let program = Program::compile(&model, &options).expect("compile");
    let feeds = [(program.value("x").expect("x"), vector(&[1.0, 2.0]))];
    let z = program.run(&feeds, program.outputs()).expect("run");
    z[0].sum(Kind::Float).backward();
    let [parameter] = program.parameters() else { panic!("one parameter expected") };
    assert_eq!((parameter.name.as_str(), floats(&parameter.tensor.grad())), ("w", vec![5.0, 10.0]));
    // An in-place update by an optimiser is visible in the next run.
    let mut leaf = parameter.tensor.shallow_clone();
    tch::no_grad(|| leaf.copy_(&vector(&[0.0, 0.0])));
    assert_eq!(floats(&program.run(&feeds, program.outputs()).expect("run")[0]), [5.0, 10.0]);
}

#[test]
fn a_trainable_value_must_be_a_floating_point_initializer() {
    let mut builder = line().ints("numbers", &[1, 2]);
    for (name, message) in [("x", "not an initializer"), ("numbers", "type int64")] {
        let id = builder.value(name);
        let options = Options { trainable: vec![id], ..Default::default() };
        let error = Program::compile(&builder.model, &options).err().expect("refused").to_string();
        assert!(error.contains(name) && error.contains(message), "{error}");
    }
}

#[test]
fn half_precision_runs_and_trains_in_f32() {
    let mut builder = Builder::new().input("x", DataType::Float16);
    let id = builder.value("w");
    let bytes: Vec<u8> = [0.5f32, 0.25].iter().flat_map(|&v| half::f16::from_f32(v).to_le_bytes()).collect();
    builder.model.graph.body.initializers.push((id, ir::Tensor::from_bytes(DataType::Float16, &[2], bytes)));
    let mut model = builder.node("Mul", &["x", "w"], &["y"]).node("Cast", &["y"], &["z"]).output("z").model;
    let to = AttributeKind::Int(DataType::Float16 as i64);
    model.graph.body.nodes[1].attributes.push(("to".into(), to.into()));
    let program = Program::compile(&model, &Options { trainable: vec![id], ..Default::default() }).expect("compile");
    let run =
        |x: Tensor| program.run(&[(program.value("x").expect("x"), x)], program.outputs()).expect("run").remove(0);
    let z = run(vector(&[1.0, 2.0]).to_kind(Kind::Half));
    assert_eq!((z.kind(), floats(&z)), (Kind::Float, vec![0.5, 0.5]));
    z.sum(Kind::Float).backward();
    let leaf = &program.parameters()[0].tensor;
    assert_eq!((leaf.kind(), floats(&leaf.grad())), (Kind::Float, vec![1.0, 2.0]));
    // More digits than f16 has, and a number outside its range.
    assert_eq!(floats(&run(vector(&[1.0001, 1e6]))), [0.5 * 1.0001, 0.25e6]);
}

#[test]
fn a_run_in_two_pieces_equals_a_run_in_one() {
    let mut builder = line();
    let (x, m, y, w) = (builder.value("x"), builder.value("m"), builder.value("y"), builder.value("w"));
    let options = Options { trainable: vec![w], ..Default::default() };
    let program = Program::compile(&builder.model, &options).expect("compile");
    let input = vector(&[1.5, -2.0]);
    let whole = program.run(&[(x, input.shallow_clone())], &[y, m]).expect("whole");
    let middle = program.run(&[(x, input.shallow_clone())], &[m]).expect("first piece");
    let end = program.run(&[(x, input), (m, middle[0].shallow_clone())], &[y]).expect("second piece");
    assert_eq!(floats(&whole[0]), floats(&end[0]));
    end[0].sum(Kind::Float).backward();
    assert_eq!(floats(&program.parameters()[0].tensor.grad()), [1.5, -2.0]);
}

#[test]
fn values_cached_per_shape_are_right_for_every_shape() {
    // y = x reshaped by its own first dimension, plus a range of that length; everything else is shape arithmetic.
    let model = Builder::new()
        .input("x", DataType::Float)
        .ints("zero", &[0])
        .ints("minus", &[-1])
        .ints("axes", &[0])
        .node("Shape", &["x"], &["shape"])
        .node("Gather", &["shape", "zero"], &["rows"])
        .node("Concat", &["rows", "minus"], &["target"])
        .attribute("axis", AttributeKind::Int(0))
        .node("Reshape", &["x", "target"], &["flat"])
        .node("Squeeze", &["rows", "axes"], &["count"])
        .node("Squeeze", &["zero", "axes"], &["start"])
        .node("Squeeze", &["minus", "axes"], &["back"])
        .node("Neg", &["back"], &["step"])
        .node("Range", &["start", "count", "step"], &["range"])
        .node("Unsqueeze", &["range", "minus"], &["column"])
        .node("Cast", &["column"], &["numbers"])
        .attribute("to", AttributeKind::Int(1))
        .node("Add", &["flat", "numbers"], &["y"])
        .output("y")
        .model;
    let program = Program::compile(&model, &Options::default()).expect("compile");
    let x = program.value("x").expect("x");
    for _ in 0..2 {
        for (rows, columns) in [(2i64, 3i64), (3, 1), (1, 4)] {
            let input = Tensor::ones([rows, columns, 2], tch::kind::FLOAT_CPU);
            let out = program.run(&[(x, input)], program.outputs()).expect("run");
            assert_eq!(out[0].size(), [rows, 2 * columns]);
            assert_eq!(out[0].double_value(&[rows - 1, 0]), rows as f64);
        }
    }
}

#[test]
fn a_function_without_a_row_is_inlined() {
    let mut function = Function { name: "Scaled".into(), domain: "mine".into(), ..Default::default() };
    function.opset_imports.insert(String::new(), 21);
    function.attribute_defaults.push(("offset".into(), AttributeKind::Float(1.0).into()));
    function.attributes.push("factor".into());
    let graph = &mut function.graph;
    let (a, missing) = (value_of(graph, "a"), value_of(graph, "missing"));
    graph.body.inputs = vec![a, missing];
    for (name, attribute) in [("f", "factor"), ("o", "offset")] {
        let mut constant = node_of(graph, "Constant", &[], &[name]);
        let reference = AttributeKind::Reference { name: attribute.into(), type_number: 1 };
        constant.attributes.push(("value_float".into(), Attribute::from(reference)));
        graph.body.nodes.push(constant);
    }
    for (op, inputs, output) in [("Mul", ["a", "f"], "b"), ("Add", ["b", "o"], "c")] {
        let node = node_of(graph, op, &inputs, &[output]);
        graph.body.nodes.push(node);
    }
    let c = value_of(graph, "c");
    graph.body.outputs = vec![c];
    let mut builder = Builder::new().input("x", DataType::Float);
    builder.model.opset_imports.insert("mine".into(), 1);
    builder.model.functions.push(function);
    let builder = builder.node("mine:Scaled", &["x"], &["y"]).attribute("factor", AttributeKind::Float(3.0));
    let builder = builder.node("mine:Scaled", &["y"], &["z"]).attribute("factor", AttributeKind::Float(2.0));
    let model = builder.attribute("offset", AttributeKind::Float(-1.0)).output("z").model;
    let z = run(&model, &[("x", vector(&[1.0, 2.0]))]).expect("run");
    assert_eq!(floats(&z[0]), [7.0, 13.0]);
}

#[test]
fn a_function_that_calls_itself_is_refused() {
    let mut function = Function { name: "Loop".into(), domain: "mine".into(), ..Default::default() };
    function.opset_imports.insert("mine".into(), 1);
    let a = value_of(&mut function.graph, "a");
    function.graph.body.inputs = vec![a];
    let node = node_of(&mut function.graph, "mine:Loop", &["a"], &["b"]);
    function.graph.body.nodes.push(node);
    let b = value_of(&mut function.graph, "b");
    function.graph.body.outputs = vec![b];
    let mut builder = Builder::new().input("x", DataType::Float);
    builder.model.opset_imports.insert("mine".into(), 1);
    builder.model.functions.push(function);
    let model = builder.node("mine:Loop", &["x"], &["y"]).output("y").model;
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    assert!(error.contains("nest deeper than"), "{error}");
}

#[test]
fn writing_to_a_result_does_not_change_the_program() {
    let model = Builder::new().weight("w", &[2], &[1.0, 2.0]).node("Identity", &["w"], &["y"]).output("y").model;
    let program = Program::compile(&model, &Options::default()).expect("compile");
    let mut first = program.run(&[], program.outputs()).expect("run");
    let _ = first[0].fill_(9.0);
    assert_eq!(floats(&program.run(&[], program.outputs()).expect("run")[0]), [1.0, 2.0]);
}

#[test]
fn matrix_products_run_in_the_autocast_kind() {
    let mut builder = Builder::new().input("x", DataType::Float).weight("w", &[2, 2], &[1.0, 2.0, 3.0, 4.0]);
    let weight = builder.value("w");
    let model = builder.node("MatMul", &["x", "w"], &["y"]).output("y").model;
    let options = Options { trainable: vec![weight], autocast: Some(Kind::BFloat16), ..Default::default() };
    let program = Program::compile(&model, &options).expect("compile");
    let feeds = [(program.value("x").expect("x"), vector(&[1.0, 1.0]).reshape([1, 2]))];
    let y = program.run(&feeds, program.outputs()).expect("run");
    assert_eq!(y[0].kind(), Kind::BFloat16);
    y[0].sum(Kind::Float).backward();
    assert_eq!(program.parameters()[0].tensor.grad().kind(), Kind::Float);
}

/// A stream that enters in the autocast kind leaves in it, with every value in between, and weights of both sorts have
/// gradients in f32.
#[test]
fn a_stream_in_the_autocast_kind_keeps_it() {
    let mut builder = Builder::new()
        .input("x", DataType::Float)
        .weight("scale", &[2], &[1.5, 0.75])
        .weight("w", &[2, 2], &[1.0, 2.0, 3.0, -4.0])
        .weight("v", &[2, 2], &[0.5, -1.0, 2.0, 1.0]);
    let trainable = ["scale", "w"].map(|name| builder.value(name)).to_vec();
    let model = builder
        .node("SimplifiedLayerNormalization", &["x", "scale"], &["normal"])
        .node("MatMul", &["normal", "w"], &["gate"])
        .node("Sigmoid", &["gate"], &["open"])
        .node("Mul", &["gate", "open"], &["inner"])
        .node("MatMul", &["inner", "v"], &["down"])
        .node("Add", &["x", "down"], &["y"])
        .output("y")
        .model;
    let run = |autocast: Option<Kind>| {
        let options = Options { trainable: trainable.clone(), autocast, ..Default::default() };
        let program = Program::compile(&model, &options).expect("compile");
        let x = vector(&[0.3, -1.7, 2.2, 0.9]).reshape([2, 2]);
        let feeds = [(program.value("x").expect("x"), x.to_kind(autocast.unwrap_or(Kind::Float)))];
        let names = ["normal", "gate", "inner", "down", "y"];
        let ids: Vec<_> = names.iter().map(|name| program.value(name).expect("value")).collect();
        let values = program.run(&feeds, &ids).expect("run");
        values[4].to_kind(Kind::Float).square().sum(Kind::Float).backward();
        let gradients: Vec<Tensor> = program.parameters().iter().map(|weight| weight.tensor.grad()).collect();
        (values, gradients)
    };
    let (exact, low) = (run(None), run(Some(Kind::BFloat16)));
    assert!(low.0.iter().all(|value| value.kind() == Kind::BFloat16));
    assert!(low.1.iter().all(|gradient| gradient.kind() == Kind::Float));
    for (exact, low) in exact.0.iter().chain(&exact.1).zip(low.0.iter().chain(&low.1)) {
        let apart = (exact - low.to_kind(Kind::Float)).norm().double_value(&[]);
        assert!(apart <= 0.02 * exact.norm().double_value(&[]), "{exact} {low}");
    }
}

/// A frozen weight is converted to the autocast kind once and keeps its precision for other readers.
#[test]
fn frozen_weights_keep_their_precision_outside_matrix_products() {
    let values = [1.001, 2.002, 3.003, 4.004];
    let model = Builder::new()
        .input("x", DataType::Float)
        .weight("w", &[2, 2], &values)
        .node("Transpose", &["w"], &["t"])
        .node("MatMul", &["x", "w"], &["y"])
        .node("MatMul", &["x", "t"], &["z"])
        .node("Add", &["x", "w"], &["sum"])
        .output("y")
        .output("z")
        .output("sum")
        .model;
    let options = Options { autocast: Some(Kind::BFloat16), ..Default::default() };
    let x = vector(&[1.003, 1.005, 0.001, 3.0]).reshape([2, 2]);
    let (exact, low) = (vector(&values).reshape([2, 2]), |x: &Tensor| x.to_kind(Kind::BFloat16));
    let wanted = [
        ("y", low(&x).matmul(&low(&exact))),
        ("z", low(&x).matmul(&low(&exact.tr()))),
        ("sum", &x + &exact),
        ("w", exact.shallow_clone()),
        ("t", exact.tr()),
    ];
    assert!(low(&exact).to_kind(Kind::Float) != exact, "these values must not be representable in bf16");
    // Orders of reading the weight in one type, in the other and in both.
    for order in [[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]] {
        let program = Program::compile(&model, &options).expect("compile");
        let feeds = [(program.value("x").expect("x"), x.shallow_clone())];
        let run = |places: &[usize]| {
            let ids: Vec<_> = places.iter().map(|&place| program.value(wanted[place].0).expect("value")).collect();
            let results = program.run(&feeds, &ids).expect("run");
            assert_eq!(results.len(), places.len());
            for (&place, found) in places.iter().zip(results) {
                let (name, expected) = &wanted[place];
                assert_eq!((found.kind(), &found), (expected.kind(), expected), "{name}");
            }
        };
        order.iter().for_each(|&place| run(&[place]));
        run(&order);
        order.iter().for_each(|&place| run(&[place]));
    }
}

#[test]
fn the_support_table_has_a_line_per_row() {
    let table = support_table();
    let of_files = operators().iter().filter(|row| row.domain != crate::rewrite::INTERNAL_DOMAIN);
    assert_eq!(table.lines().count(), of_files.count() + 2);
    assert!(table.contains("| com.microsoft | GroupQueryAttention | 1 | yes |"), "{table}");
}

#[test]
fn rows_of_one_operator_do_not_overlap() {
    for pair in operators().windows(2) {
        if (pair[0].domain, pair[0].op_type) == (pair[1].domain, pair[1].op_type) {
            assert!(pair[0].until < pair[1].since, "{} twice", pair[0].op_type);
        }
    }
}

#[test]
fn tensors_round_trip_through_the_graph() {
    let values = Tensor::from_slice(&[1.5f32, -2.0, 0.25]);
    for dtype in [DataType::Float, DataType::Float16, DataType::Bfloat16, DataType::Double] {
        let stored = tensor_to_ir("w", &values, dtype).expect("to the graph");
        assert_eq!((stored.dtype, stored.dims.as_slice()), (dtype, [3u64].as_slice()));
        assert_eq!(floats(&tensor_from_ir("w", &stored).expect("back").to_kind(Kind::Float)), [1.5, -2.0, 0.25]);
    }
    let nibbles = ir::Tensor::from_bytes(DataType::Int4, &[3], vec![0x8f, 0x07]);
    let unpacked = tensor_from_ir("w", &nibbles).expect("int4");
    assert_eq!(Vec::<i8>::try_from(unpacked).expect("bytes"), [-1, -8, 7]);
}

#[test]
fn short_weights_and_unknown_types_are_refused() {
    for (tensor, message) in [
        (ir::Tensor::from_bytes(DataType::Float, &[4], vec![0u8; 12]), "12 bytes do not fill"),
        (ir::Tensor::from_bytes(DataType::Uint64, &[1], vec![0u8; 8]), "no element type for uint64"),
        (ir::Tensor::from_bytes(DataType::Float, &[1 << 40, 1 << 40], Vec::new()), "do not fill"),
        (ir::Tensor::from_bytes(DataType::Float, &[u64::MAX], Vec::new()), "out of range"),
    ] {
        let error = tensor_from_ir("w", &tensor).expect_err("refused").to_string();
        assert!(error.contains(message), "{error}");
    }
}

/// Attributes and operands that overflow, divide by zero or request absurd amounts of memory.
#[test]
fn absurd_attributes_and_operands_are_errors() {
    let int = |value: i64| AttributeKind::Int(value);
    let ints = |values: &[i64]| AttributeKind::Ints(values.to_vec());
    let wide = || Tensor::ones([1, 4, 2, 2], tch::kind::FLOAT_CPU);
    // Messages of LibTorch differ between its versions, so only their origin is checked.
    let torch = "LibTorch: ";
    type Absurd = (&'static str, i64, &'static [i64], Vec<(&'static str, AttributeKind)>, &'static str);
    let cases: Vec<Absurd> = vec![
        (
            "Pad",
            21,
            &[i64::MIN, 0, 0, 0, 0, 0, 0, i64::MIN],
            vec![],
            "pads of -9223372036854775808 and 0 are out of range",
        ),
        ("Reshape", 21, &[i64::MAX, i64::MAX, -1, 0], vec![("allowzero", int(1))], torch),
        ("Expand", 21, &[i64::MAX, 4, 2, 2], vec![], "shape [9223372036854775807, 4, 2, 2] is not possible"),
        ("Tile", 21, &[i64::MAX, i64::MAX, 1, 1], vec![], torch),
        ("Unsqueeze", 21, &[i64::MAX], vec![], "axis 9223372036854775807 is outside rank 5"),
        ("ReduceSum", 21, &[i64::MIN], vec![], "axis -9223372036854775808 is outside rank 4"),
        ("DepthToSpace", 21, &[], vec![("blocksize", int(1 << 62))], "attribute `blocksize` is 4611686018427387904"),
        ("DepthToSpace", 21, &[], vec![("blocksize", int(0))], "attribute `blocksize` is 0"),
        ("SpaceToDepth", 21, &[], vec![("blocksize", int(-2))], "attribute `blocksize` is -2"),
        ("Split", 13, &[i64::MAX, i64::MAX], vec![], "do not split an axis of 1 into 1"),
        ("GlobalAveragePool", 21, &[1], vec![("unknown", int(0))], "attribute `unknown` is not known"),
        (
            "AveragePool",
            21,
            &[],
            vec![
                ("kernel_shape", ints(&[i64::MAX, i64::MAX])),
                ("auto_pad", AttributeKind::String(b"SAME_UPPER".to_vec())),
            ],
            "attribute `kernel_shape` is out of range",
        ),
        (
            "MaxPool",
            21,
            &[],
            vec![("kernel_shape", ints(&[1, 1])), ("strides", ints(&[0, 0])), ("ceil_mode", int(1))],
            torch,
        ),
        ("MaxPool", 21, &[], vec![], "attribute `kernel_shape` is missing"),
        ("Softmax", 21, &[], vec![("axis", int(i64::MIN))], "axis -9223372036854775808 is outside rank 4"),
        ("Transpose", 21, &[], vec![("perm", ints(&[0, 0, 0, 0]))], torch),
        ("Transpose", 21, &[], vec![("perm", ints(&[0]))], "attribute `perm` has 1 axes, the input 4"),
        ("Cast", 21, &[], vec![("to", int(i64::MAX))], "element type 9223372036854775807 is not known"),
        ("Cast", 21, &[], vec![("to", AttributeKind::Float(1.0))], "attribute `to` is not an integer"),
    ];
    for (op, version, operand, attributes, want) in cases {
        let mut builder = Builder::new().input("x", DataType::Float).ints("n", operand);
        builder.model.opset_imports.insert(String::new(), version);
        let inputs: &[&str] = if operand.is_empty() { &["x"] } else { &["x", "n"] };
        let mut builder = builder.node(op, inputs, &["y"]);
        for (name, kind) in &attributes {
            builder = builder.attribute(name, kind.clone());
        }
        let error = run(&builder.output("y").model, &[("x", wide())]).expect_err(op).to_string();
        for part in [format!("node `/{op}` ({op})"), want.to_string()] {
            assert!(error.contains(&part), "{op} {operand:?} {attributes:?}: `{part}` is not in: {error}");
        }
    }
}

#[test]
fn functions_that_expand_exponentially_are_refused() {
    let mut builder = Builder::new().input("x", DataType::Float);
    builder.model.opset_imports.insert("mine".into(), 1);
    for level in 0..40 {
        let mut function = Function { name: format!("F{level}"), domain: "mine".into(), ..Default::default() };
        function.opset_imports.insert("mine".into(), 1);
        function.opset_imports.insert(String::new(), 21);
        let graph = &mut function.graph;
        let a = value_of(graph, "a");
        graph.body.inputs = vec![a];
        let inner = if level == 39 { "Neg".to_string() } else { format!("mine:F{}", level + 1) };
        for (from, to) in [("a", "b"), ("b", "c")] {
            let node = node_of(graph, &inner, &[from], &[to]);
            graph.body.nodes.push(node);
        }
        let c = value_of(graph, "c");
        graph.body.outputs = vec![c];
        builder.model.functions.push(function);
    }
    let model = builder.node("mine:F0", &["x"], &["y"]).output("y").model;
    let error = Program::compile(&model, &Options::default()).err().expect("refused").to_string();
    assert!(error.contains("expand to more than"), "{error}");
}

#[test]
fn a_program_can_move_to_another_thread() {
    let program = Program::compile(&line().model, &Options::default()).expect("compile");
    let worker = std::thread::spawn(move || {
        let feeds = [(program.value("x").expect("x"), vector(&[1.0, 1.0]))];
        floats(&program.run(&feeds, program.outputs()).expect("run")[0])
    });
    assert_eq!(worker.join().expect("worker"), [3.0, 4.0]);
}

//! Bodies of `If`, `Loop` and `Scan`.

use super::*;

/// A loop body or branch of one node that reads values of the outer graph.
fn body_of(graph: &mut ir::Graph, op: &str, inputs: &[&str], output: &str) -> Body {
    let node = node_of(graph, op, inputs, &[output]);
    let outputs = node.outputs.iter().flatten().copied().collect();
    Body { nodes: vec![node], outputs, ..Default::default() }
}

#[test]
fn branches_see_outer_values_and_pass_gradients() {
    let mut builder = line().input("flag", DataType::Bool);
    let weight = builder.value("w");
    let then_body = body_of(&mut builder.model.graph, "Mul", &["y", "w"], "then");
    let else_body = body_of(&mut builder.model.graph, "Neg", &["y"], "else");
    builder.model.graph.body.outputs.clear();
    let model = builder
        .node("If", &["flag"], &["z"])
        .attribute("then_branch", AttributeKind::Graph(then_body))
        .attribute("else_branch", AttributeKind::Graph(else_body))
        .output("z")
        .model;
    let program =
        Program::compile(&model, &Options { trainable: vec![weight], ..Default::default() }).expect("compile");
    let (x, flag) = (program.value("x").expect("x"), program.value("flag").expect("flag"));
    for (on, expected, slope) in [(true, [6.0, 12.0], [5.0, 7.0]), (false, [-3.0, -4.0], [-1.0, -1.0])] {
        let condition = Tensor::from_slice(&[on]).reshape([0i64; 0]);
        let z = program.run(&[(x, vector(&[1.0, 1.0])), (flag, condition)], program.outputs()).expect("run");
        assert_eq!(floats(&z[0]), expected);
        let mut leaf = program.parameters()[0].tensor.shallow_clone();
        leaf.zero_grad();
        z[0].sum(Kind::Float).backward();
        assert_eq!(floats(&leaf.grad()), slope);
    }
}

#[test]
fn loops_carry_state_and_collect_scan_outputs() {
    let mut builder = Builder::new().input("x", DataType::Float).input("trips", DataType::Int64);
    let graph = &mut builder.model.graph;
    let inputs: Vec<ValueId> = ["i", "going", "carried"].iter().map(|name| value_of(graph, name)).collect();
    let mut nodes = vec![
        node_of(graph, "Identity", &["going"], &["on"]),
        node_of(graph, "Add", &["carried", "x"], &["next"]),
        node_of(graph, "Neg", &["next"], &["seen"]),
    ];
    // The builder finds names among a graph's own nodes only, so the test sets the body's values directly.
    nodes[0].inputs = vec![Some(inputs[1])];
    nodes[1].inputs[0] = Some(inputs[2]);
    nodes[2].inputs = vec![nodes[1].outputs[0]];
    let outputs = [&nodes[0], &nodes[1], &nodes[2]].iter().filter_map(|node| node.outputs[0]).collect();
    let body = Body { inputs, nodes, outputs, ..Default::default() };
    let model = builder
        .node("Loop", &["trips", "", "x"], &["last", "all"])
        .attribute("body", AttributeKind::Graph(body))
        .output("last")
        .output("all")
        .model;
    let trips = Tensor::from(3i64);
    let out = run(&model, &[("x", vector(&[1.0, 2.0])), ("trips", trips)]).expect("run");
    assert_eq!(floats(&out[0]), [4.0, 8.0]);
    assert_eq!((out[1].size(), floats(&out[1])), (vec![3, 2], vec![-2.0, -4.0, -3.0, -6.0, -4.0, -8.0]));
}

/// A loop without a condition, neither a value nor an empty name, whose body reads a value from outside.
#[test]
fn a_loop_of_one_input_takes_no_outer_value_for_its_condition() {
    let mut builder = Builder::new().input("x", DataType::Float).input("trips", DataType::Int64);
    let graph = &mut builder.model.graph;
    let inputs: Vec<ValueId> = ["i", "going"].iter().map(|name| value_of(graph, name)).collect();
    let mut nodes = vec![node_of(graph, "Identity", &["going"], &["go_on"]), node_of(graph, "Neg", &["x"], &["seen"])];
    nodes[0].inputs = vec![Some(inputs[1])];
    let outputs = nodes.iter().filter_map(|node| node.outputs[0]).collect();
    let body = Body { inputs, nodes, outputs, ..Default::default() };
    let model =
        builder.node("Loop", &["trips"], &["all"]).attribute("body", AttributeKind::Graph(body)).output("all").model;
    let out = run(&model, &[("x", vector(&[0.0, 2.0])), ("trips", Tensor::from(2i64))]).expect("run");
    assert_eq!((out[0].size(), floats(&out[0])), (vec![2, 2], vec![0.0, -2.0, 0.0, -2.0]));
}

#[test]
fn scans_read_slices_and_carry_state() {
    let mut builder = Builder::new().input("start", DataType::Float).input("rows", DataType::Float);
    let graph = &mut builder.model.graph;
    let inputs: Vec<ValueId> = ["carried", "row"].iter().map(|name| value_of(graph, name)).collect();
    let mut nodes =
        vec![node_of(graph, "Add", &["carried", "row"], &["next"]), node_of(graph, "Neg", &["next"], &["seen"])];
    nodes[0].inputs = inputs.iter().copied().map(Some).collect();
    nodes[1].inputs = vec![nodes[0].outputs[0]];
    let outputs = nodes.iter().filter_map(|node| node.outputs[0]).collect();
    let body = Body { inputs, nodes, outputs, ..Default::default() };
    let model = builder
        .node("Scan", &["start", "rows"], &["last", "all"])
        .attribute("body", AttributeKind::Graph(body))
        .attribute("num_scan_inputs", AttributeKind::Int(1))
        .attribute("scan_input_axes", AttributeKind::Ints(vec![1]))
        .attribute("scan_input_directions", AttributeKind::Ints(vec![1]))
        .attribute("scan_output_axes", AttributeKind::Ints(vec![-1]))
        .output("last")
        .output("all")
        .model;
    let rows = vector(&[1.0, 2.0, 3.0, 10.0, 20.0, 30.0]).reshape([2, 3]);
    let out = run(&model, &[("start", vector(&[0.5, 0.0])), ("rows", rows)]).expect("run");
    // Columns from the last to the first: 3, 2, 1 and 30, 20, 10.
    assert_eq!(floats(&out[0]), [6.5, 60.0]);
    assert_eq!((out[1].size(), floats(&out[1])), (vec![2, 3], vec![-3.5, -5.5, -6.5, -30.0, -50.0, -60.0]));
}

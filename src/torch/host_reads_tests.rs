//! The account of what a program on a GPU reads on the host.

use std::collections::HashMap;

use super::*;
use crate::ir::{AttributeKind, Body};

/// A graph under construction; its values are found by name.
#[derive(Default)]
struct Net(Model, HashMap<String, ValueId>);

impl Net {
    fn value(&mut self, name: &str) -> ValueId {
        let graph = &mut self.0.graph;
        let add = || graph.add_value(ir::Value { name: name.into(), ..Default::default() });
        *self.1.entry(name.to_string()).or_insert_with(add)
    }

    fn ints(mut self, name: &str, values: &[i64]) -> Self {
        let id = self.value(name);
        self.0.graph.body.initializers.push((id, ir::Tensor::from_i64(&[values.len() as u64], values)));
        self
    }

    /// `a:Op(b, c)` as a node without attributes.
    fn read(&mut self, line: &str) -> ir::Node {
        let (outputs, call) = line.split_once(':').unwrap();
        let (op, inputs) = call.trim_end_matches(')').split_once('(').unwrap();
        let named = |net: &mut Net, list: &str| -> Vec<Option<ValueId>> {
            let names = list.split(',').map(str::trim);
            names.map(|name| (!name.is_empty()).then(|| net.value(name))).collect()
        };
        let (inputs, outputs) = (named(self, inputs), named(self, outputs));
        let (domain, op) = op.split_once('.').unwrap_or(("", op));
        let domain = if domain.is_empty() { "" } else { "com.microsoft" };
        let mut node = ir::Node { domain: domain.into(), op_type: op.into(), inputs, outputs, ..Default::default() };
        if op == "Cast" {
            node.attributes.push(("to".into(), AttributeKind::Int(ir::DataType::Int64 as i64).into()));
        }
        node
    }

    fn body(&mut self, inputs: &str, lines: &[&str], outputs: &str) -> Body {
        let [inputs, outputs] = [inputs, outputs].map(|list| list.split_whitespace().collect::<Vec<_>>());
        let [inputs, outputs] = [inputs, outputs].map(|list| list.into_iter().map(|name| self.value(name)).collect());
        let nodes = lines.iter().map(|line| self.read(line)).collect();
        Body { inputs, nodes, outputs, ..Default::default() }
    }

    fn node(mut self, line: &str, attributes: Vec<(&str, AttributeKind)>) -> Self {
        let mut node = self.read(line);
        node.attributes.extend(attributes.into_iter().map(|(name, kind)| (name.into(), kind.into())));
        self.0.graph.body.nodes.push(node);
        self
    }

    fn program(mut self, inputs: &str, outputs: &str) -> Program {
        self.0.ir_version = 10;
        self.0.opset_imports.extend([(String::new(), 21), ("com.microsoft".into(), 1)]);
        let [inputs, outputs] = [inputs, outputs].map(|list| list.split_whitespace().collect::<Vec<_>>());
        let [inputs, outputs] = [inputs, outputs].map(|list| list.into_iter().map(|name| self.value(name)).collect());
        (self.0.graph.body.inputs, self.0.graph.body.outputs) = (inputs, outputs);
        Program::compile(&self.0, &Options::default()).expect("compile")
    }
}

fn copied(program: &Program) -> Vec<String> {
    let mut names: Vec<String> = program.host_reads(|_| false).1.into_iter().map(str::to_string).collect();
    names.sort();
    names
}

/// A loop over a row of the stream, which returns `next`; the condition is computed by `lines` as `goes_on`.
fn loop_with(lines: &[&str]) -> Program {
    let mut net = Net::default().ints("trips", &[3]).ints("two", &[2]).ints("zero", &[0]);
    let body = net.body("turn going row", &[lines, &["next:Neg(row)"]].concat(), "goes_on next");
    let net = net.node("length:Shape(x)", vec![]).node("limit:Mul(length, two)", vec![]);
    net.node("y:Loop(trips, , x)", vec![("body", AttributeKind::Graph(body))]).program("x", "y")
}

#[test]
fn a_loop_waits_for_a_condition_that_is_computed_from_the_stream() {
    let free: [&[&str]; 3] = [
        &["goes_on:Identity(going)"],
        &["less:Less(turn, two)", "goes_on:And(less, going)"],
        // `limit` is computed from a shape, in front of the loop.
        &["less:Less(turn, limit)", "goes_on:And(less, going)"],
    ];
    for lines in free {
        let program = loop_with(lines);
        assert_eq!(copied(&program), Vec::<String>::new(), "{lines:?}");
        // Values from which a body computes on the host stay there when they are cached between runs.
        let id = program.value("limit").unwrap();
        assert_eq!(program.kept.contains(&id.index()), lines[0].contains("limit"), "{lines:?}");
        let x = (program.inputs()[0], Tensor::from_slice(&[1f32, 2.0]));
        let out = program.run(&[x], program.outputs()).expect("run");
        assert_eq!(Vec::<f32>::try_from(&out[0]).unwrap(), [-1.0, -2.0]);
    }
    let computed = ["sum:ReduceSum(row)", "whole:Cast(sum)", "less:Less(whole, two)", "goes_on:And(less, going)"];
    assert_eq!(copied(&loop_with(&computed)), ["goes_on"]);
}

/// Repeats the stream in each turn by a number that `lines` compute as `by`.
fn repeats(lines: &[&str], more: &str) -> Program {
    let mut net = Net::default().ints("trips", &[2]).ints("one", &[1]).ints("zero", &[0]);
    let lines = [lines, &["wide:Expand(x, by)", "goes_on:Identity(going)"]].concat();
    let body =
        net.body(&format!("turn going {more}"), &lines, &format!("goes_on {} wide", more.replace("by", "after")));
    let net = net.node("count:ReduceSum(mask, zero)", vec![]);
    let (inputs, outputs) = if more.is_empty() { ("trips", "y") } else { ("trips, , one", "last, y") };
    net.node(&format!("{outputs}:Loop({inputs})"), vec![("body", AttributeKind::Graph(body))]).program("x mask", "y")
}

#[test]
fn what_a_body_computes_from_the_stream_and_reads_on_the_host_is_named() {
    // Shapes are on the host by themselves.
    assert_eq!(copied(&repeats(&["by:Shape(x)"], "")), Vec::<String>::new());
    let sum = ["sum:ReduceSum(x, zero)", "by:Cast(sum)"];
    assert_eq!(copied(&repeats(&sum, "")), ["by"]);
    // From a value outside that no operator reads on the host itself, so it is not computed ahead.
    let longer = repeats(&["by:Add(count, one)"], "");
    let mask = longer.value("mask").unwrap();
    assert_eq!(longer.host_reads(|id| id == mask), (vec![], vec!["by"]));
    // The first turn receives a constant, the second one what the first one computes, or passes on.
    let changed = ["sum:ReduceSum(x, zero)", "after:Cast(sum)"];
    assert_eq!(copied(&repeats(&changed, "by")), ["by"]);
    assert_eq!(copied(&repeats(&["after:Add(by, one)"], "by")), Vec::<String>::new());
    assert_eq!(copied(&repeats(&["after:Add(turn, by)"], "by")), Vec::<String>::new());
}

#[test]
fn branches_and_scans_are_looked_into() {
    let mut net = Net::default().ints("zero", &[0]);
    let counted = net.body("", &["places:NonZero(x)", "size:Shape(places)"], "size");
    let fixed = net.body("", &["shape:Shape(x)", "size2:Mul(shape, shape)"], "size2");
    let branches = vec![("then_branch", AttributeKind::Graph(counted)), ("else_branch", AttributeKind::Graph(fixed))];
    let net = net.node("size3:If(flag)", branches).node("y:Expand(x, size3)", vec![]);
    // `NonZero` reads the stream itself; both branches give a shape.
    assert_eq!(copied(&net.program("x flag", "y")), ["flag", "x"]);

    for (line, found) in [("by:Shape(row)", &[][..]), ("by:Cast(row)", &["by"])] {
        let mut net = Net::default();
        let inner = net.body("", &[line, "wide:Expand(row, by)"], "wide");
        let other = net.body("", &["same:Identity(row)"], "same");
        let mut body = net.body("state row", &["kept:Identity(state)"], "kept out");
        let mut choice = net.read("out:If(flag)");
        let branches = [("then_branch", inner), ("else_branch", other)];
        choice.attributes.extend(branches.map(|(name, body)| (name.into(), AttributeKind::Graph(body).into())));
        body.nodes.push(choice);
        let attributes = vec![("body", AttributeKind::Graph(body)), ("num_scan_inputs", AttributeKind::Int(1))];
        let net = net.node("last, y:Scan(begin, x)", attributes);
        let expected: Vec<&str> = found.iter().chain(&["flag"]).copied().collect();
        assert_eq!(copied(&net.program("begin x flag", "y")), expected, "{line}");
    }
}

#[test]
fn operators_that_read_numbers_of_their_own_are_named() {
    let weights = "x, router, first, , second";
    let mixture = |net: Net| net.program("x router first second", "y");
    assert_eq!(copied(&mixture(Net::default().node(&format!("y:ms.MoE({weights})"), vec![]))), ["y"]);
    let mut net = Net::default().ints("trips", &[2]);
    let lines = [format!("mixed:ms.MoE({weights})"), "goes_on:Identity(going)".into()];
    let body = net.body("turn going", &lines.each_ref().map(String::as_str), "goes_on mixed");
    let net = net.node("y:Loop(trips)", vec![("body", AttributeKind::Graph(body))]);
    assert_eq!(copied(&mixture(net)), ["mixed"]);
}

/// The graph that chooses a picture's tokens has a loop in a loop, whose lengths come from the numbers of tokens.
#[test]
fn the_loops_of_a_token_pruner_wait_for_lengths_and_not_for_conditions() {
    let model = crate::rewrite::token_pruner(0.5, ir::DataType::Float).unwrap();
    let program = Program::compile(&model, &Options::default()).expect("compile");
    let names = copied(&program);
    // What `NonZero` reads, and numbers of tokens.
    let read = ["image_mask", "pivot_mask", "scatterelements_2"];
    let lengths = ["add", "div_2", "gather_7", "min_1", "reshape_1", "step_2"];
    let mut expected = [&read[..], &lengths].concat();
    expected.sort_unstable();
    assert_eq!(names, expected);
}

//! Sizes of what the bodies of `If`, `Loop` and `Scan` compute. A value of a body cannot be an output of the graph, but its number
//! of elements can: a branch gives it out, or 0 where the other one is taken; of a loop's iterations the most count.

use std::collections::HashMap;

use crate::ir::{
    AttributeKind, Body, DataType, FreshNames, Graph, Model, Node, Tensor, Value, ValueId, ValueType, element_types,
};

/// Operators whose results are no tensors.
const NO_TENSORS: &[&str] = &[
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceInsert",
    "SequenceErase",
    "SequenceMap",
    "SplitToSequence",
    "Optional",
];

/// The values that the nodes of a body compute, with their operators.
pub(super) fn computed(graph: &Graph, body: &Body) -> Vec<(ValueId, String)> {
    let is_shown = |node: &&Node| node.op_type != "Constant" && !NO_TENSORS.contains(&node.op_type.as_str());
    let nodes = body.nodes.iter().filter(is_shown);
    let values = nodes.flat_map(|node| node.outputs.iter().flatten().map(move |id| (*id, node.op_type.clone())));
    values.filter(|(id, _)| matches!(graph.value(*id).ty, None | Some(ValueType::Tensor { .. }))).collect()
}

/// A value inside a body.
pub(super) struct Counted {
    /// As messages show it.
    pub name: String,
    /// Its element type.
    pub dtype: DataType,
    /// Output of the graph with the most elements that it has in a run, an int64 scalar.
    pub output: String,
}

/// The values inside a graph's bodies.
#[derive(Default)]
pub(super) struct Inside {
    /// Those whose elements are counted.
    pub counted: Vec<Counted>,
    /// The others, as messages show them: values of unknown element type, and those of operators that give nothing out.
    pub uncounted: Vec<String>,
}

/// Gives the model an output for each value inside of a body.
pub(super) fn count(model: &mut Model) -> Inside {
    let types = element_types(model);
    let (names, opset) = (FreshNames::of(&model.graph), model.opset_imports.get("").copied().unwrap_or(1));
    let mut body = std::mem::take(&mut model.graph.body);
    let mut counter = Counter { graph: &mut model.graph, types, names, opset, uncounted: Vec::new() };
    let found = counter.of_nodes(&mut body);
    let uncounted = counter.uncounted;
    body.outputs.extend(found.iter().map(|own| own.count));
    model.graph.body = body;
    let name = |id: ValueId| model.graph.name(id).to_string();
    let counted =
        found.into_iter().map(|Own { name: own, dtype, count }| Counted { name: own, dtype, output: name(count) });
    Inside { counted: counted.collect(), uncounted }
}

/// A value with its number of elements in the body around.
struct Own {
    name: String,
    dtype: DataType,
    count: ValueId,
}

struct Counter<'a> {
    /// The graph without its body.
    graph: &'a mut Graph,
    types: HashMap<ValueId, DataType>,
    names: FreshNames,
    opset: i64,
    uncounted: Vec<String>,
}

impl Counter<'_> {
    fn value(&mut self) -> ValueId {
        let name = self.names.fresh("interlace.elements");
        self.graph.add_value(Value { name, ..Value::default() })
    }

    fn node(&mut self, op_type: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]) -> (Node, ValueId) {
        let output = self.value();
        let node = Node {
            op_type: op_type.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            attributes: attributes.iter().map(|(name, kind)| (name.to_string(), kind.clone().into())).collect(),
            ..Node::default()
        };
        (node, output)
    }

    /// A constant of zeros.
    fn zero(&mut self, dims: &[u64]) -> (Node, ValueId) {
        let zero = Tensor::from_i64(dims, &vec![0; dims.iter().product::<u64>() as usize]);
        self.node("Constant", &[], &[("value", AttributeKind::Tensor(zero))])
    }

    /// Counts the values of a body and of those inside of it. `place` names the node that has the body.
    fn of_body(&mut self, body: &mut Body, place: &str) -> Vec<Own> {
        let values: Vec<(ValueId, String)> = computed(self.graph, body);
        let mut found = self.of_nodes(body);
        for (id, operator) in values {
            let name = format!("`{}` of {operator} in {place}", self.graph.name(id));
            let Some(&dtype) = self.types.get(&id) else {
                self.uncounted.push(name);
                continue;
            };
            let (node, count) = self.node("Size", &[id], &[]);
            body.nodes.push(node);
            found.push(Own { name, dtype, count });
        }
        found
    }

    /// The values inside of a body's nodes, counted in the body.
    fn of_nodes(&mut self, body: &mut Body) -> Vec<Own> {
        let (mut found, mut added) = (Vec::new(), Vec::new());
        let mut nodes = std::mem::take(&mut body.nodes);
        for node in nodes.iter_mut().filter(|node| node.bodies().next().is_some()) {
            let place = node.describe(self.graph);
            match (node.domain.as_str(), node.op_type.as_str()) {
                ("", "If") => found.extend(self.of_branches(node, &place)),
                ("", "Loop") => found.extend(self.of_iterations(node, &place, 1, &mut added)),
                ("", "Scan") if self.opset >= 9 => found.extend(self.of_iterations(node, &place, 0, &mut added)),
                _ => {
                    let inner = node.bodies().map(|inner| computed(self.graph, inner).len()).sum::<usize>();
                    self.uncounted.push(format!("{inner} values in {place}"));
                }
            }
        }
        nodes.extend(added);
        body.nodes = nodes;
        found
    }

    /// The branches of an `If`: each gives out its own values' counts, and zeros for those of the other one.
    fn of_branches(&mut self, node: &mut Node, place: &str) -> Vec<Own> {
        let mut branches: Vec<&mut Body> = node.bodies_mut().collect();
        let before = branches.first().map_or(0, |branch| branch.outputs.len());
        let own: Vec<Vec<Own>> = branches.iter_mut().map(|branch| self.of_body(branch, place)).collect();
        for (at, branch) in branches.iter_mut().enumerate() {
            for (of, values) in own.iter().enumerate() {
                for value in values {
                    if at == of {
                        branch.outputs.push(value.count);
                        continue;
                    }
                    let (zero, count) = self.zero(&[]);
                    branch.nodes.push(zero);
                    branch.outputs.push(count);
                }
            }
        }
        node.outputs.resize(before, None);
        let given = |own: Own| {
            let count = self.value();
            node.outputs.push(Some(count));
            Own { count, ..own }
        };
        own.into_iter().flatten().map(given).collect()
    }

    /// The body of a `Loop` or `Scan`, whose first outputs are not those of the node: the most elements of all iterations, 0 of none.
    fn of_iterations(&mut self, node: &mut Node, place: &str, first: usize, added: &mut Vec<Node>) -> Vec<Own> {
        let Some(body) = node.bodies_mut().next() else { return Vec::new() };
        let before = body.outputs.len().saturating_sub(first);
        let own = self.of_body(body, place);
        body.outputs.extend(own.iter().map(|value| value.count));
        // A list of axes or directions has one for each output of all iterations.
        for (name, attribute) in &mut node.attributes {
            if let AttributeKind::Ints(numbers) = &mut attribute.kind
                && ["scan_output_axes", "scan_output_directions"].contains(&name.as_str())
            {
                numbers.extend(vec![0; own.len()]);
            }
        }
        node.outputs.resize(before, None);
        let (zero, none) = self.zero(&[1]);
        added.push(zero);
        let given = |own: Own| {
            let counts = self.value();
            node.outputs.push(Some(counts));
            let (all, joined) = self.node("Concat", &[counts, none], &[("axis", AttributeKind::Int(0))]);
            let (most, count) = self.node("ReduceMax", &[joined], &[("keepdims", AttributeKind::Int(0))]);
            added.extend([all, most]);
            Own { count, ..own }
        };
        own.into_iter().map(given).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::Device;
    use crate::ir::Dim;
    use crate::runtime::{Runtime, SessionOptions, TensorValue};

    /// A graph by the names of its values.
    struct Named(Graph, HashMap<String, ValueId>);

    impl Named {
        fn id(&mut self, name: &str) -> ValueId {
            let Named(graph, ids) = self;
            let new = || graph.add_value(Value { name: name.into(), ..Value::default() });
            *ids.entry(name.to_string()).or_insert_with(new)
        }

        fn ids(&mut self, names: &[&str]) -> Vec<ValueId> {
            names.iter().map(|name| self.id(name)).collect()
        }

        fn typed(&mut self, name: &str, dtype: DataType, shape: Option<&[i64]>) -> ValueId {
            let id = self.id(name);
            let dims = |shape: &[i64]| {
                shape.iter().map(|&size| if size < 0 { Dim::Unknown } else { Dim::Known(size) }).collect()
            };
            self.0.values[id.index()].ty = Some(ValueType::Tensor { dtype, shape: shape.map(dims) });
            id
        }

        fn node(
            &mut self,
            op: &str,
            inputs: &[&str],
            outputs: &[&str],
            attributes: Vec<(&str, AttributeKind)>,
        ) -> Node {
            Node {
                name: format!("the {op}"),
                op_type: op.into(),
                inputs: self.ids(inputs).into_iter().map(Some).collect(),
                outputs: self.ids(outputs).into_iter().map(Some).collect(),
                attributes: attributes.into_iter().map(|(name, kind)| (name.to_string(), kind.into())).collect(),
                ..Node::default()
            }
        }

        fn body(&mut self, inputs: &[&str], outputs: &[&str], nodes: Vec<Node>) -> AttributeKind {
            let (inputs, outputs) = (self.ids(inputs), self.ids(outputs));
            AttributeKind::Graph(Body { name: "body".into(), inputs, outputs, nodes, ..Body::default() })
        }
    }

    /// A loop that doubles `x` in each iteration, and in it a branch with the double of that or its negative.
    fn model() -> Model {
        let mut graph = Named(Graph::default(), HashMap::new());
        let axis = || vec![("axis", AttributeKind::Int(0))];
        let then = graph.node("Concat", &["b", "b"], &["t"], axis());
        let then = graph.body(&[], &["t"], vec![then]);
        let other = graph.node("Neg", &["b"], &["e"], vec![]);
        let other = graph.body(&[], &["e"], vec![other]);
        let inner = vec![
            graph.node("Identity", &["go"], &["on"], vec![]),
            graph.node("Concat", &["a", "a"], &["b"], axis()),
            graph.node("If", &["c"], &["chosen"], vec![("else_branch", other), ("then_branch", then)]),
        ];
        for (name, dtype, shape) in [("i", DataType::Int64, Some(&[][..])), ("go", DataType::Bool, Some(&[]))] {
            graph.typed(name, dtype, shape);
        }
        graph.typed("a", DataType::Float, None);
        let body = graph.body(&["i", "go", "a"], &["on", "b"], inner);
        // Rows of a vector are scalars.
        let scanned = vec![
            graph.node("Add", &["s", "row"], &["sum"], vec![]),
            graph.node("Mul", &["sum", "row"], &["both"], vec![]),
        ];
        graph.typed("s", DataType::Float, Some(&[]));
        graph.typed("row", DataType::Float, Some(&[]));
        let scanned = graph.body(&["s", "row"], &["sum", "both"], scanned);
        let mut nodes = vec![
            graph.node("Loop", &["n", "true", "x"], &["y"], vec![("body", body)]),
            graph.node("ReduceSum", &["x"], &["start"], vec![("keepdims", AttributeKind::Int(0))]),
        ];
        let attributes = vec![
            ("body", scanned),
            ("num_scan_inputs", AttributeKind::Int(1)),
            ("scan_output_axes", AttributeKind::Ints(vec![0])),
        ];
        nodes.push(graph.node("Scan", &["start", "x"], &["last", "all"], attributes));
        let inputs = [
            graph.typed("x", DataType::Float, Some(&[-1])),
            graph.typed("n", DataType::Int64, Some(&[])),
            graph.typed("c", DataType::Bool, Some(&[])),
            graph.typed("true", DataType::Bool, Some(&[])),
        ];
        graph.typed("y", DataType::Float, Some(&[-1]));
        graph.typed("last", DataType::Float, Some(&[]));
        graph.0.body = Body {
            name: "main".into(),
            inputs: inputs.to_vec(),
            outputs: graph.ids(&["y", "last", "all"]),
            nodes,
            ..Body::default()
        };
        Model { ir_version: 8, opset_imports: [(String::new(), 17)].into(), graph: graph.0, ..Model::default() }
    }

    #[test]
    fn values_of_branches_and_iterations_are_counted_where_they_run() {
        let mut model = model();
        let Inside { counted, uncounted } = count(&mut model);
        assert!(uncounted.is_empty(), "{uncounted:?}");
        assert!(
            counted
                .iter()
                .all(|value| value.dtype
                    == if value.name.contains("Identity") { DataType::Bool } else { DataType::Float })
        );
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let mut session = runtime.session_of(&model, &SessionOptions::default()).expect("a session");
        for (iterations, taken, wanted) in [
            (
                2,
                true,
                [
                    ("`b` of Concat", 12),
                    ("`t` of Concat", 24),
                    ("`e` of Neg", 0),
                    ("`chosen` of If", 24),
                    ("`on` of Identity", 1),
                ],
            ),
            (
                3,
                false,
                [
                    ("`b` of Concat", 24),
                    ("`t` of Concat", 0),
                    ("`e` of Neg", 24),
                    ("`chosen` of If", 24),
                    ("`on` of Identity", 1),
                ],
            ),
            (
                0,
                true,
                [
                    ("`b` of Concat", 0),
                    ("`t` of Concat", 0),
                    ("`e` of Neg", 0),
                    ("`chosen` of If", 0),
                    ("`on` of Identity", 0),
                ],
            ),
        ] {
            let x = TensorValue::from_f32(DataType::Float, &[3], vec![1.0, 2.0, 3.0]).expect("x");
            let n = TensorValue::new(&[], vec![iterations as i64]).expect("n");
            let (c, always) =
                (TensorValue::new(&[], vec![taken]).expect("c"), TensorValue::new(&[], vec![true]).expect("true"));
            let names: Vec<&str> = counted.iter().map(|value| value.output.as_str()).collect();
            let found =
                session.run(&[("x", &x), ("n", &n), ("c", &c), ("true", &always)], Some(&names)).expect("a run");
            let found: Vec<(&str, i64)> = counted
                .iter()
                .zip(found.iter())
                .map(|(value, (_, count))| (value.name.as_str(), count.data::<i64>().expect("counts")[0]))
                .collect();
            for (name, want) in wanted.into_iter().chain([("`sum` of Add", 1), ("`both` of Mul", 1)]) {
                let own =
                    found.iter().find(|(own, _)| own.starts_with(name)).unwrap_or_else(|| panic!("{name}: {found:?}"));
                assert_eq!(own.1, want, "{iterations} {taken} {name}: {found:?}");
            }
            assert_eq!(found.len(), 7, "{found:?}");
            assert!(found.iter().any(|(name, _)| name.contains("in node `the If` (If)")), "{found:?}");
        }
    }

    #[test]
    fn values_of_unknown_type_and_of_other_operators_are_named() {
        let mut model = model();
        let scan = model.graph.body.nodes.iter_mut().find(|node| node.op_type == "Scan").expect("a scan");
        scan.op_type = "Elsewhere".into();
        let start = model.graph.input("x").expect("x");
        model.graph.values[start.index()].ty = None;
        for value in &mut model.graph.values {
            if value.name == "a" {
                value.ty = None;
            }
        }
        let Inside { counted, uncounted } = count(&mut model);
        assert_eq!(counted.len(), 1, "the condition of the loop");
        assert!(
            uncounted.iter().any(|name| name.starts_with("2 values in node `the Scan` (Elsewhere)")),
            "{uncounted:?}"
        );
        assert!(uncounted.iter().any(|name| name.starts_with("`t` of Concat in node `the If` (If)")), "{uncounted:?}");
    }
}

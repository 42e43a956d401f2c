//! Cached state of programs between runs, and sharing of weights between programs.

use super::super::schedule::MAX_CACHES_BYTES;
use super::*;

/// x times a square matrix of ones as wide as x, so the matrix depends only on shapes.
fn squares() -> Model {
    let mut model = Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(String::new(), 21);
    let graph = &mut model.graph;
    let mut value = |name: &str| graph.add_value(ir::Value { name: name.into(), ..Default::default() });
    let [x, length, size, square, y] = ["x", "length", "size", "square", "y"].map(&mut value);
    let node = |op: &str, inputs: &[ValueId], output: ValueId| {
        let inputs = inputs.iter().map(|id| Some(*id)).collect();
        ir::Node { op_type: op.into(), inputs, outputs: vec![Some(output)], ..Default::default() }
    };
    let mut join = node("Concat", &[length, length], size);
    join.attributes.push(("axis".into(), ir::AttributeKind::Int(0).into()));
    let mut fill = node("ConstantOfShape", &[size], square);
    fill.attributes.push(("value".into(), ir::AttributeKind::Tensor(ir::Tensor::from_f32(&[1], &[1.0])).into()));
    graph.body.nodes = vec![node("Shape", &[x], length), join, fill, node("MatMul", &[x, square], y)];
    (graph.body.inputs, graph.body.outputs) = (vec![x], vec![y]);
    model
}

/// x times a transposed 2 x 2 weight in f16.
fn product() -> Model {
    let mut model = Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(String::new(), 21);
    let graph = &mut model.graph;
    let mut value = |name: &str| graph.add_value(ir::Value { name: name.into(), ..Default::default() });
    let [x, w, u, turned, y, z] = ["x", "w", "u", "turned", "y", "z"].map(&mut value);
    let node = |op: &str, inputs: &[ValueId], output: ValueId| {
        let inputs = inputs.iter().map(|id| Some(*id)).collect();
        ir::Node { op_type: op.into(), inputs, outputs: vec![Some(output)], ..Default::default() }
    };
    let halves = |numbers: &[f32]| -> Vec<u8> {
        numbers.iter().flat_map(|&number| half::f16::from_f32(number).to_le_bytes()).collect()
    };
    let side = 80i64;
    let numbers: Vec<f32> = (0..side * side).map(|n| (n as f32 * 0.37).sin()).collect();
    let weight = |data| ir::Tensor::from_bytes(DataType::Float16, &[side as u64, side as u64], data);
    graph.body.initializers = vec![(w, weight(halves(&numbers))), (u, weight(halves(&numbers[..])))];
    graph.body.nodes =
        vec![node("Transpose", &[w], turned), node("MatMul", &[x, turned], y), node("MatMul", &[y, u], z)];
    (graph.body.inputs, graph.body.outputs) = (vec![x], vec![z]);
    model
}

#[test]
fn programs_share_frozen_weights_and_can_hold_them_in_16_bits() {
    let x = Tensor::arange(240, tch::kind::FLOAT_CPU).cos().view([3, 80]).set_requires_grad(true);
    let mut results: Vec<[Tensor; 2]> = Vec::new();
    for (hold, kind) in [(Hold::Widened, Kind::Float), (Hold::Stored, Kind::Half)] {
        let options = Options { hold, ..Options::default() };
        let first = Program::compile(&product(), &options).expect("compile");
        let mut second = Program::compile(&product(), &options).expect("compile");
        second.share_weights(&first).expect("share");
        let mut places = Vec::new();
        for program in [&first, &second] {
            let out = program.run(&[(program.inputs()[0], x.shallow_clone())], program.outputs()).expect("run");
            let gradient = Tensor::run_backward(&[out[0].square().sum(Kind::Float)], &[&x], false, false);
            results.push([out[0].detach(), gradient[0].shallow_clone()]);
            let state = program.state.borrow();
            let none = HashSet::new();
            for name in ["turned", "u"] {
                let slot = program.value(name).expect("a value").index();
                let tensor = state.fixed.get(slot, &none).expect("a fixed tensor");
                assert_eq!(tensor.kind(), kind, "{name}");
                places.push(tensor.data_ptr().addr());
            }
        }
        assert_eq!(places[..2], places[2..]);
    }
    assert!(results.iter().all(|result| result.iter().zip(&results[0]).all(|(a, b)| a.equal(b))));
}

#[test]
fn the_cache_of_values_per_shape_is_bounded() {
    let program = Program::compile(&squares(), &Options::default()).expect("compile");
    let run = |length: i64| {
        let x = Tensor::ones([length], tch::kind::FLOAT_CPU);
        let out = program.run(&[(program.inputs()[0], x)], program.outputs()).expect("run");
        assert_eq!((out[0].size(), out[0].double_value(&[length - 1])), (vec![length], length as f64));
        program.state.borrow().caches.size_bytes()
    };
    assert_eq!(run(3), 3 * 3 * 4);
    // Each matrix takes about 4 MB, so 40 of them exceed the limit.
    let kept = (1000..1040).map(run).max().expect("runs");
    assert!((MAX_CACHES_BYTES / 2..=MAX_CACHES_BYTES).contains(&kept), "{kept} bytes");
    // A matrix larger than the limit is computed in each run.
    let large = ((MAX_CACHES_BYTES / 4) as f64).sqrt() as i64 + 8;
    let before = run(1039);
    assert_eq!([run(large), run(large)], [before; 2]);
}

#[test]
fn values_that_only_the_host_reads_are_known() {
    let program = Program::compile(&squares(), &Options::default()).expect("compile");
    let on_host = |name: &str| program.reads_on_host(program.value(name).expect("a value"));
    assert_eq!(["x", "length", "size", "square"].map(on_host), [false, false, true, false]);
    // Shapes are on the host by themselves.
    assert_eq!(program.host_reads(|_| true), (Vec::new(), Vec::new()));
}

/// A loop that repeats a row by the number of a mask's tokens, which each turn passes on.
#[test]
fn what_a_loop_reads_on_the_host_is_known() {
    let mut model = Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(String::new(), 21);
    let graph = &mut model.graph;
    let mut value = |name: &str| graph.add_value(ir::Value { name: name.into(), ..Default::default() });
    let [x, mask, zero, trips, size, last, y] = ["x", "mask", "zero", "trips", "size", "last", "y"].map(&mut value);
    let [turn, going, by, row, goes_on, next, wide] =
        ["turn", "going", "by", "row", "goes_on", "next", "wide"].map(&mut value);
    let node = |op: &str, inputs: &[Option<ValueId>], outputs: &[ValueId]| {
        let outputs = outputs.iter().copied().map(Some).collect();
        ir::Node { op_type: op.into(), inputs: inputs.to_vec(), outputs, ..Default::default() }
    };
    let body = ir::Body {
        inputs: vec![turn, going, by, row],
        nodes: vec![
            node("Identity", &[Some(going)], &[goes_on]),
            node("Identity", &[Some(by)], &[next]),
            node("Expand", &[Some(row), Some(by)], &[wide]),
        ],
        outputs: vec![goes_on, next, wide],
        ..Default::default()
    };
    let mut repeat = node("Loop", &[Some(trips), None, Some(size), Some(x)], &[last, y]);
    repeat.attributes.push(("body".into(), ir::AttributeKind::Graph(body).into()));
    let ints = |values: &[i64]| ir::Tensor::from_i64(&[values.len() as u64], values);
    graph.body.initializers = vec![(zero, ints(&[0])), (trips, ints(&[2]))];
    graph.body.nodes = vec![node("ReduceSum", &[Some(mask), Some(zero)], &[size]), repeat];
    (graph.body.inputs, graph.body.outputs) = (vec![x, mask], vec![y]);
    let program = Program::compile(&model, &Options::default()).expect("compile");
    assert_eq!([size, x].map(|id| program.reads_on_host(id)), [true, false]);
    assert_eq!(program.host_reads(|id| id == mask), (vec![size], vec![]));
    assert_eq!(program.host_reads(|_| false), (vec![], vec!["size"]));
    let given = [(x, Tensor::from_slice(&[7f32])), (mask, Tensor::from_slice(&[1i64, 1, 0]))];
    let out = program.run(&given, &[y]).expect("run");
    assert_eq!(Vec::<f32>::try_from(&out[0]).expect("numbers"), [7.0, 7.0]);
}

/// Tokens of a mask, as a length by which a row of the stream is repeated, and the places of the stream's numbers above 0.
#[test]
fn values_that_the_host_reads_are_computed_ahead_or_copied() {
    let mut model = Model { ir_version: 10, ..Default::default() };
    model.opset_imports.insert(String::new(), 21);
    let graph = &mut model.graph;
    let mut value = |name: &str| graph.add_value(ir::Value { name: name.into(), ..Default::default() });
    let names = ["x", "mask", "sum", "zero", "one", "from", "next", "to", "cut", "places", "size", "y"];
    let [x, mask, sum, zero, one, from, next, to, cut, places, size, y] = names.map(&mut value);
    let node = |op: &str, inputs: &[ValueId], output: ValueId| {
        let inputs = inputs.iter().map(|id| Some(*id)).collect();
        ir::Node { op_type: op.into(), inputs, outputs: vec![Some(output)], ..Default::default() }
    };
    let ints = |values: &[i64]| ir::Tensor::from_i64(&[values.len() as u64], values);
    graph.body.initializers = vec![(zero, ints(&[0])), (one, ints(&[1]))];
    graph.body.nodes = vec![
        node("ReduceSum", &[mask, zero], sum),
        node("Sub", &[sum, sum], from),
        node("Sub", &[sum, one], next),
        node("Add", &[next, zero], to),
        node("Slice", &[x, from, to], cut),
        node("NonZero", &[cut], places),
        node("Shape", &[places], size),
        node("Expand", &[cut, size], y),
    ];
    (graph.body.inputs, graph.body.outputs) = (vec![x, mask], vec![y]);
    let program = Program::compile(&model, &Options::default()).expect("compile");
    let read = |held: &dyn Fn(ValueId) -> bool| {
        let (ahead, copied) = program.host_reads(held);
        (ahead.into_iter().map(|id| program.name(id)).collect::<Vec<_>>(), copied)
    };
    // What `NonZero` reads comes from the stream; the shape of what it gives is on the host by itself.
    assert_eq!(read(&|id| id == mask), (vec!["from", "to"], vec!["cut"]));
    assert_eq!(read(&|_| false), (vec![], vec!["from", "to", "cut"]));
    assert!(program.reads(mask) && program.reads(x) && !program.reads(places));
    // A program of the lengths alone knows the stream by its shape, and the other one takes what it computes.
    let (ahead, _) = program.host_reads(|id| id == mask);
    let lengths = Program::compile(
        &model,
        &Options { outputs: Some(ahead.clone()), inputs: Some(vec![x, mask]), ..Options::default() },
    );
    let lengths = lengths.expect("compile");
    assert!(lengths.reads(mask) && !lengths.reads(x));
    let kept = Tensor::from_slice(&[1i64, 1, 1, 0]);
    let stream = Tensor::from_slice(&[1f32, 2.0, 3.0, 4.0]);
    let shape = Tensor::zeros([1], tch::kind::FLOAT_CPU).expand([4], false);
    let found = lengths.run(&[(x, shape), (mask, kept.shallow_clone())], &ahead).expect("run");
    assert_eq!([found[0].int64_value(&[0]), found[1].int64_value(&[0])], [0, 2]);
    let mut given = vec![(x, stream.shallow_clone())];
    given.extend(ahead.iter().copied().zip(found));
    let out = program.run(&given, &[y]).expect("run");
    let whole = program.run(&[(x, stream), (mask, kept)], &[y]).expect("run");
    assert!(out[0].equal(&whole[0]));
}

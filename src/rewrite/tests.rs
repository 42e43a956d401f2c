use std::collections::HashMap;
use std::path::Path;

use super::*;
use crate::analysis::analyse;
use crate::ir::Model;
use crate::onnx;

fn zoo(name: &str) -> Model {
    onnx::load(&Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name)).unwrap()
}

fn cases() -> Vec<String> {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/cases.tsv")).unwrap();
    table.lines().filter_map(|line| line.split('\t').next().map(str::to_string)).collect()
}

fn operators(model: &Model) -> HashMap<String, usize> {
    let mut counts = HashMap::new();
    for node in &model.graph.body.nodes {
        *counts.entry(node.op()).or_default() += 1;
    }
    counts
}

#[test]
fn an_empty_plan_changes_no_operator_and_no_weight() {
    for name in cases() {
        let model = zoo(&name);
        let same = drop_layers(&analyse(&model).unwrap(), &[]).unwrap();
        assert_eq!(operators(&model), operators(&same), "{name}");
        let bytes = |model: &Model| -> HashMap<String, Vec<u8>> {
            let graph = &model.graph;
            graph.body.initializers.iter().map(|(id, t)| (graph.name(*id).to_string(), t.bytes().to_vec())).collect()
        };
        assert_eq!(bytes(&model), bytes(&same), "{name}");
    }
}

#[test]
fn ports_are_renumbered_without_a_gap() {
    for name in cases() {
        let model = zoo(&name);
        let pruned = drop_layers(&analyse(&model).unwrap(), &[0, 2, 7]).unwrap();
        let map = analyse(&pruned).unwrap().map;
        assert_eq!(map.layers.len(), 5, "{name}");
        let names = |model: &Model| -> Vec<String> {
            let graph = &model.graph;
            graph.body.inputs.iter().chain(&graph.body.outputs).map(|id| graph.name(*id).to_string()).collect()
        };
        let want: Vec<String> = names(&model)
            .into_iter()
            .filter(|port| {
                !["5", "6", "7"]
                    .iter()
                    .any(|number| port.contains(&format!(".{number}.")) || port.ends_with(&format!(".{number}")))
            })
            .collect();
        assert_eq!(names(&pruned), want, "{name}");
        assert_eq!(original_layers(&pruned, 5), [1, 3, 4, 5, 6]);
    }
}

#[test]
fn layers_that_cannot_be_dropped_are_refused() {
    let analysis = analyse(&zoo("ts17/smolvlm/decoder_model_merged.onnx")).unwrap();
    for (drop, want) in
        [(vec![8], "layer 8 does not exist"), (vec![2, 2], "named twice"), ((0..8).collect(), "nothing would be left")]
    {
        let message = drop_layers(&analysis, &drop).unwrap_err().to_string();
        assert!(message.contains(want), "{message}");
    }
}

#[test]
fn skip_norms_come_back_with_every_output_they_had() {
    let outputs = |model: &Model| -> Vec<Vec<String>> {
        let graph = &model.graph;
        let name = |id: &Option<crate::ir::ValueId>| id.map(|id| graph.name(id).to_string()).unwrap_or_default();
        let fused = graph.body.nodes.iter().filter(|node| node.op_type.starts_with("Skip"));
        fused.map(|node| node.outputs.iter().map(name).collect()).collect()
    };
    let model = zoo("mobius/qwen3_vl/decoder/model.onnx");
    assert!(outputs(&model).iter().all(|names| names.len() == 4 && !names.contains(&String::new())));
    let analysis = analyse(&model).unwrap();
    assert_eq!(outputs(&drop_layers(&analysis, &[]).unwrap()), outputs(&model));
    let pruned = outputs(&drop_layers(&analysis, &[0, 7]).unwrap());
    assert_eq!(pruned.len(), 12);
    assert!(pruned.iter().all(|names| names.len() == 4 && !names.contains(&String::new())));
}

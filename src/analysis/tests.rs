use std::path::Path;

use super::*;
use crate::onnx;

fn zoo(name: &str) -> Analysis {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(name);
    analyse(&onnx::load(&path).unwrap()).unwrap_or_else(|e| panic!("{name}: {e}"))
}

#[test]
fn every_exporter_s_eight_layers_are_found() {
    let table = std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo/cases.tsv")).unwrap();
    for line in table.lines() {
        let name = line.split('\t').next().unwrap();
        let found = zoo(name);
        let map = &found.map;
        assert_eq!(map.layers.len(), 8, "{name}");
        for layer in &map.layers {
            let roles: Vec<PortRole> = layer.ports.iter().map(|port| port.role).collect();
            assert_eq!(roles, [PortRole::Key, PortRole::Value], "{name} layer {}", layer.index);
            let name_of = |id: Option<crate::ir::ValueId>| id.map(|id| found.model.graph.name(id)).unwrap_or("");
            for (port, word) in layer.ports.iter().zip(["key", "value"]) {
                for port_name in [name_of(port.past), name_of(port.present)] {
                    let numbered = port_name.contains(&format!(".{}.", layer.index)) && port_name.contains(word);
                    assert!(numbered, "{name} layer {}: `{port_name}`", layer.index);
                }
            }
            assert_eq!(layer.class, 0, "{name} layer {}", layer.index);
        }
    }
}

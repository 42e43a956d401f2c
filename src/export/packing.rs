//! DeepStack for a runtime that feeds the decoder `inputs_embeds` alone: the features stand after each row of the embeddings.
//!
//! With `k` levels and width `D`, `inputs_embeds` gets `(1 + k) x D` columns, which the decoder's first node splits. The token
//! embedding's rows end in zeros, and the vision encoder's `image_features` are its features and those of the levels, side by side.

use crate::base::{Error, Result};
use crate::bundle::{Component, Role};
use crate::ir::{Attribute, AttributeKind, Dim, Model, Node, Tensor, Value, ValueId, ValueType};
use crate::runtime::{Input, InputKind, Port};

use super::nodes::inputs_of;

const EMBEDS: &str = "inputs_embeds";
const FEATURES: &str = "image_features";

/// How the columns are packed: what each component of a folder has to give and take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Packing {
    /// Number of DeepStack levels, at least one.
    levels: usize,
    /// Width of the token embeddings.
    width: usize,
}

impl Packing {
    /// The packing that a decoder needs beside this token embedding; `None` without DeepStack, and for components that are packed
    /// already.
    ///
    /// Errors: `Error::Unsupported` for DeepStack inputs that are not `[B, T, D]` each.
    pub(super) fn of(decoder: &Model, embedding: &Model) -> Result<Option<Self>> {
        let width = |graph: &crate::ir::Graph, id: ValueId| Port::of_value(graph, id).and_then(|port| port.width());
        let given = embedding.graph.output(EMBEDS).and_then(|id| width(&embedding.graph, id));
        let taken = decoder.graph.input(EMBEDS).and_then(|id| width(&decoder.graph, id));
        let (Some(given), Some(taken)) = (given, taken) else { return Ok(None) };
        let levels = level_inputs(decoder)?.len();
        let packed = taken / given.max(1);
        match (levels, packed) {
            (0, 0 | 1) => Ok(None),
            (0, _) if taken % given == 0 => Ok(Some(Packing { levels: packed - 1, width: given })),
            (_, 1) if taken == given => Ok(Some(Packing { levels, width: given })),
            _ => Err(Error::unsupported(
                "the decoder",
                format!("takes embeddings of width {taken}, the token embedding gives {given}"),
            )
            .remedy("export both from one model")),
        }
    }

    /// Packs one component.
    ///
    /// Errors: `Error::Unsupported` when the vision encoder does not give each level's features as rows beside its own.
    pub(super) fn apply(&self, component: &Component, model: &mut Model) -> Result<()> {
        if model.opset_imports.get("").copied().unwrap_or(1) < 13 {
            return Err(Error::unsupported(
                format!("`{}`", component.file),
                "is of an opset below 13, and is not packed",
            )
            .remedy("export it in opset 13 or later"));
        }
        match component.role {
            Role::Decoder if !level_inputs(model)?.is_empty() => self.decoder(component, model),
            Role::EmbedTokens => self.embedding(component, model),
            Role::VisionEncoder => self.vision(component, model),
            _ => Ok(()),
        }
    }

    /// Splits `inputs_embeds` into the embeddings and the levels' inputs.
    fn decoder(&self, component: &Component, model: &mut Model) -> Result<()> {
        let levels = level_inputs(model)?;
        let ids: Vec<ValueId> = levels.iter().map(|(id, _)| *id).collect();
        let embeds = model.graph.input(EMBEDS).ok_or_else(|| lacks(component, EMBEDS))?;
        let dtype = |model: &Model, id: ValueId| model.graph.value(id).ty.as_ref().and_then(ValueType::dtype);
        if let Some(&other) = ids.iter().find(|id| dtype(model, **id) != dtype(model, embeds)) {
            let problem = format!("is not of the type of `{EMBEDS}`");
            return Err(Error::unsupported(format!("input `{}`", model.graph.name(other)), problem)
                .remedy("export both in one type"));
        }
        let wide = self.widened(model, embeds, EMBEDS, 1 + self.levels);
        let body = &mut model.graph.body;
        body.inputs.retain(|id| !ids.contains(id));
        body.inputs.iter_mut().filter(|id| **id == embeds).for_each(|id| *id = wide);
        let widths = vec![self.width as i64; 1 + self.levels];
        let sizes = constant(model, "widths", &widths);
        let parts = std::iter::once(embeds).chain(ids).map(Some).collect();
        let split = node("Split", vec![Some(wide), Some(sizes)], parts, Some(("axis", AttributeKind::Int(-1))));
        model.graph.body.nodes.insert(0, split);
        Ok(())
    }

    /// Adds zeros after each row of the embeddings.
    fn embedding(&self, component: &Component, model: &mut Model) -> Result<()> {
        let narrow = model.graph.output(EMBEDS).ok_or_else(|| lacks(component, EMBEDS))?;
        let wide = self.widened(model, narrow, EMBEDS, 1 + self.levels);
        model.graph.body.outputs.iter_mut().filter(|id| **id == narrow).for_each(|id| *id = wide);
        let pads = constant(model, "pads", &[0, 0, 0, 0, 0, (self.levels * self.width) as i64]);
        model.graph.body.nodes.push(node("Pad", vec![Some(narrow), Some(pads)], vec![Some(wide)], None));
        Ok(())
    }

    /// Puts the levels' features beside the vision encoder's own.
    fn vision(&self, component: &Component, model: &mut Model) -> Result<()> {
        let graph = &model.graph;
        let narrow = graph.output(FEATURES).ok_or_else(|| lacks(component, FEATURES))?;
        let ports: Vec<(ValueId, Port)> = graph
            .body
            .outputs
            .iter()
            .filter_map(|&id| Some((id, Port::of_value(graph, id)?)).filter(|_| id != narrow))
            .collect();
        let own: Vec<Port> = ports.iter().map(|(_, port)| port.clone()).collect();
        let inputs = Input::all(&format!("`{}`", component.file), &own)?;
        let mut levels: Vec<(ValueId, Input)> = ports.into_iter().map(|(id, _)| id).zip(inputs).collect();
        levels.retain(|(_, input)| input.kind() == InputKind::Deepstack);
        levels.sort_by_key(|(_, input)| input.number);
        let rank = Port::of_value(graph, narrow).map(|port| port.rank());
        if levels.len() != self.levels || levels.iter().any(|(_, input)| Some(input.port.rank()) != rank) {
            let names: Vec<String> = levels.iter().map(|(_, input)| input.port.described()).collect();
            let problem = format!(
                "gives {} DeepStack outputs ({}), the decoder takes {}",
                levels.len(),
                names.join(", "),
                self.levels
            );
            return Err(Error::unsupported(format!("`{}`", component.file), problem)
                .remedy("export the vision encoder with one output of rows for each level"));
        }
        let wide = self.widened(model, narrow, FEATURES, 1 + self.levels);
        let ids: Vec<ValueId> = levels.iter().map(|(id, _)| *id).collect();
        let body = &mut model.graph.body;
        body.outputs.retain(|id| !ids.contains(id));
        body.outputs.iter_mut().filter(|id| **id == narrow).for_each(|id| *id = wide);
        let parts = std::iter::once(narrow).chain(ids).map(Some).collect();
        body.nodes.push(node("Concat", parts, vec![Some(wide)], Some(("axis", AttributeKind::Int(-1)))));
        Ok(())
    }

    /// A value `name` like `narrow`, of `parts` times the columns; `narrow` gets another name.
    fn widened(&self, model: &mut Model, narrow: ValueId, name: &str, parts: usize) -> ValueId {
        let inner = model.graph.fresh_name(&format!("interlace.packed.{name}"));
        let graph = &mut model.graph;
        let mut ty = graph.value(narrow).ty.clone();
        graph.values[narrow.index()].name = inner;
        if let Some(ValueType::Tensor { shape: Some(shape), .. }) = &mut ty
            && let Some(last) = shape.last_mut()
        {
            *last = Dim::Known((parts * self.width) as i64);
        }
        graph.add_value(Value { name: name.to_string(), ty, ..Value::default() })
    }
}

/// The decoder's DeepStack inputs, in the order of their levels.
///
/// Errors: `Error::Unsupported` for inputs that are not `[B, T, D]` each.
fn level_inputs(decoder: &Model) -> Result<Vec<(ValueId, Input)>> {
    let mut levels = inputs_of("decoder", decoder)?;
    levels.retain(|(_, input)| input.kind() == InputKind::Deepstack);
    if let Some((_, other)) = levels.iter().find(|(_, input)| input.is_stacked() || input.port.rank() != 3) {
        let problem = "is not `[batch, tokens, width]` for one level, and the runtime feeds `inputs_embeds` alone";
        return Err(Error::unsupported(format!("input {}", other.port.described()), problem).remedy(
            "export the decoder with one input for each level, with zeros at text, or packed into `inputs_embeds`",
        ));
    }
    levels.sort_by_key(|(_, input)| input.number);
    Ok(levels)
}

fn lacks(component: &Component, name: &str) -> Error {
    Error::unsupported(format!("`{}`", component.file), format!("has no `{name}`"))
        .remedy("name its inputs and outputs so in the exporter")
}

fn constant(model: &mut Model, stem: &str, numbers: &[i64]) -> ValueId {
    let name = model.graph.fresh_name(&format!("interlace.packed.{stem}"));
    let id = model.graph.add_value(Value { name, ..Value::default() });
    model.graph.body.initializers.push((id, Tensor::from_i64(&[numbers.len() as u64], numbers)));
    id
}

fn node(
    op_type: &str,
    inputs: Vec<Option<ValueId>>,
    outputs: Vec<Option<ValueId>>,
    attribute: Option<(&str, AttributeKind)>,
) -> Node {
    let attributes = attribute.map(|(name, kind)| (name.to_string(), Attribute::from(kind)));
    Node { op_type: op_type.into(), inputs, outputs, attributes: attributes.into_iter().collect(), ..Node::default() }
}

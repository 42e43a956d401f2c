//! What each part of a model costs in fewer bits, and the forms that meet a size or a divergence.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use crate::analysis::{self, LayerMap};
use crate::base::{Cancel, Error, Progress, Result, ScratchDir, human_bytes, notice};
use crate::bundle::{Bundle, Component, Role};
use crate::ir::{Graph, Model};
use crate::onnx::{self, Storage};

use super::allocation::{FormCosts, forms_after, forms_within, upgrades};
use super::divergence::{Divergence, MEASURED};
use super::forms::{WeightForm, WeightForms};
use super::report::{PartSensitivity, PrecisionBudget, Sensitivity};
use super::{PrecisionSettings, RangeCalibration, Ranges, Work, int4, refuse};

/// Limits of a model in `int4`, some of whose parts get 8 bits or stay floats. Without limits its parts are only measured.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct BudgetRequest {
    /// Most bytes of the component files together.
    pub target_bytes: Option<u64>,
    /// Largest divergence in nats, as in [`Sensitivity`].
    pub max_kl: Option<f64>,
}

impl BudgetRequest {
    /// Errors: `Error::Invalid` for a divergence that is not above 0, which its setting has this name for.
    pub fn check(&self, max_kl: &str) -> Result<()> {
        match self.max_kl {
            Some(most) if !(most > 0.0 && most.is_finite()) => {
                Err(Error::invalid(max_kl, format!("is {most}, expected nats above 0"))
                    .remedy("give 0.01, for instance"))
            }
            _ => Ok(()),
        }
    }
}

/// The forms of every graph's weights, by the component's file.
pub(super) struct Allocation {
    pub forms: BTreeMap<String, WeightForms>,
    pub sensitivity: Sensitivity,
}

/// Measures all parts and chooses their forms.
///
/// Errors: `Error::Unsupported` for components that are not measured; `Error::Invalid` with the best that can be reached when the
/// limits cannot be met; as [`Divergence`].
pub(super) fn allocate(
    bundle: &Bundle,
    components: &[&Component],
    (settings, calibration): (&PrecisionSettings, &RangeCalibration<'_>),
    budget: BudgetRequest,
    scratch: &Path,
) -> Result<Allocation> {
    let graphs = components.iter().map(|component| Part::graph(bundle, component)).collect::<Result<Vec<_>>>()?;
    let parts: Vec<Part> =
        graphs.iter().enumerate().flat_map(|(number, graph)| parts_of(number, graph, settings)).collect();
    let graphs = Graphs { graphs, parts, settings, scratch, cancel: calibration.cancel };
    // Before anything is measured, which takes long.
    let size = budget.target_bytes.map(|most| Ok((most, graphs.spare_within(most)?))).transpose()?;
    let divergence = Divergence::open(bundle, calibration, &scratch.join("reference"))?;
    let mut search = Search { graphs, divergence };
    let rows = search.measure_parts()?;
    let all_int4 = vec![WeightForm::Int4; rows.len()];
    let int4_kl = search.measure(&all_int4)?;
    let (forms, kl) = match (size, budget.max_kl) {
        (None, None) => (all_int4, int4_kl),
        (Some(size), max_kl) => search.within_size(&rows, size, max_kl, int4_kl)?,
        (None, Some(most)) => search.within_divergence(&rows, most, int4_kl)?,
    };
    let has_target = budget.target_bytes.is_some() || budget.max_kl.is_some();
    let kl_of = |(row, form): (&FormCosts, &WeightForm)| row.kl[*form as usize];
    let budget = PrecisionBudget {
        target_bytes: budget.target_bytes,
        max_kl: budget.max_kl,
        size_bytes: 0,
        kl,
        sum_of_parts: rows.iter().zip(&forms).map(kl_of).sum(),
        int4_kl,
    };
    let sensitivity = Sensitivity {
        samples: search.divergence.samples(),
        answer_tokens: search.divergence.answer_tokens(),
        prefills: search.divergence.prefills(),
        parts: search
            .graphs
            .parts
            .iter()
            .zip(&rows)
            .zip(&forms)
            .map(|((part, row), form)| search.graphs.row(part, row, *form))
            .collect(),
        budget: has_target.then_some(budget),
    };
    Ok(Allocation { forms: search.graphs.by_file(&forms), sensitivity })
}

/// A component's float graph.
struct FloatGraph<'a> {
    component: &'a Component,
    model: Model,
    /// Bytes of its files.
    bytes: u64,
}

/// Weights that get one form.
struct Part {
    /// Place of its graph.
    graph: usize,
    label: String,
    weights: Vec<String>,
    bytes: [u64; 3],
}

impl Part {
    fn graph<'a>(bundle: &Bundle, component: &'a Component) -> Result<FloatGraph<'a>> {
        if !MEASURED.contains(&component.role) {
            let names: Vec<&str> = MEASURED.iter().map(|role| role.name()).collect();
            let problem =
                format!("is a {}; the sensitivity is measured for {}", component.role.name(), names.join(", "));
            return Err(Error::unsupported(format!("`{}`", component.file), problem)
                .remedy("leave `--sensitivity`, `--target-size` and `--max-kl` out"));
        }
        let model = onnx::load(&bundle.path_of(component))?;
        refuse(&model, &component.file)?;
        Ok(FloatGraph { component, model, bytes: bundle.size_bytes(component)? })
    }
}

/// The layers of a graph, and the rest of it.
fn parts_of(graph: usize, float: &FloatGraph<'_>, settings: &PrecisionSettings) -> Vec<Part> {
    let labels = layer_labels(float);
    let rest = if labels.is_empty() { "all" } else { "rest" };
    let mut parts: Vec<Part> = Vec::new();
    for weight in int4::weight_sizes(&float.model, settings) {
        let label = labels.get(&weight.name).map_or(rest, String::as_str);
        let at = parts.iter().position(|part| part.label == label).unwrap_or_else(|| {
            parts.push(Part { graph, label: label.to_string(), weights: Vec::new(), bytes: [0; 3] });
            parts.len() - 1
        });
        parts[at].weights.push(weight.name);
        parts[at].bytes.iter_mut().zip(weight.bytes).for_each(|(sum, bytes)| *sum += bytes);
    }
    // Layers in their order, then the rest.
    let order = |part: &Part| {
        let number = part.label.rsplit(' ').next().and_then(|number| number.parse().ok());
        (number.is_none(), part.label.starts_with("layer"), number.unwrap_or(0usize))
    };
    parts.sort_by_key(order);
    parts
}

/// The layer of each weight that one layer alone reads, by the weight's name. Empty where no layers are found.
fn layer_labels(float: &FloatGraph<'_>) -> HashMap<String, String> {
    let mut labels = HashMap::new();
    if float.component.role == Role::EmbedTokens {
        return labels;
    }
    let mut add = |graph: &Graph, map: &LayerMap, kind: &str| {
        for layer in &map.layers {
            let named = layer.weights.iter().map(|&id| (graph.name(id).to_string(), format!("{kind} {}", layer.index)));
            labels.extend(named);
        }
    };
    // A graph whose layers are not understood is one part.
    if let Ok(found) = analysis::analyse(&float.model) {
        add(&found.model.graph, &found.map, "layer");
        if let Some(vision) = &found.vision {
            add(&found.model.graph, vision, "vision layer");
        }
    }
    labels
}

/// The float graphs, whose parts are written in other forms.
struct Graphs<'a> {
    graphs: Vec<FloatGraph<'a>>,
    parts: Vec<Part>,
    settings: &'a PrecisionSettings,
    scratch: &'a Path,
    cancel: &'a Cancel,
}

impl Graphs<'_> {
    /// The graphs of which a part is not in floats.
    fn with_forms(&self, forms: &[WeightForm], scratch: &Path) -> Result<BTreeMap<Role, Model>> {
        let ranges = Ranges::new();
        let mut graphs = BTreeMap::new();
        for (number, graph) in self.graphs.iter().enumerate() {
            let own = self.forms_of(number, forms);
            if own.is_float() {
                continue;
            }
            let (settings, file) = (self.settings, graph.component.file.as_str());
            let (model, ranges, cancel) = (graph.model.clone(), &ranges, self.cancel);
            let work = Work { model, settings, forms: &own, ranges, scratch, file, cancel };
            graphs.insert(graph.component.role, int4::single(work)?.model);
        }
        Ok(graphs)
    }

    fn forms_of(&self, graph: usize, forms: &[WeightForm]) -> WeightForms {
        let own = self.parts.iter().zip(forms).filter(|(part, _)| part.graph == graph);
        let named = own.flat_map(|(part, form)| part.weights.iter().map(|name| (name.clone(), *form)));
        WeightForms::floats_but(named.collect())
    }

    fn by_file(&self, forms: &[WeightForm]) -> BTreeMap<String, WeightForms> {
        let graphs = self.graphs.iter().enumerate();
        graphs.map(|(number, graph)| (graph.component.file.clone(), self.forms_of(number, forms))).collect()
    }

    fn row(&self, part: &Part, costs: &FormCosts, form: WeightForm) -> PartSensitivity {
        PartSensitivity {
            role: self.graphs[part.graph].component.role,
            part: part.label.clone(),
            float_bytes: costs.bytes[0],
            int8_bytes: costs.bytes[1],
            int8_kl: costs.kl[1],
            int4_bytes: costs.bytes[2],
            int4_kl: costs.kl[2],
            form,
        }
    }

    /// Bytes of a size that int4 in all parts leaves.
    ///
    /// Errors: `Error::Invalid` for a size that is too small.
    fn spare_within(&self, most: u64) -> Result<u64> {
        let smallest = self.written_bytes(&vec![WeightForm::Int4; self.parts.len()])?;
        most.checked_sub(smallest).ok_or_else(|| {
            let problem = format!("is {}, and int4 in all parts takes {}", human_bytes(most), human_bytes(smallest));
            Error::invalid("`--target-size`", problem).remedy(format!(
                "give at least {smallest} bytes, drop layers with `prune`, or take longer blocks with `--block-size 128`"
            ))
        })
    }

    /// Bytes of all component files in these forms.
    fn written_bytes(&self, forms: &[WeightForm]) -> Result<u64> {
        let folder = ScratchDir::create_in(self.scratch)?;
        let graphs = self.with_forms(forms, folder.path())?;
        let mut bytes = 0;
        for graph in &self.graphs {
            let Some(model) = graphs.get(&graph.component.role) else {
                bytes += graph.bytes;
                continue;
            };
            let path = folder.path().join("graph.onnx");
            let storage = match graph.component.external.is_empty() {
                true => Storage::Inline,
                false => Storage::External { file_name: "graph.onnx_data".to_string(), chunk_bytes: None },
            };
            let data = onnx::save(model, &path, &storage)?;
            let files = std::iter::once("graph.onnx").chain(data.iter().map(String::as_str));
            for file in files {
                let path = folder.path().join(file);
                bytes += std::fs::metadata(&path).map_err(|e| Error::io("read", &path, e))?.len();
            }
        }
        Ok(bytes)
    }
}

struct Search<'a> {
    graphs: Graphs<'a>,
    divergence: Divergence<'a>,
}

impl Search<'_> {
    /// Bytes and divergence of every part in every form.
    fn measure_parts(&mut self) -> Result<Vec<FormCosts>> {
        let count = self.graphs.parts.len();
        // Each step of the search for a divergence halves the upgrades, of which there are two for each part.
        let most = 2 * count + 2 + (2 * count).max(1).ilog2() as usize + 1;
        let samples = self.divergence.samples();
        notice(format!("{count} parts: up to {most} graphs on {samples} samples, {} prefills", most * samples));
        let progress = Progress::new("sensitivity", "graphs", 2 * count as u64);
        let mut rows = Vec::with_capacity(count);
        for part in 0..count {
            let mut kl = [0.0; 3];
            for form in [WeightForm::Int8, WeightForm::Int4] {
                let mut forms = vec![WeightForm::Float32; count];
                forms[part] = form;
                kl[form as usize] = self.measure(&forms)?;
                progress.advance(1);
            }
            rows.push(FormCosts { bytes: self.graphs.parts[part].bytes, kl });
        }
        Ok(rows)
    }

    /// The divergence with the parts in these forms.
    fn measure(&mut self, forms: &[WeightForm]) -> Result<f64> {
        let folder = ScratchDir::create_in(self.graphs.scratch)?;
        let graphs = self.graphs.with_forms(forms, folder.path())?;
        self.divergence.measure(&graphs)
    }

    /// As few upgrades as reach a divergence, found by halving their number.
    fn within_divergence(&mut self, rows: &[FormCosts], most: f64, int4_kl: f64) -> Result<(Vec<WeightForm>, f64)> {
        let upgrades = upgrades(rows);
        let forms = |count: usize| forms_after(rows.len(), &upgrades[..count]);
        if int4_kl <= most {
            return Ok((forms(0), int4_kl));
        }
        // All parts as floats are the model that the divergence is measured from.
        let (mut fails, mut holds) = (0, (upgrades.len(), 0.0));
        while holds.0 - fails > 1 {
            let middle = fails.midpoint(holds.0);
            let kl = self.measure(&forms(middle))?;
            match kl <= most {
                true => holds = (middle, kl),
                false => fails = middle,
            }
        }
        Ok((forms(holds.0), holds.1))
    }

    /// The upgrades that fit into a size, of which int4 in all parts leaves these bytes.
    fn within_size(
        &mut self,
        rows: &[FormCosts],
        (most, mut spare): (u64, u64),
        max_kl: Option<f64>,
        int4_kl: f64,
    ) -> Result<(Vec<WeightForm>, f64)> {
        let upgrades = upgrades(rows);
        let forms = loop {
            let forms = forms_within(rows, &upgrades, spare);
            let bytes = self.graphs.written_bytes(&forms)?;
            // Names and shapes of other operators take a little more room than their weights alone.
            match bytes.checked_sub(most).filter(|over| *over > 0) {
                Some(over) => spare = spare.saturating_sub(over),
                None => break forms,
            }
        };
        // Errors of parts may cancel each other, so that fewer changes may be better.
        let fewer = [spare / 2, spare / 4].map(|spare| forms_within(rows, &upgrades, spare));
        let mut tried = vec![vec![WeightForm::Int4; rows.len()]];
        let (mut forms, mut kl) = (forms, None::<f64>);
        for own in std::iter::once(forms.clone()).chain(fewer) {
            if tried.contains(&own) {
                continue;
            }
            let found = self.measure(&own)?;
            if kl.is_none_or(|least| found < least) {
                (forms, kl) = (own.clone(), Some(found));
            }
            tried.push(own);
        }
        let (forms, kl) = match kl.filter(|kl| *kl < int4_kl) {
            Some(kl) => (forms, kl),
            None => (vec![WeightForm::Int4; rows.len()], int4_kl),
        };
        match max_kl.filter(|max_kl| kl > *max_kl) {
            Some(max_kl) => {
                let problem = format!("is {max_kl}, and the best within {} is {kl:.2e}", human_bytes(most));
                Err(Error::invalid("`--max-kl`", problem).remedy("allow more with `--max-kl` or `--target-size`"))
            }
            None => Ok((forms, kl)),
        }
    }
}

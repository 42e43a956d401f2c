//! Ranges of activations on calibration data, measured in ONNX Runtime.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::base::{Cancel, Device, Error, Progress, Result};
use crate::bundle::{Bundle, Component, Role};
use crate::data::{Dataset, Encoder, Intake, Subset};
use crate::ir::{AttributeKind, DataType, Dim, Model, Node, Value, ValueId, ValueType};
use crate::onnx;
use crate::prompt::ImageArrays;
use crate::runtime::{Decoder, FeatureCache, Runtime, Session, SessionOptions, VisionEncoder, VlmSession};

use super::super::components::NOTHING;
use super::weights::Weights;

/// Least and greatest value of each activation, by the name of the value.
pub type Ranges = BTreeMap<String, (f32, f32)>;

/// Output with the least and the greatest value of each activation, `[n, 2]`.
const OUTPUT: &str = "interlace.ranges";

/// Samples on which activations are measured.
pub struct RangeCalibration<'a> {
    /// The data set.
    pub dataset: &'a Dataset,
    /// Which samples of it.
    pub subset: Subset,
    /// Samples with more tokens are left out.
    pub max_tokens: usize,
    /// Device of the sessions.
    pub device: Device,
    /// Set when the user asks to stop.
    pub cancel: &'a Cancel,
}

/// The ranges of what each component's products read, by the component's file.
///
/// Errors: as `Intake::encoded`; `Error::Invalid` when no sample is left and for activations that are not finite;
/// `Error::Engine` when a run fails; `Error::Interrupted` when the user asked to stop.
pub(super) fn ranges(bundle: &Bundle, calibration: &RangeCalibration<'_>) -> Result<BTreeMap<String, Ranges>> {
    let runtime = Runtime::new(calibration.device)?;
    let options = SessionOptions::default();
    let mut decoder = Tapped::open(bundle, bundle.require(Role::Decoder)?)?;
    let mut vision = bundle.component(Role::VisionEncoder).map(|part| Tapped::open(bundle, part)).transpose()?;
    let head_dim = bundle.config().and_then(|config| config.head_size());
    let session = Decoder::prefill_only(runtime.session_of(&decoder.model, &options)?, head_dim)?;
    let mut model = VlmSession::with_decoder(&runtime, bundle, session, &options, &FeatureCache::new(64 << 20))?;
    let mut encoder = vision.as_ref().map(|vision| Pictures::open(&runtime, bundle, vision)).transpose()?;
    let indices = calibration.dataset.draw(calibration.subset)?;
    let intake = Intake::new(calibration.dataset, bundle, calibration.max_tokens);
    let samples = Encoder::open(bundle, calibration.dataset)?;
    let progress = Progress::new("calibrate", "samples", indices.len() as u64);
    let mut count = 0;
    for encoded in intake.encoded(calibration.dataset, &indices, |sample| samples.conversation(sample))? {
        calibration.cancel.check(NOTHING)?;
        let prompt = encoded?.into_prompt();
        if let (Some(encoder), Some(vision)) = (&mut encoder, &mut vision) {
            for picture in &prompt.pictures {
                encoder.measure(picture, vision)?;
            }
        }
        let outputs = model.prefill(&prompt, false)?;
        decoder.add(&outputs.get(OUTPUT)?.to_f32()?)?;
        count += 1;
        progress.advance(1);
    }
    if count == 0 {
        let left_out = intake.left_out();
        let problem = format!("no sample is left to calibrate on: {}", left_out.summary().unwrap_or_default());
        return Err(Error::invalid(format!("data `{}`", calibration.dataset.path().display()), problem)
            .remedy("look at the data, or raise `--max-tokens`"));
    }
    let all = [Some(decoder), vision].into_iter().flatten().filter(|tapped| tapped.measured);
    Ok(all.map(|tapped| (tapped.file.clone(), tapped.ranges())).collect())
}

/// A graph with the ranges of what its products read as an output.
struct Tapped {
    file: String,
    model: Model,
    names: Vec<String>,
    found: Vec<(f32, f32)>,
    measured: bool,
}

impl Tapped {
    fn open(bundle: &Bundle, component: &Component) -> Result<Self> {
        let mut model = onnx::load(&bundle.path_of(component))?;
        super::refuse(&model, &component.file)?;
        let weights = Weights::of(&model);
        let operands: BTreeSet<ValueId> =
            model.graph.body.nodes.iter().filter_map(|node| Some(weights.product(node)?.operand)).collect();
        let names: Vec<String> = operands.iter().map(|&id| model.graph.name(id).to_string()).collect();
        tap(&mut model, &operands.into_iter().collect::<Vec<_>>());
        let found = vec![(0.0, 0.0); names.len()];
        Ok(Tapped { file: component.file.clone(), model, names, found, measured: false })
    }

    /// Errors: `Error::Invalid` for an activation that is not finite.
    fn add(&mut self, values: &[f32]) -> Result<()> {
        self.measured = true;
        for ((range, pair), name) in self.found.iter_mut().zip(values.chunks_exact(2)).zip(&self.names) {
            if let Some(value) = pair.iter().find(|value| !value.is_finite()) {
                let subject = format!("`{}`: activation `{name}`", self.file);
                return Err(Error::invalid(subject, format!("is {value} on a calibration sample"))
                    .remedy("run `eval` on the float model: it computes numbers that are not finite"));
            }
            *range = (range.0.min(pair[0]), range.1.max(pair[1]));
        }
        Ok(())
    }

    fn ranges(self) -> Ranges {
        self.names.into_iter().zip(self.found).collect()
    }
}

/// Adds the output: the reductions of the flattened values, in pairs.
fn tap(model: &mut Model, values: &[ValueId]) {
    let graph = &mut model.graph;
    let mut add = |op: &str, inputs: &[ValueId], attributes: &[(&str, AttributeKind)]| {
        let name = graph.fresh_name("interlace.range");
        let output = graph.add_value(Value { name, ..Value::default() });
        graph.body.nodes.push(Node {
            op_type: op.into(),
            inputs: inputs.iter().copied().map(Some).collect(),
            outputs: vec![Some(output)],
            attributes: attributes.iter().map(|(name, kind)| (name.to_string(), kind.clone().into())).collect(),
            ..Node::default()
        });
        output
    };
    let shape = AttributeKind::Tensor(crate::ir::Tensor::from_i64(&[2], &[1, 1]));
    let shape = add("Constant", &[], &[("value", shape)]);
    let mut ends = Vec::with_capacity(2 * values.len());
    for &value in values {
        for op in ["ReduceMin", "ReduceMax"] {
            let end = add(op, &[value], &[("keepdims", AttributeKind::Int(0))]);
            ends.push(add("Reshape", &[end, shape], &[]));
        }
    }
    if ends.is_empty() {
        return;
    }
    let joined = add("Concat", &ends, &[("axis", AttributeKind::Int(0))]);
    let dims = vec![Dim::Known(2 * values.len() as i64), Dim::Known(1)];
    let value = &mut graph.values[joined.index()];
    value.name = OUTPUT.to_string();
    value.ty = Some(ValueType::Tensor { dtype: DataType::Float, shape: Some(dims) });
    graph.body.outputs.push(joined);
}

/// The vision encoder, with its inputs made by the encoder as it is.
struct Pictures {
    encoder: VisionEncoder,
    session: Session,
    seen: BTreeSet<String>,
}

impl Pictures {
    fn open(runtime: &Runtime, bundle: &Bundle, tapped: &Tapped) -> Result<Self> {
        let options = SessionOptions::default();
        let part = bundle.require(Role::VisionEncoder)?;
        let plain = runtime.session(&bundle.path_of(part), &options)?;
        let encoder = VisionEncoder::new(plain, part.file.clone(), FeatureCache::new(0))?;
        Ok(Pictures { encoder, session: runtime.session_of(&tapped.model, &options)?, seen: BTreeSet::new() })
    }

    fn measure(&mut self, picture: &Arc<ImageArrays>, tapped: &mut Tapped) -> Result<()> {
        if tapped.names.is_empty() || !self.seen.insert(picture.key().clone()) {
            return Ok(());
        }
        let feeds = self.encoder.feeds(&[picture.as_ref()])?;
        let feeds: Vec<_> = feeds.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let outputs = self.session.run(&feeds, Some(&[OUTPUT]))?;
        tapped.add(&outputs.get(OUTPUT)?.to_f32()?)
    }
}

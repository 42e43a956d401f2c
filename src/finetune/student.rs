//! The student: the decoder from the first trained layer on, as a LibTorch program that runs layer by layer.

use std::collections::HashSet;
use std::ops::Range;

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result};
use crate::ir::ValueId;
use crate::rewrite::fuse_kernels;
use crate::runtime::InputKind;
use crate::torch::{self, Hold, Options, Program};

use crate::finetune::cut::{Cut, Suffix, inputs_of};
use crate::finetune::data::{FeedPlace, Feeds, TrainingBatch};
use crate::finetune::error::torch_error;
use crate::finetune::loss::{ComparedPoints, Compute, LossKind, TeacherOutput};
use crate::finetune::settings::{Precision, Settings};

/// The decoder from the first trained layer to the logits.
pub struct Student {
    program: Program,
    /// What computes, on the CPU, the values that layers read on the host, from the inputs of which a batch has a copy there;
    /// `None` where there are none.
    ahead: Option<Program>,
    /// Number of weights with gradients. They are the program's first parameters; the others are written by a fit only.
    trained: usize,
    suffix: Suffix,
    /// Type of the residual stream, and with it of the activations, where that is not f32.
    stream_kind: Option<Kind>,
    feeds: Feeds,
    /// The connector's inputs, and the embeddings with its output among them.
    connector: Option<ConnectorValues>,
    /// For each layer, the positions in `weights()` of the parameters that it reads.
    by_layer: Vec<Vec<usize>>,
    /// Points of the residual stream with targets, counted in layers from the first trained one, in the order of the
    /// targets.
    points: Vec<usize>,
    /// Those of `points` that the anchor term compares.
    anchor_points: Vec<usize>,
    /// The only layer in training, counted from the first trained one; None when all layers are trained together.
    pub only: Option<usize>,
}

/// Values of a connector that is a part of the network.
struct ConnectorValues {
    features: ValueId,
    places: ValueId,
    merged: ValueId,
    /// Positions in `weights()` of its parameters.
    weights: Vec<usize>,
}

/// Values other than the residual stream that the layers read, for one batch.
pub struct SideTensors(Vec<(ValueId, Tensor)>);

impl Student {
    /// Compiles the part of the graph that training runs.
    ///
    /// Errors: `Error::Unsupported` for unknown operators and inputs; `Error::Invalid` for weights that cannot be
    /// trained.
    pub fn compile(cut: &Cut, suffix: Suffix, precision: Precision, hold: Hold, device: Device) -> Result<Self> {
        let model = &cut.analysis.model;
        let graph = &model.graph;
        let mut given = graph.body.inputs.clone();
        given.push(suffix.streams[0]);
        let stream_kind = (precision == Precision::Bf16).then_some(Kind::BFloat16);
        let options = Options {
            device,
            trainable: cut.trained.clone(),
            writable: cut.written.clone(),
            inputs: Some(given),
            outputs: Some(vec![suffix.logits]),
            autocast: stream_kind,
            hold,
        };
        let fused = fuse_kernels(model).0;
        let program = Program::compile(&fused, &options)?;
        // The connector's inputs come with the batch.
        let inputs = inputs_of(graph, &suffix)?.into_iter().filter(|(_, input)| input.kind() != InputKind::Added);
        let inputs: Vec<_> = inputs.collect();
        let fed: HashSet<ValueId> = inputs.iter().map(|(id, _)| *id).collect();
        let (lengths, _) = program.host_reads(|id| fed.contains(&id));
        let on_cpu =
            || Options { inputs: options.inputs.clone(), outputs: Some(lengths.clone()), ..Options::default() };
        let ahead = (!lengths.is_empty()).then(|| Program::compile(&fused, &on_cpu())).transpose()?;
        let place = |id: ValueId| match (program.reads_on_host(id), &ahead) {
            (true, _) => FeedPlace::Host,
            (false, Some(ahead)) if ahead.reads(id) => FeedPlace::Both,
            (false, _) => FeedPlace::Device,
        };
        let feeds = Feeds::new(inputs, suffix.reads_tokens, place);
        let by_layer = suffix
            .trained
            .iter()
            .map(|ids| ids.iter().filter_map(|id| program.parameters().iter().position(|p| p.id == *id)).collect())
            .collect();
        let trained = cut.trained.len();
        let connector = cut.connector.as_ref().map(|connector| {
            let adapted = cut.adapted.iter().filter(|adapted| cut.of_connector(adapted.weight));
            let ids: Vec<ValueId> = adapted.flat_map(|adapted| [adapted.a, adapted.b]).collect();
            let weights =
                program.parameters()[..trained].iter().enumerate().filter(|(_, weight)| ids.contains(&weight.id));
            ConnectorValues {
                features: connector.features,
                places: connector.places,
                merged: connector.merged,
                weights: weights.map(|(number, _)| number).collect(),
            }
        });
        Ok(Student {
            program,
            ahead,
            trained,
            suffix,
            stream_kind,
            feeds,
            connector,
            by_layer,
            points: Vec::new(),
            anchor_points: Vec::new(),
            only: None,
        })
    }

    /// The network with these points of the residual stream to compare, in the order of the targets, and those of them that
    /// the anchor term compares. They are counted in layers from the first trained one.
    pub fn comparing(self, points: Vec<usize>, anchor_points: Vec<usize>) -> Self {
        Student { points, anchor_points, ..self }
    }

    /// Points of the residual stream with targets.
    pub fn points(&self) -> &[usize] {
        &self.points
    }

    /// The layers whose targets passes with these settings read: `None` for all, and an empty range where no loss term
    /// compares the stream.
    pub fn layers_compared(&self, settings: &Settings) -> Option<Range<usize>> {
        match settings.reads(TeacherOutput::Stream) {
            true => self.only.map(|layer| self.layers_to_run(layer)),
            false => Some(0..0),
        }
    }

    /// Makes this network, compiled from the same graph, a second worker of `first`. Both use the same weights in the
    /// same memory.
    ///
    /// Errors: `Error::Invalid` unless both train the same weights.
    pub fn work_for(&mut self, first: &Student) -> Result<()> {
        self.program.share_weights(&first.program)
    }

    /// Device of the weights.
    pub fn device(&self) -> Device {
        self.program.device()
    }

    /// Inputs of the graph that a batch brings.
    pub fn feeds(&self) -> &Feeds {
        &self.feeds
    }

    /// The trained weights, which are the leaves of the gradient.
    pub fn weights(&self) -> &[torch::Parameter] {
        &self.program.parameters()[..self.trained]
    }

    /// All weights that training or a fit writes, the trained ones first.
    pub fn written(&self) -> &[torch::Parameter] {
        self.program.parameters()
    }

    /// Name and tensor of an initializer that training or a fit writes.
    ///
    /// Errors: `Error::Invalid` for any other initializer.
    pub fn weight_of(&self, id: ValueId) -> Result<(String, Tensor)> {
        let weight = self.written().iter().find(|weight| weight.id == id);
        let weight = weight.ok_or_else(|| Error::invalid(format!("`{}`", self.program.name(id)), "is not trained"))?;
        Ok((weight.name.clone(), weight.tensor.shallow_clone()))
    }

    /// True when the term `kind` compares the residual stream at `point`.
    pub fn compares(&self, kind: LossKind, point: usize) -> bool {
        match kind.row().compute {
            Compute::Stream(ComparedPoints::TrainedAndAnchors, _) => self.anchor_points.contains(&point),
            Compute::Stream(ComparedPoints::All, _) => self.points.contains(&point),
            Compute::Answers(_) => false,
        }
    }

    /// Number of layers from the first trained one on.
    pub fn layers(&self) -> usize {
        self.suffix.streams.len() - 1
    }

    /// Positions in `weights()` of the parameters that `layer` reads, counted from the first trained layer.
    pub fn layer_parameters(&self, layer: usize) -> &[usize] {
        &self.by_layer[layer]
    }

    /// True for a weight, by its position in `weights()`, that the loss does not depend on in batches without pictures.
    pub fn reads_pictures_alone(&self, weight: usize) -> bool {
        self.connector.as_ref().is_some_and(|connector| connector.weights.contains(&weight))
    }

    /// The weights in training: those of the layer `only`, or all of them.
    pub fn weights_now(&self) -> impl Iterator<Item = &torch::Parameter> {
        let own = self.only.map(|layer| self.layer_parameters(layer));
        let now = move |number: usize| own.is_none_or(|own| own.contains(&number));
        self.weights().iter().enumerate().filter(move |(number, _)| now(*number)).map(|(_, weight)| weight)
    }

    /// The layers to run when only `layer` is trained: up to the last compared point that is not after the next trained
    /// layer.
    pub fn layers_to_run(&self, layer: usize) -> Range<usize> {
        let next = (layer + 1..self.layers()).find(|&next| !self.layer_parameters(next).is_empty());
        let next = next.unwrap_or(self.layers());
        layer..self.points.iter().copied().filter(|&point| point <= next).max().unwrap_or(layer)
    }

    /// The initializers that training or a fit writes, with their values in the graph's element type. Adapters are
    /// merged into their weights: `W + scale * A B`, where `scale` is `alpha / r`.
    ///
    /// Errors: `Error::Engine` when a tensor cannot be read back.
    pub fn changed(&self, cut: &Cut, scale: f64) -> Result<Vec<(ValueId, crate::ir::Tensor)>> {
        let graph = &cut.analysis.model.graph;
        let mut changed = Vec::new();
        let thin = |id: ValueId| cut.adapted.iter().any(|adapted| [adapted.a, adapted.b].contains(&id));
        for weight in self.written().iter().filter(|weight| !thin(weight.id)) {
            if cut.adapted.iter().all(|adapted| adapted.weight != weight.id) {
                changed.push((weight.id, torch::tensor_to_ir(&weight.name, &weight.tensor, weight.dtype)?));
            }
        }
        for adapted in &cut.adapted {
            let name = graph.name(adapted.weight);
            let (a, b) = (self.weight_of(adapted.a)?.1, self.weight_of(adapted.b)?.1);
            let stored = graph.body.initializer(adapted.weight);
            let quantised = cut.quantised_weight(adapted.weight);
            let base = match (self.weight_of(adapted.weight), stored, quantised) {
                (Ok((_, tensor)), ..) => tensor,
                (Err(_), Some(stored), _) => torch::tensor_from_ir(name, stored)?,
                (Err(_), None, Some(quantised)) => {
                    let values = quantised.form.values(cut.stored_body(adapted.weight))?;
                    torch::tensor_from_ir(name, &crate::ir::Tensor::from_f32(&quantised.dims, &values))?
                }
                (Err(error), None, None) => return Err(error),
            };
            let computed = quantised.map(|quantised| quantised.form.float_type(cut.stored_body(adapted.weight)));
            let dtype = stored.map(|stored| stored.dtype).or(computed).unwrap_or(crate::ir::DataType::Float);
            let merged = || -> Result<Tensor, tch::TchError> {
                let change = a.f_detach()?.f_matmul(&b.f_detach()?)?.f_mul_scalar(scale)?.f_to_device(Device::Cpu)?;
                let change = if adapted.transposed { change.f_tr()? } else { change };
                base.f_detach()?.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?.f_add(&change)
            };
            let merged = merged().map_err(torch_error(format!("the adapter of `{name}`")))?;
            changed.push((adapted.weight, torch::tensor_to_ir(name, &merged, dtype)?));
            if let Some(stored) = stored {
                stored.release();
            }
        }
        Ok(changed)
    }

    /// The stream with which a training pass begins, in the type of its activations.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn entering(&self, hidden: &Tensor) -> Result<Tensor> {
        match self.stream_kind {
            Some(kind) => hidden.f_to_kind(kind).map_err(torch_error("the residual stream")),
            None => Ok(hidden.shallow_clone()),
        }
    }

    /// Computes, once per batch, the values other than the residual stream that the layers read.
    ///
    /// Errors: `Error::Invalid` when an operator rejects its inputs.
    pub fn side(&self, batch: &TrainingBatch) -> Result<SideTensors> {
        let mut given = Vec::with_capacity(batch.inputs.len() + self.suffix.side.len());
        for (id, feed) in &batch.inputs {
            given.push((*id, feed.tensor(self.device())?));
        }
        match (&self.connector, &batch.connector) {
            (Some(own), Some(rows)) => {
                given.push((own.features, self.entering(&rows.features)?));
                given.push((own.places, rows.places.shallow_clone()));
            }
            // Without pictures the connector does not run.
            (Some(own), None) => given.push((own.merged, self.entering(&batch.hidden)?)),
            (None, _) => {}
        }
        // Some of these values take their length from the first stream, which is an input of the program.
        let mut fed: Vec<(ValueId, Tensor)> = given.iter().map(|(id, tensor)| (*id, tensor.shallow_clone())).collect();
        if !given.iter().any(|(id, _)| *id == self.suffix.streams[0]) {
            fed.push((self.suffix.streams[0], batch.hidden.shallow_clone()));
        }
        let lengths = self.lengths(batch, &fed)?;
        let known = |id: &ValueId| lengths.iter().any(|(length, _)| length == id);
        let side: Vec<ValueId> = self.suffix.side.iter().copied().filter(|id| !known(id)).collect();
        fed.extend(lengths.iter().map(|(id, tensor)| (*id, tensor.shallow_clone())));
        let values = tch::no_grad(|| self.program.run(&fed, &side))?;
        given.extend(lengths);
        given.extend(side.into_iter().zip(values));
        // Once for all layers, a value is put where they read it. On the way to the host this waits for the GPU.
        for (id, tensor) in &mut given {
            let place = match self.program.stays_on_host(*id, tensor) {
                true if tensor.device() == Device::Cpu || self.program.reads_on_host(*id) => Device::Cpu,
                _ => self.device(),
            };
            let placed = || tensor.f_to_device_(place, tensor.f_kind()?, place != Device::Cpu, false);
            *tensor = placed().map_err(torch_error("a value that layers read"))?;
        }
        Ok(SideTensors(given))
    }

    /// The values that layers read on the host and that depend on a batch's masks and positions, computed without the GPU.
    /// `fed` are the values that the network is given, of which others than the graph's inputs are known by their shape.
    ///
    /// Errors: `Error::Invalid` when an operator rejects its inputs.
    fn lengths(&self, batch: &TrainingBatch, fed: &[(ValueId, Tensor)]) -> Result<Vec<(ValueId, Tensor)>> {
        let Some(ahead) = &self.ahead else { return Ok(Vec::new()) };
        let mut on_host = Vec::with_capacity(fed.len());
        for (id, tensor) in fed {
            let feed = batch.inputs.iter().find(|(input, _)| input == id);
            let own = feed.map(|(_, feed)| feed.on_host()).transpose()?.flatten();
            let shape = || {
                let one = Tensor::f_zeros(vec![1; tensor.dim()], (tensor.f_kind()?, Device::Cpu))?;
                one.f_expand(tensor.size(), false)
            };
            let own = own.map_or_else(shape, Ok).map_err(torch_error("the shape of an input"))?;
            on_host.push((*id, own));
        }
        let values = tch::no_grad(|| ahead.run(&on_host, ahead.outputs()))?;
        Ok(ahead.outputs().iter().copied().zip(values).collect())
    }

    /// Values that a pass copies from the GPU to the host, for which it waits.
    #[cfg(test)]
    pub fn copied_from_device(&self) -> Vec<&str> {
        let fed = self.feeds.ids();
        self.program.host_reads(|id| fed.contains(&id)).1
    }

    /// Values that a pass computes ahead on the CPU.
    #[cfg(test)]
    pub fn computed_ahead(&self) -> Vec<&str> {
        let ids = self.ahead.iter().flat_map(|ahead| ahead.outputs());
        ids.map(|id| self.program.name(*id)).collect()
    }

    /// The residual stream after a layer, `[B, T, D]`, from the stream before it. The layer is counted from the first
    /// trained one.
    ///
    /// Errors: `Error::Invalid` when an operator rejects its inputs.
    pub fn layer(&self, layer: usize, stream: &Tensor, side: &SideTensors) -> Result<Tensor> {
        self.run(self.suffix.streams[layer], stream, self.suffix.streams[layer + 1], side)
    }

    /// As [`Student::layer`]; also returns `inner`, a value inside the layer.
    ///
    /// Errors: `Error::Invalid` when an operator rejects its inputs.
    pub fn layer_with(
        &self,
        layer: usize,
        stream: &Tensor,
        side: &SideTensors,
        inner: ValueId,
    ) -> Result<(Tensor, Tensor)> {
        let (from, to) = (self.suffix.streams[layer], self.suffix.streams[layer + 1]);
        let [output, inner] = self.values(from, stream, [to, inner], side)?;
        Ok((output, inner))
    }

    /// Logits `[N, V]` at the answer positions from the residual stream after the last layer.
    ///
    /// Errors: `Error::Unsupported` when the head's input does not have one row per token.
    pub fn head(&self, stream: &Tensor, batch: &TrainingBatch, side: &SideTensors) -> Result<Tensor> {
        self.answers(self.suffix.streams[self.layers()], stream, self.suffix.head_input, batch, side)
    }

    /// Logits `[N, V]` at the answer positions from the residual stream before the last layer. What that layer computes
    /// for each position independently, usually its MLP, is computed at the answer positions only.
    ///
    /// Errors: `Error::Unsupported` when the layer does not keep one row per token.
    pub fn last_layer_and_head(&self, stream: &Tensor, batch: &TrainingBatch, side: &SideTensors) -> Result<Tensor> {
        self.answers(self.suffix.streams[self.layers() - 1], stream, self.suffix.rows_from, batch, side)
    }

    /// The logits `[N, V]` at the answer positions from the value `from` of all positions; from the value `at` on, only
    /// these positions are computed.
    fn answers(
        &self,
        from: ValueId,
        value: &Tensor,
        at: ValueId,
        batch: &TrainingBatch,
        side: &SideTensors,
    ) -> Result<Tensor> {
        let all = self.run(from, value, at, side)?;
        let size = all.size();
        let places: i64 = size.iter().rev().skip(1).product();
        if batch.places() != places {
            let problem = format!("`{}` has shape {size:?}, one row per token was expected", self.program.name(at));
            return Err(Error::unsupported("the decoder's head", problem));
        }
        let width = size.last().copied().unwrap_or(0);
        let answers = all
            .f_reshape([places, width])
            .and_then(|all| all.f_index_select(0, &batch.answer_rows))
            .map_err(torch_error("the answer positions"))?;
        if at == self.suffix.logits {
            return Ok(answers);
        }
        let count = batch.answer_tokens as i64;
        let answers = answers.f_reshape([1, count, width]).map_err(torch_error("the answer positions"))?;
        let logits = self.run(at, &answers, self.suffix.logits, side)?;
        logits.f_reshape([count, -1]).map_err(torch_error("the logits"))
    }

    fn run(&self, from: ValueId, stream: &Tensor, to: ValueId, side: &SideTensors) -> Result<Tensor> {
        if from == to {
            return Ok(stream.shallow_clone());
        }
        let [value] = self.values(from, stream, [to], side)?;
        Ok(value)
    }

    fn values<const N: usize>(
        &self,
        from: ValueId,
        stream: &Tensor,
        wanted: [ValueId; N],
        side: &SideTensors,
    ) -> Result<[Tensor; N]> {
        let mut given = Vec::with_capacity(side.0.len() + 1);
        given.push((from, stream.shallow_clone()));
        given.extend(side.0.iter().filter(|(id, _)| *id != from).map(|(id, tensor)| (*id, tensor.shallow_clone())));
        let values = self.program.run(&given, &wanted)?;
        values.try_into().map_err(|_| {
            let names: Vec<&str> = wanted.iter().map(|&id| self.program.name(id)).collect();
            Error::invalid(format!("value `{}`", names.join("`, `")), "was not computed")
        })
    }
}

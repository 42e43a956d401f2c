//! Graph inputs of the trained part: masks, positions, DeepStack features and flags of a batch.

use tch::{Device, Kind, Tensor};

use crate::base::Result;
use crate::finetune::error::torch_error;
use crate::ir::{Dim, ValueId};
use crate::prompt::Array;
use crate::runtime::{Input, InputKind, Step, Training};
use crate::torch;

/// Graph inputs that the trained part reads besides the residual stream.
#[derive(Clone, Debug, Default)]
pub struct Feeds(Vec<FedInput>);

/// One of them.
#[derive(Clone, Debug)]
struct FedInput {
    id: ValueId,
    input: Input,
    /// What is made for it: the token inputs' values, or only their shape.
    training: Training,
    place: FeedPlace,
}

/// Where operators read an input of the graph.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FeedPlace {
    /// On the device.
    Device,
    /// On the host.
    Host,
    /// On the device, and on the host for lengths that are computed ahead.
    Both,
}

/// The value of one graph input for a batch.
#[derive(Debug)]
pub enum Feed {
    /// Numbers, which move with the batch.
    Data(Tensor),
    /// Numbers, which move with the batch, and a copy of them that stays on the host.
    Both(Tensor, Tensor),
    /// A flag or a length. It is read on the host and stays there.
    Host(Tensor),
    /// Zeros of this shape and kind: an empty cache, or the initial value of a state.
    Zeros(Vec<i64>, Kind),
    /// Zeros of this shape and kind that take the memory of one element, because only the shape is read.
    Shape(Vec<i64>, Kind),
}

impl Feeds {
    /// The inputs `inputs`. `reads_tokens`: the trained part reads the values of token ids or embeddings, not only
    /// their shape. `place`: where operators read an input.
    pub fn new(inputs: Vec<(ValueId, Input)>, reads_tokens: bool, place: impl Fn(ValueId) -> FeedPlace) -> Self {
        let fed = |(id, input): (ValueId, Input)| {
            let flag = matches!(input.kind(), InputKind::UseCacheBranch | InputKind::LogitsToKeep);
            let training = match input.row.training {
                Training::ShapeOnly if reads_tokens => Training::Fed,
                training => training,
            };
            FedInput { id, training, place: if flag { FeedPlace::Host } else { place(id) }, input }
        };
        Feeds(inputs.into_iter().map(fed).collect())
    }

    /// The values for a step with a residual stream of `hidden_size` numbers for each token, in host memory.
    ///
    /// Errors: `Error::Invalid` when the step lacks data for an input; `Error::Engine` from LibTorch.
    pub fn of(&self, step: &Step, hidden_size: usize) -> Result<Vec<(ValueId, Feed)>> {
        self.0.iter().map(|fed| Ok((fed.id, fed.of(step, hidden_size)?))).collect()
    }
}

#[cfg(test)]
impl Feeds {
    /// The inputs.
    pub fn ids(&self) -> Vec<ValueId> {
        self.0.iter().map(|fed| fed.id).collect()
    }

    /// Inputs of these names with open axes, and DeepStack features of width 2.
    pub fn of_names(names: &[&str]) -> Self {
        use crate::ir::{DataType, Graph, Value};
        let mut graph = Graph::default();
        let port = |name: &str| {
            let (dtype, shape) = match name {
                "use_cache_branch" => (DataType::Bool, vec![Dim::Known(1)]),
                name if name.starts_with("deepstack") => (DataType::Float, vec![Dim::Unknown, Dim::Known(2)]),
                _ => (DataType::Int64, vec![Dim::Unknown; 2]),
            };
            crate::runtime::Port { name: name.into(), dtype, shape }
        };
        let ports: Vec<_> = names.iter().map(|name| port(name)).collect();
        let inputs = Input::all_or_given(&ports);
        let ids = names.iter().map(|name| graph.add_value(Value { name: (*name).into(), ..Value::default() }));
        Feeds::new(ids.zip(inputs).collect(), false, |_| FeedPlace::Device)
    }
}

impl FedInput {
    fn of(&self, step: &Step, hidden_size: usize) -> Result<Feed> {
        let port = &self.input.port;
        let kind = torch::kind_of(port.dtype).unwrap_or(Kind::Float);
        let (rows, time) = (step.batch() as i64, step.time() as i64);
        Ok(match self.training {
            Training::ShapeOnly if port.rank() < 3 => Feed::Shape(vec![rows, time], kind),
            Training::ShapeOnly => Feed::Shape(vec![rows, time, port.width().unwrap_or(hidden_size) as i64], kind),
            Training::Empty => {
                let sizes = port.shape.iter().enumerate().map(|(axis, dim)| past_size(dim, axis, port.rank(), rows));
                Feed::Zeros(sizes.collect(), kind)
            }
            Training::Fed => {
                let tensor = tensor_of(self.input.make(step)?, kind);
                let tensor = tensor.map_err(torch_error(format!("input `{}`", port.name)))?;
                match self.place {
                    FeedPlace::Device => Feed::Data(tensor),
                    FeedPlace::Host => Feed::Host(tensor),
                    FeedPlace::Both => Feed::Both(tensor.shallow_clone(), tensor),
                }
            }
        })
    }
}

impl Feed {
    /// The tensor, of which data is where the batch is. Zeros are made on `device`, without a copy.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn tensor(&self, device: Device) -> Result<Tensor> {
        let made = match self {
            Feed::Data(tensor) | Feed::Host(tensor) | Feed::Both(tensor, _) => Ok(tensor.shallow_clone()),
            Feed::Zeros(sizes, kind) => Tensor::f_zeros(sizes, (*kind, device)),
            Feed::Shape(sizes, kind) => {
                let one = Tensor::f_zeros(vec![1; sizes.len()], (*kind, device));
                one.and_then(|one| one.f_expand(sizes, false))
            }
        };
        made.map_err(torch_error("a graph input"))
    }

    /// The tensor on the host; `None` for numbers that only the device reads.
    ///
    /// Errors: `Error::Engine` from LibTorch.
    pub fn on_host(&self) -> Result<Option<Tensor>> {
        match self {
            Feed::Data(_) => Ok(None),
            Feed::Both(_, own) => Ok(Some(own.shallow_clone())),
            Feed::Host(_) | Feed::Zeros(..) | Feed::Shape(..) => self.tensor(Device::Cpu).map(Some),
        }
    }

    /// The value with its data put elsewhere by `place`.
    ///
    /// Errors: those of `place`.
    pub fn moved(self, place: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        match self {
            Feed::Data(tensor) => Ok(Feed::Data(place(&tensor)?)),
            Feed::Both(tensor, own) => Ok(Feed::Both(place(&tensor)?, own)),
            other => Ok(other),
        }
    }
}

fn tensor_of(array: Array, kind: Kind) -> Result<Tensor, tch::TchError> {
    let shape: Vec<i64> = array.shape().iter().map(|&size| size as i64).collect();
    let tensor = match &array {
        Array::Float(array) => Tensor::f_from_slice(&array.iter().copied().collect::<Vec<f32>>()),
        Array::Int(array) => Tensor::f_from_slice(&array.iter().copied().collect::<Vec<i64>>()),
        Array::Bool(array) => Tensor::f_from_slice(&array.iter().copied().collect::<Vec<bool>>()),
    };
    tensor?.f_view(&shape[..])?.f_to_kind(kind)
}

/// Size of one axis of an empty cache. Axis 0 is the batch; an open axis 2 of 4 is the sequence, of length 0.
fn past_size(dim: &Dim, axis: usize, rank: usize, rows: i64) -> i64 {
    match dim {
        _ if axis == 0 => rows,
        Dim::Known(size) => *size,
        Dim::Symbol(name) if axis != 2 || rank != 4 => name.parse().unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ir::{DataType, Graph, Value};
    use crate::runtime::{Embedded, Port};

    fn port(name: &str, dtype: DataType, shape: &[i64]) -> Port {
        let axis = |&size: &i64| if size < 0 { Dim::Unknown } else { Dim::Known(size) };
        Port { name: name.into(), dtype, shape: shape.iter().map(axis).collect() }
    }

    #[test]
    fn inputs_are_data_or_zeros_or_stay_on_the_host() {
        let ports = [
            port("inputs_embeds", DataType::Float, &[-1, -1, -1]),
            port("input_ids", DataType::Int64, &[-1, -1]),
            port("attention_mask", DataType::Int64, &[-1, -1]),
            port("position_ids", DataType::Int64, &[-1, -1]),
            port("past_key_values.0.key", DataType::Float, &[-1, 3, -1, 8]),
            port("use_cache_branch", DataType::Bool, &[1]),
        ];
        let inputs: Vec<_> = Input::all("the decoder", &ports).unwrap();
        let mut graph = Graph::default();
        let ids: Vec<ValueId> =
            ports.iter().map(|port| graph.add_value(Value { name: port.name.clone(), ..Value::default() })).collect();
        let given = || ids.iter().copied().zip(inputs.clone()).collect::<Vec<_>>();
        let step = Step::padded_right(&[
            &Embedded::text(&[5, 6, 7], 2, vec![0.5; 6], 0, 1),
            &Embedded::text(&[8], 2, vec![0.25; 2], 0, 1),
        ]);
        let step = step.unwrap();
        let place = |id| match ids.iter().position(|own| *own == id) {
            Some(2) => FeedPlace::Both,
            Some(3) => FeedPlace::Host,
            _ => FeedPlace::Device,
        };
        let feeds = Feeds::new(given(), false, place);
        let values = feeds.of(&step, 2).unwrap();
        let tensors: Vec<Tensor> = values.iter().map(|(_, feed)| feed.tensor(Device::Cpu).unwrap()).collect();
        let sizes: Vec<Vec<i64>> = tensors.iter().map(Tensor::size).collect();
        let expected: [&[i64]; 6] = [&[2, 3, 2], &[2, 3], &[2, 3], &[2, 3], &[2, 3, 0, 8], &[1]];
        assert_eq!(sizes, expected);
        let forms = values.iter().map(|(_, feed)| match feed {
            Feed::Data(_) => "data",
            Feed::Both(..) => "both",
            Feed::Host(_) => "host",
            Feed::Zeros(..) => "zeros",
            Feed::Shape(..) => "shape",
        });
        assert_eq!(forms.collect::<Vec<_>>(), ["shape", "shape", "both", "host", "zeros", "host"]);
        // A copy on another device leaves the one on the host.
        let mask = feeds.of(&step, 2).unwrap().swap_remove(2).1;
        let moved = mask.moved(|tensor| Ok(tensor.zeros_like())).unwrap();
        let sums = [moved.on_host().unwrap().unwrap(), moved.tensor(Device::Cpu).unwrap()];
        assert_eq!(sums.map(|tensor| tensor.sum(Kind::Int64).int64_value(&[])), [4, 0]);
        // A layer that reads the embeddings gets their values.
        let values = Feeds::new(given(), true, |_| FeedPlace::Device).of(&step, 2).unwrap();
        let Feed::Data(embeddings) = &values[0].1 else { panic!("{:?}", values[0].1) };
        assert!(values[0].1.on_host().unwrap().is_none());
        assert_eq!(embeddings.double_value(&[0, 2, 1]), 0.5);
    }
}

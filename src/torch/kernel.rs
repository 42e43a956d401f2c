//! An operator at run time: a closure from tensors to tensors.

use tch::kind::Element;
use tch::{Device, Kind, TchError, Tensor};

use crate::ir::{Body, DataType};

use super::attributes::Attributes;
pub use super::op_error::{OpError, OpResult};

/// A compiled operator.
pub type Kernel = Box<dyn Fn(&Args) -> OpResult<Vec<Tensor>> + Send>;

/// The tensors of one call, in the node's order; `None` is an omitted optional input.
pub struct Args<'a> {
    pub(super) inputs: &'a [Option<&'a Tensor>],
}

impl<'a> Args<'a> {
    /// Input `index`, which is required.
    pub fn get(&self, index: usize) -> OpResult<&'a Tensor> {
        self.opt(index).ok_or_else(|| OpError::new(format!("input {index} is missing")))
    }

    /// Input `index`, if present.
    pub fn opt(&self, index: usize) -> Option<&'a Tensor> {
        self.inputs.get(index).copied().flatten()
    }

    /// All inputs that are present.
    pub fn all(&self) -> impl Iterator<Item = &'a Tensor> + '_ {
        self.inputs.iter().flatten().copied()
    }

    /// The elements of an integer tensor, if the input is present.
    pub fn ints(&self, index: usize) -> OpResult<Option<Vec<i64>>> {
        #[cfg(test)]
        READS.with_borrow_mut(|reads| reads.push(Some(index)));
        self.opt(index).map(host_ints).transpose()
    }

    /// The elements of an integer tensor.
    pub fn ints_required(&self, index: usize) -> OpResult<Vec<i64>> {
        self.get(index)?;
        Ok(self.ints(index)?.unwrap_or_default())
    }

    /// The single integer of an input, if present.
    pub fn int(&self, index: usize) -> OpResult<Option<i64>> {
        match self.ints(index)?.as_deref() {
            None => Ok(None),
            Some([value]) => Ok(Some(*value)),
            Some(values) => Err(OpError::new(format!("input {index} has {} elements, expected 1", values.len()))),
        }
    }

    /// The single number of an input as f64, if present.
    pub fn float(&self, index: usize) -> OpResult<Option<f64>> {
        #[cfg(test)]
        READS.with_borrow_mut(|reads| reads.push(Some(index)));
        let Some(tensor) = self.opt(index) else { return Ok(None) };
        if tensor.numel() != 1 {
            return Err(OpError::new(format!("input {index} has {} elements, expected 1", tensor.numel())));
        }
        let flat = tensor.f_reshape([1i64])?;
        Ok(Some(flat.f_double_value(&[0])?))
    }
}

#[cfg(test)]
thread_local! {
    /// Inputs whose numbers the operator in progress has read on the host; `None` for numbers of its own.
    static READS: std::cell::RefCell<Vec<Option<usize>>> = const { std::cell::RefCell::new(Vec::new()) };
}

/// Ends the list of reads of the operator in progress, which goes on after one inside it.
#[cfg(test)]
pub(super) fn take_reads() -> Vec<Option<usize>> {
    READS.take()
}

/// The reads since [`take_reads`], whose list goes on.
#[cfg(test)]
pub(super) fn put_reads(outer: Vec<Option<usize>>) -> Vec<Option<usize>> {
    READS.replace(outer)
}

/// The elements of an integer or bool tensor as i64, in order.
pub fn host_ints(tensor: &Tensor) -> OpResult<Vec<i64>> {
    let kind = tensor.f_kind()?;
    if is_float(kind) {
        return Err(OpError::new(format!("integers expected, {kind:?} found")));
    }
    let flat = tensor.f_to_kind(Kind::Int64)?.f_reshape([-1i64])?;
    Ok(Vec::<i64>::try_from(&flat)?)
}

/// Integers that an operator has computed itself, for which a run waits where that was on a GPU. The operator's row says that
/// it does so.
pub fn own_ints(tensor: &Tensor) -> OpResult<Vec<i64>> {
    #[cfg(test)]
    READS.with_borrow_mut(|reads| reads.push(None));
    host_ints(tensor)
}

/// A tensor on a device. A copy to a GPU does not wait for what the GPU computes; LibTorch's own `to_device` does, also for
/// a single number.
pub fn moved_to(tensor: &Tensor, device: Device) -> Result<Tensor, TchError> {
    tensor.f_to_device_(device, tensor.f_kind()?, device != Device::Cpu, false)
}

/// Numbers that were computed on the host, as a tensor `[N]` on a device.
pub fn list_on<T: Element>(numbers: &[T], device: Device) -> Result<Tensor, TchError> {
    moved_to(&Tensor::f_from_slice(numbers)?, device)
}

/// True for the floating-point kinds that support arithmetic.
pub fn is_float(kind: Kind) -> bool {
    matches!(kind, Kind::Half | Kind::BFloat16 | Kind::Float | Kind::Double)
}

/// Information about a node for the function that builds its kernel.
pub struct Build<'a> {
    /// The node's attributes. Compilation fails if one remains unread.
    pub attributes: &'a Attributes<'a>,
    /// Version of the operator's domain in the model's (or function's) imports.
    pub version: i64,
    /// True for connected inputs.
    pub inputs: &'a [bool],
    /// True for outputs that are read.
    pub outputs: &'a [bool],
    /// Element types of the inputs, where the graph declares them.
    pub(super) dtypes: &'a [Option<DataType>],
    /// True when the graph has 4-bit constants, which tensors hold as one byte per element.
    pub(super) has_4_bits: bool,
    /// Kind of matrix products, if it differs from that of the tensors.
    pub autocast: Option<Kind>,
    /// Compiles sub-graphs for control flow.
    pub bodies: &'a mut dyn BodyCompiler,
}

/// Compiles the sub-graphs of a node.
pub trait BodyCompiler {
    /// Compiles `body`. At run time its captured values follow the node's own inputs.
    ///
    /// Errors: when an operator of the body is unknown.
    fn compile(&mut self, body: &Body) -> OpResult<Box<dyn SubGraph>>;
}

/// A compiled sub-graph of a control-flow operator.
pub trait SubGraph: Send {
    /// Number of inputs of the body.
    fn input_count(&self) -> usize;

    /// Number of outputs of the body.
    fn output_count(&self) -> usize;

    /// Runs the body. `inputs` are the body's inputs, `args` those of the node, including captured values.
    fn run(&self, args: &Args, inputs: Vec<Tensor>) -> OpResult<Vec<Tensor>>;

    /// Declared kind and shape of output `index`, if the body declares both.
    fn declared(&self, index: usize) -> Option<(Kind, Vec<i64>)>;
}

impl dyn SubGraph {
    /// An empty tensor for output `index` of a body that runs zero times; `axis` is the axis of the iterations.
    ///
    /// Type and shape are the declared ones, as in ONNX Runtime. Without a declaration the body runs once on `inputs`
    /// to find them.
    pub fn nothing(
        &self,
        args: &Args,
        index: usize,
        axis: i64,
        inputs: impl FnOnce() -> OpResult<Vec<Tensor>>,
    ) -> OpResult<Tensor> {
        let (kind, mut shape) = match self.declared(index) {
            Some(declared) => declared,
            None => {
                let untold = |e: OpError| {
                    OpError::new(format!(
                        "the body runs zero times and does not declare the type of its output {index}: {}",
                        e.0
                    ))
                };
                let outputs = inputs().and_then(|inputs| self.run(args, inputs)).map_err(untold)?;
                let output =
                    outputs.get(index).ok_or_else(|| OpError::new(format!("the body has no output {index}")))?;
                (output.f_kind()?, output.size())
            }
        };
        let axis = axis_of(axis, shape.len() + 1)?;
        shape.insert(axis as usize, 0);
        Ok(Tensor::f_zeros(&shape, (kind, Device::Cpu))?)
    }
}

impl Build<'_> {
    /// True when output `index` is connected.
    pub fn wants(&self, index: usize) -> bool {
        self.outputs.get(index).copied().unwrap_or(false)
    }

    /// True when input `index` is connected.
    pub fn has(&self, index: usize) -> bool {
        self.inputs.get(index).copied().unwrap_or(false)
    }

    /// The declared element type of input `index`; `None` when the graph does not declare it and
    /// the tensor's kind decides.
    ///
    /// Errors: when the type is not declared and may be a 4-bit type, which the tensor's kind does not show.
    pub fn dtype(&self, index: usize) -> OpResult<Option<DataType>> {
        match self.dtypes.get(index).copied().flatten() {
            None if self.has_4_bits => Err(OpError::new(format!(
                "the graph does not say the element type of input {index}, and has constants of 4 bits"
            ))),
            dtype => Ok(dtype),
        }
    }

    /// Rejects connected outputs from number `first` on.
    pub fn only_outputs(&self, first: usize) -> OpResult<()> {
        match (first..self.outputs.len()).find(|&index| self.outputs[index]) {
            Some(index) => Err(OpError::new(format!("output {index} is not computed here"))),
            None => Ok(()),
        }
    }
}

/// A kernel from a closure with one result.
pub fn one(run: impl Fn(&Args) -> OpResult<Tensor> + Send + 'static) -> OpResult<Kernel> {
    Ok(Box::new(move |args| Ok(vec![run(args)?])))
}

/// A kernel from a closure with several results.
pub fn many(run: impl Fn(&Args) -> OpResult<Vec<Tensor>> + Send + 'static) -> OpResult<Kernel> {
    Ok(Box::new(run))
}

/// Largest valid size, stride or pad; the product of two fits i64.
pub const LARGEST: i64 = 1 << 31;

/// An axis counted from the front.
pub fn axis_of(axis: i64, rank: usize) -> OpResult<i64> {
    let rank = rank as i64;
    if (-rank..rank).contains(&axis) {
        Ok(if axis < 0 { axis + rank } else { axis })
    } else {
        Err(OpError::new(format!("axis {axis} is outside rank {rank}")))
    }
}

/// Axes counted from the front, ascending, each once.
pub fn axes_of(axes: &[i64], rank: usize) -> OpResult<Vec<i64>> {
    let mut out: Vec<i64> = axes.iter().map(|&axis| axis_of(axis, rank)).collect::<OpResult<_>>()?;
    out.sort_unstable();
    if out.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(OpError::new(format!("axes {axes:?} name an axis twice")));
    }
    Ok(out)
}

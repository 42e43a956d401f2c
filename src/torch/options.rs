//! Options of compilation.

use tch::{Device, Kind};

use crate::ir::ValueId;

use super::weights::Hold;

/// Options of compilation.
#[derive(Clone, Debug)]
pub struct Options {
    /// Device of the tensors; for a GPU use [`super::cuda_device`].
    pub device: Device,
    /// Initializers with gradients. They are copied to f32 (f64 stays f64). Frozen weights share the file's memory
    /// unless `hold` widens them.
    pub trainable: Vec<ValueId>,
    /// Initializers that are written to without gradients; copied like the trainable ones.
    pub writable: Vec<ValueId>,
    /// The values that runs receive; `None` for the graph's inputs. Any value is allowed; nodes that only lead to it
    /// are not compiled.
    pub inputs: Option<Vec<ValueId>>,
    /// The values that runs compute; `None` for the graph's outputs. Nodes on which none of them depends are not
    /// compiled. When `inputs` and `outputs` are both `None`, every node is compiled and must be supported.
    pub outputs: Option<Vec<ValueId>>,
    /// Kind of matrix products (such as bf16), and of what is computed from a stream that enters in it, but for powers,
    /// roots and sums, which are computed in f32. With a stream in f32 all but the products are.
    pub autocast: Option<Kind>,
    /// Storage of frozen weights.
    pub hold: Hold,
}

impl Default for Options {
    fn default() -> Self {
        let (device, hold) = (Device::Cpu, Hold::default());
        Options {
            device,
            trainable: Vec::new(),
            writable: Vec::new(),
            inputs: None,
            outputs: None,
            autocast: None,
            hold,
        }
    }
}

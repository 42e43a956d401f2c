//! One row of the operator table.

use super::kernel::{Build, Kernel, OpResult};

/// One operator.
pub struct Operator {
    /// `""` for the default domain.
    pub domain: &'static str,
    /// Name of the operator.
    pub op_type: &'static str,
    /// First version of the domain that the row implements.
    pub since: i64,
    /// Last version of the domain that the row implements.
    pub until: i64,
    /// True when gradients flow from its outputs to its floating-point inputs.
    pub differentiable: bool,
    /// Bit `i` is set when the content of input `i` is read on the host and determines the shape of the outputs.
    pub(super) host_inputs: u32,
    /// True when only the shape of input 0 is read.
    pub(super) shape_only: bool,
    /// True when inputs 0 and 1 are converted to the autocast kind, if there is one.
    pub(super) lowers: bool,
    /// True when operands in the autocast kind are read in f32; the results are in f32 then.
    pub(super) widens: bool,
    /// True when the results have the autocast kind where an operand has it.
    pub(super) rounds: bool,
    /// True when the output needs more memory than the input: quantised weights as floats.
    pub(super) expands: bool,
    /// True when it reads on the host numbers that it computes itself.
    pub(super) waits: bool,
    pub(super) build: fn(&mut Build) -> OpResult<Kernel>,
}

impl Operator {
    pub(super) const fn new(
        domain: &'static str,
        op_type: &'static str,
        since: i64,
        build: fn(&mut Build) -> OpResult<Kernel>,
    ) -> Self {
        Operator {
            domain,
            op_type,
            since,
            until: if domain.is_empty() { LATEST_OPSET } else { 1 },
            differentiable: false,
            host_inputs: 0,
            shape_only: false,
            lowers: false,
            widens: false,
            rounds: false,
            expands: false,
            waits: false,
            build,
        }
    }

    pub(super) const fn until(mut self, version: i64) -> Self {
        self.until = version;
        self
    }

    pub(super) const fn grad(mut self) -> Self {
        self.differentiable = true;
        self
    }

    pub(super) const fn host(mut self, mask: u32) -> Self {
        self.host_inputs = mask;
        self
    }

    pub(super) const fn shape_only(mut self) -> Self {
        self.shape_only = true;
        self
    }

    pub(super) const fn lowers(mut self) -> Self {
        self.lowers = true;
        self
    }

    pub(super) const fn widens(mut self) -> Self {
        self.widens = true;
        self
    }

    pub(super) const fn rounds(mut self) -> Self {
        self.rounds = true;
        self
    }

    pub(super) const fn expands(mut self) -> Self {
        self.expands = true;
        self
    }

    pub(super) const fn waits(mut self) -> Self {
        self.waits = true;
        self
    }

    /// True when input `index` is read on the host.
    pub(super) fn reads_on_host(&self, index: usize) -> bool {
        index < 32 && self.host_inputs >> index & 1 == 1 || index >= 32 && self.host_inputs == ALL
    }
}

/// Every input determines the shape of the outputs.
pub(super) const ALL: u32 = u32::MAX;

/// The latest version of the default domain against which the rows were checked.
pub(super) const LATEST_OPSET: i64 = 26;

/// Domain of ONNX Runtime's own operators.
pub(super) const MICROSOFT: &str = "com.microsoft";

//! One graph in ONNX Runtime, with named and typed tensors as inputs and outputs.

use std::path::Path;
use std::time::Duration;

use ort::ep;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use ort::value::{Outlet, ValueType};

use crate::base::{Device, Error, Result, Stopwatch, list_preview};
use crate::ir::{DataType, Dim};
use crate::onnx;

use super::backing::Backing;
use super::port::Port;
use super::tensor::{TensorValue, data_type};
use super::{ENGINE, library};

/// Value 1 makes products of 8-bit integers exact. Without it, processors that lack VNNI add pairs of products of
/// unsigned and signed 8-bit integers in 16 bits, and the sums saturate.
const EXACT_INTEGERS_KEY: &str = "session.x64quantprecision";
/// `accuracy_level` of the `MatMulNBits` nodes that ONNX Runtime creates by fusion; 1 is f32.
const QDQ_ACCURACY_KEY: &str = "session.qdq_matmulnbits_accuracy_level";

/// ONNX Runtime on one device; creates sessions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Runtime {
    device: Device,
}

/// Graph optimisation at load time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Optimisation {
    /// The unchanged graph.
    None,
    /// All optimisations for this machine.
    #[default]
    All,
}

/// Settings of a session.
#[derive(Clone, Copy, Debug, Default)]
pub struct SessionOptions {
    /// Threads inside one operator; `None` uses the pool of all cores that sessions share.
    pub threads: Option<usize>,
    /// Graph optimisation at load time.
    pub optimisation: Optimisation,
    /// Computes products exactly as in the graph. By default ONNX Runtime fuses a product with the
    /// `DequantizeLinear` of its 4-bit weights and rounds the other factor to 8 bits, and sums of 8-bit products
    /// saturate on some processors.
    pub exact_products: bool,
    /// The most bytes of a GPU that the session's arena takes; `None` for no limit.
    pub memory_limit: Option<u64>,
}

/// A loaded graph.
pub struct Session {
    inner: ort::session::Session,
    device: Device,
    subject: String,
    inputs: Vec<Port>,
    outputs: Vec<Port>,
    /// Total time of all runs.
    clock: Stopwatch,
    /// Declared after `inner`, so that it is dropped later.
    _backing: Vec<Backing>,
}

/// Inputs of a session on its device, for one run or several.
#[derive(Debug)]
pub struct Binding {
    inner: ort::session::IoBinding,
    /// Name and type of each input so far.
    given: Vec<(String, DataType)>,
}

/// Named results of a run.
#[derive(Debug)]
pub struct Outputs {
    subject: String,
    tensors: Vec<(String, TensorValue)>,
}

impl Runtime {
    /// Loads the library.
    ///
    /// Errors: `Error::Invalid` when ONNX Runtime does not load or has no execution provider for the device.
    pub fn new(device: Device) -> Result<Self> {
        let runtime = Runtime { device };
        runtime.builder(&SessionOptions::default())?;
        Ok(runtime)
    }

    /// The device of its sessions.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Loads a graph from its file; external data is in the same folder.
    ///
    /// Errors: `Error::Io` when there is no such file; as `onnx::load` when the file is damaged; `Error::Engine` when
    /// ONNX Runtime rejects a sound file.
    pub fn session(&self, path: &Path, options: &SessionOptions) -> Result<Session> {
        std::fs::metadata(path).map_err(|e| Error::io("open", path, e))?;
        let subject = format!("`{}`", path.display());
        let mut builder = self.builder(options)?;
        let refused = |e| match onnx::load(path) {
            Err(unsound) => unsound,
            Ok(_) => Error::engine(ENGINE, subject.clone(), e),
        };
        let inner = builder.commit_from_file(path).map_err(refused)?;
        Session::new(inner, self.device, subject, Vec::new())
    }

    pub(super) fn builder(&self, options: &SessionOptions) -> Result<SessionBuilder> {
        let failed = |e: ort::Error| Error::engine(ENGINE, "session options", e);
        let environment = library::environment()?;
        let mut builder = ort::session::Session::builder(&environment).map_err(failed)?;
        if let Some(threads) = options.threads {
            builder = builder.with_independent_thread_pool().map_err(|e| failed(e.into()))?;
            builder = builder.with_intra_threads(threads).map_err(|e| failed(e.into()))?;
        }
        let level = match options.optimisation {
            Optimisation::None => GraphOptimizationLevel::Disable,
            Optimisation::All => GraphOptimizationLevel::All,
        };
        builder = builder.with_optimization_level(level).map_err(|e| failed(e.into()))?;
        // Lengths differ from call to call, so cached buffer plans per shape would only accumulate.
        builder = builder.with_memory_pattern(false).map_err(|e| failed(e.into()))?;
        if options.exact_products {
            for key in [QDQ_ACCURACY_KEY, EXACT_INTEGERS_KEY] {
                builder = builder.with_config_entry(key, "1").map_err(|e| failed(e.into()))?;
            }
        }
        if let Device::Cuda(index) = self.device {
            let index = i32::try_from(index).map_err(|_| no_cuda(self.device, "the index is too large"))?;
            library::load_cuda();
            // Memory grows by the requested size only, which leaves the rest of the GPU to LibTorch.
            let mut provider = ep::CUDA::default()
                .with_device_id(index)
                .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested);
            if let Some(limit) = options.memory_limit {
                provider = provider.with_memory_limit(usize::try_from(limit).unwrap_or(usize::MAX));
            }
            builder = builder
                .with_execution_providers([provider.build().error_on_failure()])
                .map_err(|e| no_cuda(self.device, e))?;
        }
        Ok(builder)
    }
}

fn no_cuda(device: Device, problem: impl std::fmt::Display) -> Error {
    let problem = problem.to_string();
    if problem.contains("libcuda.so") {
        return Error::invalid(
            format!("device `{device}`"),
            "this machine has no NVIDIA driver: libcuda.so.1 is missing",
        )
        .remedy("install the driver of the GPU, or use `cpu`");
    }
    Error::invalid(
        format!("device `{device}`"),
        format!("ONNX Runtime has no CUDA execution provider for it: {problem}"),
    )
    .remedy(
        "run `scripts/setup --cuda`, or point ORT_DYLIB_PATH at the library of onnxruntime-gpu 1.30, on a machine with a \
         CUDA device; or use `cpu`",
    )
}

impl Session {
    pub(super) fn new(
        inner: ort::session::Session,
        device: Device,
        subject: String,
        backing: Vec<Backing>,
    ) -> Result<Self> {
        let inputs = inner.inputs().iter().map(|outlet| port(&subject, outlet)).collect::<Result<_>>()?;
        let outputs = inner.outputs().iter().map(|outlet| port(&subject, outlet)).collect::<Result<_>>()?;
        Ok(Session { inner, device, subject, inputs, outputs, clock: Stopwatch::default(), _backing: backing })
    }

    /// Name of the session in messages.
    pub fn subject(&self) -> &str {
        &self.subject
    }

    /// Time inside all runs so far.
    pub fn elapsed(&self) -> Duration {
        self.clock.elapsed()
    }

    /// Inputs in graph order.
    pub fn inputs(&self) -> &[Port] {
        &self.inputs
    }

    /// Outputs in graph order.
    pub fn outputs(&self) -> &[Port] {
        &self.outputs
    }

    /// An input by name.
    pub fn input(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().find(|port| port.name == name)
    }

    /// An output by name.
    pub fn output(&self, name: &str) -> Option<&Port> {
        self.outputs.iter().find(|port| port.name == name)
    }

    /// Runs the graph. `wanted` names the outputs to compute; `None` means all. Results are in CPU memory.
    ///
    /// Errors: `Error::Invalid` when an input is missing, unknown to the graph or of another type, or when the graph
    /// has no such output; `Error::Engine` when the run fails.
    pub fn run(&mut self, feeds: &[(&str, &TensorValue)], wanted: Option<&[&str]>) -> Result<Outputs> {
        self.run_keeping(feeds, wanted, |_| false)
    }

    /// [`Session::run`], after which outputs for which `stay` is true are on the session's device, so that the next call
    /// can use them without a copy.
    ///
    /// Errors: as `run`.
    pub fn run_keeping(
        &mut self,
        feeds: &[(&str, &TensorValue)],
        wanted: Option<&[&str]>,
        stay: impl Fn(&str) -> bool,
    ) -> Result<Outputs> {
        let mut binding = self.bind(&[])?;
        self.run_bound(&mut binding, feeds, wanted, stay)
    }

    /// Copies inputs to the session's device for any number of [`Session::run_bound`]. Tensors that are there already,
    /// as all are for a session on the CPU, are shared.
    ///
    /// Errors: `Error::Engine` when a tensor cannot be copied, or is none of the graph's inputs.
    pub fn bind(&self, feeds: &[(&str, &TensorValue)]) -> Result<Binding> {
        let failed = |e: ort::Error| Error::engine(ENGINE, self.subject.clone(), e);
        let inner = self.inner.create_binding().map_err(failed)?;
        let mut binding = Binding { inner, given: Vec::new() };
        feeds.iter().try_for_each(|(name, tensor)| binding.add(name, tensor).map_err(failed))?;
        Ok(binding)
    }

    /// [`Session::run_keeping`] with the inputs of `binding`, which is of this session, and `feeds`, which stay in it.
    ///
    /// Errors: as `run`.
    pub fn run_bound(
        &mut self,
        binding: &mut Binding,
        feeds: &[(&str, &TensorValue)],
        wanted: Option<&[&str]>,
        stay: impl Fn(&str) -> bool,
    ) -> Result<Outputs> {
        self.check(binding, feeds)?;
        let names: Vec<&str> = match wanted {
            Some(names) => names.to_vec(),
            None => self.outputs.iter().map(|port| port.name.as_str()).collect(),
        };
        if let Some(name) = names.iter().find(|name| self.outputs.iter().all(|port| port.name != **name)) {
            return Err(Error::invalid(self.subject.clone(), format!("has no output `{name}`")));
        }
        let failed = |e: ort::Error| Error::engine(ENGINE, self.subject.clone(), e);
        let on_cpu =
            MemoryInfo::new(AllocationDevice::CPU, 0, AllocatorType::Device, MemoryType::CPUOutput).map_err(failed)?;
        let on_device = match self.device {
            Device::Cpu => None,
            Device::Cuda(index) => {
                let (cuda, kind) = (AllocationDevice::CUDA, AllocatorType::Device);
                Some(MemoryInfo::new(cuda, index as i32, kind, MemoryType::Default).map_err(failed)?)
            }
        };
        let bind = || -> ort::Result<()> {
            feeds.iter().try_for_each(|(name, tensor)| binding.add(name, tensor))?;
            // The results of an earlier run would be taken for memory to write to.
            binding.inner.clear_outputs();
            names.iter().try_for_each(|name| {
                let place = on_device.as_ref().filter(|_| stay(name)).unwrap_or(&on_cpu);
                binding.inner.bind_output_to_device(*name, place)
            })
        };
        self.clock.time(bind).map_err(failed)?;
        let mut outputs = self.clock.time(|| self.inner.run_binding(&binding.inner)).map_err(failed)?;
        let tensors = names.iter().map(|name| match outputs.remove(*name) {
            Some(value) => Ok((name.to_string(), TensorValue::from_value(value)?)),
            None => Err(Error::engine(ENGINE, self.subject.clone(), format!("it gave no output `{name}`"))),
        });
        Ok(Outputs { subject: self.subject.clone(), tensors: tensors.collect::<Result<_>>()? })
    }

    fn check(&self, binding: &Binding, feeds: &[(&str, &TensorValue)]) -> Result<()> {
        let mut given: Vec<(&str, DataType)> = Vec::with_capacity(binding.given.len() + feeds.len());
        for (name, tensor) in feeds {
            given.push((name, tensor.dtype()?));
        }
        given.extend(binding.given.iter().map(|(name, dtype)| (name.as_str(), *dtype)));
        for port in &self.inputs {
            let Some((_, dtype)) = given.iter().find(|(name, _)| *name == port.name) else {
                return Err(Error::invalid(self.subject.clone(), format!("input `{}` was not given", port.name)));
            };
            if *dtype != port.dtype {
                return Err(Error::invalid(
                    self.subject.clone(),
                    format!("input `{}` takes {}, got {dtype}", port.name, port.dtype),
                ));
            }
        }
        // An input with a default value may be given or left out.
        let optional = |name: &str| self.inner.overridable_initializers().iter().any(|known| known.name() == name);
        match given.iter().find(|(name, _)| self.input(name).is_none() && !optional(name)) {
            Some((name, _)) => {
                let known: Vec<&str> = self.inputs.iter().map(|port| port.name.as_str()).collect();
                Err(Error::invalid(
                    self.subject.clone(),
                    format!("has no input `{name}`, it has {}", list_preview(&known, 8)),
                ))
            }
            None => Ok(()),
        }
    }
}

impl Binding {
    /// Copies an input to the session's device, in place of the earlier one of this name.
    fn add(&mut self, name: &str, tensor: &TensorValue) -> ort::Result<()> {
        self.inner.bind_input(name, tensor.value())?;
        self.given.retain(|(known, _)| known != name);
        if let Ok(dtype) = tensor.dtype() {
            self.given.push((name.to_string(), dtype));
        }
        Ok(())
    }
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Session({}, {} inputs, {} outputs)", self.subject, self.inputs.len(), self.outputs.len())
    }
}

impl Outputs {
    /// A result by name. Errors: `Error::Invalid` when the run has no such output.
    pub fn get(&self, name: &str) -> Result<&TensorValue> {
        let found = self.tensors.iter().find(|(key, _)| key == name).map(|(_, tensor)| tensor);
        found.ok_or_else(|| self.missing(name))
    }

    /// Removes and returns a result. Errors: `Error::Invalid` when the run has no such output.
    pub fn take(&mut self, name: &str) -> Result<TensorValue> {
        match self.tensors.iter().position(|(key, _)| key == name) {
            Some(position) => Ok(self.tensors.swap_remove(position).1),
            None => Err(self.missing(name)),
        }
    }

    /// All results in the requested order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &TensorValue)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    fn missing(&self, name: &str) -> Error {
        Error::invalid(self.subject.clone(), format!("gave no output `{name}`"))
    }
}

fn port(subject: &str, outlet: &Outlet) -> Result<Port> {
    let refuse = |what: String| Error::unsupported(format!("{subject}: `{}`", outlet.name()), what);
    let ValueType::Tensor { ty, shape, dimension_symbols } = outlet.dtype() else {
        return Err(refuse(format!("is not a tensor but {}", outlet.dtype())));
    };
    let dtype = data_type(*ty).ok_or_else(|| refuse(format!("element type {ty}")))?;
    let shape = shape
        .iter()
        .zip(dimension_symbols.iter())
        .map(|(&size, symbol)| match (size, symbol.as_str()) {
            (0.., _) => Dim::Known(size),
            (_, "") => Dim::Unknown,
            (_, symbol) => Dim::Symbol(symbol.to_string()),
        })
        .collect();
    Ok(Port { name: outlet.name().to_string(), dtype, shape })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Holds with and without a GPU: no machine has a device of the largest index, and device 0 works or is refused.
    #[test]
    fn a_cuda_device_works_or_is_refused_by_name() {
        let error = Runtime::new(Device::Cuda(u32::MAX)).expect_err("no such device");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().contains("device `cuda:4294967295`: "), "{error}");
        match Runtime::new(Device::Cuda(0)) {
            Ok(runtime) => {
                assert!(Path::new("/dev/nvidiactl").exists(), "a fall-back to the CPU");
                let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/embed_tokens.onnx");
                let embedded = [runtime, Runtime::new(Device::Cpu).expect("ONNX Runtime")].map(|runtime| {
                    let mut session = runtime.session(&path, &SessionOptions::default()).expect("a session");
                    let ids = TensorValue::new(&[1, 3], vec![5i64, 6, 7]).expect("ids");
                    let outputs = session.run(&[("input_ids", &ids)], None).expect("a run");
                    outputs.get("inputs_embeds").expect("an output").to_f32().expect("numbers").to_vec()
                });
                assert!(!embedded[0].is_empty());
                assert_eq!(embedded[0], embedded[1]);
            }
            Err(error) => {
                assert!(matches!(error, Error::Invalid { .. }), "{error}");
                let error = error.to_string();
                let remedy = error.contains("ORT_DYLIB_PATH") || error.contains("install the driver");
                assert!(error.contains("device `cuda:0`: ") && remedy, "{error}");
            }
        }
    }

    /// What a GPU runs, on the CPU: inputs that stay bound and outputs that stay on the device give the numbers of
    /// ONNX Runtime's plain call, in every run.
    #[test]
    fn bound_runs_equal_plain_ones_to_the_bit() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/model/onnx/embed_tokens.onnx");
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let mut session = runtime.session(&path, &SessionOptions::default()).expect("a session");
        let ids = |ids: &[i64]| TensorValue::new(&[1, ids.len()], ids.to_vec()).expect("ids");
        let (first, second) = (ids(&[5, 6, 7]), ids(&[9, 8, 7, 6]));
        let plain = |session: &mut Session, ids: &TensorValue| {
            let feeds = vec![("input_ids", ort::session::SessionInputValue::from(ids.value()))];
            let mut outputs = session.inner.run(feeds).expect("a plain run");
            let value = TensorValue::from_value(outputs.remove("inputs_embeds").expect("an output")).expect("a tensor");
            (value.shape(), value.to_f32().expect("numbers").to_vec())
        };
        let numbers = |outputs: Outputs| {
            let value = outputs.get("inputs_embeds").expect("an output");
            (value.shape(), value.to_f32().expect("numbers").to_vec())
        };
        let expected = [plain(&mut session, &first), plain(&mut session, &second)];
        assert_ne!(expected[0], expected[1]);
        let mut bound = session.bind(&[("input_ids", &first)]).expect("a binding");
        for _ in 0..2 {
            let outputs = session.run_bound(&mut bound, &[], None, |_| true).expect("a run");
            assert_eq!(numbers(outputs), expected[0]);
        }
        // Another shape in place of the bound input, which stays.
        for feeds in [&[("input_ids", &second)][..], &[]] {
            let outputs = session.run_bound(&mut bound, feeds, Some(&["inputs_embeds"]), |_| false).expect("a run");
            assert_eq!(numbers(outputs), expected[1]);
        }
        assert_eq!(numbers(session.run(&[("input_ids", &first)], None).expect("a run")), expected[0]);
        let mut empty = session.bind(&[]).expect("a binding");
        let error = session.run_bound(&mut empty, &[], None, |_| false).expect_err("no input").to_string();
        assert!(error.contains("input `input_ids` was not given"), "{error}");
        let wrong = TensorValue::new(&[1], vec![1.0f32]).expect("a tensor");
        let error = session.run(&[("input_ids", &wrong)], None).expect_err("another type").to_string();
        assert!(error.contains("takes int64, got float32"), "{error}");
    }

    #[test]
    fn a_missing_file_is_an_io_error() {
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let error = runtime.session(Path::new("no/such.onnx"), &SessionOptions::default()).expect_err("no file");
        assert!(matches!(error, Error::Io { .. }), "{error}");
        assert!(error.to_string().contains("`no/such.onnx`"), "{error}");
    }

    #[test]
    fn an_invalid_onnx_file_is_refused_by_name() {
        let folder = tempfile::tempdir().expect("folder");
        let path = folder.path().join("broken.onnx");
        std::fs::write(&path, b"not a model").expect("write");
        let runtime = Runtime::new(Device::Cpu).expect("ONNX Runtime");
        let error = runtime.session(&path, &SessionOptions::default()).expect_err("broken");
        assert!(matches!(error, Error::Invalid { .. }), "{error}");
        assert!(error.to_string().contains("broken.onnx"), "{error}");
    }
}

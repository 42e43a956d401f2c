//! The processes of a distributed run, started by `torchrun`.
//!
//! They meet, and exchange bytes and sums of CPU tensors, through LibTorch's c10d over Gloo; NCCL sums tensors on GPUs. This is
//! PyTorch's own choice for a process group whose back end is not named.
//!
//! All ranks must make collective calls in the same order. After a failure the group cannot be used any more: end the
//! process with an error, so that the launcher restarts all of them.

use std::env;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::net::TcpListener;
use std::os::fd::IntoRawFd;
use std::ptr::NonNull;
use std::time::Duration;

use tch::{Device, Kind, Tensor};

use self::nccl::{Functions, Nccl, Streams};
use super::cuda_device;
use crate::base::{self, Error, Peers, Result};

mod nccl;

/// Environment variable that chooses what sums tensors on GPUs: `nccl` (the default), or `gloo`, through host memory.
pub(super) const VARIABLE: &str = "INTERLACE_RANKS_BACKEND";

/// Time limit for waiting for a rank that runs but does not call. A rank that has ended is noticed at once.
const TIMEOUT: Duration = Duration::from_secs(30 * 60);

/// Bytes of tensors that are copied into one buffer and summed together, larger tensors aside.
const BUCKET_BYTES: usize = 64 << 20;

/// One of the processes of a run.
#[derive(Debug)]
pub struct Ranks {
    rank: usize,
    size: usize,
    local_rank: usize,
    gpu_sums: GpuSums,
    group: Group,
}

/// What sums tensors on GPUs.
#[derive(Debug)]
enum GpuSums {
    /// Nothing: a run on CPUs.
    None,
    /// Gloo, over copies in host memory.
    Host,
    /// NCCL, on the GPUs.
    Nccl(Nccl),
}

/// A back end of process groups, under PyTorch's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Backend {
    Gloo,
    Nccl,
}

impl Backend {
    /// What sums tensors on a device, where the user asks for `asked`.
    ///
    /// Errors: `Error::Invalid` for an unknown back end, and for `nccl` without a GPU.
    fn of(device: base::Device, asked: Option<&str>) -> Result<Backend> {
        let wrong = |problem: String| {
            Error::invalid(format!("environment variable {VARIABLE}"), problem)
                .remedy("unset it, or set it to `gloo` to sum the tensors of GPUs in host memory")
        };
        match (asked, device) {
            (None, base::Device::Cpu) | (Some("gloo"), _) => Ok(Backend::Gloo),
            (None | Some("nccl"), base::Device::Cuda(_)) => Ok(Backend::Nccl),
            (Some("nccl"), base::Device::Cpu) => {
                Err(wrong("is `nccl`, which sums tensors on GPUs only, and the device is cpu".to_string()))
            }
            (Some(other), _) => Err(wrong(format!("is `{other}`, `nccl` or `gloo` is expected"))),
        }
    }
}

/// A process's position among the processes of its run.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    rank: usize,
    size: usize,
    local_rank: usize,
    /// Address of the store through which the ranks connect.
    host: String,
    port: u16,
    /// True when the launcher serves the store.
    served: bool,
    /// Prefix of the store's keys, different for each restart.
    prefix: String,
}

impl Place {
    /// Reads the environment that `torchrun` sets; `None` without `WORLD_SIZE` or with a single process.
    ///
    /// Errors: `Error::Invalid` for a variable that is missing or is not a number in its range.
    fn of(variable: impl Fn(&str) -> Option<String>) -> Result<Option<Place>> {
        let Some(size) = variable("WORLD_SIZE") else { return Ok(None) };
        let wrong = |name: &str, found: &str, want: &str| {
            Error::invalid(format!("environment variable {name}"), format!("is `{found}`, {want} is expected")).remedy(
                "start with `torchrun --nproc-per-node N interlace-torch ...`, or unset WORLD_SIZE to run alone",
            )
        };
        let required = |name: &str| variable(name).ok_or_else(|| wrong(name, "not set", "what torchrun sets"));
        let number = |name: &str| -> Result<usize> {
            let text = required(name)?;
            text.parse().map_err(|_| wrong(name, &text, "a number"))
        };
        let size: usize = size.parse().map_err(|_| wrong("WORLD_SIZE", &size, "a number"))?;
        // c10d counts ranks in a C `int`.
        if size == 0 || c_int::try_from(size).is_err() {
            return Err(wrong("WORLD_SIZE", &size.to_string(), "a number from 1 to 2147483647"));
        }
        let rank = number("RANK")?;
        if rank >= size {
            return Err(wrong("RANK", &rank.to_string(), &format!("a number below WORLD_SIZE, which is {size},")));
        }
        let port = number("MASTER_PORT")?;
        let port = u16::try_from(port).map_err(|_| wrong("MASTER_PORT", &port.to_string(), "a port"))?;
        let host = required("MASTER_ADDR")?;
        if size == 1 {
            return Ok(None);
        }
        let restart = variable("TORCHELASTIC_RESTART_COUNT").unwrap_or_else(|| "0".to_string());
        Ok(Some(Place {
            rank,
            size,
            local_rank: number("LOCAL_RANK")?,
            host,
            port,
            served: variable("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true")),
            prefix: format!("interlace/{restart}"),
        }))
    }
}

impl Ranks {
    /// Connects to the other processes of this run, if the environment describes any.
    ///
    /// Errors: `Error::Invalid` for an incomplete environment; `Error::Engine` when the other
    /// processes cannot be reached.
    pub fn of_environment() -> Result<Option<Ranks>> {
        Place::of(|name| env::var(name).ok().filter(|value| !value.is_empty()))?.map(Ranks::connect).transpose()
    }

    fn connect(place: Place) -> Result<Ranks> {
        let Place { rank, size, local_rank, .. } = place;
        let text = |text: &str| {
            CString::new(text).map_err(|_| Error::invalid("MASTER_ADDR", "holds a zero byte, an address is expected"))
        };
        // By default the store would listen on every interface.
        let listener = match place.rank == 0 && !place.served {
            true => Some(TcpListener::bind((place.host.as_str(), place.port)).map_err(|e| {
                Error::invalid(
                    "MASTER_ADDR and MASTER_PORT",
                    format!("cannot listen on {}:{}: {e}", place.host, place.port),
                )
                .remedy("name an address of this machine and a free port")
            })?),
            false => None,
        };
        let own = own_address(&place.host, place.port)?;
        let (host, prefix, own) = (text(&place.host)?, text(&place.prefix)?, text(&own)?);
        let listener = listener.map_or(-1, |listener| listener.into_raw_fd());
        let timeout = i64::try_from(TIMEOUT.as_millis()).unwrap_or(i64::MAX);
        let mut error = std::ptr::null_mut();
        // SAFETY: the texts live until the call returns, and the socket's ownership moves to the group.
        let group = unsafe {
            interlace_group_new(
                host.as_ptr(),
                place.port,
                listener,
                prefix.as_ptr(),
                own.as_ptr(),
                rank as c_int,
                size as c_int,
                timeout,
                &mut error,
            )
        };
        let group = NonNull::new(group).ok_or_else(|| failed(error, "meeting the other ranks"))?;
        Ok(Ranks { rank, size, local_rank, gpu_sums: GpuSums::None, group: Group(group) })
    }

    /// Prepares sums of tensors on `device`, over NCCL for a GPU. All ranks make this call.
    ///
    /// Errors: `Error::Invalid` when INTERLACE_RANKS_BACKEND asks for something else than `nccl` and `gloo`;
    /// `Error::Unsupported` when the GPU or NCCL is missing; `Error::Engine` when another rank does not get as far.
    pub fn for_device(mut self, device: base::Device) -> Result<Ranks> {
        let asked = env::var(VARIABLE).ok().filter(|value| !value.is_empty());
        let backend = Backend::of(device, asked.as_deref())?;
        let base::Device::Cuda(index) = device else { return Ok(self) };
        let gpu = index as usize;
        let device = cuda_device(gpu)?;
        self.gpu_sums = match backend {
            Backend::Gloo => GpuSums::Host,
            Backend::Nccl => {
                let functions = Functions::load()?;
                // A rank without NCCL has ended; the others would wait for it in NCCL.
                self.wait_for_all()?;
                let streams = Streams { current: current_stream, idle: stream_is_idle };
                let (place, first) = ((self.rank, self.size), |bytes: &[u8]| self.from_first(bytes));
                GpuSums::Nccl(Nccl::connect(functions, streams, (device, gpu), place, first)?)
            }
        };
        Ok(self)
    }

    /// This process's rank, from 0.
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// Number of processes, at least 2.
    pub fn size(&self) -> usize {
        self.size
    }

    /// This process's rank on its machine, which selects its device.
    pub fn local_rank(&self) -> usize {
        self.local_rank
    }

    /// Sums the tensors over all ranks in place, with bitwise equal results on all of them. Shapes must be equal on all
    /// ranks and all tensors must have one element type. Tensors on a GPU stay there where NCCL sums them.
    ///
    /// Errors: `Error::Engine` when a rank has ended or does not make the call in time, and for a device for which
    /// [`Ranks::for_device`] was not called.
    pub fn sum(&self, tensors: &[Tensor]) -> Result<()> {
        let mut groups: Vec<((Kind, Device), Vec<&Tensor>)> = Vec::new();
        for tensor in tensors {
            let own = (tensor.kind(), tensor.device());
            match groups.iter_mut().find(|(group, _)| *group == own) {
                Some((_, others)) => others.push(tensor),
                None => groups.push((own, vec![tensor])),
            }
        }
        for ((_, device), tensors) in &groups {
            let nccl = self.nccl_of(*device)?;
            if let Some(nccl) = nccl {
                // NCCL does not notice a rank that has ended, so all meet first, each with an idle GPU.
                nccl.wait_for_gpu(TIMEOUT)?;
                self.sum_on_host(&Tensor::from_slice(&[1.0]))?;
            }
            for bucket in buckets(tensors, BUCKET_BYTES) {
                self.sum_bucket(bucket, nccl)?;
            }
        }
        Ok(())
    }

    /// The communicator that sums tensors of `device`; `None` for sums in host memory.
    fn nccl_of(&self, device: Device) -> Result<Option<&Nccl>> {
        match &self.gpu_sums {
            GpuSums::Nccl(nccl) if nccl.device() == device => Ok(Some(nccl)),
            GpuSums::Host => Ok(None),
            _ if device == Device::Cpu => Ok(None),
            _ => Err(Error::engine(
                "c10d",
                "the sum over ranks",
                format!("this run has no process group for {device:?}"),
            )),
        }
    }

    fn sum_bucket(&self, tensors: &[&Tensor], nccl: Option<&Nccl>) -> Result<()> {
        let problem = |e: tch::TchError| Error::engine("LibTorch", "the sum over ranks", e);
        let _guard = tch::no_grad_guard();
        if let Some(own) = in_one_piece(tensors).filter(|own| nccl.is_some() || own.device() == Device::Cpu) {
            return match nccl {
                Some(nccl) => nccl.sum(&own),
                None => self.sum_on_host(&own),
            };
        }
        let flat: Vec<Tensor> = tensors
            .iter()
            .map(|tensor| tensor.f_detach()?.f_reshape([-1]))
            .collect::<Result<_, _>>()
            .map_err(problem)?;
        let whole = Tensor::f_cat(&flat, 0).map_err(problem)?;
        let whole = match nccl {
            Some(nccl) => nccl.sum(&whole).map(|()| whole),
            None => whole.f_to_device(Device::Cpu).map_err(problem).and_then(|whole| {
                self.sum_on_host(&whole)?;
                Ok(whole)
            }),
        }?;
        let mut start = 0;
        for tensor in tensors {
            let count = tensor.numel() as i64;
            let own = whole.f_narrow(0, start, count).and_then(|own| own.f_reshape(tensor.size())).map_err(problem)?;
            tensor.f_detach().and_then(|mut detached| detached.f_copy_(&own)).map_err(problem)?;
            start += count;
        }
        Ok(())
    }

    /// Sums a CPU tensor in place, over Gloo.
    fn sum_on_host(&self, tensor: &Tensor) -> Result<()> {
        self.call("the sum over ranks", |error| {
            // SAFETY: the group and the tensor live until the call returns.
            unsafe { interlace_group_sum(self.group.0.as_ptr(), tensor.as_ptr().cast(), error) }
        })
    }

    /// The sum of a number over all ranks.
    ///
    /// Errors: as [`Ranks::sum`].
    pub fn sum_of(&self, value: f64) -> Result<f64> {
        let tensor = Tensor::from_slice(&[value]);
        self.sum(std::slice::from_ref(&tensor))?;
        Ok(tensor.double_value(&[0]))
    }

    /// Sends the bytes of rank 0 to all ranks; the argument of other ranks is ignored.
    ///
    /// Errors: as [`Ranks::sum`].
    pub fn from_first(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        let length = Tensor::from_slice(&[bytes.len() as i64]);
        self.broadcast(&length, 0)?;
        let length = usize::try_from(length.int64_value(&[0])).unwrap_or_default();
        let content = match self.rank {
            0 => Tensor::from_slice(bytes),
            _ => Tensor::zeros([length as i64], (Kind::Uint8, Device::Cpu)),
        };
        if length > 0 {
            self.broadcast(&content, 0)?;
        }
        Vec::<u8>::try_from(&content).map_err(|e| Error::engine("LibTorch", "what rank 0 sent", e))
    }

    /// The bytes of every rank, in the order of the ranks.
    ///
    /// Errors: as [`Ranks::sum`].
    pub fn of_all(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        let mut all = Vec::with_capacity(self.size);
        for rank in 0..self.size {
            let length = Tensor::from_slice(&[bytes.len() as i64]);
            self.broadcast(&length, rank)?;
            let length = usize::try_from(length.int64_value(&[0])).unwrap_or_default();
            let content = match rank == self.rank {
                true => Tensor::from_slice(bytes),
                false => Tensor::zeros([length as i64], (Kind::Uint8, Device::Cpu)),
            };
            if length > 0 {
                self.broadcast(&content, rank)?;
            }
            all.push(Vec::<u8>::try_from(&content).map_err(|e| Error::engine("LibTorch", "what a rank sent", e))?);
        }
        Ok(all)
    }

    /// Returns when all ranks have made this call.
    ///
    /// Errors: as [`Ranks::sum`].
    pub fn wait_for_all(&self) -> Result<()> {
        self.sum_of(1.0).map(|_| ())
    }

    fn broadcast(&self, tensor: &Tensor, from: usize) -> Result<()> {
        self.call("a broadcast", |error| {
            // SAFETY: the group and the tensor live until the call returns.
            unsafe { interlace_group_broadcast(self.group.0.as_ptr(), tensor.as_ptr().cast(), from as c_int, error) }
        })
    }

    fn call(&self, subject: &str, work: impl FnOnce(*mut *mut c_char) -> bool) -> Result<()> {
        let mut error = std::ptr::null_mut();
        match work(&mut error) {
            true => Ok(()),
            false => Err(failed(error, &format!("{subject} of rank {} of {}", self.rank, self.size))),
        }
    }
}

impl Peers for Ranks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.size
    }

    fn of_all(&self, bytes: &[u8]) -> Result<Vec<Vec<u8>>> {
        Ranks::of_all(self, bytes)
    }
}

/// Cuts tensors into runs of at most `most` bytes; a larger tensor is alone.
fn buckets<'a, 't>(tensors: &'a [&'t Tensor], most: usize) -> Vec<&'a [&'t Tensor]> {
    let bytes = |tensor: &Tensor| tensor.numel() * tensor.kind().elt_size_in_bytes();
    let (mut cut, mut start, mut held) = (Vec::new(), 0, 0);
    for (at, tensor) in tensors.iter().enumerate() {
        if at > start && held + bytes(tensor) > most {
            cut.push(&tensors[start..at]);
            (start, held) = (at, 0);
        }
        held += bytes(tensor);
    }
    cut.push(&tensors[start..]);
    cut
}

/// A single contiguous tensor, which is summed where it is: a large one has no room for a copy. It shares the memory.
fn in_one_piece(tensors: &[&Tensor]) -> Option<Tensor> {
    match tensors {
        [only] if only.is_contiguous() => only.f_detach().ok(),
        _ => None,
    }
}

/// Makes `gpu` this thread's GPU and gives the stream (`cudaStream_t`) on which LibTorch computes there.
fn current_stream(gpu: usize) -> Result<*mut c_void> {
    let (mut stream, mut error) = (std::ptr::null_mut(), std::ptr::null_mut());
    // SAFETY: the pointers live until the call returns.
    match unsafe { interlace_stream(gpu as c_int, &mut stream, &mut error) } {
        true => Ok(stream),
        false => Err(failed(error, &format!("the stream of cuda:{gpu}"))),
    }
}

/// True when everything queued on LibTorch's stream of `gpu` is done.
fn stream_is_idle(gpu: usize) -> Result<bool> {
    let (mut idle, mut error) = (false, std::ptr::null_mut());
    // SAFETY: the pointers live until the call returns.
    match unsafe { interlace_stream_idle(gpu as c_int, &mut idle, &mut error) } {
        true => Ok(idle),
        false => Err(failed(error, &format!("the work of cuda:{gpu}"))),
    }
}

/// The address of this machine from which the store is reached: the other ranks connect to it.
fn own_address(host: &str, port: u16) -> Result<String> {
    let socket = std::net::UdpSocket::bind("0.0.0.0:0");
    let address = socket.and_then(|socket| {
        // Connecting a UDP socket sends nothing; it only selects the interface.
        socket.connect((host, port))?;
        socket.local_addr()
    });
    let address = address.map_err(|e| {
        Error::invalid("MASTER_ADDR", format!("`{host}` cannot be reached: {e}")).remedy("name the machine of rank 0")
    })?;
    Ok(address.ip().to_string())
}

fn failed(error: *mut c_char, subject: &str) -> Error {
    Error::engine("c10d", subject, text_of(error))
}

/// The first line of a text of LibTorch's own, which is freed.
pub(super) fn text_of(error: *mut c_char) -> String {
    if error.is_null() {
        return "no reason is given".to_string();
    }
    // SAFETY: the text is zero-terminated and freed once, here.
    let text = unsafe {
        let text = CStr::from_ptr(error).to_string_lossy().into_owned();
        interlace_text_free(error);
        text
    };
    text.lines().next().unwrap_or_default().to_string()
}

#[derive(Debug)]
struct Group(NonNull<c_void>);

// SAFETY: c10d's groups may be used from any thread, one at a time; `Ranks` has no other mutable state.
unsafe impl Send for Group {}
// SAFETY: see above; concurrent collectives of two threads could mix up their order, but not corrupt memory.
unsafe impl Sync for Group {}

impl Drop for Group {
    fn drop(&mut self) {
        // SAFETY: created by `interlace_group_new`, freed once.
        unsafe { interlace_group_free(self.0.as_ptr()) }
    }
}

unsafe extern "C" {
    fn interlace_group_new(
        host: *const c_char,
        port: u16,
        listener: c_int,
        prefix: *const c_char,
        own_address: *const c_char,
        rank: c_int,
        size: c_int,
        timeout_ms: i64,
        error: *mut *mut c_char,
    ) -> *mut c_void;
    fn interlace_group_free(group: *mut c_void);
    fn interlace_group_sum(group: *mut c_void, tensor: *const c_void, error: *mut *mut c_char) -> bool;
    fn interlace_group_broadcast(
        group: *mut c_void,
        tensor: *const c_void,
        root: c_int,
        error: *mut *mut c_char,
    ) -> bool;
    fn interlace_stream(gpu: c_int, stream: *mut *mut c_void, error: *mut *mut c_char) -> bool;
    fn interlace_stream_idle(gpu: c_int, idle: *mut bool, error: *mut *mut c_char) -> bool;
    #[cfg(test)]
    fn interlace_group_layout() -> usize;
    fn interlace_text_free(text: *mut c_char);
}

#[cfg(test)]
mod tests;

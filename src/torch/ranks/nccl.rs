//! Sums of tensors on GPUs over ranks, by NCCL.
//!
//! This calls NCCL's C interface and not c10d's `ProcessGroupNCCL`. One program serves LibTorch's builds with and without CUDA:
//! the builds without it do not have that class, and its declaration needs the headers of CUDA and NCCL, which few machines
//! have. NCCL's C interface needs no header and keeps its binary form from release to release. LibTorch with CUDA has
//! already loaded `libnccl.so.2`, so both use the same library.
//!
//! Nothing here waits without a limit. The communicator is a non-blocking one (NCCL 2.14 or newer). Before a sum all ranks
//! meet over Gloo, which notices a rank that has ended at once; the sum itself then only takes the time of the transfer.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use tch::{Device, Kind, Tensor};

use crate::base::{Error, Result};
use crate::torch::library::Library;

/// The name under which NCCL's releases 2.x are installed.
const LIBRARY: &str = "libnccl.so.2";

/// First release with non-blocking communicators, as NCCL counts: 10000 for the major, 100 for the minor version.
const FIRST_VERSION: c_int = 21400;

/// Time limit for one transfer, or for making the communicator, after all ranks have met.
const LIMIT: Duration = Duration::from_secs(120);

/// Pause between two looks at a communicator or stream.
const PAUSE: Duration = Duration::from_micros(50);

/// `ncclResult_t`.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;

/// `ncclRedOp_t`.
const SUM: c_int = 0;

/// `ncclUniqueId`: the address at which the ranks meet.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct UniqueId(pub(super) [u8; 128]);

/// `ncclConfig_t` of NCCL 2.14. Later releases add fields behind these and read as many as `size` says.
#[repr(C)]
pub(super) struct Config {
    pub(super) size: usize,
    pub(super) magic: u32,
    pub(super) version: u32,
    pub(super) blocking: c_int,
}

macro_rules! functions {
    ($($field:ident = $symbol:literal ($($argument:ty),*) -> $result:ty;)*) => {
        /// NCCL's functions, with the types of `nccl.h`. A communicator is an opaque pointer.
        #[derive(Clone, Copy, Debug)]
        pub(super) struct Functions {
            $(pub(super) $field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn of(library: Library) -> Result<Self, String> {
                Ok(Functions {
                    $($field: {
                        let address = library.function($symbol)?;
                        // SAFETY: this is the type that `nccl.h` declares for the function.
                        unsafe {
                            std::mem::transmute::<NonNull<c_void>, unsafe extern "C" fn($($argument),*) -> $result>(address)
                        }
                    },)*
                })
            }
        }
    };
}

functions! {
    get_version = c"ncclGetVersion"(*mut c_int) -> c_int;
    get_unique_id = c"ncclGetUniqueId"(*mut UniqueId) -> c_int;
    init = c"ncclCommInitRankConfig"(*mut *mut c_void, c_int, UniqueId, c_int, *mut Config) -> c_int;
    state = c"ncclCommGetAsyncError"(*mut c_void, *mut c_int) -> c_int;
    all_reduce = c"ncclAllReduce"(*const c_void, *mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void) -> c_int;
    finalize = c"ncclCommFinalize"(*mut c_void) -> c_int;
    destroy = c"ncclCommDestroy"(*mut c_void) -> c_int;
    abort = c"ncclCommAbort"(*mut c_void) -> c_int;
    error_text = c"ncclGetErrorString"(c_int) -> *const c_char;
    last_error = c"ncclGetLastError"(*mut c_void) -> *const c_char;
}

impl Functions {
    /// Opens NCCL.
    ///
    /// Errors: `Error::Unsupported` when it is not there or is too old.
    pub fn load() -> Result<Self> {
        Self::load_from(Path::new(LIBRARY))
    }

    fn load_from(path: &Path) -> Result<Self> {
        let refused = |problem: String| {
            Error::unsupported("sums over several GPUs", format!("NCCL is needed: {problem}")).remedy(format!(
                "run `scripts/setup --cuda`, which fetches it; or put the folder of {LIBRARY} on LD_LIBRARY_PATH; or set \
                 {}=gloo to sum in host memory, which is slower",
                super::VARIABLE
            ))
        };
        let functions = Library::open(path).and_then(Self::of).map_err(refused)?;
        let mut version = 0;
        // SAFETY: the function writes one number.
        let result = unsafe { (functions.get_version)(&mut version) };
        if result != SUCCESS || version < FIRST_VERSION {
            return Err(refused(format!(
                "`{}` says version {version}, {FIRST_VERSION} or newer is needed",
                path.display()
            )));
        }
        Ok(functions)
    }
}

/// The stream on which LibTorch computes on a GPU.
#[derive(Clone, Copy, Debug)]
pub(super) struct Streams {
    /// Makes the GPU the calling thread's and gives the stream (`cudaStream_t`).
    pub(super) current: fn(gpu: usize) -> Result<*mut c_void>,
    /// True when everything on the stream is done.
    pub(super) idle: fn(gpu: usize) -> Result<bool>,
}

/// One rank's communicator. The results of sums are equal to the bit on all ranks: NCCL adds each element up in one place and
/// sends the sum round.
#[derive(Debug)]
pub(super) struct Nccl {
    functions: Functions,
    streams: Streams,
    device: Device,
    gpu: usize,
    /// Null after an abort.
    communicator: Mutex<Communicator>,
}

#[derive(Debug)]
struct Communicator(*mut c_void);

// SAFETY: NCCL's communicators may be used from any thread, one at a time: a mutex holds this one.
unsafe impl Send for Communicator {}

impl Nccl {
    /// Makes the communicator of this rank on its `gpu`, whose tensors are on `device`. `from_first` sends bytes of rank 0 to
    /// all ranks.
    ///
    /// Errors: `Error::Engine` when NCCL fails or a rank does not come in time; those of `from_first`.
    pub fn connect(
        functions: Functions,
        streams: Streams,
        (device, gpu): (Device, usize),
        (rank, size): (usize, usize),
        from_first: impl Fn(&[u8]) -> Result<Vec<u8>>,
    ) -> Result<Self> {
        let own = Nccl { functions, streams, device, gpu, communicator: Mutex::new(Communicator(null_mut())) };
        (streams.current)(gpu)?;
        let mut id = UniqueId([0; 128]);
        if rank == 0 {
            // SAFETY: the function fills the id.
            own.checked(null_mut(), unsafe { (functions.get_unique_id)(&mut id) }, "the address of the ranks")?;
        }
        let sent = from_first(&id.0)?;
        id.0 = sent.try_into().map_err(|_| Error::engine("NCCL", "the address of the ranks", "has a wrong length"))?;
        let version = FIRST_VERSION as u32;
        let mut config = Config { size: size_of::<Config>(), magic: 0xcafe_beef, version, blocking: 0 };
        let mut communicator = null_mut();
        // SAFETY: the pointers live until the call returns; it copies what it needs.
        let result = unsafe { (functions.init)(&mut communicator, size as c_int, id, rank as c_int, &mut config) };
        *own.held() = Communicator(communicator);
        own.completed(communicator, result, "the communicator")?;
        Ok(own)
    }

    /// The device whose tensors it sums.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Waits until this GPU has done all that is queued.
    ///
    /// Errors: `Error::Engine` when that fails or takes longer than `limit`.
    pub fn wait_for_gpu(&self, limit: Duration) -> Result<()> {
        self.wait(limit, "the GPU's work", || (self.streams.idle)(self.gpu))
    }

    /// Sums a contiguous tensor over all ranks in place, and waits for it. All ranks have met before, with idle GPUs.
    ///
    /// Errors: `Error::Engine` when NCCL fails or a rank has ended; the communicator cannot be used any more then.
    pub fn sum(&self, tensor: &Tensor) -> Result<()> {
        let what = "the sum over ranks";
        let kind = data_type(tensor.kind())
            .ok_or_else(|| Error::engine("NCCL", what, format!("has no sum of {:?} numbers", tensor.kind())))?;
        let stream = (self.streams.current)(self.gpu)?;
        let communicator = self.held().0;
        if communicator.is_null() {
            return Err(Error::engine("NCCL", what, "an earlier call has failed"));
        }
        let numbers = tensor.data_ptr();
        // SAFETY: the tensor is contiguous, on the communicator's GPU, and lives until the sum is done.
        let result =
            unsafe { (self.functions.all_reduce)(numbers, numbers, tensor.numel(), kind, SUM, communicator, stream) };
        self.completed(communicator, result, what)?;
        self.wait(LIMIT, what, || {
            self.checked(communicator, self.state(communicator), what)?;
            (self.streams.idle)(self.gpu)
        })
    }

    fn held(&self) -> std::sync::MutexGuard<'_, Communicator> {
        self.communicator.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, communicator: *mut c_void) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator exists; the function writes one number.
        match unsafe { (self.functions.state)(communicator, &mut state) } {
            SUCCESS => state,
            failed => failed,
        }
    }

    /// Waits until a call of a non-blocking communicator is done.
    fn completed(&self, communicator: *mut c_void, result: c_int, what: &str) -> Result<()> {
        self.checked(communicator, result, what)?;
        if result == SUCCESS {
            return Ok(());
        }
        self.wait(LIMIT, what, || {
            let state = self.state(communicator);
            self.checked(communicator, state, what)?;
            Ok(state == SUCCESS)
        })
    }

    fn checked(&self, communicator: *mut c_void, result: c_int, what: &str) -> Result<()> {
        if result == SUCCESS || result == IN_PROGRESS {
            return Ok(());
        }
        // SAFETY: both functions give null or terminated texts of the library.
        let texts = unsafe { [(self.functions.error_text)(result), (self.functions.last_error)(communicator)] };
        let text = texts.iter().filter(|text| !text.is_null()).map(|&text| {
            // SAFETY: see above.
            unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
        });
        let text: Vec<String> = text.filter(|text| !text.is_empty()).collect();
        self.abort();
        Err(Error::engine("NCCL", what, text.join(": ")))
    }

    fn wait(&self, limit: Duration, what: &str, done: impl Fn() -> Result<bool>) -> Result<()> {
        let began = Instant::now();
        while !done()? {
            if began.elapsed() > limit {
                self.abort();
                let problem = format!("was not done after {} s: a rank has ended or hangs", limit.as_secs());
                return Err(Error::engine("NCCL", what, problem));
            }
            std::thread::sleep(PAUSE);
        }
        Ok(())
    }

    /// Ends what still runs on the GPU, and the communicator.
    fn abort(&self) {
        let communicator = std::mem::replace(&mut *self.held(), Communicator(null_mut())).0;
        if !communicator.is_null() {
            // SAFETY: the communicator exists, and nothing uses it from here on.
            unsafe { (self.functions.abort)(communicator) };
        }
    }
}

impl Drop for Nccl {
    /// Lets the other ranks finish reading from this one's memory before it is freed.
    fn drop(&mut self) {
        let communicator = self.held().0;
        if communicator.is_null() {
            return;
        }
        // SAFETY: the communicator exists.
        let result = unsafe { (self.functions.finalize)(communicator) };
        if self.completed(communicator, result, "the end of the communicator").is_ok() {
            // SAFETY: the communicator exists, is final, and is not used from here on.
            unsafe { (self.functions.destroy)(communicator) };
        }
    }
}

/// `ncclDataType_t` of a kind of numbers.
fn data_type(kind: Kind) -> Option<c_int> {
    match kind {
        Kind::Int8 => Some(0),
        Kind::Uint8 => Some(1),
        Kind::Int => Some(2),
        Kind::Int64 => Some(4),
        Kind::Half => Some(6),
        Kind::Float => Some(7),
        Kind::Double => Some(8),
        Kind::BFloat16 => Some(9),
        _ => None,
    }
}

#[cfg(test)]
mod tests;

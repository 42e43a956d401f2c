//! NCCL's calls against a library of this file, whose ranks are threads and whose GPUs are numbers of this file, and the errors
//! of a library that is missing. They need no GPU.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;

use super::*;

/// `ncclRemoteError`.
const REMOTE: c_int = 6;

/// The first answer of every call of a non-blocking communicator.
const LATER: c_int = IN_PROGRESS;

/// Communicators of more ranks than this fail when they are used.
const MOST: usize = 8;

/// A communicator of the library of this file.
struct Fake {
    id: u64,
    rank: usize,
    size: usize,
    /// How often its state is still "in progress".
    looks: AtomicUsize,
}

#[derive(Default)]
struct World {
    ids: u64,
    /// Address, count and type of the numbers of each rank that has called.
    calls: HashMap<u64, Vec<(usize, usize, usize, c_int)>>,
    /// GPUs at work.
    busy: HashSet<usize>,
    aborted: usize,
    destroyed: HashMap<u64, usize>,
}

static WORLD: Mutex<Option<World>> = Mutex::new(None);

fn world<T>(work: impl FnOnce(&mut World) -> T) -> T {
    work(WORLD.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_default())
}

/// The GPU of a rank; those of different communicators are different.
fn gpu_of(id: u64, rank: usize) -> usize {
    id as usize * 100 + rank
}

unsafe extern "C" fn get_version(version: *mut c_int) -> c_int {
    unsafe { *version = 22809 };
    SUCCESS
}

unsafe extern "C" fn get_unique_id(id: *mut UniqueId) -> c_int {
    let next = world(|world| {
        world.ids += 1;
        world.ids
    });
    unsafe { (&mut (*id).0)[120..].copy_from_slice(&next.to_le_bytes()) };
    SUCCESS
}

unsafe extern "C" fn init(
    communicator: *mut *mut c_void,
    size: c_int,
    id: UniqueId,
    rank: c_int,
    config: *mut Config,
) -> c_int {
    let config = unsafe { &*config };
    assert_eq!((config.size, config.magic, config.blocking), (24, 0xcafe_beef, 0));
    let id = u64::from_le_bytes(id.0[120..].try_into().unwrap());
    let fake = Fake { id, rank: rank as usize, size: size as usize, looks: AtomicUsize::new(3) };
    unsafe { *communicator = Box::into_raw(Box::new(fake)).cast() };
    LATER
}

unsafe extern "C" fn state(communicator: *mut c_void, state: *mut c_int) -> c_int {
    let fake = unsafe { &*communicator.cast::<Fake>() };
    let left = fake.looks.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |looks| looks.checked_sub(1));
    let now = match left {
        Ok(_) => LATER,
        Err(_) if fake.size > MOST => REMOTE,
        Err(_) => SUCCESS,
    };
    unsafe { *state = now };
    SUCCESS
}

unsafe extern "C" fn all_reduce(
    send: *const c_void,
    receive: *mut c_void,
    count: usize,
    kind: c_int,
    operation: c_int,
    communicator: *mut c_void,
    stream: *mut c_void,
) -> c_int {
    let fake = unsafe { &*communicator.cast::<Fake>() };
    assert!(send == receive.cast_const() && operation == SUM && stream.is_null());
    fake.looks.store(2, Ordering::Relaxed);
    world(|world| {
        world.busy.insert(gpu_of(fake.id, fake.rank));
        let calls = world.calls.entry(fake.id).or_default();
        calls.push((fake.rank, receive as usize, count, kind));
        if calls.len() == fake.size {
            let calls = world.calls.remove(&fake.id).unwrap();
            assert!(calls.iter().all(|call| (call.2, call.3) == (count, kind)));
            match kind {
                7 => unsafe { add_up::<f32>(&calls) },
                8 => unsafe { add_up::<f64>(&calls) },
                4 => unsafe { add_up::<i64>(&calls) },
                other => panic!("type {other}"),
            }
            for call in calls {
                world.busy.remove(&gpu_of(fake.id, call.0));
            }
        }
    });
    LATER
}

unsafe fn add_up<T: Copy + std::iter::Sum<T>>(calls: &[(usize, usize, usize, c_int)]) {
    for number in 0..calls[0].2 {
        let at = |call: &(usize, usize, usize, c_int)| (call.1 as *mut T).wrapping_add(number);
        let sum: T = calls.iter().map(|call| unsafe { *at(call) }).sum();
        calls.iter().for_each(|call| unsafe { *at(call) = sum });
    }
}

unsafe extern "C" fn finalize(communicator: *mut c_void) -> c_int {
    unsafe { &*communicator.cast::<Fake>() }.looks.store(2, Ordering::Relaxed);
    LATER
}

unsafe extern "C" fn destroy(communicator: *mut c_void) -> c_int {
    let fake = unsafe { Box::from_raw(communicator.cast::<Fake>()) };
    assert_eq!(fake.looks.load(Ordering::Relaxed), 0, "destroyed before it was final");
    world(|world| *world.destroyed.entry(fake.id).or_default() += 1);
    SUCCESS
}

unsafe extern "C" fn abort(communicator: *mut c_void) -> c_int {
    drop(unsafe { Box::from_raw(communicator.cast::<Fake>()) });
    world(|world| world.aborted += 1);
    SUCCESS
}

unsafe extern "C" fn error_text(result: c_int) -> *const c_char {
    if result == REMOTE { c"remote error".as_ptr() } else { c"another error".as_ptr() }
}

unsafe extern "C" fn last_error(_: *mut c_void) -> *const c_char {
    c"a rank is gone".as_ptr()
}

const FAKE: Functions =
    Functions { get_version, get_unique_id, init, state, all_reduce, finalize, destroy, abort, error_text, last_error };

const STREAMS: Streams =
    Streams { current: |_| Ok(null_mut()), idle: |gpu| Ok(world(|world| !world.busy.contains(&gpu))) };

/// The GPU number follows from the address of the ranks, which is known only inside `connect`; it is set right behind it.
fn connect(rank: usize, size: usize, first: &(Barrier, Mutex<Vec<u8>>)) -> Result<Nccl> {
    let send = |bytes: &[u8]| {
        if rank == 0 {
            *first.1.lock().unwrap() = bytes.to_vec();
        }
        first.0.wait();
        Ok(first.1.lock().unwrap().clone())
    };
    let mut own = Nccl::connect(FAKE, STREAMS, (Device::Cpu, 0), (rank, size), send)?;
    let id = u64::from_le_bytes(first.1.lock().unwrap()[120..].try_into().unwrap());
    own.gpu = gpu_of(id, rank);
    Ok(own)
}

#[test]
fn ranks_sum_numbers_of_every_size_in_place_and_end_together() {
    let size = 3;
    let first = Arc::new((Barrier::new(size), Mutex::new(Vec::new())));
    let ranks = (0..size).map(|rank| {
        let first = first.clone();
        thread::spawn(move || {
            let nccl = connect(rank, size, &first).unwrap();
            for kind in [Kind::Float, Kind::Double, Kind::Int64] {
                let own = Tensor::full([5], rank as i64 + 1, (kind, Device::Cpu));
                nccl.sum(&own).unwrap();
                assert_eq!(Vec::<f64>::try_from(own.to_kind(Kind::Double)).unwrap(), [6.0; 5], "{kind:?}");
            }
            let error = nccl.sum(&Tensor::zeros([2], (Kind::Bool, Device::Cpu))).unwrap_err().to_string();
            assert!(error.contains("Bool"), "{error}");
        })
    });
    ranks.collect::<Vec<_>>().into_iter().for_each(|rank| rank.join().unwrap());
    let id = u64::from_le_bytes(first.1.lock().unwrap()[120..].try_into().unwrap());
    assert_eq!(world(|world| world.destroyed[&id]), size);
}

#[test]
fn a_failed_communicator_says_why_and_is_not_used_again() {
    let first = (Barrier::new(1), Mutex::new(Vec::new()));
    let error = connect(0, MOST + 1, &first).unwrap_err().to_string();
    assert!(error.contains("remote error: a rank is gone"), "{error}");
    assert!(world(|world| world.aborted) > 0);
}

#[test]
fn a_gpu_that_does_not_end_its_work_is_an_error() {
    let first = (Barrier::new(1), Mutex::new(Vec::new()));
    let nccl = connect(0, 1, &first).unwrap();
    world(|world| world.busy.insert(nccl.gpu));
    let error = nccl.wait_for_gpu(Duration::from_millis(5)).unwrap_err().to_string();
    assert!(error.contains("ended or hangs"), "{error}");
    let error = nccl.sum(&Tensor::zeros([2], (Kind::Float, Device::Cpu))).unwrap_err().to_string();
    assert!(error.contains("an earlier call has failed"), "{error}");
}

#[test]
fn a_missing_or_foreign_library_is_refused_with_the_remedy() {
    for (name, want) in [("libnccl-of-no-machine.so.2", "does not load"), ("libc.so.6", "ncclGetVersion")] {
        let error = Functions::load_from(Path::new(name)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
        let text = error.to_string();
        for part in [want, "scripts/setup --cuda", "INTERLACE_RANKS_BACKEND=gloo"] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}

/// Reaches the real library's own error for a machine without a GPU, through the functions and structures declared here.
#[test]
#[ignore = "needs libnccl.so.2 on LD_LIBRARY_PATH, and no GPU"]
fn the_real_library_takes_these_calls() {
    let functions = Functions::load().unwrap();
    let streams = Streams { current: |_| Ok(null_mut()), idle: |_| Ok(true) };
    let send = |bytes: &[u8]| {
        assert!(bytes.iter().any(|&byte| byte != 0));
        Ok(bytes.to_vec())
    };
    let error = Nccl::connect(functions, streams, (Device::Cuda(0), 0), (0, 2), send).unwrap_err().to_string();
    assert!(error.contains("cuda error") && error.contains("driver"), "{error}");
}

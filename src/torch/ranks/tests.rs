//! Several processes on this machine. The test program starts itself once for each rank.

use std::collections::HashMap;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::*;

#[test]
fn the_declared_size_of_the_c10d_class_matches_this_libtorch() {
    // SAFETY: the function has no arguments and reads no memory.
    assert_eq!(
        unsafe { interlace_group_layout() },
        488,
        "c10d has changed: check src/torch/ranks/gloo against its header"
    );
}

/// No buffer is larger than asked, but for a tensor that is; every tensor is in one, in order.
#[test]
fn tensors_are_summed_in_buckets() {
    let sizes = [10i64, 6, 200, 1, 1, 30];
    let tensors: Vec<Tensor> = sizes.iter().map(|&size| Tensor::zeros([size], (Kind::Float, Device::Cpu))).collect();
    let all: Vec<&Tensor> = tensors.iter().collect();
    let found: Vec<Vec<i64>> =
        buckets(&all, 64).iter().map(|bucket| bucket.iter().map(|tensor| tensor.size()[0]).collect()).collect();
    assert_eq!(found, [vec![10, 6], vec![200], vec![1, 1], vec![30]]);
}

/// The sum of a tensor that has a bucket of its own is in its own memory, also where it has a gradient.
#[test]
fn a_tensor_alone_is_summed_where_it_is() {
    let matrix = Tensor::zeros([3, 5], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let own = in_one_piece(&[&matrix]).unwrap();
    assert!(own.data_ptr() == matrix.data_ptr() && !own.requires_grad());
    assert!(in_one_piece(&[&matrix.tr()]).is_none() && in_one_piece(&[&matrix, &matrix]).is_none());
}

#[test]
fn the_back_end_follows_from_the_device_and_what_is_asked() {
    use crate::base::Device::{Cpu, Cuda};
    for (device, asked, want) in [
        (Cpu, None, Backend::Gloo),
        (Cpu, Some("gloo"), Backend::Gloo),
        (Cuda(1), None, Backend::Nccl),
        (Cuda(0), Some("nccl"), Backend::Nccl),
        (Cuda(0), Some("gloo"), Backend::Gloo),
    ] {
        assert_eq!(Backend::of(device, asked).unwrap(), want, "{device}, {asked:?}");
    }
    for (device, asked, part) in [(Cpu, "nccl", "the device is cpu"), (Cuda(0), "mpi", "`mpi`")] {
        let error = Backend::of(device, Some(asked)).unwrap_err().to_string();
        assert!(error.contains(part) && error.contains("INTERLACE_RANKS_BACKEND"), "{error}");
    }
}

fn place(variables: &[(&str, &str)]) -> Result<Option<Place>> {
    let variables: HashMap<&str, &str> = variables.iter().copied().collect();
    Place::of(|name| variables.get(name).map(ToString::to_string))
}

#[test]
fn torchrun_environment_variables_are_read_or_refused_by_name() {
    assert_eq!(place(&[]).unwrap(), None);
    let all = [
        ("WORLD_SIZE", "2"),
        ("RANK", "1"),
        ("LOCAL_RANK", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
        ("TORCHELASTIC_RESTART_COUNT", "3"),
    ];
    let found = place(&all).unwrap().unwrap();
    assert_eq!((found.rank, found.size, found.served, found.prefix.as_str()), (1, 2, true, "interlace/3"));
    for (name, value) in [
        ("RANK", "2"),
        ("RANK", "x"),
        ("MASTER_PORT", "99999"),
        ("WORLD_SIZE", "0"),
        ("WORLD_SIZE", "4294967298"),
        ("LOCAL_RANK", ""),
    ] {
        let changed: Vec<_> = all.iter().map(|&(key, old)| (key, if key == name { value } else { old })).collect();
        let error = place(&changed).unwrap_err().to_string();
        assert!(error.contains(name) && error.contains("torchrun"), "{error}");
    }
    for missing in ["RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"] {
        let without: Vec<_> = all.iter().copied().filter(|(key, _)| *key != missing).collect();
        assert!(place(&without).unwrap_err().to_string().contains(missing), "{missing}");
    }
    let alone: Vec<_> = all
        .iter()
        .map(|&(key, old)| {
            (
                key,
                if key == "WORLD_SIZE" {
                    "1"
                } else if key == "RANK" {
                    "0"
                } else {
                    old
                },
            )
        })
        .collect();
    assert_eq!(place(&alone).unwrap(), None);
}

/// Starts one process per rank on a free port. Each process runs the test `name` of this file.
fn start(name: &str, size: usize) -> Vec<Child> {
    let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let own = std::env::current_exe().unwrap();
    let rank = |rank: usize| {
        Command::new(&own)
            .args([&format!("torch::ranks::tests::{name}"), "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("WORLD_SIZE", size.to_string())
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("MASTER_ADDR", "127.0.0.1")
            .env("MASTER_PORT", port.to_string())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    };
    (0..size).map(rank).collect()
}

#[test]
#[ignore = "one of several processes, started by the test below"]
fn child_process_that_sums_and_sends() {
    let ranks = Ranks::of_environment().unwrap().unwrap();
    let ranks = ranks.for_device(base::Device::Cpu).unwrap();
    assert!(ranks.nccl_of(Device::Cpu).unwrap().is_none());
    // Tensors on a GPU are not summed in host memory unless that is asked for.
    let error = ranks.nccl_of(Device::Cuda(0)).unwrap_err().to_string();
    assert!(error.contains("no process group for Cuda(0)"), "{error}");
    let own = ranks.rank() as f64 + 1.0;
    let total: f64 = (1..=ranks.size()).map(|n| n as f64).sum();
    let weight = Tensor::ones([2, 3], (Kind::Float, Device::Cpu)).set_requires_grad(true);
    let float = &weight * own;
    let double = Tensor::full([4], own, (Kind::Double, Device::Cpu));
    ranks.sum(&[float.shallow_clone(), double.shallow_clone()]).unwrap();
    assert_eq!(f64::try_from(float.sum(Kind::Double)).unwrap(), 6.0 * total);
    assert_eq!(f64::try_from(double.sum(Kind::Double)).unwrap(), 4.0 * total);
    assert_eq!(ranks.sum_of(own).unwrap(), total);
    assert_eq!(ranks.from_first(format!("rank {}", ranks.rank()).as_bytes()).unwrap(), b"rank 0");
    let all = ranks.of_all(&vec![ranks.rank() as u8; ranks.rank()]).unwrap();
    let want: Vec<Vec<u8>> = (0..ranks.size()).map(|rank| vec![rank as u8; rank]).collect();
    assert_eq!(all, want);
    ranks.wait_for_all().unwrap();
}

#[test]
fn two_and_three_processes_sum_and_send() {
    for size in [2, 3] {
        for (rank, child) in start("child_process_that_sums_and_sends", size).into_iter().enumerate() {
            let output = child.wait_with_output().unwrap();
            let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success() && text.contains("1 passed"), "rank {rank} of {size}: {text}");
        }
    }
}

#[test]
#[ignore = "one of several processes, started by the test below"]
fn child_process_whose_neighbour_aborts() {
    let ranks = Ranks::of_environment().unwrap().unwrap();
    ranks.wait_for_all().unwrap();
    if ranks.rank() == 1 {
        std::process::abort();
    }
    let error = ranks.wait_for_all().unwrap_err().to_string();
    assert!(error.contains("c10d failed"), "{error}");
}

#[test]
fn a_rank_that_ends_is_an_error_in_the_others_within_seconds() {
    let began = Instant::now();
    for (rank, child) in start("child_process_whose_neighbour_aborts", 3).into_iter().enumerate() {
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.success(), rank != 1, "rank {rank}: {}", String::from_utf8_lossy(&output.stdout));
    }
    assert!(began.elapsed() < TIMEOUT / 10, "the others waited for {:?}", began.elapsed());
}

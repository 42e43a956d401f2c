//! Files with bytes changed at random: `inspect` and `prune` give a result or an error, in bounded time and memory, and
//! never panic.

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use interlace::analysis::analyse;
use interlace::base::peak_memory_bytes;
use interlace::bundle::{Bundle, Tower};
use interlace::onnx::{self, Storage};
use interlace::pipeline::steps::{self, Drop};
use interlace::rewrite::drop_layers;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Graphs of every exporter.
const FILES: &[&str] = &[
    "llama/dyn18-ids.onnx",
    "qwen3_vl/dyn23.onnx",
    "genai/llama-fp32-embeds/model.onnx",
    "genai/llama-int4-shared/model.onnx",
    "genai/qwen3_vl-fp32-embeds/model.onnx",
    "hfexp/llama-cpu/decode.onnx",
    "qwen3_vl/mobius.onnx",
    "llama/optimum-O2.onnx",
    "post/llama-ts17__int8.onnx",
    "llama/ts17-noname.onnx",
    "smolvlm/ts17-slim.onnx",
    "qwen3_vl/ts17.onnx",
];
/// Limits for a network of 3 layers with 1.5 MB of weights: additional memory and time.
const MEMORY_LIMIT: u64 = 256 << 20;
const TIME_LIMIT: Duration = Duration::from_secs(10);

/// How far the processing of a file got.
#[derive(Default)]
struct Outcomes {
    refused: usize,
    inspected: usize,
    pruned: usize,
}

/// The graph with three of its layers and external weights, so that most of its bytes are structure.
fn small(file: &str, folder: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/zoo").join(file);
    let model = onnx::load(&source).unwrap();
    let small = drop_layers(&analyse(&model).unwrap(), &[1, 2, 4, 5, 6]).unwrap();
    let path = folder.join("model.onnx");
    onnx::save(&small, &path, &Storage::External { file_name: "model.onnx_data".into(), chunk_bytes: None }).unwrap();
    path
}

/// One to six small changes: bits, bytes, copied pieces, exchanged digits in names. In one file of three, pieces are
/// also removed and doubled, which seldom leaves a decodable file.
pub fn mutate(bytes: &mut Vec<u8>, rng: &mut ChaCha8Rng) {
    let piece = |rng: &mut ChaCha8Rng, length: usize, most: usize| -> Range<usize> {
        let from = rng.random_range(0..length);
        from..(from + rng.random_range(0..most)).min(length)
    };
    let kinds = if rng.random_range(0..3) == 0 { 8 } else { 5 };
    for _ in 0..rng.random_range(1..=6) {
        if bytes.is_empty() {
            return;
        }
        let at = rng.random_range(0..bytes.len());
        match rng.random_range(0..kinds) {
            0 => bytes[at] ^= 1 << rng.random_range(0..8),
            1 => bytes[at] = rng.random(),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff][rng.random_range(0..5)],
            3 => {
                let copy = bytes[piece(rng, bytes.len(), 16)].to_vec();
                let end = (at + copy.len()).min(bytes.len());
                bytes[at..end].copy_from_slice(&copy[..end - at]);
            }
            // Different values become one, or form a cycle.
            4 => {
                if let Some(digit) = bytes[at..].iter_mut().find(|byte| byte.is_ascii_digit()) {
                    *digit = b'0' + rng.random_range(0..10u8);
                }
            }
            5 => {
                bytes.drain(piece(rng, bytes.len(), 64));
            }
            6 => {
                let copy = bytes[piece(rng, bytes.len(), 64)].to_vec();
                bytes.splice(at..at, copy);
            }
            _ => bytes.truncate(at.max(bytes.len() / 2)),
        }
    }
}

/// Runs changed files one after the other and checks the limits of each.
pub struct Guard {
    /// Peak memory in use before the first file.
    before: u64,
    memory_limit: u64,
    slowest: Duration,
    /// The file that took longest.
    slowest_at: String,
}

impl Guard {
    /// `memory_limit`: how many bytes the process may grow.
    pub fn new(memory_limit: u64) -> Self {
        Guard { before: peak_memory_bytes(), memory_limit, slowest: Duration::ZERO, slowest_at: String::new() }
    }

    /// Does the work; `at` identifies it in messages. The bytes are saved to a file if it panics or exceeds a limit.
    pub fn watch<T>(&mut self, at: &str, bytes: &[u8], work: impl FnOnce() -> T) -> T {
        let start = Instant::now();
        let result = catch_unwind(AssertUnwindSafe(work));
        let took = start.elapsed();
        if took > self.slowest {
            self.slowest = took;
            self.slowest_at = at.to_string();
        }
        let grown = peak_memory_bytes().saturating_sub(self.before);
        let problem = match &result {
            Err(_) => "panics".to_string(),
            Ok(_) if took >= TIME_LIMIT => format!("took {took:?}"),
            Ok(_) if grown >= self.memory_limit => format!("memory grew by {grown} bytes"),
            Ok(_) => String::new(),
        };
        if !problem.is_empty() {
            let kept = std::env::temp_dir().join(format!("interlace-{}", at.replace([' ', ',', '/'], "-")));
            fs::write(&kept, bytes).unwrap();
            panic!("{at}: {problem}; the file is saved as {}", kept.display());
        }
        result.unwrap_or_else(|_| unreachable!())
    }
}

impl std::fmt::Display for Guard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "slowest {:?} ({}), peak {} MB", self.slowest, self.slowest_at, peak_memory_bytes() >> 20)
    }
}

fn run(count: usize, seed: u64) {
    let folder = tempfile::tempdir().unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut outcomes = Outcomes::default();
    let mut slowest = Duration::ZERO;
    for (number, file) in FILES.iter().enumerate() {
        let own = folder.path().join(number.to_string());
        fs::create_dir(&own).unwrap();
        let path = small(file, &own);
        let sound = fs::read(&path).unwrap();
        let mut guard = Guard::new(MEMORY_LIMIT);
        for attempt in 0..count.div_ceil(FILES.len()) {
            let mut bytes = sound.clone();
            mutate(&mut bytes, &mut rng);
            fs::write(&path, &bytes).unwrap();
            let out = own.join("out");
            let at = format!("{file}, seed {seed}, attempt {attempt}");
            let result = guard.watch(&at, &bytes, || {
                let bundle = Bundle::open(&path)?;
                steps::inspect(&bundle)?;
                let drop = Drop::Layers { tower: Tower::Text, layers: &[1] };
                Ok::<bool, interlace::base::Error>(steps::prune(&bundle, &drop, Default::default(), None, &out).is_ok())
            });
            match result {
                Ok(true) => outcomes.pruned += 1,
                Ok(false) => outcomes.inspected += 1,
                Err(_) => outcomes.refused += 1,
            }
            // A refused file left no output behind.
            if out.exists() {
                assert!(Bundle::open(&out).is_ok(), "{at}: the written model cannot be opened");
                fs::remove_dir_all(&out).unwrap();
            }
            let left = fs::read_dir(&own).unwrap().count();
            assert_eq!(left, 2, "{at}: files were left behind");
        }
        slowest = slowest.max(guard.slowest);
    }
    println!(
        "{} refused, {} inspected only, {} pruned, slowest {slowest:?}, peak {} MB",
        outcomes.refused,
        outcomes.inspected,
        outcomes.pruned,
        peak_memory_bytes() >> 20
    );
    assert!(outcomes.pruned > 0 && outcomes.refused > 0, "some changed files must be pruned and some refused");
}

/// A number from an environment variable.
pub fn number_of(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().map_or(default, |value| value.parse().unwrap())
}

#[test]
fn changed_files_never_panic() {
    run(240, 1);
}

/// `INTERLACE_MUTATIONS` sets the number of files (20,000), `INTERLACE_SEED` the seed.
#[test]
#[ignore = "takes minutes"]
fn many_changed_files_never_panic() {
    run(number_of("INTERLACE_MUTATIONS", 20_000) as usize, number_of("INTERLACE_SEED", 2));
}

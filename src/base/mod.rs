//! Foundations of every other module: errors, files, hashing, progress. Nothing here knows about models.

mod ahead;
mod artifact;
mod cancel;
mod device;
mod error;
mod files;
mod hash;
mod http;
mod lock;
mod memory;
mod paths;
mod peers;
mod progress;
mod runaway;
mod staging;
mod stopwatch;
mod text;
mod threads;

pub use ahead::{ahead, prepared_ahead};
pub use artifact::{Provenance, read_artifact, read_json, write_json};
pub use cancel::{Cancel, install_ctrl_c};
pub use device::Device;
pub use error::{Error, Result};
pub use files::{AtomicFile, MappedFile, check_output_file, contained_path, copy_range, free_disk_bytes, read_plain};
pub use hash::{Sha256Digest, sha256_bytes, sha256_file, sha256_json, sha256_large_file};
pub use http::http_agent;
pub use lock::{FolderLock, LOCK_FILE};
pub use memory::{free_memory_bytes, peak_memory_bytes};
pub use paths::{refuse_hub_cache, resolved_path};
pub use peers::{Peers, gathered, is_first, is_own, own_part};
pub use progress::{Progress, notice, set_quiet};
pub use runaway::{confined, on_runaway};
pub use staging::{ScratchDir, StagedDir, folder_of};
pub use stopwatch::Stopwatch;
pub use text::{
    BYTE_UNITS, clipped, findings_preview, human_bytes, human_count, list_preview, printable, printable_json,
    shortened, table, turns_direction,
};
pub use threads::thread_count;

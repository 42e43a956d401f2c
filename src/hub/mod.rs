//! Models on the Hugging Face hub, in the hub's own cache: `hf:OWNER/NAME[@REVISION]`.
//!
//! Layout of the cache, which `huggingface_hub` shares: `models--OWNER--NAME/blobs/ID` holds contents, `snapshots/COMMIT/PATH`
//! links to them, and `refs/REVISION` holds commits. Next to these, `.interlace/` holds the listing of each commit and
//! the folders that verbs read: links to exactly the files that were asked for, whatever else the cache has.

mod cache;
mod client;
mod download;
mod environment;
mod link;
mod name;
mod repository;
mod tree;

pub use link::{commit_of, name_of};
pub use name::HubName;
pub use repository::Repository;

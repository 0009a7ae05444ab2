//! Doors to the readers of hostile bytes, for the fuzz targets (`fuzz/`). No part of the API.
//!
//! What has to hold of a reader is asserted by its target. Here is only what can't be reached from
//! outside of the crate: the conversation with a guest without the guest, a supervisor that is whatever
//! sits at the other end of the streams, RLM's wire over any stream, the answers of models without their
//! servers, and the format of snapshots without a file.

mod models;
mod processes;
mod snapshots;
mod talk;

pub use self::models::{ask, read_anthropic, read_openai, serve};
pub use self::processes::{Reader, Writer, backend};
pub use self::snapshots::{Contents, read_snapshot};
pub use self::talk::{Ask, Reply, Talk};

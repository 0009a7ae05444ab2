//! Kaa runs Python that a model wrote: cells in a persistent CPython session inside WebAssembly.

#[cfg(not(any(target_os = "linux", target_os = "macos")))]
compile_error!(
    "Kaa runs on Linux and macOS: it maps images with mmap and keeps them private by owner and mode"
);

mod agent;
mod capture;
mod environment;
mod error;
mod frame;
mod image;
mod limits;
pub mod lm;
mod policy;
mod protocol;
mod value;
pub mod wasm;

pub use environment::*;
pub use error::{Error, Result};
pub use image::{ImageManifest, Progress, ProgressFn, Store};
pub use limits::*;
pub use policy::{Clock, Mount, Policy};
pub use value::Value;
pub use wasm::{Image, ImageSpec, Metering, Runtime, WasmEnvironment};

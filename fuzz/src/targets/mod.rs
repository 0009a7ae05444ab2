//! The bodies of the fuzz targets, by name. What each asserts is at the top of its file.

#[path = "../../../tests/common/mod.rs"]
mod common;
#[path = "../../../tests/metering/differential.rs"]
mod differential;
#[path = "../../../tests/hostile/files.rs"]
mod files;

mod cell;
mod frames;
mod input;
mod lm_wire;
mod resume;
mod rewrite;
mod snapshot;
mod supervisor;

/// A target's name, and what it does with an input: whether that was taken for something good.
type Target = (&'static str, fn(&[u8]) -> bool);

/// All of them.
pub(crate) const TARGETS: &[Target] = &[
    ("cell", cell::run),
    ("frames", frames::run),
    ("lm_wire", lm_wire::run),
    ("resume", resume::run),
    ("rewrite", rewrite::run),
    ("snapshot", snapshot::run),
    ("supervisor", supervisor::run),
];

/// Does with an input what the target of this name does; whether it was taken for something good.
pub(crate) fn run(target: &str, input: &[u8]) -> bool {
    let found = TARGETS.iter().find(|(name, _)| *name == target);
    let (_, body) = found.unwrap_or_else(|| panic!("there is no target `{target}`"));
    body(input)
}

/// Waits for what does nothing but compute.
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().build();
    runtime.expect("a runtime").block_on(future)
}
